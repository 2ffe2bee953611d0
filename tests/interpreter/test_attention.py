"""The attention kernels in the interpreter against attention in float64."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vlblocks.ops import SegmentMask, attention
from vlblocks_kernels import attention_triton
from vlblocks_kernels.attention import dropout_keep, keep_scale_of, packed_runs
from vlblocks_kernels.launch import Config

TESTS = Path(__file__).resolve().parents[1]
PAIRS = {"image": ["image", "codes"], "codes": ["image", "codes", "text"], "text": ["codes", "text"]}
CAPTION = {"image": ["image", "codes"], "codes": ["image", "codes"], "text": ["image", "codes", "text"]}
SIZES = {"image": 21, "codes": 3, "text": 18}
DTYPES = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def segment_masks(longest=9):
    spec = importlib.util.spec_from_file_location("ops_conftest", TESTS / "ops/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._segment_masks(masked_rows=("zeros",), longest=longest)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Small tiles, so that short sequences have several."""
    chosen = {"BLOCK_M": 16, "BLOCK_N": 16}
    monkeypatch.setattr(attention_triton, "config_of", lambda *args: Config(dict(chosen)))
    return chosen


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make_qkv(batch, queries, keys, *, heads=2, kv_heads=1, width=12, value=None, dtype=torch.float32):
    shapes = ((queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value or width))
    # As a module makes them: [B, T, H, D] in memory.
    return [torch.randn(batch, *shape, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


def dense_attention(q, k, v, allowed, keep=1.0):
    """By autograd, from the dense mask, in q's dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    blind = ~allowed.any(-1, keepdim=True)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~(allowed | blind), float("-inf"))
    return (scores.softmax(-1) * keep).to(q.dtype).masked_fill(blind, 0.0) @ v


def run(function, qkv, grad):
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def distances(found, exact):
    # Where the gradient is zero, as with a single key, there is nothing for it to be relative to.
    return [((a.double() - b).norm() / b.norm().clamp_min(1.0)).item() for a, b in zip(found, exact, strict=True)]


def check(mask, qkv, *, seed=None, dropout_p=0.0):
    """Output and gradients against float64, and against what the same dtype gives without a kernel."""
    dtype = qkv[0].dtype
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask.dense()
    allowed = allowed.expand(*qkv[0].shape[:3], qkv[1].shape[2])
    keep = 1.0
    if dropout_p:
        keep = (dropout_keep(seed, tuple(allowed.shape), dropout_p) * keep_scale_of(dropout_p)).double()
    grad = torch.randn(*qkv[0].shape[:3], qkv[2].shape[3])
    if mask is None or not dropout_p:
        ours = run(lambda *x: attention(*x, mask=mask, backend="triton"), qkv, grad)
    else:
        options = dict(runs=mask.kernel_runs(), scale=qkv[0].shape[3] ** -0.5, dropout_p=dropout_p, seed=seed)
        ours = run(lambda *x: attention_triton.attention(*x, **options), qkv, grad)
    exact = run(lambda *x: dense_attention(*x, allowed, keep), [x.double() for x in qkv], grad)
    eager = distances(run(lambda *x: dense_attention(*x, allowed, keep), qkv, grad), exact)
    for name, found, error, at_most in zip(("out", "dq", "dk", "dv"), ours, distances(ours, exact), eager, strict=True):
        assert found.dtype == dtype and found.isfinite().all()
        assert error <= DTYPES[dtype], name
        # With a single key there is no gradient of q and k, and eager's zero is exact.
        assert at_most == 0 or error <= max(2 * at_most, 1e-6), name
    return ours


def text_of(*lengths):
    return torch.arange(SIZES["text"]) < torch.tensor(lengths)[:, None]


def named_masks():
    gap = torch.ones(2, SIZES["image"], dtype=torch.bool)
    gap[0, 5:9] = gap[1, 17:] = False
    prefix = torch.tensor([0, 7])
    return {
        "pairs": SegmentMask.build(SIZES, PAIRS, valid={"text": text_of(18, 5)}),
        "captioning": SegmentMask.build(SIZES, CAPTION, valid={"text": text_of(2, 18)}, causal="text", prefix=prefix),
        "two runs": SegmentMask.build(SIZES, PAIRS, valid={"image": gap, "text": text_of(1, 0)}),
        "apart": SegmentMask.build(SIZES, {"image": ["image", "text"], "text": ["image"]}),
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("captioning", dtype) for dtype in DTYPES),
        *(("pairs", dtype) for dtype in (torch.float32, torch.bfloat16)),
        *(("two runs", dtype) for dtype in (torch.float32, torch.float16)),
        ("apart", torch.float32),
    ],
)
def test_masks(name, dtype):
    mask = named_masks()[name]
    check(mask, make_qkv(2, mask.queries, mask.total, dtype=dtype))


some_masks = settings(
    derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@some_masks
@given(mask=segment_masks())
def test_any_mask(mask):
    if mask.queries:
        check(mask, make_qkv(mask.batch or 1, mask.queries, mask.total, heads=1, width=4))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 33), (17, 1), (40, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_across_sequences_without_a_mask(sizes, dtype):
    check(None, make_qkv(2, *sizes, heads=3, kv_heads=3, width=5, value=20, dtype=dtype))


@pytest.mark.parametrize("width", [16, 20, 33, 64, 80, 128])
def test_head_widths(width):
    check(None, make_qkv(1, 18, 19, width=width))


def test_tiles_of_different_heights(tiles):
    mask = named_masks()["captioning"]
    for tiles["BLOCK_M"], tiles["BLOCK_N"] in ((16, 32), (32, 16)):
        check(mask, make_qkv(2, mask.queries, mask.total))


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_query_heads_share_heads_of_keys(heads):
    mask = named_masks()["captioning"]
    check(mask, make_qkv(2, mask.queries, mask.total, heads=heads[0], kv_heads=heads[1]))


@pytest.mark.parametrize(("name", "dtype"), [("pairs", torch.bfloat16), ("captioning", torch.float32)])
def test_dropout_is_the_mask_of_its_seed(name, dtype):
    mask = named_masks()[name]
    check(mask, make_qkv(2, mask.queries, mask.total, dtype=dtype), seed=torch.tensor([2**61 + 12345]), dropout_p=0.3)


def test_everything_dropped_is_zero():
    q, k, v = make_qkv(1, 20, 20)
    out = attention(q, k, v, dropout_p=1.0, backend="triton")
    assert torch.equal(out, torch.zeros_like(out))


def test_masks_of_keys():
    q, k, v = make_qkv(3, 18, 20)
    valid = torch.rand(3, 20) < 0.6
    valid[1] = False
    mask = valid[:, None, None, :]
    grad = torch.randn(3, 2, 18, 12)
    ours = run(lambda *x: attention(*x, mask=mask, backend="triton"), (q, k, v), grad)
    exact = run(lambda *x: dense_attention(*x, mask), (q.double(), k.double(), v.double()), grad)
    assert max(distances(ours, exact)) < 1e-5


def test_decoding_is_the_last_rows_of_the_whole():
    mask = named_masks()["captioning"]
    q, k, v = make_qkv(2, mask.total, mask.total, heads=1)
    whole = attention(q, k, v, mask=mask, backend="triton")
    for n in (1, 19):
        last = attention(q[:, :, -n:], k, v, mask=mask.last_queries(n), backend="triton")
        torch.testing.assert_close(last, whole[:, :, -n:])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_examples(causal):
    """More segments than a tile of keys sees, from lengths that could live on a device."""
    lengths = [20, 0, 1, 30, 5, 5, 40, 17]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    total = sum(lengths)
    runs = packed_runs(bounds, keys=total, causal=causal)
    assert int((runs.seen_by[0, :, 1] - runs.seen_by[0, :, 0]).max()) < len(lengths)
    qkv = make_qkv(1, total, total)
    grad = torch.randn(1, 2, total, 12)
    ours = run(lambda *x: attention_triton.attention(*x, runs=runs, scale=12**-0.5), qkv, grad)
    dense = SegmentMask.packed(lengths, causal=causal).dense()
    exact = run(lambda *x: dense_attention(*x, dense), [x.double() for x in qkv], grad)
    assert max(distances(ours, exact)) < 1e-5


@pytest.mark.parametrize(
    ("name", "dtype"), [("pairs", torch.float32), ("captioning", torch.bfloat16), ("two runs", torch.float32)]
)
def test_padding_reaches_nothing(name, dtype):
    """NaN and inf in padding, and in the gradient of padded rows; two clean runs give equal bits."""
    mask = named_masks()[name]
    clean = make_qkv(2, mask.queries, mask.total, heads=1, dtype=dtype)
    real = mask.valid_tokens()[:, None, :, None]
    garbage = garbage_of(12, dtype)
    dirty = [torch.where(real, x, garbage) for x in clean]
    grad = torch.randn(2, 1, mask.queries, 12)
    dirty_grad = torch.where(real, grad, garbage.float())
    found = [
        run(lambda *x: attention(*x, mask=mask, backend="triton"), *given)
        for given in ((dirty, dirty_grad), (clean, grad), (clean, grad))
    ]
    for a, b, again in zip(*found, strict=True):
        assert torch.equal(a, b) and torch.equal(b, again)
        assert not a.masked_select(~real).any(), "a padded row is not zero"


def garbage_of(width, dtype=torch.float32):
    return torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30]).repeat(width // 4).to(dtype)


@settings(some_masks, max_examples=8)
@given(mask=segment_masks(5).filter(lambda mask: mask.queries and mask.valid_tokens() is not None))
def test_padding_of_any_mask_reaches_nothing(mask):
    clean = make_qkv(mask.batch or 1, mask.queries, mask.total, heads=1, width=4)
    queries, keys = (x[:, None, :, None] for x in (mask.valid_queries(), mask.valid_tokens()))
    grad = torch.randn(clean[0].shape)
    dirty = [torch.where(real, x, garbage_of(4)) for x, real in zip(clean, (queries, keys, keys), strict=True)]
    dirty_grad = torch.where(queries, grad, garbage_of(4))
    given = (dirty, dirty_grad), (clean, grad)
    found, expected = (run(lambda *x: attention(*x, mask=mask, backend="triton"), *pair) for pair in given)
    for a, b, real in zip(found, expected, (queries, queries, keys, keys), strict=True):
        assert torch.equal(a, b) and not a.masked_select(~real).any()


def test_strided_validity():
    """A validity that is not dense, alone in a mask, reaches the kernels as it is."""
    ids = torch.randint(0, 3, (19, 2))
    valid = ids.t() > 0
    every_other = torch.stack([valid, ~valid], dim=-1)[..., 0]
    qkv = make_qkv(2, 19, 19, heads=1)
    for strided in (valid, every_other, valid[:1].expand(2, -1)):
        assert not strided.is_contiguous()
        found, expected = (
            attention(*qkv, mask=SegmentMask.single(length=19, valid=x), backend="triton")
            for x in (strided, strided.contiguous())
        )
        assert torch.equal(found, expected)
    check(SegmentMask.single(length=19, valid=valid), qkv)


def test_strided_runs():
    mask = named_masks()["two runs"]
    runs = mask.kernel_runs()

    def sparse(x):
        wide = x.new_full((*x.shape, 2), 77)
        wide[..., 0] = x
        return wide[..., 0]

    strided = runs._replace(**{name: sparse(getattr(runs, name)) for name in ("bounds", "runs", "segments", "seen_by")})
    qkv, grad = make_qkv(2, mask.queries, mask.total, heads=1), torch.randn(2, 1, mask.queries, 12)
    found, expected = (
        run(lambda *x, given=given: attention_triton.attention(*x, runs=given, scale=0.3), qkv, grad)
        for given in (strided, runs)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_packed_examples_from_strided_bounds():
    bounds = torch.tensor([[0, 3, 20, 41], [5] * 4], dtype=torch.int32).t().contiguous()[:, 0]
    assert not bounds.is_contiguous()
    qkv = make_qkv(1, 41, 41)
    found, expected = (
        attention_triton.attention(*qkv, runs=packed_runs(b, keys=41), scale=0.3) for b in (bounds, bounds.clone())
    )
    assert torch.equal(found, expected)


def test_strides_of_any_kind():
    q, k, v = (torch.randn(2, 3, 12, 20).transpose(2, 3) for _ in range(3))
    wide = torch.randn(2, 20, 3, 3, 12).permute(2, 0, 3, 1, 4)
    check(None, [q, k, v])
    check(None, list(wide.unbind(0)))
    check(None, [q[:, :, ::2], k[:, ::3].expand(2, 3, 20, 12), v])
    x = torch.randn(2, 3, 12, 20).transpose(2, 3).requires_grad_()
    out = attention(x, x, x, backend="triton")
    (expanded,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (dense,) = torch.autograd.grad(out, x, torch.ones(out.shape))
    assert torch.equal(expanded, dense)
