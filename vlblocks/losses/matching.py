"""Image-text matching: the binary objective, and hard negatives for it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.losses._reduce import check_rows, mean_cross_entropy, upcast
from vlblocks.ops.contrastive import hard_pairs


def matching_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of "these two match", the mean over valid pairs.

    Over ranks: times `ops.collectives.rank_share` of the number of valid pairs (or the sum of their weights).

    Args:
        logits: [n, 2], no match and match.
        labels: [n] integers, 1 = match, 0 = no match, -100 = not counted.
        weight: [n]; e.g. is_multimodal, or `HardNegatives.found`; all 1 if None.

    Returns:
        sum(weight * CE) / sum(weight), scalar; 0 if nothing counts.

    Raises:
        UserError: shapes that do not fit.

    Source: Lu et al. 2019 (ViLBERT); unimo2_spec item 24.
    """
    if logits.ndim != 2 or logits.shape[1] != 2:
        raise UserError(f"logits {list(logits.shape)}: matching needs two per pair, [n, 2]")
    return mean_cross_entropy(logits, labels, weight)


class HardNegatives(NamedTuple):
    """One negative per direction for each of b pairs.

    Attributes:
        text_for_image: [b] long: a text that does not belong to image i.
        image_for_text: [b] long: an image that does not belong to text i.
        found: [b] bool: False where there is none; the indices are then i itself.
    """

    text_for_image: Tensor
    image_for_text: Tensor
    found: Tensor


@torch.no_grad()
def mine_hard_negatives(
    similarity: Tensor, *, image_ids: Tensor | None = None, generator: torch.Generator | None = None
) -> HardNegatives:
    """Draws a hard negative text for each image and image for each text, both in one multinomial draw.

    A candidate's probability is the softmax of the contrastive logits over the row's (column's) true negatives: neither
    the partner nor, with image_ids, any row of the same picture is ever drawn. Negatives are this rank's own rows. NaN
    counts as 0, an infinity as the largest number.

    Args:
        similarity: [b, b] contrastive logits (divided by the temperature), images by texts; pairs on the diagonal.
        image_ids: [b] integers, equal for equal pictures.
        generator: makes the draw repeatable; on similarity's device.

    Returns:
        text_for_image [b], image_for_text [b], found [b] bool: both are the row itself where there is no negative.

    Raises:
        UserError: shapes that do not fit.

    Source: Li et al. 2021 (ALBEF).
    """
    rows = similarity.shape[0]
    if similarity.ndim != 2 or similarity.shape[1] != rows:
        raise UserError(f"similarity {list(similarity.shape)}: give a square [b, b], images by texts")
    check_rows("image_ids", image_ids, rows)
    own = torch.arange(rows, device=similarity.device)
    if rows == 0:
        return HardNegatives(own, own, own.bool())
    same = torch.eye(rows, dtype=torch.bool, device=similarity.device)
    if image_ids is not None:
        same = same | (image_ids[:, None] == image_ids[None, :])
    found = ~same.all(dim=1)
    # A row without negatives draws among all, for a distribution of zeros cannot be drawn from; `found` discards it.
    masked = same & found[:, None]
    # A diverged step must reach the loss, where it can be skipped, and not end in an invalid distribution here.
    logits = upcast(similarity).nan_to_num()
    both = torch.cat([logits.masked_fill(masked, -math.inf), logits.t().masked_fill(masked, -math.inf)])
    drawn = torch.multinomial(both.softmax(dim=1), 1, generator=generator).squeeze(1)
    text_for_image, image_for_text = torch.where(found, drawn.unflatten(0, (2, rows)), own)
    return HardNegatives(text_for_image, image_for_text, found)


@torch.no_grad()
def draw_hard_negatives(
    image: Tensor,
    text: Tensor,
    *,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_bytes: int | None = None,
) -> HardNegatives:
    """Draws as `mine_hard_negatives` does of the logits image text^T / temperature, which are never whole.

    The draws are others, and depend on chunk_bytes; their distribution is the same. It is a pass of its own over the
    tiles, beside the contrastive loss's, and in PyTorch on every device.

    Args:
        image: [b, D] features.
        text: [b, D] features; row i is image i's text.
        temperature: what similarities are divided by (scalar or [1]).
        image_ids: [b] integers, equal for equal pictures.
        generator: makes the draw repeatable; on image's device.
        chunk_bytes: size of the logits that are held at once; None: what suits the device.

    Returns:
        text_for_image [b], image_for_text [b], found [b] bool: both are the row itself where there is no negative.

    Raises:
        UserError: shapes that do not fit.

    Source: Li et al. 2021 (ALBEF); the draw by competing clocks: Efraimidis and Spirakis 2006.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise UserError(f"image {list(image.shape)} and text {list(text.shape)}: give both the same shape [b, D]")
    check_rows("image_ids", image_ids, image.shape[0])
    return HardNegatives(*hard_pairs(image, text, temperature, image_ids, generator, chunk_bytes))
