"""Circle loss over a query's positive and negative similarities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.losses._reduce import Reduction, check_rows, reduce_rows, upcast


def circle_loss(
    positives: Tensor,
    negatives: Tensor,
    *,
    margin: float = 0.2,
    scale: float = 1.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """log(1 + sum_j exp(scale a_j (n_j - margin)) * sum_i exp(-scale a_i (p_i - (1 - margin)))), per row.

    The paces a_i = max(1 + margin - p_i, 0) and a_j = max(n_j + margin, 0) say how far a similarity is from its
    optimum; they are constants in the gradient.

    Args:
        positives: [b, P] similarities p to what belongs to the query, P >= 1.
        negatives: [b, N] similarities n to what does not; with N = 0 the loss is 0.
        margin: how far from 1 (positives) and 0 (negatives) the decision boundary lies.
        scale: the paper's gamma.
        weight: [b]; all 1 if None.
        reduction: "mean" over rows, "weighted" mean, "sum" or "none".

    Returns:
        Scalar, or [b] with reduction="none".

    Raises:
        UserError: shapes that do not fit.

    Source: Sun et al. 2020, Circle Loss; unimo2_spec item 26 (margin 0.2, scale 1).
    """
    if positives.ndim != 2 or negatives.ndim != 2 or positives.shape[0] != negatives.shape[0]:
        raise UserError(
            f"positives {list(positives.shape)} and negatives {list(negatives.shape)}: give [b, P] and [b, N]"
        )
    check_rows("weight", weight, positives.shape[0])
    positives, negatives = upcast(positives), upcast(negatives)
    positive_pace = (1 + margin - positives.detach()).clamp_min(0)
    negative_pace = (negatives.detach() + margin).clamp_min(0)
    pull = torch.logsumexp(-scale * positive_pace * (positives - (1 - margin)), dim=1)
    push = torch.logsumexp(scale * negative_pace * (negatives - margin), dim=1)
    both = pull + push
    return reduce_rows(torch.logaddexp(both, torch.zeros_like(both)), weight, reduction)


class CircleLoss(nn.Module):
    """`circle_loss` with its settings.

    Args:
        margin: see `circle_loss`; UNIMO-2's retrieval fine-tuning uses 0.2.
        scale: see `circle_loss`; UNIMO-2 uses 1, the paper 32 to 256.
    """

    def __init__(self, *, margin: float = 0.2, scale: float = 1.0) -> None:
        super().__init__()
        if scale <= 0:
            raise UserError(f"scale is {scale}: give a positive number")
        self.margin, self.scale = margin, scale

    def forward(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """positives [b, P], negatives [b, N] -> scalar."""
        return circle_loss(positives, negatives, margin=self.margin, scale=self.scale)
