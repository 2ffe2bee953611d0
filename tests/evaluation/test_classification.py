"""Metrics of classifiers against counts by hand."""

import math
import sys

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.evaluation import class_accuracies, classification_metrics, regression_metrics, top_k_metrics


def test_two_classes_by_hand():
    labels, found = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 0]
    # True positives 2, false positives 1, false negatives 2, true negatives 3.
    metrics = classification_metrics(found, labels, classes=2)
    assert metrics["accuracy"] == 5 / 8
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert metrics["matthews"] == pytest.approx((2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5))


def test_three_classes_by_hand():
    labels, found = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 2]
    metrics = classification_metrics(found, labels, classes=4)
    assert metrics["accuracy"] == 4 / 6
    # Class 0: 1 of 2 found, 1 of 2 right; class 1: 2 of 2 and 2 of 3; class 2: 1 of 2 and 1 of 1; class 3: nothing.
    assert metrics["f1"] == pytest.approx((0.5 + 0.8 + 2 / 3 + 0.0) / 4)


def test_one_class_for_all_is_no_correlation():
    assert classification_metrics([1, 1, 1, 1], [1, 0, 1, 0], classes=2)["matthews"] == 0.0


def test_correlations_by_hand():
    found, true = [1.0, 2.0, 3.0, 5.0], [2.0, 1.0, 4.0, 20.0]
    metrics = regression_metrics(found, true)
    mean_f, mean_t = sum(found) / 4, sum(true) / 4
    product = sum((f - mean_f) * (t - mean_t) for f, t in zip(found, true, strict=True))
    spread = sum((f - mean_f) ** 2 for f in found) * sum((t - mean_t) ** 2 for t in true)
    assert metrics["pearson"] == pytest.approx(product / math.sqrt(spread))
    # Ranks 1 2 3 4 and 2 1 3 4: 1 - 6 * 2 / (4 * 15).
    assert metrics["spearman"] == pytest.approx(0.8)
    assert metrics["pearson_spearman"] == pytest.approx((metrics["pearson"] + 0.8) / 2)
    assert all(math.isnan(value) for value in regression_metrics([1.0, 1.0], [1.0, 2.0]).values())


def test_top_k_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.0], [0.4, 0.3, 0.2, 0.1], [0.0, 0.1, 0.2, 0.3], [0.9, 0.8, 0.7, 0.1]])
    assert top_k_metrics(scores, [2, 0, 0, 2], ks=(1, 2, 3, 4)) == {"top1": 0.25, "top2": 0.5, "top3": 0.75}
    assert top_k_metrics(scores, [1, 0, 3, 0]) == {"top1": 1.0}


def test_top_k_equals_a_slow_count():
    scores, labels = torch.randn(200, 12), torch.randint(0, 11, (200,)).tolist()
    found = top_k_metrics(scores, labels)
    for k in (1, 5):
        hits = [label in row.argsort(descending=True)[:k].tolist() for row, label in zip(scores, labels, strict=True)]
        assert found[f"top{k}"] == pytest.approx(sum(hits) / 200)


def test_each_class_by_hand():
    assert class_accuracies([0, 1, 1, 3], [0, 0, 1, 2], ["a", "b", "c", "d"]) == {"a": 0.5, "b": 1.0, "c": 0.0}


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"pip install 'vlblocks\[tasks\]'"):
        classification_metrics([1], [1], classes=2)
