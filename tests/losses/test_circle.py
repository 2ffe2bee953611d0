"""Circle loss."""

import math

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.losses import CircleLoss, circle_loss


def by_hand(positives, negatives, margin, scale):
    pull = sum(math.exp(-scale * max(1 + margin - p, 0) * (p - 1 + margin)) for p in positives)
    push = sum(math.exp(scale * max(n + margin, 0) * (n - margin)) for n in negatives)
    return math.log(1 + pull * push)


@pytest.mark.parametrize(("margin", "scale"), [(0.2, 1.0), (0.4, 8.0)])
def test_by_hand(margin, scale):
    positives = torch.tensor([[0.9, 0.3], [1.5, -0.5]])
    negatives = torch.tensor([[0.1, -0.7, 0.4], [0.9, 0.0, -0.1]])
    rows = [by_hand(p, n, margin, scale) for p, n in zip(positives.tolist(), negatives.tolist(), strict=True)]
    expected = torch.tensor(rows)
    torch.testing.assert_close(
        circle_loss(positives, negatives, margin=margin, scale=scale, reduction="none"), expected
    )
    torch.testing.assert_close(CircleLoss(margin=margin, scale=scale)(positives, negatives), expected.mean())
    weight = torch.tensor([1.0, 3.0])
    weighted = circle_loss(positives, negatives, margin=margin, scale=scale, weight=weight, reduction="weighted")
    torch.testing.assert_close(weighted, (expected * weight).sum() / 4)


def test_paces_are_constants_in_the_gradient():
    positives = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    negatives = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    circle_loss(positives, negatives, margin=0.25, scale=4.0).backward()
    ours = positives.grad.clone(), negatives.grad.clone()
    a, b = (1.25 - positives.detach()).clamp(min=0), (negatives.detach() + 0.25).clamp(min=0)

    def frozen(p, n):
        pull = (-4.0 * a * (p - 0.75)).exp().sum(1)
        push = (4.0 * b * (n - 0.25)).exp().sum(1)
        return (1 + pull * push).log().mean()

    assert torch.autograd.gradcheck(frozen, (positives, negatives))
    for gradient, expected in zip(
        ours, torch.autograd.grad(frozen(positives, negatives), (positives, negatives)), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_gradient_pulls_positives_up_and_pushes_negatives_down():
    positives = torch.tensor([[0.5]], requires_grad=True)
    negatives = torch.tensor([[0.5, 0.1]], requires_grad=True)
    circle_loss(positives, negatives).backward()
    assert positives.grad < 0
    assert (negatives.grad > 0).all()
    assert negatives.grad[0, 0] > negatives.grad[0, 1]


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_similarities_stay_finite(value):
    positives = torch.full((2, 3), value, requires_grad=True)
    negatives = torch.full((2, 3), -value, requires_grad=True)
    loss = circle_loss(positives, negatives, scale=64.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(positives.grad).all()
    assert torch.isfinite(negatives.grad).all()


def test_nothing_that_counts_gives_zero():
    for rows, count, weight in ((2, 3, torch.zeros(2)), (0, 3, None), (2, 0, None)):
        positives = torch.rand(rows, 2, requires_grad=True)
        negatives = torch.rand(rows, count, requires_grad=True)
        loss = circle_loss(positives, negatives, weight=weight)
        loss.backward()
        assert loss == 0
        assert torch.equal(positives.grad, torch.zeros_like(positives))
        assert torch.equal(negatives.grad, torch.zeros_like(negatives))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="negatives"):
        circle_loss(torch.zeros(2, 1), torch.zeros(3, 1))
    with pytest.raises(UserError, match="weight"):
        circle_loss(torch.zeros(2, 1), torch.zeros(2, 1), weight=torch.zeros(3))
    with pytest.raises(UserError, match="scale"):
        CircleLoss(scale=0)
