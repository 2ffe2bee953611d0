"""Image-text retrieval: ranks, recall, intervals and chance, of scores that need not be held whole.

A rank is 1 for the best. Ties are counted against the query: a wrong candidate with the same score (or a score that is
no number) stands before the right one, so that a model that gives every pair the same score is at the bottom, not at
the top.

R@K is our own: torchmetrics' RetrievalHitRate takes flat arrays of all pairs, 1.25e8 of them in COCO's 5K protocol, and
does not count ties against the query.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlblocks.errors import UserError

__all__ = [
    "FeatureScores",
    "Fold",
    "RetrievalRanks",
    "Scores",
    "as_scores",
    "bootstrap_intervals",
    "chance_levels",
    "mean_metrics",
    "retrieval_metrics",
    "retrieval_ranks",
    "score_blocks",
    "split_folds",
    "summarize_ranks",
]

DEFAULT_KS = (1, 5, 10)
_BLOCK_ELEMENTS = 16_000_000  # scores that are compared at once


class FeatureScores:
    """Scores [I, T] of a dual encoder: products of features, made a block of rows at a time and never held whole.

    Args:
        image: [I, F]; normalised already where the score is a cosine.
        text: [T, F].

    Raises:
        UserError: the features are not two matrices of one width.
    """

    def __init__(self, image: Tensor, text: Tensor) -> None:
        if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
            raise UserError(f"features: expected [I, F] and [T, F], got {list(image.shape)} and {list(text.shape)}")
        self.image, self.text = image, text

    @property
    def shape(self) -> tuple[int, int]:
        """I, T."""
        return len(self.image), len(self.text)

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.image.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Scores [b, T] of the images from `start` to `stop`."""
        return self.image[start:stop] @ self.text.T

    def pairs(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores [n] of image indices [n] with text indices [n]."""
        return torch.linalg.vecdot(self.image[images], self.text[texts])

    def part(self, images: Tensor, texts: Tensor) -> FeatureScores:
        """The same among some images and some texts only."""
        return FeatureScores(self.image[images], self.text[texts])


Scores = Tensor | FeatureScores


def as_scores(scores: Any) -> Scores:
    """Scores [I, T] as a floating-point tensor or :class:`FeatureScores`, from tensors, arrays or nested lists.

    Raises:
        UserError: it is no matrix of numbers with at least one image and one text.
    """
    if not isinstance(scores, FeatureScores):
        scores = _tensor("scores", scores)
        scores = scores if scores.is_floating_point() else scores.double()
        if scores.ndim != 2:
            raise UserError(f"scores: expected [images, texts], got {list(scores.shape)}")
    if 0 in scores.shape:
        raise UserError("nothing to rank: give at least one image and one text")
    return scores


def score_blocks(scores: Scores) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores [b, T] of some rows), in order; the same blocks, to the bit, every time."""
    images, texts = scores.shape
    rows = max(1, _BLOCK_ELEMENTS // texts)
    for start in range(0, images, rows):
        stop = min(start + rows, images)
        yield start, scores.rows(start, stop) if isinstance(scores, FeatureScores) else scores[start:stop]


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


def retrieval_metrics(scores: Any, text_image: Any, *, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """R@k and median rank in both directions, and the gallery's size.

    Args:
        scores: [I, T], higher is more alike: a tensor, array or list of lists, or :class:`FeatureScores`.
        text_image: [T] whole numbers, the row of ``scores`` that each text belongs to: a tensor, array or list.
            Images without a text are distractors. Of a `vlblocks.data.Gallery`: its ``owners``.
        ks: for which k recall is given.

    Returns:
        ``text_to_image_r{k}``, ``image_to_text_r{k}`` in [0, 1], ``text_to_image_median_rank``,
        ``image_to_text_median_rank`` and ``gallery_size`` (number of images).

    Raises:
        UserError: shapes or indices do not fit together, or there is nothing to rank.
    """
    return summarize_ranks(retrieval_ranks(scores, text_image), ks=ks)


def retrieval_ranks(scores: Any, text_image: Any) -> RetrievalRanks:
    """Ranks in both directions for scores [I, T] and text_image [T]; holds no copy of the scores.

    Raises:
        UserError: as :func:`retrieval_metrics`.
    """
    scores = as_scores(scores)
    text_image = _owners(text_image, scores.shape).to(scores.device)
    images, texts = scores.shape
    own = _own_scores(scores, text_image)
    # A score that is no number is worse than any other, and any other then stands before it.
    known = own.masked_fill(own.isnan(), float("-inf"))
    best = known.new_full((images,), float("-inf")).scatter_reduce(0, text_image, known, "amax")

    by_text = torch.zeros(texts, dtype=torch.long, device=scores.device)
    by_image = torch.empty(images, dtype=torch.long, device=scores.device)
    for start, block in score_blocks(scores):
        rows = slice(start, start + len(block))
        by_text += (~(block < known)).sum(0)
        by_image[rows] = (~(block < best[rows, None])).sum(1)
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


class Fold(NamedTuple):
    """A part of a gallery, evaluated as if there were no other.

    Attributes:
        images: [i] indices in the whole gallery.
        texts: [t] indices in the whole gallery.
        text_image: [t] places in `images`.
    """

    images: Tensor
    texts: Tensor
    text_image: Tensor


def split_folds(text_image: Any, images: int, folds: int) -> list[Fold]:
    """A gallery's consecutive parts, of as equal numbers of images as can be, each with its captions.

    Raises:
        UserError: there are fewer images than folds.
    """
    if images < folds:
        raise UserError(f"--folds: {folds} parts of {images} images; give at most {images}")
    text_image, parts = _tensor("text_image", text_image), []
    for chosen in torch.arange(images).tensor_split(folds):
        first, last = int(chosen[0]), int(chosen[-1])
        texts = ((text_image >= first) & (text_image <= last)).nonzero()[:, 0]
        parts.append(Fold(chosen, texts, text_image[texts] - first))
    return parts


def mean_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over galleries that have the same ones, such as the five 1K folds of COCO's test."""
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


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


def chance_levels(text_image: Any, *, images: int | None = None, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """What a random ranking gives: the exact expected R@k, and the median of one random query's rank.

    From text to image R@k is k / I. From image to text an image with m captions among T has a hit in the first k with
    probability 1 - C(T - m, k) / C(T, k), averaged over the images that have captions.

    Args:
        text_image: [T] whole numbers, the image that each text belongs to: a tensor, array or list.
        images: I, when images without captions are in the gallery; by default the highest index plus one.
        ks: for which k recall is given.

    Raises:
        UserError: no texts, or an index outside the gallery.
    """
    text_image = _tensor("text_image", text_image).cpu()
    texts = text_image.numel()
    if images is None:
        images = int(text_image.max()) + 1 if texts else 0
    if not images or not texts:
        raise UserError("nothing to rank: give at least one image and one text")
    text_image = _owners(text_image, (images, texts))
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


def _directions(ranks: RetrievalRanks) -> Iterable[tuple[str, Tensor]]:
    yield "text_to_image", ranks.text_to_image
    yield "image_to_text", ranks.image_to_text[ranks.image_to_text > 0]


def _median(values: Tensor) -> float:
    ordered = values.sort().values
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _own_scores(scores: Scores, text_image: Tensor) -> Tensor:
    """Each text's score [T] with its own image, out of the blocks: made apart it might differ in its last bit."""
    own: Tensor | None = None
    for start, block in score_blocks(scores):
        inside = ((text_image >= start) & (text_image < start + len(block))).nonzero()[:, 0]
        found = block[text_image[inside] - start, inside]
        own = found.new_empty(len(text_image)) if own is None else own
        own[inside] = found
    assert own is not None
    return own


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
        # torch takes no array that cannot be written to, or that runs backwards, as it is.
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy("C"))
    except (TypeError, ValueError):
        raise UserError(f"{name}: not numbers in rows of one length; give a tensor, an array or lists") from None


def _owners(text_image: Any, shape: tuple[int, ...]) -> Tensor:
    text_image = _tensor("text_image", text_image)
    if text_image.ndim != 1 or shape[1] != len(text_image):
        raise UserError(
            f"scores and text_image: expected [I, T] and [T], got {list(shape)} and {list(text_image.shape)}"
        )
    if text_image.is_floating_point() or text_image.dtype == torch.bool:
        raise UserError(f"text_image: holds {text_image.dtype}; give the whole number of each text's image")
    low, high = int(text_image.min()), int(text_image.max())
    if low < 0 or high >= shape[0]:
        raise UserError(f"text_image: holds {low if low < 0 else high}, but images are 0 to {shape[0] - 1}")
    return text_image.long()
