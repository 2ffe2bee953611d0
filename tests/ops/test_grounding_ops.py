"""What the dispatch adds to the references: back ends, autocast, messages."""

import pytest
import torch

from vlblocks import nn
from vlblocks.errors import UserError
from vlblocks.ops.grounding import BACKENDS, grounding_losses, grounding_scores, nearest_code, segment_sum
from vlblocks_kernels.grounding import grounding_losses_reference, grounding_scores_reference
from vlblocks_kernels.nearest import nearest_code_reference, segment_sum_reference


def draw(dtype=torch.float32):
    x, codes = torch.randn(3, 7, 16, dtype=dtype), 0.3 * torch.randn(20, 16, dtype=dtype)
    return x, codes, torch.rand(3, 20).topk(4).indices, torch.tensor([1.5]), torch.rand(3, 7) < 0.7


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_references_numbers(backend):
    x, codes, indices, t, valid = draw()
    torch.testing.assert_close(
        grounding_scores(x, codes, t, valid, backend=backend), grounding_scores_reference(x, codes, t, valid)
    )
    torch.testing.assert_close(
        grounding_losses(x, codes, indices, t, valid, backend=backend),
        grounding_losses_reference(x, codes, indices, t, valid),
    )
    found = nearest_code(x, codes, metric="cosine", backend=backend)
    assert torch.equal(found, nearest_code_reference(x, codes, "cosine")) and found.shape == x.shape[:-1]
    sums = segment_sum(x[0], found[0], 20, valid[0], backend=backend)
    torch.testing.assert_close(sums, segment_sum_reference(x[0], found[0], 20, valid[0]))


def test_temperature_may_be_a_number_or_without_dimensions():
    x, codes, indices, t, valid = draw()
    expected = grounding_scores(x, codes, t, valid), grounding_losses(x, codes, indices, t, valid)
    for other in (1.5, torch.tensor(1.5)):
        torch.testing.assert_close(
            (grounding_scores(x, codes, other, valid), grounding_losses(x, codes, indices, other, valid)), expected
        )


def test_autocast_halves_the_scores_product_alone():
    x, codes, indices, t, valid = draw()
    leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]
    losses = grounding_losses(x, codes, indices, t, valid)
    grads = torch.autograd.grad(sum(losses), leaves)
    nearest, sums = nearest_code(x, codes), segment_sum(x[0], indices[0, :1].expand(7), 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = grounding_scores(x, codes, t, valid)
        again = grounding_losses(x, codes, indices, t, valid)
        assert torch.equal(nearest_code(x, codes), nearest)
        torch.testing.assert_close(segment_sum(x[0], indices[0, :1].expand(7), 20), sums)
        assert (x @ codes.T).dtype == torch.bfloat16
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.equal(scores, grounding_scores(x.bfloat16(), codes.bfloat16(), t, valid))
    assert torch.equal(torch.stack(again), torch.stack(losses))
    for a, b in zip(torch.autograd.grad(sum(again), leaves), grads, strict=True):
        assert torch.equal(a, b)


def test_gradients_reach_bfloat16_weights_in_their_dtype():
    x, codes, indices, t, valid = draw(torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]
    losses = grounding_losses(x, codes, indices, t, valid)
    assert losses.token_loss.dtype == torch.float32
    grads = torch.autograd.grad(sum(losses), leaves)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_two_runs_are_bitwise_equal():
    x, codes, _, t, valid = draw()
    indices = torch.randint(3, (3, 4))
    leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]
    runs = [torch.autograd.grad(sum(grounding_losses(x, codes, indices, t, valid)), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_triton_where_it_cannot_run_is_refused_and_auto_does_without(monkeypatch):
    x, codes, indices, t, valid = draw()
    with pytest.raises(UserError, match="backend='triton' does not run on meta: use backend='reference'"):
        nearest_code(x.to("meta"), codes.to("meta"), backend="triton")
    expected = grounding_scores(x, codes, t, valid), grounding_losses(x, codes, indices, t, valid)
    monkeypatch.setattr("vlblocks.ops.grounding.HAS_TRITON", False)
    with pytest.raises(UserError, match="pip install triton"):
        grounding_losses(x, codes, indices, t, valid, backend="triton")
    torch.testing.assert_close(
        (grounding_scores(x, codes, t, valid), grounding_losses(x, codes, indices, t, valid)), expected
    )


def test_modules_hand_their_back_end_on(monkeypatch):
    seen = []
    for name in ("grounding_scores", "grounding_losses"):
        own = getattr(nn.grounding, name)
        monkeypatch.setattr(
            nn.grounding, name, lambda *args, own=own, backend: seen.append(backend) or own(*args, backend=backend)
        )
    x = torch.randn(2, 5, 16)
    outputs = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        grounded = nn.GroundedSpace(width=16, codes=12, picks=3, backend=backend)
        out = grounded(x)
        out.loss.backward()
        outputs.append((out.codes, out.loss, grounded.codebook.grad, grounded.temperature.grad))
    assert seen == [backend for backend in BACKENDS for _ in range(2)]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])


X, CODES = torch.ones(2, 3, 4), torch.ones(5, 4)
PICKS, TOKENS = torch.zeros(2, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    "call,named",
    [
        (lambda: grounding_scores(X, CODES, 1.0, backend="triton4"), "backend"),
        (lambda: grounding_losses(X, CODES, PICKS, 1.0, backend="fast"), "backend"),
        (lambda: nearest_code(X, CODES, backend="fast"), "backend"),
        (lambda: segment_sum(X[0], TOKENS, 5, backend="fast"), "backend"),
        (lambda: grounding_scores(X, CODES[:, :3], 1.0), "codes"),
        (lambda: grounding_scores(X[0], CODES, 1.0), "x"),
        (lambda: grounding_scores(X, CODES, torch.ones(2)), "temperature"),
        (lambda: grounding_scores(X, CODES, 1.0, torch.ones(2, 4, dtype=torch.bool)), "valid"),
        (lambda: grounding_scores(X, CODES, 1.0, torch.ones(2, 3)), "valid"),
        (lambda: grounding_losses(X, CODES, PICKS[:1], 1.0), "indices"),
        (lambda: nearest_code(X, CODES, metric="dot"), "metric"),
        (lambda: nearest_code(X, CODES[:0]), "codes"),
        (lambda: segment_sum(X[0], TOKENS[:2], 5), "indices"),
        (lambda: segment_sum(X[0], TOKENS, 5, torch.ones(2, dtype=torch.bool)), "valid"),
    ],
)
def test_a_mistake_is_named_in_one_line(call, named):
    with pytest.raises(UserError, match=named) as caught:
        call()
    assert "\n" not in str(caught.value)
