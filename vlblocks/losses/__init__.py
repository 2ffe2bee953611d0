"""Pre-training objectives: pure functions, with a thin module where there are parameters or settings to keep."""

from vlblocks.losses.caption import CaptionLoss, caption_loss
from vlblocks.losses.circle import CircleLoss, circle_loss
from vlblocks.losses.contrastive import InfoNCE, SigLIP, clip_temperature, info_nce, siglip, two_view_contrast
from vlblocks.losses.grounding import GroundingLoss, grounding_loss
from vlblocks.losses.masked import (
    MaskedCodes,
    MaskedRows,
    mask_codes,
    masked_grounding_loss,
    masked_rows,
    masked_token_loss,
)
from vlblocks.losses.matching import HardNegatives, draw_hard_negatives, matching_loss, mine_hard_negatives
from vlblocks.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "CaptionLoss",
    "CircleLoss",
    "GroundingLoss",
    "HardNegatives",
    "InfoNCE",
    "MaskedCodes",
    "MaskedRows",
    "SigLIP",
    "caption_loss",
    "circle_loss",
    "clip_temperature",
    "draw_hard_negatives",
    "grounding_loss",
    "info_nce",
    "linear_cross_entropy",
    "mask_codes",
    "masked_grounding_loss",
    "masked_rows",
    "masked_token_loss",
    "matching_loss",
    "mine_hard_negatives",
    "siglip",
    "two_view_contrast",
]
