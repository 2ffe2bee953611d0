"""What all objectives share: precision, and how a loss per row becomes a loss per batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlblocks.errors import UserError

Reduction = Literal["mean", "weighted", "sum", "none"]


def upcast(x: Tensor) -> Tensor:
    """float32, or float64 where x is float64: softmax and log in half precision lose the loss's small differences."""
    return x if x.dtype == torch.float64 else x.float()


def check_rows(name: str, x: Tensor | None, rows: int) -> None:
    """Raises UserError unless x is None or one number per row."""
    if x is not None and x.shape != (rows,):
        raise UserError(f"{name} has shape {list(x.shape)}: give one entry per row, [{rows}]")


def reduce_rows(losses: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Losses of rows [n] -> scalar, or [n] with "none". See the objectives for what the four reductions mean.

    No rows, or only rows of weight 0, give 0 with zero gradients.
    """
    weight = None if weight is None else weight.to(losses.dtype)
    weighted = losses if weight is None else losses * weight
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if reduction == "mean" or (reduction == "weighted" and weight is None):
        return weighted.sum() / max(losses.shape[0], 1)
    if reduction == "weighted" and weight is not None:
        total = weight.sum()
        return weighted.sum() / torch.where(total > 0, total, torch.ones_like(total))
    raise UserError(f'reduction is {reduction!r}: use "mean", "weighted", "sum" or "none"')


def mean_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """sum(weight * CE) / sum(weight) over logits [n, V], targets [n] and weight [n] -> scalar; ignored rows weigh 0."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise UserError(f"logits {list(logits.shape)} and targets {list(targets.shape)}: give [n, V] and [n]")
    check_rows("weight", weight, targets.shape[0])
    losses = F.cross_entropy(
        upcast(logits), targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    counts = (targets != ignore_index).to(losses.dtype)
    return reduce_rows(losses, counts if weight is None else counts * weight.to(losses.dtype), "weighted")
