"""Retrieval metrics against slow references that are written from their definitions."""

import math
from collections import Counter
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlblocks.errors import UserError
from vlblocks.evaluation import retrieval
from vlblocks.evaluation.retrieval import (
    FeatureScores,
    bootstrap_intervals,
    chance_levels,
    mean_metrics,
    retrieval_metrics,
    retrieval_ranks,
    score_blocks,
    split_folds,
)


def slow_ranks(scores, owner):
    """Rank of every query by counting in Python; a wrong candidate that ties stands before the right one."""
    images, texts = scores.shape
    score = scores.tolist()
    by_text = [
        1 + sum(i != owner[t] and score[i][t] >= score[owner[t]][t] for i in range(images)) for t in range(texts)
    ]
    by_image = []
    for i in range(images):
        own = [t for t in range(texts) if owner[t] == i]
        ranks = [1 + sum(owner[u] != i and score[i][u] >= score[i][t] for u in range(texts)) for t in own]
        by_image.append(min(ranks, default=0))
    return by_text, by_image


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    images=st.integers(1, 7),
    texts=st.integers(1, 15),
    levels=st.integers(1, 6),
    block=st.sampled_from([1, 17, 10_000]),
    seed=st.integers(0, 10_000),
)
def test_ranks_equal_the_slow_reference_with_ties_several_captions_and_distractors(images, texts, levels, block, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (images, texts), generator=generator).float()
    owner = torch.randint(images, (texts,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_BLOCK_ELEMENTS", block)
        ranks = retrieval_ranks(scores, owner)
    by_text, by_image = slow_ranks(scores, owner.tolist())
    assert ranks.text_to_image.tolist() == by_text
    assert ranks.image_to_text.tolist() == by_image

    metrics = retrieval_metrics(scores, owner, ks=(1, 3))
    queries = [rank for rank in by_image if rank]
    assert metrics["text_to_image_r1"] == pytest.approx(sum(r <= 1 for r in by_text) / texts)
    assert metrics["image_to_text_r3"] == pytest.approx(sum(r <= 3 for r in queries) / len(queries))
    assert metrics["text_to_image_median_rank"] == median(by_text)
    assert metrics["image_to_text_median_rank"] == median(queries)
    assert metrics["gallery_size"] == images


def test_perfect_constant_and_half_precision_scores():
    owner = torch.arange(4).repeat_interleave(2)
    perfect = torch.nn.functional.one_hot(owner, 4).T.to(torch.bfloat16)
    assert retrieval_metrics(perfect, owner)["image_to_text_r1"] == 1.0
    assert retrieval_metrics(perfect, owner)["text_to_image_r1"] == 1.0
    constant = retrieval_metrics(torch.zeros(4, 8), owner)
    assert constant["text_to_image_median_rank"] == 4
    # Six captions of other images tie with an image's own two.
    assert constant["image_to_text_median_rank"] == 7


def test_a_score_that_is_no_number_never_helps():
    owner = torch.arange(3)
    assert retrieval_ranks(torch.full((3, 3), float("nan")), owner).text_to_image.tolist() == [3, 3, 3]
    assert retrieval_ranks(torch.full((3, 3), float("nan")), owner).image_to_text.tolist() == [3, 3, 3]
    scores = torch.eye(3)
    scores[1, 0] = float("nan")
    assert retrieval_ranks(scores, owner).text_to_image.tolist() == [2, 1, 1]
    assert retrieval_ranks(scores, owner).image_to_text.tolist() == [1, 2, 1]


def test_lists_and_arrays_are_taken_as_tensors_are():
    scores, owner = torch.randn(5, 9), torch.tensor([0, 1, 1, 2, 4, 3, 3, 0, 2])
    expected = retrieval_metrics(scores, owner)
    read_only = scores.numpy().copy()
    read_only.setflags(write=False)
    backwards = scores.numpy()[:, ::-1].copy()[:, ::-1]
    for own in (owner.tolist(), tuple(owner.tolist()), owner.numpy(), owner.numpy().astype(np.int32)):
        for given_scores in (scores.tolist(), scores.numpy(), read_only, backwards, scores.numpy().astype(np.float64)):
            assert retrieval_metrics(given_scores, own) == expected
    # Whole numbers are scores, too, and NumPy's median is the same.
    whole = np.array([[3, 1, 2], [1, 3, 2]])
    assert retrieval_metrics(whole, [0, 1, 1])["text_to_image_median_rank"] == np.median([1, 1, 2])
    assert chance_levels(owner.tolist()) == chance_levels(owner.numpy()) == chance_levels(owner)


def test_scores_of_features_are_ranked_block_by_block(monkeypatch):
    image, text = torch.randn(2, 11, 6).double(), torch.randn(23, 6).double()
    image, owner = image[0], torch.randint(11, (23,))
    expected = retrieval_ranks(image @ text.T, owner)
    assert [start for start, _ in score_blocks(FeatureScores(image, text))] == [0]
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", 3 * 23)
    scores = FeatureScores(image, text)
    assert [(start, len(block)) for start, block in score_blocks(scores)] == [(0, 3), (3, 3), (6, 3), (9, 2)]
    for found, right in zip(retrieval_ranks(scores, owner), expected, strict=True):
        assert torch.equal(found, right)
    images, texts = torch.tensor([4, 4, 0]), torch.tensor([1, 22, 7])
    torch.testing.assert_close(scores.pairs(images, texts), (image @ text.T)[images, texts])
    part = scores.part(torch.tensor([2, 9]), torch.tensor([5, 6, 7]))
    torch.testing.assert_close(part.rows(0, 2), (image @ text.T)[[2, 9]][:, 5:8])


def test_the_whole_of_a_large_gallery_is_never_held(monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", 40)
    largest, rows = 0, FeatureScores.rows

    def watched(self, start, stop):
        nonlocal largest
        block = rows(self, start, stop)
        largest = max(largest, block.numel())
        return block

    monkeypatch.setattr(FeatureScores, "rows", watched)
    retrieval_metrics(FeatureScores(torch.randn(30, 4), torch.randn(20, 4)), torch.arange(20))
    assert largest == 40


def test_folds_by_hand():
    # Images 0 to 4 with 1, 2, 0, 1 and 2 captions, which need not come in order.
    first, second = split_folds([4, 1, 0, 3, 1, 4], 5, 2)
    assert first.images.tolist() == [0, 1, 2] and second.images.tolist() == [3, 4]
    assert first.texts.tolist() == [1, 2, 4] and first.text_image.tolist() == [1, 0, 1]
    assert second.texts.tolist() == [0, 3, 5] and second.text_image.tolist() == [1, 0, 1]
    assert [part.images.tolist() for part in split_folds([0, 1, 2], 3, 3)] == [[0], [1], [2]]
    with pytest.raises(UserError, match="--folds: 4 parts of 3 images; give at most 3"):
        split_folds([0, 1, 2], 3, 4)


def test_metrics_of_folds_are_means():
    folds = [{"text_to_image_r1": 0.25, "gallery_size": 3.0}, {"text_to_image_r1": 0.75, "gallery_size": 2.0}]
    assert mean_metrics(folds) == {"text_to_image_r1": 0.5, "gallery_size": 2.5}


def test_wrong_shapes_and_indices_are_named():
    with pytest.raises(UserError, match="scores: not numbers in rows of one length"):
        retrieval_metrics([[1.0, 2.0], [3.0]], [0, 1])
    with pytest.raises(UserError, match=r"scores: expected \[images, texts\], got \[3\]"):
        retrieval_metrics([1.0, 2.0, 3.0], [0, 1, 1])
    with pytest.raises(UserError, match=r"text_image: holds torch\.float64; give the whole number"):
        retrieval_metrics(torch.zeros(2, 2), [0.0, 1.0])
    with pytest.raises(UserError, match=r"features: expected \[I, F\] and \[T, F\]"):
        FeatureScores(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="text_image"):
        retrieval_ranks(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="holds 2, but images are 0 to 1"):
        retrieval_ranks(torch.zeros(2, 3), torch.tensor([0, 1, 2]))
    with pytest.raises(UserError, match="nothing to rank"):
        retrieval_ranks(torch.zeros(2, 0), torch.zeros(0, dtype=torch.long))


def slow_bootstrap(ranks, resamples, generator):
    """The resampled values of each metric, written out: draw images, gather their queries, compute."""
    by_text, by_image, owner = (part.tolist() for part in ranks)
    queries = [i for i, rank in enumerate(by_image) if rank]
    values = {"text_to_image_r1": [], "image_to_text_median_rank": [], "text_to_image_median_rank": []}
    drawn = torch.randint(len(queries), (resamples, len(queries)), generator=generator)
    for row in drawn.tolist():
        times = Counter(queries[j] for j in row)
        texts = [rank for rank, image in zip(by_text, owner, strict=True) for _ in range(times[image])]
        images = [by_image[i] for i in times.elements()]
        values["text_to_image_r1"].append(sum(r <= 1 for r in texts) / len(texts))
        values["text_to_image_median_rank"].append(median(texts))
        values["image_to_text_median_rank"].append(median(images))
    return {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}


def test_bootstrap_equals_the_slow_one_and_draws_captions_with_their_image():
    owner = torch.tensor([0, 0, 0, 1, 3, 3, 4, 5, 5])  # image 2 has no caption
    ranks = retrieval_ranks(torch.randn(6, 9), owner)
    found = bootstrap_intervals(ranks, resamples=50, level=0.8, seed=3)
    slow = slow_bootstrap(ranks, 50, torch.Generator().manual_seed(3))
    for name, values in slow.items():
        assert found[name] == pytest.approx(torch.quantile(values, torch.tensor([0.1, 0.9]).double()).tolist())


def test_bootstrap_is_seeded_chunked_alike_and_covers_the_estimate(monkeypatch):
    owner = torch.arange(60).repeat_interleave(5)
    scores = torch.randn(60, 300) + 2.5 * torch.nn.functional.one_hot(owner, 60).T
    ranks = retrieval_ranks(scores, owner)
    first = bootstrap_intervals(ranks, resamples=200)
    assert first == bootstrap_intervals(ranks, resamples=200)
    assert first != bootstrap_intervals(ranks, resamples=200, seed=1)
    estimates = retrieval_metrics(scores, owner)
    for name, (low, high) in first.items():
        assert low <= estimates[name] <= high
    narrow = bootstrap_intervals(ranks, resamples=200, level=0.5)["text_to_image_r1"]
    wide = first["text_to_image_r1"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    # Chunks draw one after the other from one generator, so their size must not matter.
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", 4 * 300 * 7)
    assert bootstrap_intervals(ranks, resamples=200) == first
    with pytest.raises(UserError, match="level"):
        bootstrap_intervals(ranks, level=95)


def test_chance_is_exact_for_several_captions():
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    levels = chance_levels(owner, images=4, ks=(1, 3, 20))
    assert levels["text_to_image_r1"] == 0.25
    assert levels["text_to_image_r20"] == 1.0
    assert levels["text_to_image_median_rank"] == 2.5
    for k in (1, 3):
        expected = sum(1 - math.comb(9 - m, k) / math.comb(9, k) for m in (3, 1, 5)) / 3
        assert levels[f"image_to_text_r{k}"] == pytest.approx(expected, abs=1e-12)
    assert levels["image_to_text_r20"] == 1.0


def test_chance_median_of_single_captions_is_the_middle_of_the_gallery():
    for count in (1, 2, 7, 1000):
        levels = chance_levels(torch.arange(count))
        assert levels["image_to_text_median_rank"] == levels["text_to_image_median_rank"] == (count + 1) / 2


def test_random_scores_land_on_the_chance_levels():
    owner = torch.arange(25).repeat_interleave(4)
    runs = [retrieval_metrics(torch.randn(25, 100), owner) for _ in range(120)]
    levels = chance_levels(owner)
    for name in ("text_to_image_r1", "text_to_image_r10", "image_to_text_r1", "image_to_text_r10"):
        assert sum(run[name] for run in runs) / len(runs) == pytest.approx(levels[name], abs=0.012)
