"""Re-ranking of a dual encoder's shortlist by a slower scorer, or the slower scorer on every pair, once each."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.evaluation.retrieval import RetrievalRanks, Scores, as_scores, retrieval_ranks, score_blocks

__all__ = ["KeptScores", "PairScorer", "Reranked", "Shortlist", "rerank", "score_every_pair", "shortlist"]

PairScorer = Callable[[Tensor, Tensor], Tensor]
"""(image indices [n], text indices [n]) -> [n] scores, higher is more alike."""


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

    scores: Scores
    text_candidates: Tensor
    text_scores: Tensor
    image_candidates: Tensor
    image_scores: Tensor
    pairs_scored: int

    def ranks(self, text_image: Any) -> RetrievalRanks:
        """Ranks after re-ranking, for text_image [T]."""
        first = retrieval_ranks(self.scores, text_image)
        text_image = first.text_image
        # A right answer that missed the shortlist stands behind all of it, as it did: its first rank holds.
        right = self.text_candidates == text_image[:, None]
        by_text = _shortlist_ranks(self.text_scores, right, first.text_to_image)
        images = torch.arange(self.scores.shape[0], device=text_image.device)
        right = text_image[self.image_candidates] == images[:, None]
        by_image = _shortlist_ranks(self.image_scores, right, first.image_to_text)
        return RetrievalRanks(by_text, by_image, text_image)


class Shortlist(NamedTuple):
    """The best candidates of every query by the first scores, in both directions.

    Attributes:
        scores: [I, T] the first scores.
        text_candidates: [T, k] long, images.
        image_candidates: [I, k] long, texts.
        pairs: [n] long, image * T + text of each distinct pair, ascending: one that is on an image's and on a text's
            list is there once.
    """

    scores: Scores
    text_candidates: Tensor
    image_candidates: Tensor
    pairs: Tensor

    def rerank(self, scorer: PairScorer, *, block: int = 1024) -> Reranked:
        """Score each pair once, in blocks of at most `block`, sorted by image and then by text.

        Raises:
            UserError: block below 1, or the scorer returns another shape.
        """
        texts = self.scores.shape[1]
        found = torch.empty(len(self.pairs), dtype=torch.float32, device=self.pairs.device)
        for start in range(0, len(self.pairs), _at_least_one("block", block)):
            part = self.pairs[start : start + block]
            found[start : start + block] = _asked(scorer, part // texts, part % texts)

        def scored(images: Tensor, texts_of: Tensor) -> Tensor:
            return found[torch.searchsorted(self.pairs, images * texts + texts_of)]

        rows = torch.arange(self.scores.shape[0], device=self.pairs.device)[:, None]
        columns = torch.arange(texts, device=self.pairs.device)[:, None]
        return Reranked(
            scores=self.scores,
            text_candidates=self.text_candidates,
            text_scores=scored(self.text_candidates, columns),
            image_candidates=self.image_candidates,
            image_scores=scored(rows, self.image_candidates),
            pairs_scored=len(self.pairs),
        )


def shortlist(scores: Any, k: int) -> Shortlist:
    """The k best candidates of every query of scores [I, T]; k is cut to the number of candidates.

    Raises:
        UserError: k below 1, or scores that are no matrix.
    """
    scores, k = as_scores(scores), _at_least_one("k", k)
    images, texts = scores.shape
    by_image: list[Tensor] = []
    best: Tensor | None = None  # [T, up to k], of the rows so far
    by_text: Tensor | None = None
    for start, block in score_blocks(scores):
        block = block.masked_fill(block.isnan(), float("-inf"))
        by_image.append(block.topk(min(k, texts), dim=1).indices)
        values, rows = block.T.topk(min(k, len(block)), dim=1)
        rows = rows + start
        if best is not None and by_text is not None:
            values, rows = torch.cat([best, values], dim=1), torch.cat([by_text, rows], dim=1)
            values, places = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, places)
        best, by_text = values, rows
    assert by_text is not None
    of_image = torch.cat(by_image)
    device = by_text.device
    pairs = torch.cat(
        [
            (torch.arange(images, device=device)[:, None] * texts + of_image).flatten(),
            (by_text * texts + torch.arange(texts, device=device)[:, None]).flatten(),
        ]
    ).unique()
    return Shortlist(scores, by_text, of_image, pairs)


def rerank(scores: Any, k: int, scorer: PairScorer, *, block: int = 1024) -> Reranked:
    """Score the k best candidates of every query, in both directions, with a slower and better scorer.

    Args:
        scores: [I, T] of a dual encoder.
        k: length of the shortlist per query; cut to the number of candidates.
        scorer: asked for each pair once, though it may be on an image's and on a text's list. Pairs come sorted by
            image, then by text.
        block: the most pairs per call.

    Raises:
        UserError: k or block below 1, or the scorer returns another shape.
    """
    return shortlist(scores, k).rerank(scorer, block=block)


def score_every_pair(images: int, texts: int, scorer: PairScorer, *, block: int = 1024) -> Tensor:
    """Scores [images, texts] float32 by the slower scorer alone, on the CPU; pairs come sorted by image, then by text.

    Raises:
        UserError: no images, no texts or block below 1, or the scorer returns another shape.
    """
    found = torch.empty(_at_least_one("images", images) * _at_least_one("texts", texts))
    for start in range(0, len(found), _at_least_one("block", block)):
        part = torch.arange(start, min(start + block, len(found)))
        found[start : start + block] = _asked(scorer, part // texts, part % texts)
    return found.view(images, texts)


class KeptScores:
    """A pair scorer that keeps what it was told in a folder, so that a killed evaluation goes on where it was.

    Every so often the new scores are written to one more file, which is whole or absent. Files of another fingerprint
    are left alone.

    Args:
        scorer: asked for the pairs that are not known yet.
        folder: made if need be; holds files ``scores-FINGERPRINT-NNNNN.safetensors``.
        fingerprint: of all that scores depend on (model, data, precision), letters and digits.
        seconds: the least time between two files.

    Attributes:
        recalled: how many of the scores given so far were known already.

    Raises:
        UserError: the folder cannot be made, or a file in it is damaged.
    """

    def __init__(self, scorer: PairScorer, folder: str | Path, *, fingerprint: str, seconds: float = 30.0) -> None:
        self.scorer, self.folder, self.fingerprint, self.seconds = scorer, Path(folder), fingerprint, seconds
        self.recalled = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
        files = sorted(self.folder.glob(f"scores-{fingerprint}-*.safetensors"))
        known = [_read(path) for path in files]
        pairs = torch.cat([torch.empty(0, 2, dtype=torch.int32), *(part["pairs"] for part in known)])
        scores = torch.cat([torch.empty(0), *(part["scores"] for part in known)])
        self._keys, order = _keys(pairs[:, 0], pairs[:, 1]).sort()
        self._scores = scores[order]
        self._next = 1 + max((int(path.stem.rpartition("-")[2]) for path in files), default=0)
        self._new: list[tuple[Tensor, Tensor, Tensor]] = []
        self._saved = time.monotonic()

    def __len__(self) -> int:
        """How many scores were in the folder at the start."""
        return len(self._keys)

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores [n] float32 of image indices [n] and text indices [n]."""
        keys = _keys(images.cpu(), texts.cpu())
        place = torch.searchsorted(self._keys, keys).clamp_max(max(len(self._keys) - 1, 0))
        known = self._keys[place] == keys if len(self._keys) else torch.zeros(len(keys), dtype=torch.bool)
        found = torch.empty(len(keys))
        found[known] = self._scores[place[known]]
        self.recalled += int(known.sum())
        unknown = (~known).nonzero()[:, 0]
        if len(unknown):
            rows = unknown.to(images.device)
            new = _asked(self.scorer, images[rows], texts[rows]).float().cpu()
            found[unknown] = new
            self._new.append((images[rows].cpu(), texts[rows].cpu(), new))
            if time.monotonic() - self._saved >= self.seconds:
                self.save()
        return found.to(images.device)

    def save(self) -> None:
        """Write what is new; to be called at the end, too."""
        self._saved = time.monotonic()
        if not self._new:
            return
        images, texts, scores = (torch.cat(part) for part in zip(*self._new, strict=True))
        tensors = {"pairs": torch.stack([images, texts], dim=1).int(), "scores": scores}
        _write(self.folder / f"scores-{self.fingerprint}-{self._next:05d}.safetensors", tensors)
        self._next += 1
        self._new = []


def _keys(images: Tensor, texts: Tensor) -> Tensor:
    return (images.long() << 32) | texts.long()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("pairs", "scores")}
    except (SafetensorError, OSError):
        raise UserError(f"{path}: damaged, or no file of scores; remove it, and its pairs are scored again") from None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        save_file(tensors, str(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _asked(scorer: PairScorer, images: Tensor, texts: Tensor) -> Tensor:
    scores = scorer(images, texts)
    if scores.shape != images.shape:
        raise UserError(f"scorer: returned shape {list(scores.shape)} for {len(images)} pairs; return [{len(images)}]")
    return scores.detach()


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name}: must be at least 1")
    return value


def _shortlist_ranks(scores: Tensor, right: Tensor, otherwise: Tensor) -> Tensor:
    known = scores.masked_fill(scores.isnan() | ~right, float("-inf")).amax(1, keepdim=True)
    ranks = 1 + (~(scores < known) & ~right).sum(1)
    return torch.where(right.any(1), ranks, otherwise)
