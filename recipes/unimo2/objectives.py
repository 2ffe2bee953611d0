"""What each stream of the UNIMO-2 pre-training learns from; every objective is one entry of a dictionary."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlblocks.losses import (
    HardNegatives,
    draw_hard_negatives,
    mask_codes,
    masked_rows,
    matching_loss,
    two_view_contrast,
)
from vlblocks.models import JointStates
from vlblocks.ops import rank_share, take_rows

from .configs import ObjectiveConfig, RunConfig
from .model import Unimo2


class StreamLosses(NamedTuple):
    """Unweighted losses of one stream's batch, each a scalar."""

    losses: dict[str, Tensor]
    image_picks: Tensor | None = None  # [B, K] codes that the images pick on their own
    text_picks: Tensor | None = None  # [B, K] codes that the texts pick on their own


class Lookup(NamedTuple):
    """The grounded codes of a batch."""

    codes: Tensor | None  # [B, G, D]; None without a codebook
    indices: Tensor | None  # [B, G]
    loss: Tensor | None
    image_scores: Tensor | None = None  # [B, C] share of the images in the codes' scores
    text_scores: Tensor | None = None  # [B, C] share of the texts


def lookup(
    model: Unimo2,
    image: Tensor | None = None,
    text: Tensor | None = None,
    image_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    *,
    with_loss: bool = True,
) -> Lookup:
    """Codes for pairs, images alone or texts alone, from tower states; a pair's scores are the sum of its parts'."""
    grounded = model.grounded
    if grounded is None:
        return Lookup(None, None, None)
    states, valid = model.states_to_ground(image, text, image_valid, text_valid)
    if model.config.grounding.method == "nearest":
        found = grounded(states, valid, with_loss=with_loss)
        return Lookup(found.codes, found.indices, found.loss)
    parts: list[Tensor | None] = [None, None]
    start = 0
    for side, tower in enumerate((image, text)):
        if tower is not None:
            piece = slice(start, start + tower.shape[1] - 1)
            parts[side] = grounded.scores(states[:, piece], None if valid is None else valid[:, piece])
            start = piece.stop
    scores = sum(part for part in parts if part is not None)
    found = grounded(states, valid, scores=scores, with_loss=with_loss)
    return Lookup(found.codes, found.indices, found.loss, parts[0], parts[1])


def pair_losses(
    model: Unimo2, batch: dict[str, Tensor], weights: ObjectiveConfig, generator: torch.Generator | None = None
) -> StreamLosses:
    """Aligned pairs: contrast, matching with hard negatives, masked tokens and the grounding loss (spec 23 to 27)."""
    valid, ids = batch["valid"], batch["image_id"]
    image = model.image(batch["image"])
    text = model.text(batch["tokens" if weights.whole_text else "masked_tokens"], valid)
    losses: dict[str, Tensor] = {}
    if weights.contrast or weights.matching:
        features = model.features("image", image), model.features("text", text, valid)
    if weights.contrast:
        losses["contrast"] = model.contrastive(*features, image_ids=ids)
    rows = torch.arange(math.ceil(weights.fused_share * len(ids)), device=ids.device)
    fused = None if weights.whole_text else _fuse_found(model, image, text, valid, rows)
    if weights.matching:
        negatives = draw_hard_negatives(*features, temperature=model.temperature(), image_ids=ids, generator=generator)
        true = None if fused is None else fused[1]
        losses["matching"] = _matching(model, image, text, valid, negatives, rows, true)
    if fused is None:
        masked = model.text(batch["masked_tokens"][: len(rows)], valid[: len(rows)])
        fused = _fuse_found(model, image, masked, valid, rows)
    found, joint = fused
    if weights.masked_tokens:
        losses["masked_tokens"] = _masked_tokens(model, joint.text, batch["labels"][: len(rows)])
    if weights.grounding and found.loss is not None:
        losses["grounding"] = found.loss
    return StreamLosses(losses, *_own_picks(model, found))


def _fuse_found(model: Unimo2, image: Tensor, text: Tensor, valid: Tensor, rows: Tensor) -> tuple[Lookup, JointStates]:
    """The lookup and the joint states of the first rows' true pairs."""
    image, text, valid = image[: len(rows)], text[: len(rows)], valid[: len(rows)]
    found = lookup(model, image, text, text_valid=valid)
    return found, model.fuse(image=image, codes=found.codes, text=text, text_valid=valid)


def _matching(
    model: Unimo2,
    image: Tensor,
    text: Tensor,
    valid: Tensor,
    negatives: HardNegatives,
    rows: Tensor,
    true: JointStates | None,
) -> Tensor:
    """True pairs (joint states given, or made here), each beside a wrong text and a wrong image, looked up anew."""
    image_rows = torch.cat([rows, negatives.image_for_text[rows]])
    text_rows = torch.cat([negatives.text_for_image[rows], rows])
    if true is None:
        image_rows, text_rows = torch.cat([rows, image_rows]), torch.cat([rows, text_rows])
    found = lookup(model, image, text, text_valid=valid, with_loss=False)
    joint = model.fuse(
        image=take_rows(image, image_rows),
        codes=pair_codes(model, found, image.shape[1] - 1, image_rows, text_rows),
        text=take_rows(text, text_rows),
        text_valid=valid[text_rows],
    )
    logits = model.match_logits(joint)
    if true is not None:
        logits = torch.cat([model.match_logits(true), logits])
    real = torch.cat([torch.ones_like(negatives.found[rows]), negatives.found[rows].repeat(2)])
    labels = (torch.arange(len(logits), device=image.device) < len(rows)).long()
    return matching_loss(logits, labels, weight=real)


def image_losses(
    model: Unimo2, batch: dict[str, Tensor], weights: ObjectiveConfig, generator: torch.Generator | None = None
) -> StreamLosses:
    """Images alone: two views against the rest of the batch, grounding, masked grounding (spec 28)."""
    image = model.image(batch["image"])
    losses: dict[str, Tensor] = {}
    if weights.two_views:
        views = [model.features("image", view) for view in (image, model.image(batch["image2"]))]
        losses["two_views"] = two_view_contrast(*views, temperature=model.temperature())
    found = lookup(model, image)
    if weights.grounding and found.loss is not None:
        losses["grounding"] = found.loss
    if weights.masked_codes and found.codes is not None:
        hidden = mask_codes(found.codes, found.indices, probability=weights.masked_code_share, generator=generator)
        joint = model.fuse(image=image, codes=hidden.codes)
        losses["masked_codes"] = model.code_loss(joint.codes, hidden.labels)
    return StreamLosses(losses, *_own_picks(model, found))


def text_losses(
    model: Unimo2, batch: dict[str, Tensor], weights: ObjectiveConfig, generator: torch.Generator | None = None
) -> StreamLosses:
    """Texts alone: masked tokens read through the codes, grounding, masked grounding (spec 28)."""
    valid = batch["valid"]
    text = model.text(batch["masked_tokens"], valid)
    found = lookup(model, text=text, text_valid=valid)
    codes, hidden = found.codes, None
    if weights.masked_codes and codes is not None:
        hidden = mask_codes(codes, found.indices, probability=weights.masked_code_share, generator=generator)
        codes = hidden.codes
    joint = model.fuse(codes=codes, text=text, text_valid=valid)
    losses: dict[str, Tensor] = {}
    if weights.masked_tokens:
        losses["masked_tokens"] = _masked_tokens(model, joint.text, batch["labels"])
    if weights.grounding and found.loss is not None:
        losses["grounding"] = found.loss
    if hidden is not None:
        losses["masked_codes"] = model.code_loss(joint.codes, hidden.labels)
    return StreamLosses(losses, *_own_picks(model, found))


def pair_codes(model: Unimo2, found: Lookup, patches: int, image_rows: Tensor, text_rows: Tensor) -> Tensor | None:
    """Codes [M, G, D] of pairs made anew from the images and texts of a lookup; image_rows, text_rows [M]."""
    if found.codes is None:
        return None
    if found.image_scores is not None and found.text_scores is not None:
        return model.grounded.pick(found.image_scores[image_rows] + found.text_scores[text_rows])[0]
    codes = take_rows(found.codes, image_rows)[:, :patches], take_rows(found.codes, text_rows)[:, patches:]
    return torch.cat(codes, dim=1)


def _masked_tokens(model: Unimo2, states: Tensor, labels: Tensor) -> Tensor:
    masked = masked_rows(states, labels)
    loss = model.token_loss(masked.rows, masked.labels)
    return loss * rank_share(len(masked.labels), device=loss.device)


def _own_picks(model: Unimo2, found: Lookup) -> tuple[Tensor | None, Tensor | None]:
    scores = (found.image_scores, found.text_scores)
    picks = [None if score is None else model.grounded.pick(score)[1] for score in scores]
    return picks[0], picks[1]


OBJECTIVES = {
    "pairs": ("contrast", "matching", "masked_tokens", "grounding"),
    "images": ("two_views", "grounding", "masked_codes"),
    "texts": ("masked_tokens", "grounding", "masked_codes"),
}


def curve_names(config: RunConfig) -> list[str]:
    """STREAM/OBJECTIVE of every loss that a run has."""
    grounded = config.model.grounding.method != "none"
    return [
        f"{stream}/{name}"
        for stream, objectives in OBJECTIVES.items()
        if getattr(config.batch, stream)
        for name in objectives
        if getattr(config.objective, name) and (grounded or name not in ("grounding", "masked_codes"))
    ]


STREAMS = {"pairs": pair_losses, "images": image_losses, "texts": text_losses}
