"""Contrastive losses from the whole matrix of logits, by autograd: the plain twins of `ops.contrastive`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlblocks.ops.contrastive import Ranks, SameId


def info_nce_whole(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    ranks: Ranks,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    same_id: SameId = "positive",
    queue_image: Tensor | None = None,
    queue_text: Tensor | None = None,
    queue_valid: Tensor | None = None,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`ops.contrastive.info_nce_rows`, of features in float32 or float64."""
    own = ranks.own(image.device, len(image))
    same = counted = None
    if ids is not None:
        same = ids[:, None] == ranks.constants(ids)[None, :]
        if weight is not None:
            counted = ranks.constants(weight) != 0
    losses = []
    for rows, columns, queue, taught, teacher, caption in (
        (image, text, queue_text, teacher_image, teacher_text, counted),
        (text, image, queue_image, teacher_text, teacher_image, None),
    ):
        candidates = ranks.candidates(columns)
        positive = own[:, None] == torch.arange(len(candidates), device=own.device)[None, :]
        hidden = torch.zeros_like(positive)
        if same is not None:
            group = same if caption is None else same & caption
            if same_id == "exclude":
                hidden = group & ~positive
            else:
                positive = positive | group
        if queue is not None:
            candidates = torch.cat([candidates, queue.detach().to(columns.dtype)])
            invalid = torch.zeros(len(queue), dtype=torch.bool, device=own.device)
            if queue_valid is not None:
                invalid = ~queue_valid
            hidden = torch.cat([hidden, invalid.expand(len(rows), -1)], dim=1)
            positive = F.pad(positive, (0, len(queue)))
        right, shown = positive.to(scale.dtype), (~hidden).to(scale.dtype)
        target = (1 - label_smoothing) * right / right.sum(1, keepdim=True)
        target = target + label_smoothing * shown / shown.sum(1, keepdim=True)
        if taught is not None and teacher is not None:
            against = ranks.constants(teacher)
            against = against if queue is None else torch.cat([against, queue.detach().to(teacher.dtype)])
            soft = (scale * (taught @ against.t())).detach().masked_fill(hidden, -math.inf).softmax(1)
            target = alpha * soft + (1 - alpha) * target
        logits = scale * (rows @ candidates.t())
        # A target of 0 times minus infinity would be NaN.
        chosen = (target * logits.masked_fill(hidden, 0)).sum(1)
        losses.append(logits.masked_fill(hidden, -math.inf).logsumexp(1) - chosen)
    return losses[0], losses[1]


def siglip_whole(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    ranks: Ranks,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`ops.contrastive.siglip_total` without row_weight, of features in float32 or float64."""
    logits = image @ ranks.candidates(text).t() * scale + bias
    own = ranks.own(image.device, len(image))
    matched = own[:, None] == torch.arange(ranks.total, device=image.device)[None, :]
    if ids is not None:
        same = ids[:, None] == ranks.constants(ids)[None, :]
        if weight is not None:
            same = same & (ranks.constants(weight) != 0)[None, :]
        matched = matched | same
    return -F.logsigmoid(torch.where(matched, logits, -logits)).sum(dim=1)


def two_view_whole(view1: Tensor, view2: Tensor, scale: Tensor, *, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """`ops.contrastive.two_view_rows`, of features in float32 or float64."""
    candidates = torch.cat([ranks.candidates(view1), ranks.candidates(view2)])
    first = ranks.own(view1.device, len(view1))
    second = first + ranks.total
    logits = torch.cat([view1, view2]) @ candidates.t() * scale
    itself = torch.cat([first, second])[:, None] == torch.arange(2 * ranks.total, device=view1.device)[None, :]
    losses = F.cross_entropy(
        logits.masked_fill(itself, -math.inf), torch.cat([second, first]), reduction="none"
    ).unflatten(0, (2, len(view1)))
    return losses[0], losses[1]
