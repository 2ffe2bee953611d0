"""Masked tokens, masked codes and captions."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlblocks.errors import UserError
from vlblocks.losses import (
    CaptionLoss,
    caption_loss,
    mask_codes,
    masked_grounding_loss,
    masked_rows,
    masked_token_loss,
)
from vlblocks.nn import MaskedTokenHead


def test_weighted_mean_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [4.0, 1.0]])
    labels = torch.tensor([0, 0, -100])
    assert float(masked_token_loss(logits, labels)) == pytest.approx((math.log(2) + math.log(4)) / 2)
    weight = torch.tensor([1.0, 3.0, 5.0])
    assert float(masked_token_loss(logits, labels, weight)) == pytest.approx((math.log(2) + 3 * math.log(4)) / 4)


def test_rows_are_those_with_labels():
    states = torch.arange(24.0).view(2, 3, 4)
    labels = torch.tensor([[-100, 5, -100], [7, -100, 0]])
    masked = masked_rows(states, labels)
    assert masked.labels.tolist() == [5, 7, 0]
    assert masked.positions.tolist() == [1, 3, 5]
    assert torch.equal(masked.rows, torch.stack([states[0, 1], states[1, 0], states[1, 2]]))


def test_gathered_rows_give_the_loss_and_gradient_of_all_rows():
    states = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.where(torch.rand(3, 5) < 0.4, torch.randint(7, (3, 5)), -100)
    masked = masked_rows(states, labels)
    loss = masked_token_loss(masked.rows @ weight.t(), masked.labels)
    whole = F.cross_entropy((states @ weight.t()).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, whole)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (states, weight)), torch.autograd.grad(whole, (states, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    labels = torch.tensor([[1, -100, 2], [-100, 0, 1]])
    states = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0])

    def loss(states):
        masked = masked_rows(states, labels)
        return masked_token_loss(masked.rows, masked.labels, weight, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (states,))


@pytest.mark.parametrize("labels", [torch.full((2, 3), -100), torch.zeros(0, 3, dtype=torch.long)])
def test_nothing_masked_gives_zero_loss_and_gradient(labels):
    states = torch.randn(*labels.shape, 4, requires_grad=True)
    head = torch.nn.Linear(4, 6)
    loss = masked_grounding_loss(states, labels, head.weight, bias=head.bias)
    loss.backward()
    assert loss == 0
    for x in (states, head.weight, head.bias):
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("weight", [None, torch.zeros(3)])
def test_ignored_rows_give_zero_loss_and_gradient(weight):
    logits = torch.randn(3, 5, requires_grad=True)
    labels = torch.full((3,), -100 if weight is None else 2)
    loss = masked_token_loss(logits, labels, weight)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_extreme_logits_stay_finite_and_half_precision_is_upcast():
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = masked_token_loss(logits, torch.tensor([1]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_hidden_codes_are_zero_and_labelled():
    codes, indices = torch.randn(8, 50, 4) + 3, torch.randint(2048, (8, 50))
    masked = mask_codes(codes, indices, generator=torch.Generator().manual_seed(0))
    hidden = masked.labels != -100
    assert 0.10 < hidden.float().mean() < 0.20
    assert torch.equal(masked.labels[hidden], indices[hidden])
    assert (masked.codes[hidden] == 0).all()
    assert torch.equal(masked.codes[~hidden], codes[~hidden])
    again = mask_codes(codes, indices, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.labels, masked.labels)
    assert (mask_codes(codes, indices, probability=0.0).labels == -100).all()
    assert torch.equal(mask_codes(codes, indices, probability=1.0).labels, indices)


def test_no_gradient_reaches_a_hidden_code():
    codes = torch.randn(2, 6, 4, requires_grad=True)
    masked = mask_codes(codes, torch.arange(12).view(2, 6), probability=0.5)
    masked.codes.sum().backward()
    shown = (masked.labels == -100).float()[..., None]
    assert torch.equal(codes.grad, shown.expand_as(codes))


def test_masked_grounding_predicts_the_hidden_indices():
    codebook = torch.randn(9, 4)
    indices = torch.tensor([[2, 5, 1], [8, 0, 3]])
    labels = torch.tensor([[2, -100, -100], [-100, 0, 3]])
    states = torch.randn(2, 3, 4)
    logits = states @ codebook.t()
    expected = F.cross_entropy(torch.stack([logits[0, 0], logits[1, 1], logits[1, 2]]), indices.flatten()[[0, 4, 5]])
    torch.testing.assert_close(masked_grounding_loss(states, labels, codebook), expected)
    torch.testing.assert_close(masked_grounding_loss(states / 2, labels, codebook, features=lambda x: 2 * x), expected)


def test_masked_grounding_equals_its_plain_twin_forward_and_backward():
    head = MaskedTokenHead(width=4, vocab=9, dtype=torch.float64)
    torch.nn.init.normal_(head.bias)
    codebook = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    states = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.where(torch.rand(3, 5) < 0.6, torch.randint(9, (3, 5)), -100)
    masked = masked_rows(states, labels)
    plain = masked_token_loss(head(masked.rows, codebook), masked.labels)
    leaves = (states, codebook, *head.parameters())
    expected = torch.autograd.grad(plain, leaves)
    for backend in ("auto", "reference"):
        loss = masked_grounding_loss(states, labels, codebook, bias=head.bias, features=head.features, backend=backend)
        torch.testing.assert_close(loss, plain)
        for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_caption_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [9.0, 9.0]]])
    targets = torch.tensor([[1, -100]])
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    assert float(caption_loss(logits, targets, label_smoothing=0.0)) == pytest.approx(right)
    smoothed = 0.95 * right + 0.05 * wrong
    assert float(caption_loss(logits, targets)) == pytest.approx(smoothed)
    assert float(CaptionLoss()(logits, targets)) == pytest.approx(smoothed)


def test_caption_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, 4, -100], [0, -100, -100]])
    assert torch.autograd.gradcheck(lambda x: caption_loss(x, targets), (logits,))


def test_caption_without_targets_is_zero():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = caption_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: masked_rows(torch.zeros(2, 3, 4), torch.zeros(2, 4)), "labels"),
        (lambda: masked_token_loss(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), "targets"),
        (lambda: masked_token_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2, 1)), "weight"),
        (lambda: mask_codes(torch.zeros(2, 3, 4), torch.zeros(2, 2)), "indices"),
        (lambda: mask_codes(torch.zeros(2, 3, 4), torch.zeros(2, 3), probability=15), "probability"),
        (lambda: caption_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "logits"),
        (lambda: CaptionLoss(label_smoothing=10), "label_smoothing"),
    ],
)
def test_mistakes_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
