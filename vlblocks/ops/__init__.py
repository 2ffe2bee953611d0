"""One function per operation, with an explicit back end; the only place that chooses between them."""

from vlblocks.ops.attention import attention
from vlblocks.ops.collectives import gather, gather_with_grad, rank, rank_share, world_size
from vlblocks.ops.grounding import grounding_losses, grounding_scores, nearest_code
from vlblocks.ops.linear_cross_entropy import linear_cross_entropy
from vlblocks.ops.renderings import KeyRuns
from vlblocks.ops.rows import take_rows
from vlblocks.ops.segments import SegmentMask

__all__ = [
    "KeyRuns",
    "SegmentMask",
    "attention",
    "gather",
    "gather_with_grad",
    "grounding_losses",
    "grounding_scores",
    "linear_cross_entropy",
    "nearest_code",
    "rank",
    "rank_share",
    "take_rows",
    "world_size",
]
