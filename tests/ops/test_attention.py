import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from vlblocks.errors import UserError
from vlblocks.ops.attention import AUTO, BACKENDS, Choice, attention, default_backend
from vlblocks.ops.segments import SegmentMask
from vlblocks_kernels.attention import dropout_keep

# By name: the package re-exports the function of the same name.
attention_module = importlib.import_module("vlblocks.ops.attention")
PAIRS = {"image": ["image", "codes"], "codes": ["image", "codes", "text"], "text": ["codes", "text"]}
some_masks = settings(derandomize=True, deadline=None, max_examples=40)


def make_qkv(batch, queries, keys, *, heads=2, kv_heads=None, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # As a module makes them: [B, T, H, D] in memory.
    shapes = ((queries, heads), (keys, kv_heads or heads), (keys, kv_heads or heads))
    return [torch.randn(batch, t, h, width, generator=generator, dtype=dtype).transpose(1, 2) for t, h in shapes]


def for_mask(mask, **options):
    return make_qkv(mask.batch or 2, mask.queries, mask.total, **options)


def by_definition(q, k, v, dense, scale=None):
    """Row by row, the softmax over the visible keys alone; zeros where there are none."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    dense = dense.expand(*q.shape[:3], k.shape[2])
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen, kv = dense[b, h, i], h * k.shape[1] // q.shape[1]
        if seen.any():
            scores = (k[b, kv, seen] @ q[b, h, i]) * (q.shape[3] ** -0.5 if scale is None else scale)
            out[b, h, i] = scores.softmax(0) @ v[b, kv, seen]
    return out


def run(qkv, autocast=False, **options):
    """The output and the gradients of q, k, v for a fixed gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = attention(*leaves, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, weight, materialize_grads=True)
    return out.detach(), *grads


def assert_same(left, right, **tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), left, right, strict=False):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@some_masks
@given(data=st.data())
def test_reference_is_the_definition(data, segment_masks):
    mask = data.draw(segment_masks())
    q, k, v = for_mask(mask)
    torch.testing.assert_close(attention(q, k, v, mask=mask, backend="reference"), by_definition(q, k, v, mask.dense()))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@some_masks
@given(data=st.data(), dtype=st.sampled_from((torch.float64, torch.float32)))
def test_a_back_end_is_the_reference_in_both_directions(data, backend, dtype, segment_masks):
    mask = data.draw(segment_masks())
    qkv = for_mask(mask, dtype=dtype)
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    assert_same(run(qkv, mask=mask, backend=backend), run(qkv, mask=mask, backend="reference"), **tolerance)


@pytest.mark.parametrize("backend", ["sdpa", "reference", "triton"])
def test_without_reading_values_the_numbers_are_the_same(backend, segment_masks, monkeypatch):
    """What runs on an accelerator, where looking at the padding would wait for the device."""
    monkeypatch.setattr("vlblocks.ops.segments.is_free_to_read", lambda x: False)
    monkeypatch.setattr("vlblocks.ops.stretches.is_free_to_read", lambda x: False)

    @some_masks
    @given(mask=segment_masks())
    def check(mask):
        qkv = for_mask(mask)
        found = run(qkv, mask=mask, backend=backend)
        torch.testing.assert_close(found[0], by_definition(*qkv, mask.dense()))
        assert_same(found, run(qkv, mask=mask.dense(), backend="reference"))

    check()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@some_masks
@given(data=st.data())
def test_padding_changes_nothing(data, backend, segment_masks):
    mask = data.draw(segment_masks(masked_rows=("zeros",)).filter(lambda mask: mask.valid_tokens() is not None))
    clean = for_mask(mask)
    keys, queries = mask.valid_tokens()[:, None, :, None], mask.valid_queries()[:, None, :, None]
    dirty = [
        torch.where(real, x, torch.tensor([float("nan"), float("inf"), -float("inf"), 1e300], dtype=x.dtype))
        for x, real in zip(clean, (queries, keys, keys), strict=True)
    ]
    found = run(dirty, mask=mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, run(clean, mask=mask, backend=backend), strict=True))
    out, *grads = found
    blind = ~mask.dense().any(dim=-1)[..., None]
    assert not out.masked_select(blind).any() and not grads[0].masked_select(blind).any()
    for grad, real in zip(grads, (queries, keys, keys), strict=True):
        assert grad.isfinite().all() and not grad.masked_select(~real).any()


@some_masks
@given(data=st.data())
def test_last_queries_are_the_last_rows_of_the_whole(data, segment_masks):
    mask = data.draw(segment_masks()).last_queries(0)
    mask = mask.last_queries(mask.total)
    n = data.draw(st.integers(0, mask.total))
    q, k, v = for_mask(mask)
    for backend in ("sdpa", "triton"):
        whole = attention(q, k, v, mask=mask, backend=backend)[:, :, mask.total - n :]
        last = attention(q[:, :, mask.total - n :], k, v, mask=mask.last_queries(n), backend=backend)
        torch.testing.assert_close(last, whole)


def named_masks():
    text = torch.arange(5) < torch.tensor([[5], [0], [2]])
    sizes = {"image": 4, "codes": 3, "text": 5}
    prefix = torch.tensor([0, 2, 9])
    captioning = PAIRS | {"codes": ["image", "codes"], "text": ["image", "codes", "text"]}
    return {
        "pairs": SegmentMask.build(sizes, PAIRS, valid={"text": text}),
        "pairs open": SegmentMask.build(sizes, PAIRS, valid={"text": text}, masked_rows="open"),
        "captioning": SegmentMask.build(sizes, captioning, valid={"text": text}, causal="text", prefix=prefix),
        "gap": SegmentMask.build(sizes, {"image": ["image", "text"], "text": ["image"]}, valid={"text": text}),
        "tower": SegmentMask.single(length=6, valid=torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) > 0.4),
        "causal": SegmentMask.single(length=6, causal=True),
        "packed": SegmentMask.packed([3, 1, 4], causal=True),
    }


@pytest.mark.parametrize("name", list(named_masks()))
def test_flex_forward_is_the_reference(name):
    mask = named_masks()[name]
    q, k, v = for_mask(mask, dtype=torch.float32, width=16)
    if mask.masked_rows == "zeros" and mask.valid_tokens() is not None:
        hidden = ~mask.valid_tokens()[:, None, :, None]
        q, k, v = (
            q.masked_fill(hidden, float("nan")),
            k.masked_fill(hidden, float("inf")),
            v.masked_fill(hidden, float("nan")),
        )
    expected = attention(q, k, v, mask=mask, backend="reference", scale=0.3)
    found = attention(q, k, v, mask=mask, backend="flex", scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        attention(q.requires_grad_(), k, v, mask=mask, backend="flex")


def test_flex_without_a_mask():
    q, k, v = make_qkv(2, 3, 5, dtype=torch.float32, width=16)
    torch.testing.assert_close(attention(q, k, v, backend="flex"), attention(q, k, v, backend="reference"))


def test_flex_serves_many_shapes():
    for length in range(3, 16):
        mask = SegmentMask.single(length=length, valid=torch.arange(length) < torch.tensor([[2], [length]]))
        q, k, v = for_mask(mask, dtype=torch.float32, width=16)
        expected = attention(q, k, v, mask=mask, backend="reference")
        torch.testing.assert_close(attention(q, k, v, mask=mask, backend="flex"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(named_masks()))
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_gradients_by_finite_differences(name, backend):
    mask = named_masks()[name]
    qkv = [x.requires_grad_() for x in for_mask(mask, heads=2, kv_heads=1, width=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask=mask, backend=backend), qkv)


@pytest.mark.parametrize("name", list(named_masks()))
def test_bf16_is_close_to_float64(name):
    mask = named_masks()[name]
    qkv = for_mask(mask, width=32)
    exact = run(qkv, mask=mask, backend="reference")
    for backend in ("reference", "sdpa", "triton"):
        found = run([x.bfloat16() for x in qkv], mask=mask, backend=backend)
        for a, b in zip(found, exact, strict=True):
            assert a.dtype == torch.bfloat16
            assert (a.double() - b).norm() <= 2e-2 * b.norm()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_autocast_keeps_the_numbers(backend):
    mask = named_masks()["pairs"]
    qkv = for_mask(mask, width=32, dtype=torch.float32)
    exact = run(qkv, mask=mask, backend="reference")
    found = run(qkv, mask=mask, backend=backend, autocast=True)
    assert_same(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_makes_new_tokens_and_a_float32_cache_meet(inside):
    """Where SDPA casts, the kernels take what it casts to; also if the backward runs inside."""
    q, k, v = make_qkv(2, 3, 9, width=32, dtype=torch.float32)
    q = q.bfloat16()
    weight = torch.randn(2, 2, 3, 32, dtype=torch.bfloat16)

    def grads(backend):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attention(*leaves, backend=backend)
            if inside:
                return out, *torch.autograd.grad(out, leaves, weight)
        return out, *torch.autograd.grad(out, leaves, weight)

    found = grads("triton")
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(found, grads("sdpa"), strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = attention(q, k.bfloat16(), v.bfloat16(), backend="triton")
    assert torch.equal(found[0], whole)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton", "flex"])
def test_scale(backend):
    q, k, v = make_qkv(2, 3, 5, width=16, dtype=torch.float32)
    expected = by_definition(q, k, v, torch.ones(3, 5, dtype=torch.bool), scale=1.7)
    torch.testing.assert_close(attention(q, k, v, scale=1.7, backend=backend), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (1, 1, 4, 5), (4, 5), (3, 2, 4, 5), (5,), (2, 4, 1)])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_explicit_mask(shape, backend):
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    allowed[(0,) * (len(shape) - 1)] = False
    qkv = make_qkv(3, 4, 5)
    found = run(qkv, mask=allowed, backend=backend)
    torch.testing.assert_close(found[0], by_definition(*qkv, allowed))
    assert_same(found, run(qkv, mask=allowed, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_explicit_key_padding_hides_what_is_padded(backend):
    real = torch.arange(5) < torch.tensor([[5], [2], [0]])
    q, k, v = make_qkv(3, 4, 5)
    hidden = ~real[:, None, :, None]
    dirty = q, k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("inf"))
    found = run(dirty, mask=real[:, None, None, :], backend=backend)
    clean = run((q, k, v), mask=real[:, None, None, :], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert not found[0][2].any() and not found[1][2].any() and not found[3].masked_select(hidden).any()


@pytest.fixture
def sdpa_calls(monkeypatch):
    """What reaches PyTorch's SDPA: (queries, keys, shape of the mask or None, is_causal)."""
    calls = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, **options):
        calls.append((q.shape[2], k.shape[2], None if attn_mask is None else tuple(attn_mask.shape), is_causal))
        return inner(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (SegmentMask.single(length=7), [(7, 7, None, False)]),
        (SegmentMask.single(length=7, valid=torch.ones(2, 7, dtype=torch.bool)), [(7, 7, None, False)]),
        (SegmentMask.single(length=7, causal=True), [(7, 7, None, True)]),
        (SegmentMask.single(length=7, causal=True).last_queries(1), [(1, 7, None, False)]),
        (
            SegmentMask.build({"image": 4, "codes": 3, "text": 5}, PAIRS),
            [(4, 7, None, False), (3, 12, None, False), (5, 8, None, False)],
        ),
        (
            named_masks()["pairs"],
            [(4, 7, None, False), (3, 12, (3, 1, 1, 12), False), (5, 8, (3, 1, 1, 8), False)],
        ),
        (named_masks()["captioning"], [(7, 7, None, False), (5, 12, (3, 1, 5, 12), False)]),
        (SegmentMask.build({"a": 3, "b": 2}, {"a": ["a", "b"], "b": ["b", "a"]}), [(5, 5, None, False)]),
        (SegmentMask.build({"a": 3, "b": 2}, {"a": ["b"], "b": ["a"]}), [(3, 2, None, False), (2, 3, None, False)]),
    ],
)
def test_sdpa_makes_few_calls_and_small_masks(mask, expected, sdpa_calls):
    attention(*for_mask(mask), mask=mask, backend="sdpa")
    assert sdpa_calls == expected


def test_joined_output_is_ready_for_the_projection():
    mask = named_masks()["pairs"]
    out = attention(*for_mask(mask), mask=mask, backend="sdpa")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (1, 1, 5), (1, 5), (5,), (1, 1, 1, 1)])
def test_triton_takes_masks_of_keys(shape):
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    qkv = make_qkv(3, 4, 5)
    assert_same(run(qkv, mask=allowed, backend="triton"), run(qkv, mask=allowed, backend="reference"))


@pytest.mark.parametrize("name", ["pairs", "pairs open", "captioning", "packed"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton", "flex"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_share_heads_of_keys(name, backend, kv_heads):
    mask = named_masks()[name]
    q, k, v = for_mask(mask, heads=4, kv_heads=kv_heads, width=16, dtype=torch.float32)
    found = attention(q, k, v, mask=mask, backend=backend)
    torch.testing.assert_close(found, by_definition(q, k, v, mask.dense()), rtol=1e-4, atol=1e-5)
    if backend != "flex":
        spread = [x.repeat_interleave(4 // x.shape[1], dim=1) for x in (q, k, v)]
        _, dq, dk, dv = run(spread, mask=mask, backend="reference")
        expected = [dq, *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))]
        assert_same(run((q, k, v), mask=mask, backend=backend)[1:], expected, rtol=1e-4, atol=1e-5)


def test_explicit_mask_of_query_heads_that_share_keys():
    allowed = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(3)) > 0.6
    allowed[:, :, :, 2] = False
    q, k, v = make_qkv(2, 3, 5, heads=4, kv_heads=2)
    k[:, :, 2] = v[:, :, 2] = float("nan")
    for backend in ("reference", "sdpa"):
        found = attention(q, k, v, mask=allowed, backend=backend)
        torch.testing.assert_close(found, by_definition(q, k, v, allowed))


def test_triton_gives_open_rows_to_sdpa_and_says_so(caplog, sdpa_calls):
    attention_module._say_opened.cache_clear()
    closed, opened = named_masks()["pairs"], named_masks()["pairs open"]
    q, k, v = for_mask(opened)
    attention(q, k, v, mask=closed, backend="triton")
    whole = SegmentMask.build({"image": 4, "codes": 3, "text": 5}, PAIRS, masked_rows="open")
    attention(q, k, v, mask=whole, backend="triton")
    assert not caplog.records and not sdpa_calls
    out = attention(q, k, v, mask=opened, backend="triton")
    assert sdpa_calls == [(12, 12, None, False)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "backend='sdpa' computes them" in caplog.text
    assert_same([out], [attention(q, k, v, mask=opened, backend="reference")])


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_dropout_drops_weights_and_keeps_their_mean(backend):
    mask = SegmentMask.build({"a": 30, "b": 10}, {"a": ["a"], "b": ["a", "b"]})
    q, k, v = make_qkv(2, 40, 40, heads=4)
    v = torch.ones_like(v)
    torch.manual_seed(0)
    first = attention(q, k, v, mask=mask, dropout_p=0.5, backend=backend)
    second = attention(q, k, v, mask=mask, dropout_p=0.5, backend=backend)
    assert not torch.equal(first, second) and abs(first.mean().item() - 1) < 0.05


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_dropout_is_drawn_from_torchs_generator(backend):
    mask = named_masks()["pairs"]
    qkv = for_mask(mask)

    def seeded():
        torch.manual_seed(5)
        return run(qkv, mask=mask, dropout_p=0.5, backend=backend)

    # `run` draws from a generator of its own: what follows a seeded call continues torch's.
    found, again, other = seeded(), seeded(), run(qkv, mask=mask, dropout_p=0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0], other[0])


def test_dropout_of_triton_is_the_mask_of_the_drawn_seed():
    q, k, v = make_qkv(2, 5, 6)
    torch.manual_seed(5)
    found = attention(q, k, v, dropout_p=0.5, backend="triton")
    torch.manual_seed(5)
    keep = dropout_keep(torch.randint(2**62, (1,)), (2, 2, 5, 6), 0.5)
    torch.testing.assert_close(found, ((q @ k.mT * q.shape[3] ** -0.5).softmax(-1) * keep * 2) @ v)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_no_keys_and_no_queries(backend):
    q, k, v = make_qkv(2, 3, 0)
    assert torch.equal(attention(q, k, v, backend=backend), torch.zeros(2, 2, 3, 4, dtype=q.dtype))
    q, k, v = make_qkv(2, 0, 3)
    assert attention(q, k, v, backend=backend).shape == (2, 2, 0, 4)


def test_second_derivatives_by_finite_differences():
    mask = named_masks()["pairs"]
    qkv = [x.requires_grad_() for x in for_mask(mask, heads=1, width=2)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda q, k, v: attention(q, k, v, mask=mask, backend="sdpa"), qkv)


@pytest.mark.parametrize("name", ["pairs", "pairs open", "captioning"])
def test_compiles_without_a_break(name):
    def call(q, k, v, valid):
        built = SegmentMask.build(
            dict(zip(mask.names, mask.lengths, strict=True)),
            PAIRS,
            valid={"text": valid},
            causal=mask.causal,
            prefix=mask.prefix,
            masked_rows=mask.masked_rows,
        )
        return attention(q, k, v, mask=built, backend="sdpa")

    mask = named_masks()[name]
    qkv = for_mask(mask, dtype=torch.float32)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [[x.clone().requires_grad_() for x in qkv] for _ in range(2)]
    outs = [function(*x, mask.valid[2]) for function, x in zip((call, compiled), leaves, strict=True)]
    grads = [torch.autograd.grad(out.square().sum(), x) for out, x in zip(outs, leaves, strict=True)]
    assert_same((outs[1], *grads[1]), (outs[0], *grads[0]), rtol=1e-4, atol=1e-5)


def test_auto_is_a_table():
    assert default_backend("cpu") == default_backend("cuda") == default_backend("mps") == "sdpa"
    assert all(row.backend in BACKENDS and row.source for row in AUTO)
    q, k, v = make_qkv(2, 3, 5)
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))


def test_auto_takes_the_first_row_that_fits(monkeypatch):
    half = (torch.bfloat16, torch.float16)
    rows = [Choice("cpu", half, 1, "reference", ""), Choice("cpu", half, None, "triton", "")]
    monkeypatch.setattr(attention_module, "AUTO", rows)
    found = [default_backend("cpu", dtype, n) for dtype in (torch.bfloat16, torch.float32) for n in (1, 2)]
    assert found == ["reference", "triton", "sdpa", "sdpa"]


def one_line(**options):
    q, k, v = make_qkv(2, 3, 5, dtype=torch.float32, width=16)
    q.requires_grad_(options.pop("grad", False))
    with pytest.raises(UserError) as error:
        attention(q, k, v, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_are_named_in_one_line():
    assert all(choice in one_line(backend="cudnn") for choice in BACKENDS)
    assert "[B, 1, 1, Tk]" in one_line(backend="triton", mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(UserError, match="heads up to 128 wide, not 144: use backend='sdpa'"):
        attention(*make_qkv(1, 2, 2, width=144), backend="triton")
    for wrong in (-0.1, 1.5, float("nan")):
        assert f"dropout_p is {wrong}: " in one_line(dropout_p=wrong)
    q, k, v = make_qkv(1, 2, 2)
    with pytest.raises(UserError, match="q, k, v of one dtype"):
        attention(q, k.float(), v.float(), backend="triton")
    with pytest.raises(UserError, match="q has 3 heads and k 2"):
        attention(make_qkv(1, 2, 2, heads=3)[0], k, v)
    assert "no gradient on a CPU" in one_line(backend="flex", grad=True)
    assert "dropout_p=0" in one_line(backend="flex", dropout_p=0.1)
    assert "takes a SegmentMask" in one_line(backend="flex", mask=torch.ones(3, 5, dtype=torch.bool))
    assert "give torch.bool" in one_line(mask=torch.ones(3, 5))
    assert "does not broadcast" in one_line(mask=torch.ones(4, 5, dtype=torch.bool))
    assert "does not broadcast" in one_line(mask=torch.ones(1, 1, 1, 3, 5, dtype=torch.bool))
    assert "5 queries and 5 keys" in one_line(mask=SegmentMask.single(length=5))
    valid = torch.tensor([[True] * 5] * 3)
    assert "batch 3 but q has 2" in one_line(mask=SegmentMask.single(length=5, valid=valid).last_queries(3))
    with pytest.raises(UserError, match="do not fit"):
        attention(*make_qkv(2, 3, 5)[:2], make_qkv(2, 3, 4)[2])
    with pytest.raises(UserError, match="axes"):
        attention(*(x[0] for x in make_qkv(2, 3, 5)))


def test_triton_names_a_chip_that_is_too_old(monkeypatch):
    kernels = pytest.importorskip("vlblocks_kernels.attention_triton")
    monkeypatch.setattr(kernels, "sm_of", lambda x: 75)
    assert "capability 8.0 or more, not 7.5: use backend='sdpa'" in one_line(backend="triton")
    monkeypatch.setattr(kernels, "sm_of", lambda x: 80)
    attention(*make_qkv(2, 3, 5, dtype=torch.float32), backend="triton")


def test_xformers_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "pip install 'vlblocks[xformers]'" in one_line(backend="xformers")


def fake_xformers():
    """xformers' documented contract: [B, T, H, D], an additive bias whose rows lie a multiple of 8 apart."""

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(q, k, v, *, attn_bias=None, p=0.0, scale=None):
        assert q.shape[2:] == k.shape[2:]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if isinstance(attn_bias, LowerTriangularMask):
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        elif attn_bias is not None:
            assert attn_bias.shape == scores.shape and attn_bias.dtype == q.dtype
            assert attn_bias.stride(-1) == 1 and attn_bias.stride(-2) % 8 == 0
            scores = scores + attn_bias
        return (torch.dropout(scores.softmax(-1), p, True) @ v).transpose(1, 2)

    return SimpleNamespace(
        LowerTriangularMask=LowerTriangularMask, memory_efficient_attention=memory_efficient_attention
    )


def test_xformers_has_no_cpu_attention(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=fake_xformers()))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake_xformers())
    assert "backend='sdpa'" in one_line(backend="xformers")


@pytest.mark.parametrize("name", list(named_masks()))
def test_xformers_gets_its_layout_and_bias(name, monkeypatch):
    monkeypatch.setattr(attention_module, "_load_xformers", lambda q: fake_xformers())
    mask = named_masks()[name]
    qkv = for_mask(mask)
    assert_same(run(qkv, mask=mask, backend="xformers", scale=0.4), run(qkv, mask=mask, backend="reference", scale=0.4))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_does_not_recompile_over_changing_lengths(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention, backend=graphs)
    monkeypatch.setattr(attention_module, "_flex_function", lambda compiled_: compiled)
    counts = []
    same, others = [(150, 20, 30), (140, 30, 30), (20, 20, 160)], [(150, 90, 31), (150, 20, 40), (7, 3, 300)]
    for image, codes, text in same + others:
        valid = torch.arange(text) < torch.tensor([[1 + image % 7], [text // 2]])
        mask = SegmentMask.build({"image": image, "codes": codes, "text": text}, PAIRS, valid={"text": valid})
        q, k, v = for_mask(mask, dtype=torch.float32, width=16)
        expected = attention(q, k, v, mask=mask, backend="reference")
        with torch.no_grad():
            found = attention(q, k, v, mask=mask, backend="flex")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        counts.append(graphs.frame_count)
    # One graph for this number of tokens, and one for any.
    assert counts == [1, 1, 1, 2, 2, 2]
