"""Caption loss: next-token cross-entropy with label smoothing."""

from __future__ import annotations

from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.losses._reduce import mean_cross_entropy


def caption_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.1, ignore_index: int = -100) -> Tensor:
    """Mean over a batch's real target tokens of the label-smoothed cross-entropy.

    Over ranks: times `ops.collectives.rank_share` of the number of target tokens.

    Args:
        logits: [B, T, V]; position t predicts targets[:, t], so the caller shifts.
        targets: [B, T] long, ignore_index where there is no target.
        label_smoothing: share of the target's probability that is spread evenly over all V.

    Returns:
        Scalar; 0 with zero gradients if there is no target.

    Raises:
        UserError: shapes that do not fit.

    Source: Szegedy et al. 2016 (label smoothing); UNIMO-2's captioning uses 0.1.
    """
    if logits.ndim != 3 or targets.shape != logits.shape[:2]:
        raise UserError(f"logits {list(logits.shape)} and targets {list(targets.shape)}: give [B, T, V] and [B, T]")
    return mean_cross_entropy(
        logits.flatten(0, 1), targets.flatten(), None, ignore_index=ignore_index, label_smoothing=label_smoothing
    )


class CaptionLoss(nn.Module):
    """`caption_loss` with its settings.

    Args:
        label_smoothing: in [0, 1].
        ignore_index: target that does not count.

    Raises:
        UserError: label_smoothing outside of [0, 1].
    """

    def __init__(self, *, label_smoothing: float = 0.1, ignore_index: int = -100) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing is {label_smoothing}: give a number in [0, 1]")
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [B, T, V], targets [B, T] -> scalar."""
        return caption_loss(logits, targets, label_smoothing=self.label_smoothing, ignore_index=self.ignore_index)
