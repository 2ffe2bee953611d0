import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.nn.attention import Attention, KVCache
from vlblocks.ops.segments import SegmentMask

F64 = torch.float64


def naive(x, context, wq, wk, wv, wo, heads, allowed):
    """Multi-head attention as the paper writes it, one example and one head at a time; w* are (weight, bias)."""
    dense = lambda y, w: y @ w[0].T + w[1]  # noqa: E731
    size = x.shape[-1] // heads
    rows = []
    for b in range(len(x)):
        q, k, v = dense(x[b], wq), dense(context[b], wk), dense(context[b], wv)
        parts = []
        for h in range(heads):
            s = slice(h * size, (h + 1) * size)
            scores = (q[:, s] @ k[:, s].T) / size**0.5
            parts.append(scores.masked_fill(~allowed[b], float("-inf")).softmax(-1).nan_to_num() @ v[:, s])
        rows.append(dense(torch.cat(parts, -1), wo))
    return torch.stack(rows)


def random_biases(module):
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.4)
    return module


def pieces(linear, count):
    return list(zip(linear.weight.chunk(count), linear.bias.chunk(count), strict=True))


def gradients(out, inputs):
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), inputs)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_naive(backend, causal):
    block = random_biases(Attention(width=12, heads=3, backend=backend, dtype=F64))
    x = torch.randn(2, 5, 12, dtype=F64, requires_grad=True)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    mask = SegmentMask.single(length=5, valid=valid, causal=causal)
    wq, wk, wv = pieces(block.qkv, 3)
    want = naive(x, x, wq, wk, wv, (block.proj.weight, block.proj.bias), 3, mask.dense()[:, 0])
    got = block(x, mask=mask)
    torch.testing.assert_close(got, want)
    inputs = [x, *block.parameters()]
    for a, b in zip(gradients(got[valid], inputs), gradients(want[valid], inputs), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(block(x, mask=mask.dense()), want)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_cross_attention_equals_naive(backend):
    block = random_biases(Attention(width=12, heads=3, context_width=8, backend=backend, dtype=F64))
    x = torch.randn(2, 5, 12, dtype=F64, requires_grad=True)
    context = torch.randn(2, 4, 8, dtype=F64, requires_grad=True)
    valid = torch.tensor([[True] * 4, [True, False, True, False]])
    wk, wv = pieces(block.kv, 2)
    wq, wo = (block.q.weight, block.q.bias), (block.proj.weight, block.proj.bias)
    want = naive(x, context, wq, wk, wv, wo, 3, valid[:, None].expand(2, 5, 4))
    got = block(x, context, mask=valid[:, None, None])
    torch.testing.assert_close(got, want)
    inputs = [x, context, *block.parameters()]
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_equals_torch_multihead_attention():
    block = random_biases(Attention(width=16, heads=4))
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.proj.weight,
            "out_proj.bias": block.proj.bias,
        }
    )
    x = torch.randn(3, 7, 16)
    valid = torch.arange(7) < torch.tensor([[7], [4], [1]])
    want, _ = theirs(x, x, x, key_padding_mask=~valid, need_weights=False)
    got = block(x, mask=SegmentMask.single(length=7, valid=valid))
    torch.testing.assert_close(got[valid], want[valid], atol=1e-5, rtol=1e-5)

    cross = random_biases(Attention(width=16, heads=4, context_width=16))
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([cross.q.weight, cross.kv.weight]),
            "in_proj_bias": torch.cat([cross.q.bias, cross.kv.bias]),
            "out_proj.weight": cross.proj.weight,
            "out_proj.bias": cross.proj.bias,
        }
    )
    context = torch.randn(3, 5, 16)
    want, _ = theirs(x, context, context, need_weights=False)
    torch.testing.assert_close(cross(x, context), want, atol=1e-5, rtol=1e-5)


def test_padding_reaches_no_real_token():
    block = random_biases(Attention(width=12, heads=3))
    x = torch.randn(1, 6, 12)
    valid = torch.tensor([[True, True, True, True, False, False]])
    mask = SegmentMask.single(length=6, valid=valid)
    torch.testing.assert_close(block(x, mask=mask)[:, :4], block(x[:, :4]))
    spoilt = x.clone()
    spoilt[:, 4:] = float("nan")
    torch.testing.assert_close(block(spoilt, mask=mask)[:, :4], block(x[:, :4]))


def test_query_and_key_norms_make_attention_blind_to_their_scale():
    plain = random_biases(Attention(width=12, heads=3, bias=False, dtype=F64))
    normed = Attention(width=12, heads=3, bias=False, qk_norm=True, dtype=F64)
    missing, _ = normed.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["k_norm.bias", "k_norm.weight", "q_norm.bias", "q_norm.weight"]
    x = torch.randn(2, 5, 12, dtype=F64)
    before = [plain(x), normed(x)]
    with torch.no_grad():
        for block in (plain, normed):
            block.qkv.weight[:24] *= 3.0
    assert not torch.allclose(plain(x), before[0], atol=1e-2)
    # Not exact: the norms' epsilon does not scale.
    torch.testing.assert_close(normed(x), before[1], atol=1e-3, rtol=1e-3)
    assert "qkv.bias" not in normed.state_dict()


def test_dropout_acts_in_training_only():
    block = random_biases(Attention(width=12, heads=3, dropout=0.5))
    x = torch.randn(2, 5, 12)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bfloat16_autocast_runs_forward_and_backward(qk_norm):
    block = random_biases(Attention(width=12, heads=3, qk_norm=qk_norm))
    x = torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), block(x), atol=0.1, rtol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize("with_gradient", [False, True])
def test_cached_steps_equal_the_causal_pass(with_gradient):
    block = random_biases(Attention(width=12, heads=3, dtype=F64))
    x = torch.randn(2, 200, 12, dtype=F64)
    want = block(x, mask=SegmentMask.single(length=200, causal=True))
    cache, steps, start = KVCache(), [], 0
    with torch.set_grad_enabled(with_gradient):
        for n in (3, 1, 1, 100, 1, 94):
            start += n
            mask = SegmentMask.single(length=start, causal=True).last_queries(n)
            steps.append(block(x[:, start - n : start], mask=mask, cache=cache))
    got = torch.cat(steps, dim=1)
    assert cache.length == 200 and cache.keys.shape == cache.values.shape == (2, 3, 200, 4)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    if with_gradient:
        inputs = list(block.parameters())
        for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_the_cache_never_writes_into_what_it_was_given():
    cache = KVCache()
    with torch.no_grad():
        first = torch.randn(1, 2, 3, 4)
        kept = first.clone()
        cache.append(first, first)
        old_keys, _ = cache.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
        snapshot = old_keys.clone()
        cache.append(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    assert torch.equal(first, kept) and torch.equal(old_keys, snapshot)
    assert cache.keys[0, 0, 3:, 0].tolist() == [1, 0]


def test_the_context_is_projected_once_and_reordered_with_the_rest():
    block = random_biases(Attention(width=12, heads=3, context_width=8, dtype=F64))
    x, context = torch.randn(2, 3, 12, dtype=F64), torch.randn(2, 4, 8, dtype=F64)
    calls = []
    block.kv.register_forward_hook(lambda *_: calls.append(1))
    cache = KVCache()
    steps = [block(x[:, t : t + 1], context if t == 0 else None, cache=cache) for t in range(3)]
    assert len(calls) == 1
    torch.testing.assert_close(torch.cat(steps, dim=1), block(x, context))
    cache.reorder(torch.tensor([1, 0, 1]))
    swapped = block(x[[1, 0, 1]], None, cache=cache)
    torch.testing.assert_close(swapped, block(x, context)[[1, 0, 1]])


def test_reordered_beams_go_on_from_their_origins():
    block = random_biases(Attention(width=12, heads=3, dtype=F64)).requires_grad_(False)
    x = torch.randn(2, 4, 12, dtype=F64)
    causal = lambda total, n: SegmentMask.single(length=total, causal=True).last_queries(n)  # noqa: E731
    cache = KVCache()
    block(x[:, :2], mask=causal(2, 2), cache=cache)
    block(x[:, 2:3], mask=causal(3, 1), cache=cache)
    cache.reorder(torch.tensor([1, 1, 0]))
    grown = torch.cat([x[[1, 1, 0], :3], torch.randn(3, 1, 12, dtype=F64)], dim=1)
    got = block(grown[:, 3:], mask=causal(4, 1), cache=cache)
    torch.testing.assert_close(got, block(grown, mask=causal(4, 4))[:, 3:])
    empty = KVCache()
    empty.reorder(torch.tensor([0]))
    assert empty.keys is None and empty.values is None and empty.length == 0


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("before", [0, 2])
def test_a_refused_step_leaves_the_cache_as_it_was(before, with_gradient):
    block = random_biases(Attention(width=12, heads=3, dtype=F64)).requires_grad_(with_gradient)
    causal = lambda total, n: SegmentMask.single(length=total, causal=True).last_queries(n)  # noqa: E731
    x, cache = torch.randn(2, before + 1, 12, dtype=F64), KVCache()
    want = block(x, mask=causal(before + 1, before + 1))[:, -1:]
    if before:
        block(x[:, :before], mask=causal(before, before), cache=cache)
    kept = None if cache.keys is None else cache.keys.clone()
    for wrong in (causal(before + 3, 1), torch.ones(1, 1, 1, before + 7, dtype=torch.bool)):
        with pytest.raises(UserError, match="mask"):
            block(torch.randn(2, 1, 12, dtype=F64), mask=wrong, cache=cache)
    # Of another batch, too: what is tried first must not fix the size of what comes next.
    with pytest.raises(UserError, match="mask"):
        block(torch.randn(2 if before else 5, 1, 12, dtype=F64), mask=causal(before + 2, 1), cache=cache)
    assert cache.length == before
    assert cache.keys is None if kept is None else torch.equal(cache.keys, kept)
    torch.testing.assert_close(block(x[:, before:], mask=causal(before + 1, 1), cache=cache), want)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="heads=5 does not divide width=12"):
        Attention(width=12, heads=5)
    x = torch.zeros(1, 2, 12)
    with pytest.raises(UserError, match="context is given to self-attention"):
        Attention(width=12, heads=3)(x, x)
    with pytest.raises(UserError, match="context is missing"):
        Attention(width=12, heads=3, context_width=12)(x)
