"""Image-text retrieval: ranks, recall, intervals, chance, and re-ranking of a shortlist by a slower scorer.

A rank is 1 for the best. Ties are counted against the query: a wrong candidate with the same score (or a score that is
no number) stands before the right one, so that a model that gives every pair the same score is at the bottom, not at
the top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlblocks.errors import UserError

__all__ = [
    "Reranked",
    "RetrievalRanks",
    "bootstrap_intervals",
    "chance_levels",
    "rerank",
    "retrieval_metrics",
    "retrieval_ranks",
    "summarize_ranks",
]

DEFAULT_KS = (1, 5, 10)
_BLOCK_ELEMENTS = 16_000_000  # scores that are compared at once

PairScorer = Callable[[Tensor, Tensor], Tensor]


class RetrievalRanks(NamedTuple):
    """Where each query found what it looked for; 1 is best.

    Attributes:
        text_to_image: [T] long: rank of the text's image among I images.
        image_to_text: [I] long: rank of the image's best caption, its other captions aside; 0 = image without
            one.
        text_image: [T] long: the image that each text belongs to.
    """

    text_to_image: Tensor
    image_to_text: Tensor
    text_image: Tensor


def retrieval_metrics(scores: Tensor, text_image: Tensor, *, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """R@k and median rank in both directions, and the gallery's size.

    Args:
        scores: [I, T], higher is more alike; any float type.
        text_image: [T] long, the row of ``scores`` that each text belongs to. Images without a text are distractors.
            Of a `vlblocks.data.Gallery`: ``torch.tensor(gallery.owners)``.
        ks: for which k recall is given.

    Returns:
        ``text_to_image_r{k}``, ``image_to_text_r{k}`` in [0, 1], ``text_to_image_median_rank``,
        ``image_to_text_median_rank`` and ``gallery_size`` (number of images).

    Raises:
        UserError: shapes or indices do not fit together, or there is nothing to rank.
    """
    return summarize_ranks(retrieval_ranks(scores, text_image), ks=ks)


def retrieval_ranks(scores: Tensor, text_image: Tensor) -> RetrievalRanks:
    """Ranks in both directions for scores [I, T] and text_image [T]; holds no second copy of the scores.

    Raises:
        UserError: as :func:`retrieval_metrics`.
    """
    text_image = _check(scores, text_image)
    images, texts = scores.shape
    own = scores[text_image, torch.arange(texts, device=scores.device)]  # [T]
    # A score that is no number is worse than any other, and any other then stands before it.
    known = own.masked_fill(own.isnan(), float("-inf"))
    best = known.new_full((images,), float("-inf")).scatter_reduce(0, text_image, known, "amax")

    by_text = torch.zeros(texts, dtype=torch.long, device=scores.device)
    by_image = torch.empty(images, dtype=torch.long, device=scores.device)
    rows = max(1, _BLOCK_ELEMENTS // texts)
    for start in range(0, images, rows):
        block = scores[start : start + rows]
        by_text += (~(block < known)).sum(0)
        by_image[start : start + rows] = (~(block < best[start : start + rows, None])).sum(1)
    own_ahead = torch.zeros_like(by_image).index_add_(0, text_image, (~(own < best[text_image])).long())
    by_image += 1 - own_ahead
    captions = torch.bincount(text_image, minlength=images)
    return RetrievalRanks(by_text, by_image.masked_fill(captions == 0, 0), text_image)


def summarize_ranks(ranks: RetrievalRanks, *, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """The metrics of :func:`retrieval_metrics` from ranks."""
    metrics: dict[str, float] = {}
    for direction, found in _directions(ranks):
        for k in ks:
            metrics[f"{direction}_r{k}"] = float((found <= k).double().mean())
        metrics[f"{direction}_median_rank"] = _median(found)
    metrics["gallery_size"] = float(len(ranks.image_to_text))
    return metrics


def bootstrap_intervals(
    ranks: RetrievalRanks,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every R@k and median rank (Efron, 1979), as name -> (low, high).

    Whole images are drawn with replacement, each with all its captions, because captions of one image are not
    independent. The gallery stays as it is; only the queries vary.

    Raises:
        UserError: ``resamples`` below 2 or ``level`` outside (0, 1).
    """
    if resamples < 2:
        raise UserError(f"resamples: {resamples} gives no interval; use at least 2")
    if not 0 < level < 1:
        raise UserError(f"level: {level} is not between 0 and 1; 0.95 is usual")
    text_image = ranks.text_image.cpu()
    queries = ranks.image_to_text.cpu().nonzero()[:, 0]  # images with captions
    cluster = torch.full((len(ranks.image_to_text),), -1).scatter(0, queries, torch.arange(len(queries)))
    clusters = {"text_to_image": cluster[text_image], "image_to_text": torch.arange(len(queries))}
    sorted_ranks = {}
    for direction, found in _directions(ranks):
        order = found.cpu().argsort(stable=True)
        sorted_ranks[direction] = found.cpu()[order], clusters[direction][order]

    generator = torch.Generator().manual_seed(seed)
    draws: dict[str, list[Tensor]] = {}
    chunk = max(1, _BLOCK_ELEMENTS // (4 * max(len(text_image), len(queries))))
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = torch.randint(len(queries), (count, len(queries)), generator=generator)
        times = torch.zeros(count, len(queries), dtype=torch.long).scatter_add_(1, drawn, torch.ones_like(drawn))
        for direction, (found, owner) in sorted_ranks.items():
            cumulative = times[:, owner].cumsum(1)  # [count, N] queries up to each rank, in the drawn sample
            total = cumulative[:, -1:]
            for k in ks:
                inside = int((found <= k).sum())
                hits = cumulative[:, inside - 1] if inside else torch.zeros(count)
                draws.setdefault(f"{direction}_r{k}", []).append(hits.double() / total[:, 0])
            middle = torch.cat([(total - 1) // 2, total // 2], dim=1)
            at = torch.searchsorted(cumulative, middle, right=True)
            draws.setdefault(f"{direction}_median_rank", []).append(found[at].double().mean(1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    intervals = {}
    for name, parts in draws.items():
        low, high = torch.quantile(torch.cat(parts), tails).tolist()
        intervals[name] = (low, high)
    return intervals


def chance_levels(text_image: Tensor, *, images: int | None = None, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """What a random ranking gives: the exact expected R@k, and the median of one random query's rank.

    From text to image R@k is k / I. From image to text an image with m captions among T has a hit in the first k with
    probability 1 - C(T - m, k) / C(T, k), averaged over the images that have captions.

    Args:
        text_image: [T] long, the image that each text belongs to.
        images: I, when images without captions are in the gallery; by default the highest index plus one.
        ks: for which k recall is given.

    Raises:
        UserError: no texts, or an index outside the gallery.
    """
    texts = len(text_image)
    if images is None:
        images = int(text_image.max()) + 1 if texts else 0
    text_image = _check(torch.empty(images, texts, device="meta"), text_image.cpu())
    levels = {f"text_to_image_r{k}": min(k / images, 1.0) for k in ks}
    levels["text_to_image_median_rank"] = (images + 1) / 2

    captions = torch.bincount(text_image, minlength=images)
    sizes, counts = captions[captions > 0].unique(return_counts=True)
    position = torch.arange(texts, dtype=torch.float64)
    missed = torch.zeros(texts, dtype=torch.float64)  # chance of no hit among the first 1, 2, ... T
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        still = ((texts - size - position).clamp_min(0) / (texts - position)).cumprod(0)
        missed += still * (count / int(counts.sum()))
    for k in ks:
        levels[f"image_to_text_r{k}"] = 1 - float(missed[min(k, texts) - 1])
    # Rounding of the running product must not decide on which side of one half an exact half falls.
    lower, upper = (int((missed > 0.5 + eps).sum()) + 1 for eps in (1e-9, -1e-9))
    levels["image_to_text_median_rank"] = (lower + upper) / 2
    levels["gallery_size"] = float(images)
    return levels


class Reranked(NamedTuple):
    """A shortlist per query, scored anew; whatever is not on it keeps its old order behind the shortlist.

    Attributes:
        scores: [I, T] the first scores.
        text_candidates: [T, k] long, images.
        text_scores: [T, k] float32.
        image_candidates: [I, k] long, texts.
        image_scores: [I, k] float32.
        pairs_scored: distinct pairs that the scorer saw.
    """

    scores: Tensor
    text_candidates: Tensor
    text_scores: Tensor
    image_candidates: Tensor
    image_scores: Tensor
    pairs_scored: int

    def ranks(self, text_image: Tensor) -> RetrievalRanks:
        """Ranks after re-ranking, for text_image [T]."""
        first = retrieval_ranks(self.scores, text_image)
        text_image = first.text_image
        # A right answer that missed the shortlist stands behind all of it, as it did: its first rank holds.
        right = self.text_candidates == text_image[:, None]
        by_text = _shortlist_ranks(self.text_scores, right, first.text_to_image)
        right = text_image[self.image_candidates] == torch.arange(len(self.scores), device=text_image.device)[:, None]
        by_image = _shortlist_ranks(self.image_scores, right, first.image_to_text)
        return RetrievalRanks(by_text, by_image, text_image)


def rerank(scores: Tensor, k: int, scorer: PairScorer, *, block: int = 1024) -> Reranked:
    """Score the k best candidates of every query, in both directions, with a slower and better scorer.

    Args:
        scores: [I, T] of a dual encoder.
        k: length of the shortlist per query; cut to the number of candidates.
        scorer: (image indices [n], text indices [n]) -> [n] scores, higher is more alike. Each pair is asked for
            once, though it may be on an image's and on a text's list. Pairs come sorted by image, then by text.
        block: n, the most pairs per call.

    Raises:
        UserError: k or block below 1, or the scorer returns another shape.
    """
    if scores.ndim != 2 or not scores.numel():
        raise UserError(f"scores: expected [images, texts], got {list(scores.shape)}")
    if k < 1 or block < 1:
        raise UserError(f"{'k' if k < 1 else 'block'}: must be at least 1")
    images, texts = scores.shape
    by_image = _top(scores, k)  # [I, k] texts
    by_text = _top(scores.T, k)  # [T, k] images
    image_pairs = torch.arange(images, device=scores.device)[:, None] * texts + by_image
    text_pairs = by_text * texts + torch.arange(texts, device=scores.device)[:, None]
    pairs, place = torch.cat([image_pairs.flatten(), text_pairs.flatten()]).unique(return_inverse=True)
    found = torch.empty(len(pairs), dtype=torch.float32, device=scores.device)
    for start in range(0, len(pairs), block):
        part = pairs[start : start + block]
        new = scorer(part // texts, part % texts)
        if new.shape != part.shape:
            raise UserError(f"scorer: returned shape {list(new.shape)} for {len(part)} pairs; return [{len(part)}]")
        found[start : start + block] = new.detach().to(found)
    scored = found[place]
    return Reranked(
        scores=scores,
        text_candidates=by_text,
        text_scores=scored[image_pairs.numel() :].view_as(by_text),
        image_candidates=by_image,
        image_scores=scored[: image_pairs.numel()].view_as(by_image),
        pairs_scored=len(pairs),
    )


def _top(scores: Tensor, k: int) -> Tensor:
    rows = max(1, _BLOCK_ELEMENTS // scores.shape[1])
    k = min(k, scores.shape[1])
    return torch.cat([part.topk(k, dim=1).indices for part in scores.split(rows)])


def _shortlist_ranks(scores: Tensor, right: Tensor, otherwise: Tensor) -> Tensor:
    known = scores.masked_fill(scores.isnan() | ~right, float("-inf")).amax(1, keepdim=True)
    ranks = 1 + (~(scores < known) & ~right).sum(1)
    return torch.where(right.any(1), ranks, otherwise)


def _directions(ranks: RetrievalRanks) -> Iterable[tuple[str, Tensor]]:
    yield "text_to_image", ranks.text_to_image
    yield "image_to_text", ranks.image_to_text[ranks.image_to_text > 0]


def _median(values: Tensor) -> float:
    ordered = values.sort().values
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _check(scores: Tensor, text_image: Tensor) -> Tensor:
    if scores.ndim != 2 or text_image.ndim != 1 or scores.shape[1] != len(text_image):
        raise UserError(
            f"scores and text_image: expected [I, T] and [T], got {list(scores.shape)} and {list(text_image.shape)}"
        )
    if not scores.numel():
        raise UserError("nothing to rank: give at least one image and one text")
    low, high = int(text_image.min()), int(text_image.max())
    if low < 0 or high >= scores.shape[0]:
        raise UserError(f"text_image: holds {low if low < 0 else high}, but images are 0 to {scores.shape[0] - 1}")
    return text_image.long() if scores.is_meta else text_image.to(scores.device, torch.long)
