"""Blocks: each is usable alone and knows nothing of who calls it."""

from vlblocks.nn import fusion
from vlblocks.nn.attention import Attention, KVCache
from vlblocks.nn.embed import PatchEmbed, TextEmbed, interpolate_positions
from vlblocks.nn.fusion import CoAttentionLayer, FusedStates, ModalityExperts
from vlblocks.nn.grounding import GroundedOutput, GroundedSpace, PickedCodes
from vlblocks.nn.heads import ClassificationHead, MaskedTokenHead, MatchingHead, Projection
from vlblocks.nn.momentum import FeatureQueue, MomentumEncoder
from vlblocks.nn.pooling import AttentionPool, ClsPool, MeanPool
from vlblocks.nn.quantizer import QuantizerOutput, VectorQuantizer
from vlblocks.nn.transformer import FeedForward, Transformer, TransformerLayer, uniform_layers
from vlblocks.nn.usage import CodeUsage

__all__ = [
    "Attention",
    "AttentionPool",
    "ClassificationHead",
    "ClsPool",
    "CoAttentionLayer",
    "CodeUsage",
    "FeatureQueue",
    "FeedForward",
    "FusedStates",
    "GroundedOutput",
    "GroundedSpace",
    "KVCache",
    "MaskedTokenHead",
    "MatchingHead",
    "MeanPool",
    "ModalityExperts",
    "MomentumEncoder",
    "PatchEmbed",
    "PickedCodes",
    "Projection",
    "QuantizerOutput",
    "TextEmbed",
    "Transformer",
    "TransformerLayer",
    "VectorQuantizer",
    "fusion",
    "interpolate_positions",
    "uniform_layers",
]
