"""Matching loss and hard negatives."""

import math

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.losses import draw_hard_negatives, matching_loss, mine_hard_negatives


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


def features_of(similarity):
    """Features whose products are the similarities."""
    return similarity, torch.eye(len(similarity), dtype=similarity.dtype)


@pytest.mark.parametrize("chunk_bytes", [None, 4, 24], ids=["whole", "pair by pair", "tiles"])
def test_draws_from_features_follow_the_same_softmax(chunk_bytes):
    similarity = torch.tensor([[9.0, 0.0, 1.0, 2.0], [1.0, 9.0, 0.0, 0.5], [2.0, 0.0, 9.0, 1.0], [0.0, 1.5, 1.0, 9.0]])
    ids = torch.tensor([0, 1, 2, 1])
    draws = 1000 if chunk_bytes else 3000
    generator = torch.Generator().manual_seed(0)
    text_counts, image_counts, both = torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(4, 4)
    rows = torch.arange(4)
    for _ in range(draws):
        drawn = draw_hard_negatives(
            *features_of(similarity / 2), temperature=0.5, image_ids=ids, generator=generator, chunk_bytes=chunk_bytes
        )
        text_counts[rows, drawn.text_for_image] += 1
        image_counts[rows, drawn.image_for_text] += 1
        both[drawn.text_for_image[0], drawn.image_for_text[2]] += 1
        assert drawn.found.all()
    masked = ids[:, None] == ids[None]
    bound = 5 * 0.5 / math.sqrt(draws)
    shares = [logits.masked_fill(masked, -math.inf).softmax(dim=1) for logits in (similarity, similarity.t())]
    for counts, expected in zip((text_counts, image_counts), shares, strict=True):
        assert (counts / draws - expected).abs().max() < bound
    # Rows' and columns' draws know nothing of each other, though both see the pair of image 0 and text 2.
    assert (both / draws - torch.outer(shares[0][0], shares[1][2])).abs().max() < bound


def test_draws_from_features_can_be_repeated():
    features = torch.randn(2, 40, 8)
    first, second, other = (
        draw_hard_negatives(*features, temperature=0.1, generator=torch.Generator().manual_seed(seed), chunk_bytes=999)
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.text_for_image, other.text_for_image)


@pytest.mark.parametrize("chunk_bytes", [None, 100])
def test_drawn_negatives_are_of_other_pictures(chunk_bytes):
    ids = torch.randint(5, (40,))
    image, text = torch.randn(2, 40, 8)
    drawn = draw_hard_negatives(image, text, temperature=0.05, image_ids=ids, chunk_bytes=chunk_bytes)
    assert drawn.found.all()
    assert (ids[drawn.text_for_image] != ids).all() and (ids[drawn.image_for_text] != ids).all()
    plain = draw_hard_negatives(image, text, temperature=0.05, chunk_bytes=chunk_bytes)
    rows = torch.arange(40)
    assert (plain.text_for_image != rows).all() and (plain.image_for_text != rows).all()


def test_nothing_to_draw():
    single = draw_hard_negatives(torch.ones(1, 2), torch.ones(1, 2), temperature=1.0)
    assert (single.found.tolist(), single.text_for_image.tolist()) == ([False], [0])
    twins = draw_hard_negatives(*torch.randn(2, 3, 2), temperature=1.0, image_ids=torch.tensor([5, 5, 5]))
    assert not twins.found.any()
    assert twins.text_for_image.tolist() == twins.image_for_text.tolist() == [0, 1, 2]
    assert draw_hard_negatives(torch.zeros(0, 2), torch.zeros(0, 2), temperature=1.0).found.shape == (0,)


def test_a_diverged_step_still_draws():
    image, text = torch.randn(2, 6, 4)
    image[1] = math.nan
    text[2] = 1e38
    drawn = draw_hard_negatives(image, text, temperature=torch.tensor([0.01]))
    rows = torch.arange(6)
    assert drawn.found.all()
    assert ((drawn.text_for_image != rows) & (drawn.text_for_image < 6)).all()


def test_bf16_features_are_compared_in_float32_under_autocast():
    image, text = torch.randn(2, 30, 8).bfloat16()
    expected = draw_hard_negatives(
        image.float(), text.float(), temperature=0.1, generator=torch.Generator().manual_seed(0)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = draw_hard_negatives(image, text, temperature=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.text_for_image, expected.text_for_image)


def test_mismatched_features_are_named():
    with pytest.raises(UserError, match="text"):
        draw_hard_negatives(torch.zeros(3, 2), torch.zeros(2, 2), temperature=1.0)
