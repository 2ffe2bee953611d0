"""Metrics and the protocols that compute them."""

from vlblocks.evaluation.captions import CaptionFile, caption_metrics, check_caption_metrics
from vlblocks.evaluation.classification import (
    class_accuracies,
    classification_metrics,
    regression_metrics,
    top_k_metrics,
)
from vlblocks.evaluation.codes import CodeCounts, CodeOverlap, code_overlap, code_usage
from vlblocks.evaluation.plots import GroundingExample, plot_curves, plot_grounding, shared_codes
from vlblocks.evaluation.reranking import KeptScores, Reranked, Shortlist, rerank, score_every_pair, shortlist
from vlblocks.evaluation.retrieval import (
    FeatureScores,
    Fold,
    RetrievalRanks,
    bootstrap_intervals,
    chance_levels,
    mean_metrics,
    retrieval_metrics,
    retrieval_ranks,
    split_folds,
    summarize_ranks,
)
from vlblocks.evaluation.vqa import normalize_answer, vqa_accuracy, vqa_metrics

__all__ = [
    "CaptionFile",
    "CodeCounts",
    "CodeOverlap",
    "FeatureScores",
    "Fold",
    "GroundingExample",
    "KeptScores",
    "Reranked",
    "RetrievalRanks",
    "Shortlist",
    "bootstrap_intervals",
    "caption_metrics",
    "chance_levels",
    "check_caption_metrics",
    "class_accuracies",
    "classification_metrics",
    "code_overlap",
    "code_usage",
    "mean_metrics",
    "normalize_answer",
    "plot_curves",
    "plot_grounding",
    "regression_metrics",
    "rerank",
    "retrieval_metrics",
    "retrieval_ranks",
    "score_every_pair",
    "shared_codes",
    "shortlist",
    "split_folds",
    "summarize_ranks",
    "top_k_metrics",
    "vqa_accuracy",
    "vqa_metrics",
]
