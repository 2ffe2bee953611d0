"""How the codes of a grounded space are used, and whether images and texts share them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlblocks.errors import UserError

__all__ = ["CodeCounts", "CodeOverlap", "code_overlap", "code_usage"]

_BLOCK_ELEMENTS = 16_000_000  # one-hot entries held at once


class CodeOverlap(NamedTuple):
    """Share of an image's codes that a text picks too, in [0, 1].

    Attributes:
        pair: mean over true pairs.
        random: mean over all pairs that do not belong together; nan when there is none.
    """

    pair: float
    random: float


class CodeCounts(NamedTuple):
    """How much of the codebook is in use.

    Attributes:
        used: codes picked at least once.
        perplexity: exp of the entropy of the picks, 1 to C; 0 without picks.
    """

    used: int
    perplexity: float


def code_overlap(image_picks: Tensor, text_picks: Tensor, *, groups: Tensor | None = None) -> CodeOverlap:
    """Mean of \\|image's picks and text's picks\\| / K over true pairs, and its exact mean over mismatched ones.

    Args:
        image_picks: [M, K] long, codes that each pair's image picks on its own; a code counts once per row.
        text_picks: [M, K] long, codes that its text picks on its own.
        groups: [M] long, rows of the same number belong together (captions of one picture) and are not mismatched.

    Raises:
        UserError: shapes differ, or there are no pairs.
    """
    if image_picks.ndim != 2 or image_picks.shape != text_picks.shape or not image_picks.numel():
        raise UserError(
            f"image_picks and text_picks: expected the same [M, K], got {list(image_picks.shape)} and "
            f"{list(text_picks.shape)}"
        )
    pairs, picks = image_picks.shape
    codes = int(torch.maximum(image_picks.max(), text_picks.max())) + 1
    groups = torch.arange(pairs, device=image_picks.device) if groups is None else groups.unique(return_inverse=True)[1]
    # The overlap with every text is a dot product of counts: no [M, M] is needed, nor any sampling.
    shared = 0
    image_total = torch.zeros(codes, dtype=torch.long, device=image_picks.device)
    text_total = torch.zeros_like(image_total)
    rows = max(1, _BLOCK_ELEMENTS // codes)
    for start in range(0, pairs, rows):
        image, text = (_one_hot(p[start : start + rows], codes) for p in (image_picks, text_picks))
        shared += int((image & text).sum())
        image_total += image.sum(0)
        text_total += text.sum(0)
    total = int((image_total * text_total).sum())
    sizes = torch.bincount(groups)
    together = shared if len(sizes) == pairs else _within_groups(image_picks, text_picks, groups, codes)
    mismatched = pairs * pairs - int((sizes * sizes).sum())
    random = (total - together) / (mismatched * picks) if mismatched else float("nan")
    return CodeOverlap(pair=shared / (pairs * picks), random=random)


def code_usage(picks: Tensor, codes: int) -> CodeCounts:
    """Codes in use and the perplexity of their use, for picks of any shape (negative ones are padding) of C codes.

    Raises:
        UserError: a pick is not below ``codes``.
    """
    picks = picks[picks >= 0]
    if picks.numel() and int(picks.max()) >= codes:
        raise UserError(f"picks: hold code {int(picks.max())}, but codes={codes}; give the codebook's size")
    counts = torch.bincount(picks, minlength=codes).double()
    if not picks.numel():
        return CodeCounts(0, 0.0)
    share = counts / counts.sum()
    return CodeCounts(int((counts > 0).sum()), float(torch.special.entr(share).sum().exp()))


def _one_hot(picks: Tensor, codes: int) -> Tensor:
    empty = torch.zeros(len(picks), codes, dtype=torch.bool, device=picks.device)
    return empty.scatter_(1, picks, torch.ones_like(picks, dtype=torch.bool))


def _within_groups(image_picks: Tensor, text_picks: Tensor, groups: Tensor, codes: int) -> int:
    """Sum of overlaps over all (image, text) whose rows are of one group, one row with itself included."""
    order = groups.argsort(stable=True)
    together = 0
    for rows in order.split(torch.bincount(groups).tolist()):
        image, text = (_one_hot(p[rows], codes).sum(0) for p in (image_picks, text_picks))
        together += int((image * text).sum())
    return together
