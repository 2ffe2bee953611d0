"""Nearest code and sums by code: the kernels against float64, in every type, at ragged sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlblocks.nn import VectorQuantizer
from vlblocks.ops.grounding import nearest_code, segment_sum
from vlblocks_kernels import nearest_triton
from vlblocks_kernels.launch import Config
from vlblocks_kernels.nearest import segment_sum_reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_tiles_and_poisoned_memory(monkeypatch):
    """Tiles of 16, so that small sizes have several; fresh memory holds NaN or the largest integer."""
    small = Config({"BM": 16, "BC": 16, "BD": 16})
    monkeypatch.setitem(nearest_triton.NEAREST, 90, {"half": small, "fp32": small})
    monkeypatch.setattr(nearest_triton, "SUMS", Config({"BR": 4, "BD": 32}))
    monkeypatch.setattr(nearest_triton, "LONGEST", 8)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def nearness(x, codes, metric):
    x, codes = x.double(), codes.double()
    if metric == "cosine":
        return x @ torch.nn.functional.normalize(codes, dim=1).T
    return x @ codes.T - codes.square().sum(1) / 2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("shape", [(21, 40, 37), (3, 16, 16), (50, 9, 5), (1, 1, 1), (16, 33, 90)])
def test_no_code_is_nearer_than_the_one_found(shape, metric, dtype):
    tokens, width, codes = shape
    x, e = torch.randn(tokens, width).to(dtype), torch.randn(codes, width).to(dtype)
    found = nearest_code(x, e, metric=metric, backend="triton")
    assert found.dtype == torch.long and found.shape == (tokens,)
    near = nearness(x, e, metric)
    regret = near.max(1).values - near.gather(1, found[:, None])[:, 0]
    # Half types lose nothing: their products are exact in float32.
    assert regret.max() <= 1e-6 * near.abs().max()
    assert (found == near.argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", TYPES)
def test_of_equally_near_codes_the_lowest_wins_within_a_tile_and_over_tiles(dtype, metric, split, monkeypatch):
    # Powers of two: every product and sum is exact.
    few = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]], dtype=dtype)
    codes = few.repeat(16, 1)  # 48 codes, three tiles
    x = 4 * few.repeat(3, 1)
    monkeypatch.setattr(nearest_triton, "multiprocessors", lambda _: split)
    found = nearest_code(x, codes, metric=metric, backend="triton")
    assert found.tolist() == [0, 1, 2] * 3
    found = nearest_code(x, codes.flip(0)[:47], metric=metric, backend="triton")
    assert found.tolist() == [2, 1, 0] * 3
    # Nothing is nearer to a token of zeros than the code of least length, nor by angle than any.
    assert nearest_code(0 * x[:1], codes, metric=metric, backend="triton").tolist() == [0]


def test_splits_and_descriptors_change_nothing(monkeypatch):
    x, e = torch.randn(20, 24), torch.randn(70, 24)
    found = {}
    for split in (1, 2, 64):
        for described in (True, False):
            monkeypatch.setattr(nearest_triton, "multiprocessors", lambda _, split=split: split)
            if not described:
                monkeypatch.setattr(nearest_triton, "takes_descriptors", lambda *_: False)
            found[split, described] = nearest_code(x, e, backend="triton")
            monkeypatch.undo()
    first = found.popitem()[1]
    assert all(torch.equal(first, other) for other in found.values())


few = settings(derandomize=True, deadline=None, max_examples=8)


@few
@given(tokens=st.integers(1, 40), codes=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_order_of_tokens_and_scale_do_not_matter(tokens, codes, width, seed):
    g = torch.Generator().manual_seed(seed)
    x, e = torch.randn(tokens, width, generator=g), torch.randn(codes, width, generator=g)
    order = torch.randperm(tokens, generator=g)
    found = nearest_code(x, e, backend="triton")
    near = nearness(x, e, "l2")
    best = near.gather(1, found[:, None])
    other = nearest_code(x[order], e, backend="triton")[order.argsort()]
    torch.testing.assert_close(near.gather(1, other[:, None]), best, rtol=0, atol=1e-5)
    # Both scaled by a power of two: not a bit of the comparison changes.
    assert torch.equal(nearest_code(4 * x, 4 * e, backend="triton"), found)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spread", ["even", "all on one", "most on one", "none valid"])
def test_sums_equal_the_references(spread, dtype):
    rows, width, segments = 61, 40, 7
    x = torch.randn(rows, width).to(dtype)
    indices = torch.randint(segments, (rows,))
    if spread == "all on one":
        indices = torch.full_like(indices, segments - 1)
    elif spread == "most on one":
        indices[torch.rand(rows) < 0.8] = 3
    valid = torch.rand(rows) < (0.0 if spread == "none valid" else 0.8)
    x[~valid] = float("nan")
    found = segment_sum(x, indices, segments, valid, backend="triton")
    expected = segment_sum_reference(x.double(), indices, segments, valid)
    assert torch.equal(found.counts, expected.counts) and found.sums.dtype == torch.float32
    torch.testing.assert_close(found.sums.double(), expected.sums, rtol=1e-5, atol=1e-5)
    again = segment_sum(x, indices, segments, valid, backend="triton")
    assert torch.equal(again.sums, found.sums)


@few
@given(rows=st.integers(1, 60), segments=st.integers(1, 30), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_sums_without_validity(rows, segments, width, seed):
    g = torch.Generator().manual_seed(seed)
    # Small integers: sums are exact in any order.
    x = torch.randint(-8, 9, (rows, width), generator=g).float()
    indices = (torch.rand(rows, generator=g) ** 3 * segments).long()
    found = segment_sum(x, indices, segments, backend="triton")
    one_hot = torch.nn.functional.one_hot(indices, segments).float()
    assert torch.equal(found.sums, one_hot.T @ x)
    assert torch.equal(found.counts, one_hot.sum(0).long())


def test_strided_tensors():
    x, e = torch.randn(21, 24), torch.randn(9, 24)
    expected = nearest_code(x, e, backend="triton")
    assert torch.equal(nearest_code(x.T.contiguous().T, e.T.contiguous().T, backend="triton"), expected)
    assert torch.equal(nearest_code(torch.randn(1, 33)[:, :24].copy_(x[:1]), e, backend="triton"), expected[:1])
    valid = torch.rand(21) < 0.7
    indices, known = torch.stack([expected, expected * 0], 1)[:, 0], torch.stack([valid, ~valid], 1)[:, 0]
    assert not indices.is_contiguous() and not known.is_contiguous()
    found = segment_sum(x.T.contiguous().T, indices, 9, known, backend="triton")
    for a, b in zip(found, segment_sum(x, expected, 9, valid, backend="triton"), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_sum():
    found = segment_sum(torch.empty(0, 16), torch.empty(0, dtype=torch.long), 3, backend="triton")
    assert torch.equal(found.sums, torch.zeros(3, 16)) and found.counts.tolist() == [0, 0, 0]


def test_a_quantizer_learns_alike_on_either_back_end():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 25, 16, generator=g)
    valid = torch.rand(4, 25, generator=g) < 0.8
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(width=16, codes=12, codebook="ema", decay=0.5, backend=backend)
        for _ in range(3):
            out = quantizer(x, valid)
            quantizer.update(x, out.indices, valid)
        found.append((quantizer.codebook.detach(), out.indices, out.loss))
    torch.testing.assert_close(*found)
