"""Matching loss and hard negatives."""

import math

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.losses import matching_loss, mine_hard_negatives


def test_mean_over_what_is_valid_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [5.0, -5.0], [0.0, 3.0]])
    labels = torch.tensor([1, 1, -100, 0])
    losses = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), math.log1p(math.exp(3))]
    assert float(matching_loss(logits, labels)) == pytest.approx(sum(losses) / 3)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert float(matching_loss(logits, labels, weight)) == pytest.approx((losses[0] + losses[2]) / 2)


def test_gradcheck():
    logits = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 0, -100, 1])
    assert torch.autograd.gradcheck(lambda x: matching_loss(x, labels, torch.tensor([1.0, 2.0, 1.0, 0.5])), (logits,))


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero(rows):
    logits = torch.randn(rows, 2, requires_grad=True)
    loss = matching_loss(logits, torch.ones(rows, dtype=torch.long), torch.zeros(rows))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = matching_loss(logits, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert torch.isfinite(logits.grad).all()


def test_negatives_are_never_of_the_same_picture():
    ids = torch.tensor([0, 1, 0, 2, 1, 3])
    similarity = torch.randn(6, 6) + 20 * (ids[:, None] == ids[None])
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        negatives = mine_hard_negatives(similarity, image_ids=ids, generator=generator)
        assert negatives.found.all()
        assert (ids[negatives.text_for_image] != ids).all()
        assert (ids[negatives.image_for_text] != ids).all()
        plain = mine_hard_negatives(similarity, generator=generator)
        assert (plain.text_for_image != torch.arange(6)).all()
        assert (plain.image_for_text != torch.arange(6)).all()


def test_negatives_follow_the_softmax_of_rows_and_of_columns():
    similarity = torch.tensor([[9.0, 0.0, 1.0, 2.0], [1.0, 9.0, 0.0, 0.5], [2.0, 0.0, 9.0, 1.0], [0.0, 1.5, 1.0, 9.0]])
    ids = torch.tensor([0, 1, 2, 1])
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    text_counts, image_counts = torch.zeros(4, 4), torch.zeros(4, 4)
    rows = torch.arange(4)
    for _ in range(draws):
        negatives = mine_hard_negatives(similarity, image_ids=ids, generator=generator)
        text_counts[rows, negatives.text_for_image] += 1
        image_counts[rows, negatives.image_for_text] += 1
    masked = ids[:, None] == ids[None]
    for counts, logits in ((text_counts, similarity), (image_counts, similarity.t())):
        expected = logits.masked_fill(masked, -math.inf).softmax(dim=1)
        # Five standard deviations of a binomial share of 4000 draws.
        assert (counts / draws - expected).abs().max() < 5 * 0.5 / math.sqrt(draws)


def test_generator_makes_the_draw_repeatable():
    similarity = torch.randn(32, 32)
    first, second, other = (
        mine_hard_negatives(similarity, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.text_for_image, second.text_for_image)
    assert torch.equal(first.image_for_text, second.image_for_text)
    assert not torch.equal(first.text_for_image, other.text_for_image)


def test_no_negative_to_be_had():
    single = mine_hard_negatives(torch.tensor([[3.0]]))
    assert single.found.tolist() == [False]
    assert single.text_for_image.tolist() == single.image_for_text.tolist() == [0]
    twins = mine_hard_negatives(torch.randn(3, 3), image_ids=torch.tensor([5, 5, 5]))
    assert twins.found.tolist() == [False] * 3
    assert twins.text_for_image.tolist() == twins.image_for_text.tolist() == [0, 1, 2]
    empty = mine_hard_negatives(torch.zeros(0, 0))
    assert all(len(field) == 0 for field in empty)


def test_extreme_similarities_pick_the_hardest():
    similarity = torch.tensor([[0.0, 1e3, -1e4], [1e4, 0.0, -1e3], [-1e4, 1e4, 0.0]], dtype=torch.bfloat16)
    negatives = mine_hard_negatives(similarity)
    assert negatives.text_for_image.tolist() == [1, 0, 1]
    assert negatives.image_for_text.tolist() == [1, 2, 1]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_diverged_model_still_gets_negatives(broken):
    similarity = torch.randn(4, 4)
    similarity[1, 2:] = broken
    ids = torch.tensor([0, 1, 0, 2])
    for logits in (similarity, torch.full((4, 4), broken)):
        negatives = mine_hard_negatives(logits, image_ids=ids)
        assert negatives.found.all()
        assert (ids[negatives.text_for_image] != ids).all() and (ids[negatives.image_for_text] != ids).all()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="similarity"):
        mine_hard_negatives(torch.zeros(2, 3))
    with pytest.raises(UserError, match="image_ids"):
        mine_hard_negatives(torch.zeros(2, 2), image_ids=torch.zeros(3))
    with pytest.raises(UserError, match="logits"):
        matching_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="weight"):
        matching_loss(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), torch.zeros(1))
