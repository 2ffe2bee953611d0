"""Scores and losses of the grounded space: the kernels against float64, in every type, at ragged sizes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlblocks.ops.grounding import grounding_losses, grounding_scores
from vlblocks_kernels import grounding_losses_triton, grounding_triton, nearest_triton
from vlblocks_kernels.grounding import grounding_losses_reference, grounding_scores_reference
from vlblocks_kernels.launch import Config

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""What a scalar's error may be where eager's happens to be none."""


def use_tiles(monkeypatch, scores=(16, 16, 16), losses=(16, 16, 16), sums=(4, 64)):
    small = Config(dict(zip(("BC", "BN", "BD"), scores, strict=True)))
    tiles = Config(dict(zip(("BN", "BK", "BD"), losses, strict=True)))
    steps = dict.fromkeys(("over_width", "slopes", "over_picks", "over_tokens"), tiles)
    monkeypatch.setitem(grounding_triton.SCORES, 90, {"half": small, "fp32": small})
    monkeypatch.setitem(grounding_losses_triton.LOSSES, 90, {"half": steps, "fp32": steps})
    monkeypatch.setattr(nearest_triton, "SUMS", Config(dict(zip(("BR", "BD"), sums, strict=True))))


@pytest.fixture(autouse=True)
def small_tiles_and_poisoned_memory(monkeypatch):
    """Tiles of 16, so that small sizes have several; fresh memory holds NaN or the largest integer."""
    use_tiles(monkeypatch)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(batch, tokens, width, codes, picks, *, dtype=torch.float32, share=None, seed=0):
    """x, codes, indices, temperature, valid; tokens that are not valid are NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=g).to(dtype)
    e = (0.6 * torch.randn(codes, width, generator=g)).to(dtype)
    indices = torch.rand(batch, codes, generator=g).topk(picks).indices
    valid = None
    if share is not None:
        valid = torch.rand(batch, tokens, generator=g) < share
        x = x.masked_fill(~valid[..., None], float("nan"))
    t = torch.tensor([1.3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, e, indices, t, valid


def gradients(losses, x, e, indices, t, valid, weights=(1.0, 0.25)):
    """Both losses, then the gradients of their weighted sum to x, codes and temperature."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, e, t)]
    q, code = losses(leaves[0], leaves[1], indices, leaves[2], valid)
    found = torch.autograd.grad(weights[0] * q + weights[1] * code, leaves)
    return [q.detach(), code.detach(), *found]


def plain(x, e, indices, t, valid):
    """The losses written plainly, every step in the inputs' type."""
    if valid is None:
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
    x, picked, t = x.where(valid[..., None], 0), e[indices], t.to(x.dtype)
    a = torch.sigmoid(t * (x @ picked.mT)) * valid[..., None]
    u = a @ picked / (a.sum(2, keepdim=True) + 1e-18 + 1e-7 * (x.dtype == torch.float16))
    v = a.mT @ x / (a.sum(1)[..., None] + 1e-18 + 1e-7 * (x.dtype == torch.float16))
    present = valid.any(1)
    q = (u - x.detach())[valid].square().sum() / (valid.sum().clamp_min(1) * x.shape[2])
    code = (v - picked.detach())[present].square().sum() / (present.sum().clamp_min(1) * picked[0].numel())
    return q, code


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


SHAPES = [(2, 19, 24, 21), (3, 5, 16, 16), (1, 33, 40, 35), (2, 1, 1, 1)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [None, 0.6, 0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_float64(shape, share, dtype):
    x, e, _, t, valid = draw(*shape, 1, dtype=dtype, share=share)
    found = grounding_scores(x, e, t, valid, backend="triton")
    expected = grounding_scores_reference(x.double(), e.double(), t, valid)
    assert found.dtype == torch.float32
    if share == 0.0:
        assert torch.equal(found, torch.zeros(shape[0], shape[3]))
        return
    # Products of half types are exact in float32, so that no type loses more than it.
    assert error(found, expected) < 1e-6
    eager = torch.sigmoid(t.to(dtype) * (x @ e.T))
    if valid is not None:
        eager = eager.where(valid[..., None], 0)
    assert error(found, expected) <= 2 * error(eager.sum(1), expected) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_scores_do_not_depend_on_descriptors_or_groups(dtype, group, monkeypatch):
    x, e, _, t, valid = draw(5, 11, 24, 40, 1, dtype=dtype, share=0.7)
    monkeypatch.setattr(grounding_triton, "group_size", lambda *_: group)
    monkeypatch.setattr(grounding_triton, "PANEL", 2)
    described = grounding_scores(x, e, t, valid, backend="triton")
    monkeypatch.setattr(grounding_triton, "takes_descriptors", lambda *_: False)
    plainly = grounding_scores(x, e, t, valid, backend="triton")
    assert torch.equal(described, plainly)
    assert error(plainly, grounding_scores_reference(x.double(), e.double(), t, valid)) < 1e-6


def test_scores_take_strided_and_misaligned_tensors():
    x, e, _, t, valid = draw(2, 7, 16, 9, 1, share=0.8)
    wide = torch.randn(2, 7, 33)
    wide[..., 1:17] = x
    crooked = torch.randn(9 * 16 + 1)
    crooked[1:] = e.flatten()
    expected = grounding_scores(x, e, t, valid, backend="triton")
    valid = valid.T.contiguous().T
    assert torch.equal(grounding_scores(wide[..., 1:17], crooked[1:].view(9, 16), t, valid, backend="triton"), expected)


def test_a_single_row_is_read_by_descriptor_whatever_its_stride(monkeypatch):
    x, e, _, t, _ = draw(2, 3, 16, 1, 1)
    odd = torch.randn(1, 33)[:, :16].copy_(e)
    assert odd.is_contiguous() and odd.stride(0) == 33
    taken, own = [], grounding_triton.takes_descriptors
    monkeypatch.setattr(grounding_triton, "takes_descriptors", lambda *args: taken.append(own(*args)) or taken[-1])
    found = grounding_scores(x, odd, t, backend="triton")
    assert taken == [True]
    assert torch.equal(found, grounding_scores(x, e, t, backend="triton"))


def test_losses_take_strided_tensors():
    x, e, indices, t, valid = draw(2, 7, 16, 9, 3, share=0.8)
    run = lambda *args: grounding_losses(*args, backend="triton")  # noqa: E731
    strided = [x.mT.contiguous().mT, e.T.contiguous().T, indices.T.contiguous().T, t, valid.T.contiguous().T]
    assert not any(tensor.is_contiguous() for tensor in (*strided[:3], strided[4]))
    for a, b in zip(gradients(run, *strided), gradients(run, x, e, indices, t, valid), strict=True):
        assert torch.equal(a, b)


def test_the_widest_tokens(monkeypatch):
    use_tiles(monkeypatch, scores=(16, 16, 256), losses=(16, 16, 256), sums=(4, 512))
    drawn = draw(1, 16, 1536, 16, 4)
    x, e, indices, t, valid = drawn[0], drawn[1] / 15, *drawn[2:]
    wide = x.double(), e.double()
    assert error(grounding_scores(x, e, t, backend="triton"), grounding_scores_reference(*wide, t)) < 1e-6
    found = gradients(lambda *args: grounding_losses(*args, backend="triton"), x, e, indices, t, valid)
    expected = gradients(grounding_losses_reference, *wide, indices, t.double(), valid)
    assert all(error(ours, right) < 1e-5 for ours, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "shape,share",
    [((2, 19, 24, 21, 18), 0.6), ((2, 6, 20, 12, 5), None), ((1, 17, 33, 9, 2), None), ((2, 5, 16, 9, 3), 1.0)],
)
def test_losses_and_gradients_equal_float64(shape, share, dtype):
    drawn = draw(*shape, dtype=dtype, share=share)
    found = gradients(lambda *args: grounding_losses(*args, backend="triton"), *drawn)
    x, e, indices, t, valid = drawn
    wide = x.double(), e.double(), indices, t.double(), valid
    expected = gradients(grounding_losses_reference, *wide)
    eager = gradients(plain, *drawn)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float32, dtype, dtype, torch.float32]
    for name, ours, theirs, right in zip(("q", "e", "x", "codes", "t"), found, eager, expected, strict=True):
        wrong = error(ours, right)
        assert wrong <= LIMIT[dtype], name
        slack = ROUNDING[dtype] if right.numel() == 1 else 1e-6
        assert wrong <= 2 * error(theirs, right) + slack, name
    if valid is not None:
        assert (found[2][~valid] == 0).all()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (3e4, 1.0)])
def test_gradients_of_either_loss_alone(weights):
    drawn = draw(2, 6, 16, 8, 3, share=0.7)
    x, e, indices, t, valid = drawn
    found = gradients(lambda *args: grounding_losses(*args, backend="triton"), *drawn, weights=weights)
    wide = x.double(), e.double(), indices, t.double(), valid
    for ours, right in zip(found, gradients(grounding_losses_reference, *wide, weights=weights), strict=True):
        assert error(ours, right) < 1e-5


def test_two_runs_have_equal_bits_also_where_examples_share_codes():
    x, e, _, t, valid = draw(3, 9, 16, 4, 1, dtype=torch.bfloat16, share=0.8)
    indices = torch.tensor([[0, 1, 2], [1, 0, 3], [3, 1, 0]])
    runs = [
        gradients(lambda *args: grounding_losses(*args, backend="triton"), x, e, indices, t, valid) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_example_without_tokens_adds_nothing():
    x, e, indices, t, valid = draw(3, 5, 16, 8, 4, share=0.7)
    valid[:2, 0], valid[2] = True, False
    x = torch.randn_like(x).masked_fill(~valid[..., None], float("nan"))
    run = lambda *args: grounding_losses(*args, backend="triton")  # noqa: E731
    with_it, without = gradients(run, x, e, indices, t, valid), gradients(run, x[:2], e, indices[:2], t, valid[:2])
    assert (with_it[2][2] == 0).all()
    with_it[2] = with_it[2][:2]
    for a, b in zip(with_it, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    nothing = gradients(run, x, e, indices, t, torch.zeros_like(valid))
    assert all((tensor == 0).all() for tensor in nothing)


def test_no_tokens_or_no_examples_are_zeros():
    _, e, _, t, _ = draw(1, 1, 16, 8, 1)
    for batch, tokens in ((2, 0), (0, 3)):
        x = torch.zeros(batch, tokens, 16)
        assert torch.equal(grounding_scores(x, e, t, backend="triton"), torch.zeros(batch, 8))
        indices = torch.zeros(batch, 2, dtype=torch.long)
        found = gradients(lambda *args: grounding_losses(*args, backend="triton"), x, e, indices, t, None)
        assert all((tensor == 0).all() for tensor in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_are_all_small_keep_their_means(dtype):
    _, _, indices, _, _ = draw(2, 9, 16, 8, 5)
    x, e, t = 0.2 + torch.rand(2, 9, 16).to(dtype) / 5, -0.2 - torch.rand(8, 16).to(dtype) / 5, torch.tensor([11.0])
    weights = torch.sigmoid(t.double() * (x.double() @ e[indices].double().mT))
    # Of which float16 holds no more than one or two digits.
    assert weights.min() > 1e-9 and weights.max() < 2e-6
    found = gradients(lambda *args: grounding_losses(*args, backend="triton"), x, e, indices, t, None)
    expected = gradients(grounding_losses_reference, x.double(), e.double(), indices, t.double(), None)
    for ours, right in zip(found, expected, strict=True):
        assert error(ours, right) < 1e-2


def regret(scores, by, picks):
    """How much worse the codes are that `by` picks than those that scores [B, C] pick."""
    best = scores.topk(picks).values.sum(1)
    return float((best - scores.gather(1, by.topk(picks).indices).sum(1)).max())


few = settings(derandomize=True, deadline=None, max_examples=5)
sizes = st.integers(1, 18)


@settings(few, max_examples=3)
@given(tokens=sizes, extra=st.integers(0, 5), codes=sizes, width=st.integers(1, 17), seed=st.integers(0, 99))
def test_order_of_tokens_and_invalid_ones_change_rounding_only(tokens, extra, codes, width, seed):
    picks = (codes + 1) // 2
    x, e, indices, t, _ = draw(2, tokens, width, codes, picks, seed=seed)
    order = torch.randperm(tokens + extra, generator=torch.Generator().manual_seed(seed))
    longer = torch.cat([x, torch.full((2, extra, width), float("nan"))], 1)[:, order]
    valid = (torch.arange(tokens + extra) < tokens)[order].expand(2, -1)
    scores = grounding_scores(x, e, t, backend="triton")
    other = grounding_scores(longer, e, t, valid, backend="triton")
    torch.testing.assert_close(other, scores, rtol=1e-5, atol=1e-5)
    assert regret(scores, other, picks) <= 1e-5 * tokens * picks
    run = lambda *args: grounding_losses(*args, backend="triton")  # noqa: E731
    one, two = gradients(run, x, e, indices, t, None), gradients(run, longer, e, indices, t, valid)
    two[2] = two[2][:, order.argsort()][:, :tokens]
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@few
@given(scale=st.floats(0.1, 10), codes=sizes, width=st.integers(1, 33), seed=st.integers(0, 99))
def test_temperature_is_a_scale_of_the_tokens(scale, codes, width, seed):
    x, e, indices, t, valid = draw(2, 6, width, codes, (codes + 1) // 2, share=0.8, seed=seed)
    scores = grounding_scores(x, e, t, valid, backend="triton")
    other = grounding_scores(scale * x, e, t / scale, valid, backend="triton")
    torch.testing.assert_close(other, scores, rtol=1e-5, atol=1e-5)
    assert regret(scores, other, indices.shape[1]) <= 1e-5 * indices.shape[1]
    # Weights of the losses, through their sums over picks and over tokens.
    whole = valid if valid is None else valid.clone()
    one = grounding_losses_triton.grounding_losses(x, e, indices, t, whole)[2:4]
    two = grounding_losses_triton.grounding_losses(scale * x, e, indices, t / scale, whole)[2:4]
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


@few
@given(tokens=sizes, codes=sizes, width=st.integers(1, 33), seed=st.integers(0, 99))
def test_all_codes_picked_is_the_mean_over_the_codebook(tokens, codes, width, seed):
    x, e, _, t, _ = draw(2, tokens, width, codes, codes, seed=seed)
    indices = grounding_scores(x, e, t, backend="triton").topk(codes).indices
    weights = torch.sigmoid(t.double() * (x.double() @ e.double().T))
    u = weights @ e.double() / weights.sum(2, keepdim=True)
    v = weights.mT @ x.double() / weights.sum(1)[..., None]
    q, code = grounding_losses(x, e, indices, t, backend="triton")
    torch.testing.assert_close(q.double(), (u - x).square().mean(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(code.double(), (v - e).square().mean(), rtol=1e-5, atol=1e-7)


SHIPPED = ("image_topk", "text_topk")
OTHERS = (
    *("caption_seq2seq", "pairs_image256", "pairs_nearest", "pairs_positions"),
    *("pairs_projection", "pairs_topk", "pairs_topk_padded"),
)


def wrong(path, monkeypatch):
    """Rows of a golden file that do not hold with every grounded operation on its kernels, and how many there are."""
    use_tiles(monkeypatch, scores=(64, 256, 32), losses=(256, 16, 32), sums=(64, 32))
    nearest = Config({"BM": 256, "BC": 16, "BD": 32})
    monkeypatch.setitem(nearest_triton.NEAREST, 90, {"fp32": nearest})
    # Not in an environment with the kernels alone.
    parity = pytest.importorskip("vlblocks_recipes.unimo2.parity")
    own = parity.model_config

    def on_triton(*args):
        config = own(*args)
        return replace(config, grounding=replace(config.grounding, backend="triton"))

    monkeypatch.setattr(parity, "model_config", on_triton)
    rows = list(parity.compare(parity.read_golden(path), torch.float32))
    assert any(row.name == "out.indices" for row in rows)
    return [row for row in rows if not row.ok]


@pytest.mark.parametrize("case", SHIPPED)
def test_shipped_golden_files_hold(root, case, monkeypatch):
    assert wrong(root / f"tests/golden/{case}.npz", monkeypatch) == []


@pytest.mark.parametrize("case", OTHERS)
def test_golden_files_hold(reference, case, monkeypatch):
    assert wrong(reference / f"golden/unimo2/{case}.npz", monkeypatch) == []
