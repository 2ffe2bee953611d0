"""Attention over runs of keys as an operation of PyTorch, on a CPU, where its plain reference runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlblocks.ops import SegmentMask, attention
from vlblocks_kernels.attention import dense_of, dropout_keep, packed_runs, philox

triton_attention = pytest.importorskip("vlblocks_kernels.attention_triton")

SEES = {"image": ["image", "codes"], "codes": ["image", "codes"], "text": ["image", "codes", "text"]}
SIZES = {"image": 4, "codes": 2, "text": 5}


def make_mask(valid=None):
    valid = torch.arange(5) < torch.tensor([[5], [2]]) if valid is None else valid
    return SegmentMask.build(SIZES, SEES, valid={"text": valid}, causal="text", prefix=valid[:, 3].long())


def make_qkv(*, dtype=torch.float64, batch=2, heads=4, kv_heads=2, queries=11, keys=11, width=6, value=3):
    sizes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value))
    return [torch.randn(batch, *size, dtype=dtype, requires_grad=True) for size in sizes]


def dense_attention(q, k, v, allowed, keep=1.0):
    """By autograd, from the dense mask."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    blind = ~allowed.any(-1, keepdim=True)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~(allowed | blind), float("-inf")).softmax(-1)
    return (weights * keep).masked_fill(blind, 0.0) @ v


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_by_finite_differences(dropout_p):
    runs, seed = make_mask().kernel_runs(), torch.tensor([2**61 + 12345])

    def call(*qkv):
        return triton_attention.attention(*qkv, runs=runs, scale=0.4, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(call, make_qkv())


@pytest.mark.parametrize(
    ("dtype", "dropout_p", "seed"),
    [
        (torch.float64, 0.0, None),
        (torch.float64, 0.0, -7),
        (torch.float64, 0.3, 11),
        (torch.float32, 0.3, -7),
        (torch.bfloat16, 0.3, 11),
    ],
)
def test_registration(dtype, dropout_p, seed):
    seed = None if seed is None else torch.tensor([seed])
    # As a projection and `ids.t()` leave them: neither lies dense.
    valid = (torch.arange(5)[:, None] < torch.tensor([5, 2])).t()
    runs = make_mask(valid).kernel_runs()
    tail = (runs.bounds, runs.runs, runs.segments, runs.seen_by, runs.valid.t().contiguous().t(), seed, 0.4)
    tail = (*tail, dropout_p, runs.offset, 5)
    qkv = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in make_qkv(dtype=dtype)]
    torch.library.opcheck(triton_attention.attention_forward, (*qkv, *tail))
    with torch.no_grad():
        q, k, v = qkv
        out, lse = triton_attention.attention_forward(q, k, v, *tail)
        arguments = (torch.randn_like(out), q, k, v, out, lse, *tail)
        torch.library.opcheck(triton_attention.attention_backward, arguments)


def seeded(function, *inputs):
    torch.manual_seed(7)
    return function(*inputs)


@pytest.mark.parametrize(("dynamic", "dropout_p"), [(False, 0.1), (True, 0.0), (True, 0.1)])
def test_compiles_without_a_break(dynamic, dropout_p):
    def call(q, k, v, valid):
        return attention(q, k, v, mask=make_mask(valid), dropout_p=dropout_p, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    # Sizes that no other axis has: the compiler takes equal ones for the same.
    for batch in (7, 8, 9):
        qkv = make_qkv(batch=batch)
        valid = torch.rand(batch, 5) < 0.6
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            found, expected = (seeded(function, *qkv, valid) for function in (compiled, call))
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(out.square().sum(), qkv) for out in (found, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mask", [None, "keys"])
def test_compiles_for_any_lengths(mask):
    def call(q, k, v, valid):
        return attention(q, k, v, mask=None if mask is None else valid[:, None, None, :], backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for queries, keys in ((5, 7), (3, 9), (8, 2)):
        qkv = make_qkv(queries=queries, keys=keys)
        valid = torch.rand(2, keys) < 0.7
        torch.testing.assert_close(compiled(*qkv, valid), call(*qkv, valid))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_exports(dropout_p):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, valid):
            return attention(q, k, v, mask=make_mask(valid), dropout_p=dropout_p, backend="triton")

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in ("q", "k", "v", "valid")}
    qkv, valid = [x.detach() for x in make_qkv()], torch.rand(2, 5) < 0.6
    exported = torch.export.export(Model(), (*qkv, valid), dynamic_shapes=shapes)
    assert "vlblocks.attention" in str(exported.graph)
    for size in (2, 5):
        inputs = *(x.detach() for x in make_qkv(batch=size)), torch.rand(size, 5) < 0.6
        torch.testing.assert_close(seeded(exported.module(), *inputs), seeded(Model(), *inputs))


def test_flops_are_those_of_pairs_that_see_each_other():
    q, k, v = make_qkv()
    mask = SegmentMask.build(SIZES, SEES, causal="text")
    pairs = int(mask.dense().sum())
    assert pairs == 6 * 6 + 5 * 6 + 15
    with FlopCounterMode(display=False) as forward:
        out = attention(q, k, v, mask=mask, backend="triton")
    assert forward.get_total_flops() == 2 * 2 * 4 * pairs * (6 + 3)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    # Without a mask as PyTorch counts its own.
    with FlopCounterMode(display=False) as ours:
        attention(q, k, v, backend="triton")
    with FlopCounterMode(display=False) as theirs, torch.device("meta"):
        torch.nn.functional.scaled_dot_product_attention(
            *(torch.empty(2, 4, 11, width, device="meta") for width in (6, 6, 3))
        )
    assert ours.get_total_flops() == theirs.get_total_flops() == 2 * 2 * 4 * 11 * 11 * 9


def test_philox_gives_the_published_words():
    """Random123's known answers, examples/kat_vectors."""
    zero = torch.tensor([0])
    assert philox(zero, zero, zero, zero, rounds=10).tolist() == [0x6627E8D5]
    assert philox(zero, zero, zero, zero, rounds=7).tolist() == [0x5F6FB709]


def test_dropout_is_the_mask_of_its_seed():
    mask, seed = make_mask(), torch.tensor([2**61 + 12345])
    q, k, v = make_qkv()
    keep = dropout_keep(seed, (2, 4, 11, 11), 0.3)
    out = triton_attention.attention(q, k, v, runs=mask.kernel_runs(), scale=6**-0.5, dropout_p=0.3, seed=seed)
    expected = dense_attention(q, k, v, mask.dense(), keep / 0.7)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    )


def test_dropout_keeps_the_right_share_and_differs_everywhere():
    keep = dropout_keep(torch.tensor([3]), (2, 3, 200, 300), 0.1).double()
    assert abs(keep.mean() - 0.9) < 0.002
    planes = keep.reshape(6, -1)
    assert (planes.corrcoef() - torch.eye(6)).abs().max() < 0.03
    assert not torch.equal(keep, dropout_keep(torch.tensor([4]), (2, 3, 200, 300), 0.1).double())
    assert dropout_keep(torch.tensor([3]), (1, 1, 5, 5), 0.0).all()
    assert not dropout_keep(torch.tensor([3]), (1, 1, 5, 5), 1.0).any()


def test_dropout_is_drawn_from_torchs_generator():
    runs, qkv = make_mask().kernel_runs(), make_qkv()

    def call():
        return triton_attention.attention(*qkv, runs=runs, scale=0.4, dropout_p=0.5)

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first) and not torch.equal(first, second)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    given = triton_attention.attention(*qkv, runs=runs, scale=0.4, dropout_p=0.5, seed=seed)
    assert torch.equal(given, first)


def test_everything_dropped_is_zero():
    out = triton_attention.attention(*make_qkv(), runs=make_mask().kernel_runs(), scale=0.4, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))


def test_packed_examples_are_those_apart():
    lengths = [3, 1, 0, 4]
    q, k, v = make_qkv(batch=1, queries=8, keys=8)
    for causal in (False, True):
        bounds = torch.tensor([0, 3, 4, 4, 8], dtype=torch.int32)
        runs = packed_runs(bounds, keys=8, causal=causal)
        out = triton_attention.attention(q, k, v, runs=runs, scale=6**-0.5)
        assert torch.equal(out, attention(q, k, v, mask=SegmentMask.packed(lengths, causal=causal), backend="triton"))
        apart = [
            dense_attention(
                *(x[:, :, a:b] for x in (q, k, v)), torch.ones(b - a, b - a, dtype=torch.bool).tril(diagonal)
            )
            for a, b in ((0, 3), (3, 4), (4, 8))
            for diagonal in ([0] if causal else [9])
        ]
        torch.testing.assert_close(out, torch.cat(apart, dim=2))
        assert dense_of(runs, 8, 8).sum() == (6 + 1 + 10 if causal else 9 + 1 + 16)


def test_result_lies_as_the_projection_wants_it():
    out = attention(*make_qkv(), mask=make_mask(), backend="triton")
    assert out.transpose(1, 2).is_contiguous()
