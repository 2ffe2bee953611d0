"""Retrieval with a trained model: towers once per image and caption, the joint tower only where asked."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vlblocks.evaluation import (
    FeatureScores,
    Fold,
    KeptScores,
    RetrievalRanks,
    Shortlist,
    code_overlap,
    code_usage,
    mean_metrics,
    retrieval_ranks,
    score_every_pair,
    shortlist,
    split_folds,
    summarize_ranks,
)
from vlblocks.evaluation.reranking import PairScorer

from .corpus import EvalPairs
from .model import Unimo2
from .objectives import Lookup, lookup

Autocast = Callable[[], AbstractContextManager]
Depth = int | Literal["all"]

CONTRAST_SHARE = 0.3  # of the contrastive score beside the matching logit (spec 26)


class Embedded(NamedTuple):
    """What the towers give for I images and T captions, on the CPU; the states are None where none were asked for."""

    image_states: Tensor | None  # [I, V, D]
    text_states: Tensor | None  # [T, L, D], padded
    text_valid: Tensor | None  # [T, L]
    image_features: Tensor  # [I, F]
    text_features: Tensor  # [T, F]
    image_lookup: Lookup  # what each image finds on its own
    text_lookup: Lookup  # what each caption finds on its own

    def similarity(self) -> FeatureScores:
        """Dual-encoder scores [I, T]."""
        return FeatureScores(F.normalize(self.image_features, dim=-1), self.text_features)


def evaluate_pairs(
    model: Unimo2,
    pairs: EvalPairs,
    *,
    depth: Depth = 0,
    folds: int = 1,
    out: Path | None = None,
    autocast: Autocast = nullcontext,
    precision: str = "",
    quiet: bool = False,
) -> dict[str, float]:
    """Retrieval metrics of a gallery by the dual encoder, and as `rerank_*` after the joint tower.

    Args:
        depth: candidates per query and direction that the joint tower scores, "all" for every pair, or 0.
        folds: consecutive parts of the gallery that are evaluated apart; the metrics are their means.
        out: folder in which pairs' scores are kept; they are used again for the same model, gallery and precision.
        precision: what `autocast` does, for telling kept scores apart.
        quiet: without progress bars.

    Raises:
        UserError: fewer images than folds, or `out` cannot be used.
    """
    parts = split_folds(pairs.text_image, len(pairs), folds)
    images, texts = pairs.image_batches(), pairs.text_batches()
    digest = None
    if out is not None and depth:
        digest = _digest_of(model, precision)
        images, texts = _digested(images, digest), _digested(texts, digest)
    with (
        _bar(len(pairs), "image", quiet) as image_bar,
        _bar(len(pairs.gallery.captions), "caption", quiet) as text_bar,
    ):
        seen = _watched(images, image_bar), _watched(texts, text_bar)
        embedded = embed(model, *seen, autocast=autocast, states=bool(depth))
    similarity = embedded.similarity()
    scores = [similarity if folds == 1 else similarity.part(part.images, part.texts) for part in parts]
    first = [summarize_ranks(retrieval_ranks(s, part.text_image)) for s, part in zip(scores, parts, strict=True)]
    metrics = {**mean_metrics(first), **code_metrics(model, embedded, pairs.text_image)}
    if folds > 1:
        metrics["folds"] = folds
    if not depth:
        return metrics

    lists = [None if depth == "all" else shortlist(score, depth) for score in scores]
    sizes = [len(p.images) * len(p.texts) if s is None else len(s.pairs) for s, p in zip(lists, parts, strict=True)]
    metrics["rerank_pairs_scored"] = sum(sizes)
    with _bar(sum(sizes), "pair", quiet) as bar:
        scorer: PairScorer = JointScorer(model, embedded, autocast=autocast, advance=bar.update)
        kept = None
        if digest is not None:
            kept = KeptScores(scorer, out, fingerprint=digest.hexdigest()[:16])
            scorer = _recalling(kept, bar)
        try:
            again = [summarize_ranks(_ranks(part, chosen, scorer)) for part, chosen in zip(parts, lists, strict=True)]
        finally:
            if kept is not None:
                kept.save()
                metrics["rerank_pairs_recalled"] = kept.recalled
    reranked = mean_metrics(again)
    return metrics | {f"rerank_{name}": value for name, value in reranked.items() if name != "gallery_size"}


@torch.no_grad()
def embed(
    model: Unimo2,
    images: Iterable[Tensor],
    texts: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast: Autocast = nullcontext,
    states: bool = True,
) -> Embedded:
    """Run each tower once over batches of images [b, 3, H, W] and of (tokens [b, L], valid [b, L]).

    Args:
        states: keep what `JointScorer` reads, by far the most of it; the dual encoder needs features alone.
    """
    device = next(model.parameters()).device
    topk = model.config.grounding.method == "topk"
    parts: dict[tuple[str, str], list[Tensor]] = {}

    def keep(side: Literal["image", "text"], given: Tensor, valid: Tensor | None, found: Lookup) -> None:
        fields = {
            "states": given if states else None,
            "valid": valid if states else None,
            "features": model.features(side, given, valid).float(),
            # Picked codes are looked up anew for every pair; only their scores are a part's own.
            "codes": None if topk else found.codes,
            "indices": found.indices,
            "scores": getattr(found, f"{side}_scores"),
        }
        for name, tensor in fields.items():
            if tensor is not None:
                parts.setdefault((side, name), []).append(tensor.cpu())

    for image in images:
        with autocast():
            given = model.image(image.to(device))
            keep("image", given, None, lookup(model, image=given, with_loss=False))
    for tokens, valid in texts:
        valid = valid.to(device)
        with autocast():
            given = model.text(tokens.to(device), valid)
            keep("text", given, valid, lookup(model, text=given, text_valid=valid, with_loss=False))

    def whole(side: str, name: str) -> Tensor | None:
        return _joined(parts.pop((side, name))) if (side, name) in parts else None

    return Embedded(
        image_states=whole("image", "states"),
        text_states=whole("text", "states"),
        text_valid=whole("text", "valid"),
        image_features=whole("image", "features"),
        text_features=whole("text", "features"),
        image_lookup=Lookup(
            whole("image", "codes"), whole("image", "indices"), None, image_scores=whole("image", "scores")
        ),
        text_lookup=Lookup(whole("text", "codes"), whole("text", "indices"), None, text_scores=whole("text", "scores")),
    )


def _joined(rows: list[Tensor]) -> Tensor:
    """Tensors [b, L, ...] of any L as one, padded with zeros; the list is emptied, so that not all is held twice."""
    shape = [sum(map(len, rows)), max(row.shape[1] for row in rows), *rows[0].shape[2:]]
    whole, stop = rows[0].new_zeros(shape), shape[0]
    while rows:
        row = rows.pop()
        whole[stop - len(row) : stop, : row.shape[1]] = row
        stop -= len(row)
    return whole


class JointScorer:
    """Scores pairs of a gallery by the joint tower: matching logit + 0.3 contrastive (spec 26).

    Args:
        states: about how many states pass the joint tower at once; None: by the device.
        advance: told how many pairs were scored, after each batch.
    """

    def __init__(
        self,
        model: Unimo2,
        gallery: Embedded,
        *,
        autocast: Autocast = nullcontext,
        states: int | None = None,
        advance: Callable[[int], Any] | None = None,
    ) -> None:
        self.model, self.gallery, self.autocast, self.advance = model, gallery, autocast, advance
        self.device = next(model.parameters()).device
        self.states = states or (8_192 if self.device.type == "cpu" else 262_144)
        self.lengths = gallery.text_valid.sum(1)
        self.similarity = gallery.similarity()

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores [n] float32 of image indices [n] and text indices [n]."""
        found = torch.empty(len(images))
        lengths = self.lengths[texts]
        # Texts of like length together, so that little of a batch is padding.
        order = lengths.argsort(stable=True)
        while len(order):
            longest = int(lengths[order[-1]])
            batch = max(1, self.states // (self.gallery.image_states.shape[1] + longest))
            if self.gallery.text_lookup.codes is not None:
                # A code for each token: those of padding would be seen, so there must be none.
                batch = min(batch, int((lengths == longest).sum()))
            rows, order = order[-batch:], order[:-batch]
            lengths[rows] = 0
            found[rows] = self._batch(images[rows], texts[rows], longest)
            if self.advance is not None:
                self.advance(len(rows))
        return found

    def _batch(self, images: Tensor, texts: Tensor, longest: int) -> Tensor:
        gallery, device = self.gallery, self.device
        codes = None
        if gallery.image_lookup.image_scores is not None:
            scores = gallery.image_lookup.image_scores[images] + gallery.text_lookup.text_scores[texts]
            codes = self.model.grounded.pick(scores.to(device))[0]
        elif gallery.image_lookup.codes is not None:
            own = gallery.image_lookup.codes[images], gallery.text_lookup.codes[:, : longest - 1][texts]
            codes = torch.cat(own, dim=1).to(device)
        with self.autocast():
            joint = self.model.fuse(
                image=gallery.image_states[images].to(device),
                codes=codes,
                text=gallery.text_states[:, :longest][texts].to(device),
                text_valid=gallery.text_valid[:, :longest][texts].to(device),
            )
            match = self.model.match_logits(joint)[:, 1].float().cpu()
        return match + CONTRAST_SHARE * self.similarity.pairs(images, texts)


def code_metrics(model: Unimo2, gallery: Embedded, text_image: Tensor) -> dict[str, float]:
    """How images and texts use the codebook, each on its own, and how far their picks agree; {} without top-k codes."""
    if gallery.image_lookup.image_scores is None:
        return {}
    codes = model.config.grounding.codes
    image, text = gallery.image_lookup.indices, gallery.text_lookup.indices
    image_use, text_use = code_usage(image, codes), code_usage(text, codes)
    overlap = code_overlap(image[text_image], text, groups=text_image)
    return {
        "codes_used": code_usage(torch.cat([image, text]), codes).used,
        "code_perplexity_image": image_use.perplexity,
        "code_perplexity_text": text_use.perplexity,
        "code_overlap_pair": overlap.pair,
        "code_overlap_random": overlap.random,
    }


def _ranks(part: Fold, chosen: Shortlist | None, scorer: PairScorer) -> RetrievalRanks:
    """Ranks in one fold after the scorer has seen a shortlist, or every pair."""

    def ask(images: Tensor, texts: Tensor) -> Tensor:
        return scorer(part.images[images], part.texts[texts])

    if chosen is not None:
        return chosen.rerank(ask).ranks(part.text_image)
    return retrieval_ranks(score_every_pair(len(part.images), len(part.texts), ask), part.text_image)


def _recalling(kept: KeptScores, bar: tqdm) -> PairScorer:
    """The scorer, whose known pairs move the bar, too, but say nothing about how fast the others go."""

    def score(images: Tensor, texts: Tensor) -> Tensor:
        before = kept.recalled
        scores = kept(images, texts)
        known = kept.recalled - before
        if not bar.disable:
            bar.initial += known
            bar.last_print_n += known
            bar.n += known
        return scores

    return score


def _bar(total: int, unit: str, quiet: bool) -> tqdm:
    # A log file needs no line every tenth of a second.
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=f"{unit}s", unit=unit, mininterval=every, disable=quiet)


def _watched(batches: Iterable[Any], bar: tqdm) -> Iterator[Any]:
    for batch in batches:
        yield batch
        bar.update(len(batch if isinstance(batch, Tensor) else batch[0]))


def _digest_of(model: Unimo2, precision: str) -> Any:
    digest = hashlib.sha256(f"{model.config} {precision}".encode())
    for name, tensor in model.state_dict().items():
        _update(digest, name, tensor)
    return digest


def _digested(batches: Iterable[Any], digest: Any) -> Iterator[Any]:
    for batch in batches:
        for tensor in (batch,) if isinstance(batch, Tensor) else batch:
            _update(digest, "batch", tensor)
        yield batch


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
