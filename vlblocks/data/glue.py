"""GLUE's tab-separated files (Wang et al., 2019): one or two sentences and a class or a score a line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from vlblocks.data.formats import _read
from vlblocks.data.sources import BadData, Skipped
from vlblocks.errors import UserError

__all__ = ["GLUE", "GlueFormat", "GlueTexts", "glue_format", "read_glue"]


class GlueFormat(NamedTuple):
    """Where a data set keeps what, and what it is measured by.

    Attributes:
        name: of the data set.
        texts: columns of the first and, if there is one, the second sentence.
        label: column of the label or score.
        labels: the classes, in the order of the head's outputs; None: whatever the file holds; (): a score.
        metric: what its leaderboard ranks by.
        columns: of a file without a header.
        evaluation: names of its validation files (without .tsv), the first that are there count.
    """

    name: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    metric: str = "accuracy"
    columns: tuple[str, ...] | None = None
    evaluation: tuple[str, ...] = ("dev",)

    @property
    def regression(self) -> bool:
        return self.labels == ()


_BINARY, _NLI = ("0", "1"), ("entailment", "neutral", "contradiction")
_TWO_WAY, _PAIR = ("entailment", "not_entailment"), ("sentence1", "sentence2")

GLUE: dict[str, GlueFormat] = {
    found.name: found
    for found in (
        GlueFormat("sst2", ("sentence",), "label", _BINARY),
        GlueFormat(
            "cola", ("sentence",), "label", _BINARY, "matthews", columns=("source", "label", "judgement", "sentence")
        ),
        GlueFormat("mnli", _PAIR, "gold_label", _NLI, evaluation=("dev_matched", "dev_mismatched")),
        GlueFormat("stsb", _PAIR, "score", (), "pearson_spearman"),
        GlueFormat("mrpc", ("#1 String", "#2 String"), "Quality", _BINARY, "f1"),
        GlueFormat("qqp", ("question1", "question2"), "is_duplicate", _BINARY, "f1"),
        GlueFormat("qnli", ("question", "sentence"), "label", _TWO_WAY),
        GlueFormat("rte", _PAIR, "label", _TWO_WAY),
        GlueFormat("wnli", _PAIR, "label", _BINARY),
    )
}


class GlueTexts(NamedTuple):
    """The rows of a file, in its order.

    Attributes:
        first: N sentences.
        second: N sentences, or None for a task on one.
        labels: N indices of `GlueFormat.labels`, or N scores; None for a file without that column (GLUE's tests).
        rows: N numbers of the rows, from 0, as a submission counts them.
    """

    first: list[str]
    second: list[str] | None
    labels: list[float] | None
    rows: list[int]


def glue_format(name: str, path: str | Path) -> GlueFormat:
    """The format of a file, by the data set's name, or, for "auto", by its header.

    A file of your own is read as sentence (or sentence1 and sentence2) and label, whose classes are those in the file,
    or score.

    Raises:
        UserError: an unknown name, or a header that tells nothing.
    """
    if name != "auto":
        if name not in GLUE:
            raise UserError(f"GLUE data set {name!r} is unknown; choose auto, {', '.join(GLUE)}")
        return GLUE[name]
    path = Path(path)
    header = _lines(path)[0][1]
    for own in ("mnli", "mrpc", "qqp"):
        if {*GLUE[own].texts, GLUE[own].label} <= set(header):
            return GLUE[own]
    texts = next(
        (names for names in (_PAIR, ("question", "sentence"), ("sentence",)) if set(names) <= set(header)), None
    )
    label = next((column for column in ("score", "label") if column in header), None)
    if texts is None or label is None:
        raise UserError(
            f"{path}: its header ({', '.join(header[:6])}) has no columns sentence (or sentence1, sentence2) and "
            "label (or score); name the data set, or write such a header"
        )
    if label == "score":
        return GLUE["stsb"]._replace(texts=texts)
    return GlueFormat("auto", texts, label, _classes(path, header.index(label)))


def read_glue(path: str | Path, form: GlueFormat, *, bad: BadData | None = None, labelled: bool = True) -> GlueTexts:
    """Read one file. A row with too few fields, an empty sentence or no valid label is skipped, counted and named.

    Quotation marks are text like any other, as in GLUE.

    Args:
        form: from `glue_format`; its classes are those that count as valid.
        labelled: whether the label's column must be there.

    Raises:
        UserError: the file is missing or empty, a column is missing, or no row is left.
    """
    path, bad = Path(path), bad or BadData()
    lines = _lines(path)
    # CoLA's training and validation files have no header, its test file has one.
    headless = form.columns is not None and not set(form.texts) <= set(lines[0][1])
    header = list(form.columns or ()) if headless else lines.pop(0)[1]
    absent = [column for column in (*form.texts, *([form.label] if labelled else [])) if column not in header]
    if absent:
        raise UserError(
            f"{path}: has no column {absent[0]!r}, which {form.name} needs (it has {', '.join(header[:6])}); "
            "pass that data set's file, or name another data set"
        )
    places = [header.index(column) for column in form.texts]
    label_place = header.index(form.label) if form.label in header else None
    first, second, labels, rows = [], [], [], []
    for row, (number, fields) in enumerate(lines):
        texts, label, reason = _row(fields, places, label_place, form)
        if reason:
            bad.record(Skipped(f"{path.name}/row", f"{path}: line {number}", reason, len(lines)))
            continue
        first.append(texts[0])
        second.append(texts[-1])
        labels.append(label)
        rows.append(row)
    if not first:
        raise UserError(f"{path}: holds no row besides its header; pass a file with examples")
    return GlueTexts(first, second if len(places) == 2 else None, labels if label_place is not None else None, rows)


def _row(
    fields: list[str], places: list[int], label_place: int | None, form: GlueFormat
) -> tuple[list[str], float, str]:
    """Its sentences, its label, and what is wrong with it, if anything is."""
    needed = max([*places, *([] if label_place is None else [label_place])])
    if len(fields) <= needed:
        return [], 0.0, f"{len(fields)} fields where at least {needed + 1} are needed"
    texts = [fields[place].strip() for place in places]
    if not all(texts):
        return texts, 0.0, "an empty sentence"
    if label_place is None:
        return texts, 0.0, ""
    word = fields[label_place].strip()
    if form.labels:
        known = word in form.labels
        return (
            texts,
            float(form.labels.index(word)) if known else 0.0,
            ("" if known else f"label {word!r} is none of {', '.join(form.labels)}"),
        )
    try:
        score = float(word)
    except ValueError:
        return texts, 0.0, f"score {word!r} is no number"
    return texts, score, "" if math.isfinite(score) else f"score {word!r} is not finite"


def _classes(path: Path, place: int) -> tuple[str, ...]:
    found = {fields[place].strip() for _, fields in _lines(path)[1:] if len(fields) > place} - {""}
    if not 2 <= len(found) <= 1000:
        raise UserError(f"{path}: its column of labels has {len(found)} different ones; 2 to 1000 are classes")
    # Numbers in their order, 10 after 9.
    return tuple(sorted(found, key=lambda label: (len(label), label) if label.isdigit() else (10**6, label)))


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of every line that is not blank."""
    lines = _read(path).split("\n")
    return [(n, line.rstrip("\r").split("\t")) for n, line in enumerate(lines, start=1) if line.strip()]
