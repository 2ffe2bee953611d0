"""Metrics of classifiers and regressors, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlblocks.errors import UserError

__all__ = ["class_accuracies", "classification_metrics", "regression_metrics", "top_k_metrics"]


def classification_metrics(predictions: Sequence[int], labels: Sequence[int], *, classes: int) -> dict[str, float]:
    """accuracy, matthews (correlation) and f1 of N predicted classes.

    f1 is that of class 1 where there are two classes (MRPC, QQP), else the mean over all classes; 0 for one that is
    neither predicted nor there.
    """
    metrics = _sklearn()
    average, names = ("binary", None) if classes == 2 else ("macro", list(range(classes)))
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        "matthews": float(metrics.matthews_corrcoef(labels, predictions)),
        "f1": float(metrics.f1_score(labels, predictions, average=average, labels=names, zero_division=0.0)),
    }


def regression_metrics(predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """pearson and spearman (correlations), and pearson_spearman, their mean (STS-B); NaN where one side is constant."""
    _sklearn()
    from scipy.stats import pearsonr, spearmanr

    predicted, true = np.asarray(predictions, dtype=float), np.asarray(targets, dtype=float)
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return dict.fromkeys(("pearson", "spearman", "pearson_spearman"), float("nan"))
    pearson, spearman = float(pearsonr(predicted, true).statistic), float(spearmanr(predicted, true).statistic)
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


def top_k_metrics(scores: Tensor, labels: Sequence[int], *, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """topK: the share whose class is among the K best of scores [N, C]; a K of C or more is left out."""
    metrics, classes = _sklearn(), scores.shape[1]
    table = scores.double().cpu().numpy()
    found = {}
    for k in ks:
        if k == 1:
            found["top1"] = float(metrics.accuracy_score(labels, table.argmax(1)))
        elif k < classes:
            found[f"top{k}"] = float(metrics.top_k_accuracy_score(labels, table, k=k, labels=range(classes)))
    return found


def class_accuracies(predictions: Sequence[int], labels: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """The share of each class's examples that are given that class, by its name; classes without one are left out."""
    there = sorted(set(labels))
    shares = _sklearn().recall_score(labels, predictions, labels=there, average=None, zero_division=0.0)
    return {names[index]: float(share) for index, share in zip(there, shares, strict=True)}


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise UserError("scikit-learn is not installed: pip install 'vlblocks[tasks]'") from None
    return metrics
