"""Retrieval with a trained model: towers once per image and caption, the joint tower only where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlblocks.evaluation import Reranked, code_overlap, code_usage, rerank

from .model import Unimo2
from .objectives import Lookup, lookup

Autocast = Callable[[], AbstractContextManager]


class Embedded(NamedTuple):
    """What the towers give for I images and T captions, on the CPU."""

    image_states: Tensor  # [I, V, D]
    text_states: Tensor  # [T, L, D], padded
    text_valid: Tensor  # [T, L]
    image_features: Tensor  # [I, F]
    text_features: Tensor  # [T, F]
    image_lookup: Lookup  # what each image finds on its own
    text_lookup: Lookup  # what each caption finds on its own

    def similarity(self) -> Tensor:
        """Dual-encoder scores [I, T]."""
        return F.normalize(self.image_features, dim=-1) @ self.text_features.T


@torch.no_grad()
def embed(
    model: Unimo2,
    images: Iterable[Tensor],
    texts: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast: Autocast = nullcontext,
) -> Embedded:
    """Run each tower once over batches of images [b, 3, H, W] and of (tokens [b, L], valid [b, L])."""
    device = next(model.parameters()).device
    sides: tuple[list, list] = ([], [])
    for image in images:
        with autocast():
            states = model.image(image.to(device))
            features = model.features("image", states)
            found = lookup(model, image=states)
        sides[0].append((states, features, found))
    valids = []
    for tokens, valid in texts:
        with autocast():
            valids.append(valid.to(device))
            states = model.text(tokens.to(device), valids[-1])
            features = model.features("text", states, valids[-1])
            found = lookup(model, text=states, text_valid=valids[-1])
        sides[1].append((states, features, found))
    longest = max(valid.shape[1] for valid in valids)

    def whole(parts: list[Tensor | None], pad: int = 0) -> Tensor | None:
        if parts[0] is None:
            return None
        if pad:
            parts = [F.pad(part, (0, 0) * (part.ndim - 2) + (0, pad - part.shape[1])) for part in parts]
        return torch.cat(parts).cpu()

    def lookups(parts: list[Lookup], pad: int = 0) -> Lookup:
        if model.config.grounding.method == "topk":
            pad = 0
        fields = [whole([getattr(part, name) for part in parts], pad) for name in ("codes", "indices")]
        scores = [whole([getattr(part, name) for part in parts]) for name in ("image_scores", "text_scores")]
        return Lookup(fields[0], fields[1], None, *scores)

    (image_states, image_features, image_found), (text_states, text_features, text_found) = (
        zip(*side, strict=True) for side in sides
    )
    return Embedded(
        image_states=whole(list(image_states)),
        text_states=whole(list(text_states), longest),
        text_valid=whole(valids, longest),
        image_features=whole(list(image_features)).float(),
        text_features=whole(list(text_features)).float(),
        image_lookup=lookups(list(image_found)),
        text_lookup=lookups(list(text_found), longest - 1),
    )


def rerank_jointly(
    model: Unimo2, gallery: Embedded, k: int, *, autocast: Autocast = nullcontext, block: int = 256
) -> Reranked:
    """Score the k best candidates of each query by the joint tower: matching logit + 0.3 contrastive (spec 26)."""
    device = next(model.parameters()).device
    similarity = gallery.similarity()

    @torch.no_grad()
    def score(images: Tensor, texts: Tensor) -> Tensor:
        image, text, valid = gallery.image_states[images], gallery.text_states[texts], gallery.text_valid[texts]
        codes = None
        if gallery.image_lookup.image_scores is not None:
            scores = gallery.image_lookup.image_scores[images] + gallery.text_lookup.text_scores[texts]
            codes = model.grounded.pick(scores.to(device))[0]
        elif gallery.image_lookup.codes is not None:
            codes = torch.cat([gallery.image_lookup.codes[images], gallery.text_lookup.codes[texts]], dim=1).to(device)
        with autocast():
            joint = model.fuse(image=image.to(device), codes=codes, text=text.to(device), text_valid=valid.to(device))
            match = model.match_logits(joint)[:, 1].float().cpu()
        return match + 0.3 * similarity[images, texts]

    return rerank(similarity, k, score, block=block)


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
