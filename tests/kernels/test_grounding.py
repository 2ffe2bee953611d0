"""The plain references of the grounding lookup and of the nearest code, against literal transcriptions in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlblocks_kernels.grounding import (
    CHUNK_BYTES,
    grounding_losses_reference,
    grounding_scores_reference,
    soft_means_reference,
)
from vlblocks_kernels.nearest import nearest_code_reference, segment_sum_reference


def eager(x, codes, indices, t, valid):
    """The specification's items 13, 15 and 16, example by example, with one-hot lookups and only real tokens."""
    scores, token_errors, code_errors = [], [], []
    for b in range(len(x)):
        tokens = x[b, valid[b]]
        similarity = torch.sigmoid(t * tokens @ codes.T)
        scores.append(similarity.sum(0))
        if not valid[b].any():
            continue
        one_hot = torch.nn.functional.one_hot(indices[b], len(codes)).to(x.dtype)
        picked, a = one_hot @ codes, similarity @ one_hot.T
        v = a.T @ tokens / (a.sum(0)[:, None] + 1e-18)
        u = a @ picked / (a.sum(1)[:, None] + 1e-18)
        code_errors.append((v - picked.detach()) ** 2)
        token_errors.append((u - tokens.detach()) ** 2)
    none = (x * 0).sum()
    q = torch.cat(token_errors).mean() if token_errors else none
    e = torch.stack(code_errors).mean() if code_errors else none
    return torch.stack(scores), q, e


def draw(batch=3, tokens=7, codes=9, picks=4, width=5, *, share=0.7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=g, dtype=dtype)
    e = torch.randn(codes, width, generator=g, dtype=dtype)
    indices = torch.rand(batch, codes, generator=g).topk(picks).indices
    valid = torch.rand(batch, tokens, generator=g) < share
    return x, e, indices, torch.tensor([1.3], dtype=dtype), valid


sizes = st.integers(1, 6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    batch=sizes,
    tokens=sizes,
    codes=sizes,
    width=sizes,
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    chunk=st.sampled_from([1, 64, 500, CHUNK_BYTES]),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_transcription_forward_and_backward(batch, tokens, codes, width, share, chunk, seed):
    picks = max(1, codes // 2)
    x, e, indices, t, valid = draw(batch, tokens, codes, picks, width, share=share, seed=seed)
    leaves = [tensor.requires_grad_() for tensor in (x, e, t)]
    scores, q, code = eager(x, e, indices, t, valid)
    torch.testing.assert_close(grounding_scores_reference(x, e, t, valid, chunk_bytes=chunk), scores.detach())
    ours = grounding_losses_reference(x, e, indices, t, valid)
    torch.testing.assert_close(ours, (q, code))
    for weights in ((1.0, 0.25), (0.0, 1.0)):
        theirs = torch.autograd.grad(weights[0] * q + weights[1] * code, leaves, retain_graph=True, allow_unused=True)
        mine = torch.autograd.grad(weights[0] * ours[0] + weights[1] * ours[1], leaves, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_all_valid_equals_no_validity():
    x, e, indices, t, _ = draw()
    whole = torch.ones(x.shape[:2], dtype=torch.bool)
    assert torch.equal(grounding_scores_reference(x, e, t), grounding_scores_reference(x, e, t, whole))
    torch.testing.assert_close(
        grounding_losses_reference(x, e, indices, t), grounding_losses_reference(x, e, indices, t, whole)
    )


@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck_of_the_soft_means(padded):
    x, e, indices, t, valid = draw()
    valid[1] = False
    leaves = [tensor.requires_grad_() for tensor in (x, e[indices], t)]
    assert torch.autograd.gradcheck(
        lambda x, p, t: tuple(soft_means_reference(x, p, t, valid if padded else None)), leaves
    )


def test_gradient_equals_differences_with_frozen_targets():
    x, e, indices, t, valid = draw()
    leaves = [tensor.requires_grad_() for tensor in (x, e, t)]

    def frozen(x, e, t, x0, e0):
        means = soft_means_reference(x, e[indices], t, valid)
        q = (means.tokens - x0)[valid].square().mean()
        return q + 0.25 * (means.codes - e0[indices])[valid.any(1)].square().mean()

    targets = (x.detach().clone(), e.detach().clone())
    assert torch.autograd.gradcheck(lambda *at: frozen(*at, *targets), leaves)
    losses = grounding_losses_reference(x, e, indices, t, valid)
    ours = torch.autograd.grad(losses.token_loss + 0.25 * losses.code_loss, leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(frozen(*leaves, *targets), leaves))


def test_what_padding_holds_reaches_nothing():
    x, e, indices, t, valid = draw()
    valid[1] = False
    found = []
    for filling in (0.0, 1e30, float("inf"), float("nan")):
        filled = x.masked_fill(~valid[..., None], filling)
        leaves = [tensor.clone().requires_grad_() for tensor in (filled, e, t)]
        losses = grounding_losses_reference(leaves[0], leaves[1], indices, leaves[2], valid)
        scores = grounding_scores_reference(filled, e, t, valid)
        found.append([scores, *losses, *torch.autograd.grad(losses.token_loss + losses.code_loss, leaves)])
    assert all(tensor.isfinite().all() for tensor in found[0])
    assert (found[0][3][~valid] == 0).all() and (found[0][0][1] == 0).all()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_an_example_without_tokens_changes_no_mean():
    x, e, indices, t, valid = draw(batch=3)
    valid[:2, 0], valid[2] = True, False
    with_it = grounding_losses_reference(x, e, indices, t, valid)
    torch.testing.assert_close(with_it, grounding_losses_reference(x[:2], e, indices[:2], t, valid[:2]))


@pytest.mark.parametrize("batch,tokens", [(2, 0), (0, 3)])
def test_nothing_at_all_gives_zero_losses_and_gradients(batch, tokens):
    x, e, _, t, _ = draw(batch, tokens)
    x.requires_grad_()
    e.requires_grad_()
    indices = torch.zeros(batch, 2, dtype=torch.long)
    assert torch.equal(grounding_scores_reference(x, e, t), torch.zeros(batch, len(e), dtype=x.dtype))
    losses = grounding_losses_reference(x, e, indices, t)
    assert losses == (0, 0)
    assert all((grad == 0).all() for grad in torch.autograd.grad(sum(losses), (x, e)))


def test_order_of_tokens_and_padding_between_them_do_not_matter():
    x, e, indices, t, valid = draw(tokens=12)
    order = torch.randperm(24)
    longer = torch.cat([x, torch.randn_like(x)], dim=1)[:, order]
    known = torch.cat([valid, torch.zeros_like(valid)], dim=1)[:, order]
    torch.testing.assert_close(
        grounding_scores_reference(longer, e, t, known), grounding_scores_reference(x, e, t, valid)
    )
    torch.testing.assert_close(
        grounding_losses_reference(longer, e, indices, t, known), grounding_losses_reference(x, e, indices, t, valid)
    )


def test_temperature_is_a_scale_of_the_tokens():
    x, e, indices, t, valid = draw()
    torch.testing.assert_close(
        grounding_scores_reference(4 * x, e, t / 4, valid), grounding_scores_reference(x, e, t, valid)
    )
    # A scale of x is one of q's target, too; the codes' means scale with x.
    scaled = soft_means_reference(4 * x, e[indices], t / 4, valid)
    plain = soft_means_reference(x, e[indices], t, valid)
    torch.testing.assert_close(scaled.tokens, plain.tokens)
    torch.testing.assert_close(scaled.codes, 4 * plain.codes)


def test_all_codes_picked_is_the_mean_over_the_codebook():
    x, e, _, t, _ = draw(codes=6)
    weights = torch.sigmoid(t * x @ e.T)
    expected = (weights @ e / weights.sum(-1, keepdim=True) - x).square().mean()
    for order in (torch.arange(6), torch.randperm(6)):
        losses = grounding_losses_reference(x, e, order.expand(len(x), 6), t)
        torch.testing.assert_close(losses.token_loss, expected)


def test_codes_far_from_every_token_give_no_nan_in_float32():
    x = torch.ones(1, 3, 4, requires_grad=True)
    codes = torch.full((2, 4), -100.0, requires_grad=True)
    losses = grounding_losses_reference(x, codes, torch.tensor([[0, 1]]), 100.0)
    grads = torch.autograd.grad(sum(losses), (x, codes))
    assert losses.token_loss.item() == 1.0 and losses.code_loss.item() == 10000.0
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-6)])
def test_low_precision_stays_near_float64_and_gives_float32(dtype, tolerance):
    x, e, indices, t, valid = draw(4, 200, 50, 8, 32)
    x, e = x.to(dtype), (e * 0.1).to(dtype)
    scores = grounding_scores_reference(x, e, t.float(), valid)
    losses = grounding_losses_reference(x, e, indices, t.float(), valid)
    assert scores.dtype == losses.token_loss.dtype == torch.float32
    expected, q, code = eager(x.double(), e.double(), indices, t, valid)
    assert (scores - expected).norm() < tolerance * expected.norm()
    # The losses differ from float64 by float32 arithmetic alone: a half type's inputs are exact in it.
    torch.testing.assert_close(losses, (q.float(), code.float()), rtol=1e-5, atol=1e-6)


def test_scores_hold_chunks_only(largest_tensor):
    batch, tokens, codes = 4, 300, 4000
    x, e, t = torch.randn(batch, tokens, 8), torch.randn(codes, 8), torch.ones(1)
    valid = torch.rand(batch, tokens) < 0.5
    for dtype in (torch.float32, torch.bfloat16):
        with largest_tensor() as mode:
            grounding_scores_reference(x.to(dtype), e.to(dtype), t, valid, chunk_bytes=2**20)
        assert mode.bytes <= 2**20
    with largest_tensor() as mode:
        torch.sigmoid(x @ e.T)
    assert mode.bytes == 4 * batch * tokens * codes


def test_scores_and_losses_need_only_what_the_picked_codes_need_with_gradients(largest_tensor):
    batch, tokens, codes, width = 4, 64, 4096, 8
    x = torch.randn(batch, tokens, width, requires_grad=True)
    e = torch.randn(codes, width, requires_grad=True)
    t = torch.ones(1, requires_grad=True)
    with largest_tensor() as mode:
        scores = grounding_scores_reference(x, e, t, chunk_bytes=2**18)
        losses = grounding_losses_reference(x, e, scores.topk(16).indices, t)
        sum(losses).backward()
    assert not scores.requires_grad
    assert mode.bytes <= max(2**18, 4 * codes * width)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("chunk", [1, 300, CHUNK_BYTES])
def test_nearest_code_equals_all_distances(metric, chunk):
    x, e = torch.randn(3, 11, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    if metric == "l2":
        expected = torch.cdist(x.flatten(0, 1), e).argmin(1).view(3, 11)
    else:
        expected = torch.nn.functional.cosine_similarity(x[:, :, None], e, dim=-1).argmax(-1)
    assert torch.equal(nearest_code_reference(x, e, metric, chunk_bytes=chunk), expected)


@pytest.mark.parametrize("columns", [3, 4096])
def test_nearest_code_takes_the_lowest_index_of_equals_also_over_chunks(columns, monkeypatch):
    monkeypatch.setattr("vlblocks_kernels.nearest.COLUMNS", columns)
    codes = torch.randn(4, 5).repeat(5, 1)
    x = torch.randn(200, 5)
    found = nearest_code_reference(x, codes)
    assert torch.equal(found, torch.cdist(x, codes[:4]).argmin(1)) and found.max() == 3
    spread = torch.randn(20, 5)
    assert torch.equal(nearest_code_reference(x, spread), torch.cdist(x, spread).argmin(1))


def test_nearest_code_holds_chunks_only(largest_tensor):
    x, e = torch.randn(5000, 4), torch.randn(6000, 4)
    with largest_tensor() as mode:
        nearest_code_reference(x, e, chunk_bytes=2**18)
    assert mode.bytes <= 2**18


@pytest.mark.parametrize("segments", [1, 5, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_segment_sum_equals_the_one_hot_product(segments, padded):
    x = torch.randn(30, 4, dtype=torch.float64)
    indices = torch.randint(segments, (30,))
    valid = torch.rand(30) < 0.5 if padded else None
    one_hot = torch.nn.functional.one_hot(indices, segments).double()
    if valid is not None:
        one_hot = one_hot * valid[:, None]
        expected = one_hot.T @ x
        x[~valid] = float("nan")
    else:
        expected = one_hot.T @ x
    found = segment_sum_reference(x, indices, segments, valid)
    torch.testing.assert_close(found.sums, expected)
    assert torch.equal(found.counts, one_hot.sum(0).long())


def test_segment_sum_of_nothing():
    found = segment_sum_reference(torch.empty(0, 3), torch.empty(0, dtype=torch.long), 4)
    assert torch.equal(found.sums, torch.zeros(4, 3)) and found.counts.tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [4096, CHUNK_BYTES])
def test_memory_that_nobody_wrote_reaches_nothing(dtype, chunk, poisoned_memory):
    """At sizes where products of half types read past a row's end."""
    for tokens in (17, 33, 40):
        x, e, indices, t, valid = draw(2, tokens, 403, 50, 128, dtype=torch.float32)
        x, e = x.to(dtype).requires_grad_(), (e / 8).to(dtype).requires_grad_()
        q, code = grounding_losses_reference(x, e, indices, t, valid)
        found = [q, code, *torch.autograd.grad(q + code, (x, e))]
        found += [
            grounding_scores_reference(x, e, t, valid, chunk_bytes=chunk),
            *soft_means_reference(x, e[indices], t),
        ]
        flat, codes = x.detach().flatten(0, 1), nearest_code_reference(x.detach(), e.detach(), chunk_bytes=chunk)
        found.append(segment_sum_reference(flat, codes.flatten(), 403).sums)
        assert all(part.isfinite().all() for part in found), tokens
        assert codes.max() < 403
