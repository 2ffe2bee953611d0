"""Metrics and the protocols that compute them."""

from vlblocks.evaluation.codes import CodeCounts, CodeOverlap, code_overlap, code_usage
from vlblocks.evaluation.plots import GroundingExample, plot_curves, plot_grounding, shared_codes
from vlblocks.evaluation.retrieval import (
    Reranked,
    RetrievalRanks,
    bootstrap_intervals,
    chance_levels,
    rerank,
    retrieval_metrics,
    retrieval_ranks,
    summarize_ranks,
)

__all__ = [
    "CodeCounts",
    "CodeOverlap",
    "GroundingExample",
    "Reranked",
    "RetrievalRanks",
    "bootstrap_intervals",
    "chance_levels",
    "code_overlap",
    "code_usage",
    "plot_curves",
    "plot_grounding",
    "rerank",
    "retrieval_metrics",
    "retrieval_ranks",
    "shared_codes",
    "summarize_ranks",
]
