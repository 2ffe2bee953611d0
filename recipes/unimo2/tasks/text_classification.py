"""Classes or scores of one or two sentences: GLUE, or a TSV of one's own."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.data import GlueFormat, GlueTexts, glue_format, read_glue
from vlblocks.data.scene_tasks import ENTAILMENT_LABELS, count_label, hypothesise
from vlblocks.errors import UserError
from vlblocks.evaluation import classification_metrics, regression_metrics
from vlblocks.nn import ClassificationHead
from vlblocks.training import write_atomic

from ..model import Unimo2
from .base import (
    Autocast,
    Examples,
    Split,
    Task,
    TaskConfig,
    TaskData,
    TaskModel,
    TaskOptim,
    encode,
    pad_texts,
    pooled,
    scene_splits,
)
from .image_text import unspoiled


@dataclass(frozen=True)
class TextData(TaskData):
    root: Path | None = None
    """GLUE folder of one data set: train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv)."""
    train: Path | None = None
    """TSV in place of the folder's."""
    val: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    name: Literal["auto", "sst2", "cola", "mnli", "stsb", "mrpc", "qqp", "qnli", "rte", "wnli"] = "auto"
    """auto: by the header, which CoLA's files do not have."""
    label: Literal["count", "entailment"] = "count"
    """On the generated corpus: how many things a caption tells of, or whether it entails a second sentence."""


@dataclass(frozen=True)
class TextConfig(TaskConfig):
    task: str = "text"
    epochs: float = 2.0
    batch: int = 64
    optim: TaskOptim = field(default_factory=lambda: TaskOptim(lr=5e-4))
    by_length: bool = True
    """Batches of texts of like length: less padding. Not on the generated corpus, where length tells the label."""
    data: TextData = field(default_factory=TextData)


class TextClassification(Task):
    """GLUE and the like: a class, or a score, of a sentence or of a pair of sentences."""

    Config = TextConfig
    watch = "accuracy"
    sides = ("text",)

    def __init__(self, config: TextConfig, *context: Any) -> None:
        super().__init__(config, *context)
        self.form: GlueFormat | None = None
        self.scale = (0.0, 1.0)  # mean and deviation of scores
        self.parts, self.rows = cache(self.parts), cache(self.rows)

    def facts(self) -> dict[str, Any]:
        if self.form is None:
            self._read_format()
        form = self.form
        self.watch = form.metric
        return {**form._asdict(), "scale": self.scale}

    def adopt(self, saved: dict[str, Any], source: Path) -> None:
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        try:
            self.form = GlueFormat(**{name: tuples[name] for name in GlueFormat._fields})
            self.scale, self.watch = tuples["scale"], self.form.metric
        except KeyError as error:
            raise UserError(f"{source}: has no {error}; use the file that the run wrote") from None
        wanted = self.config.data.name
        if wanted not in ("auto", self.form.name):
            raise UserError(f"{source}: this run was trained on {self.form.name}, not on {wanted}")
        data = self.config.data
        if data.embedded and self.form.name != _scene_form(data).name:
            raise UserError(
                f"{source}: this run was trained on {self.form.name}, not on the generated corpus's {data.label} "
                "(--data.embedded, --data.label); evaluate it on data of its kind"
            )

    def make_head(self, model: Unimo2) -> nn.Module:
        classes = 1 if self.form.regression else len(self.form.labels)
        return ClassificationHead(width=model.config.width, classes=classes, dropout=self.head_dropout)

    def dataset(self, split: Split) -> Examples:
        rows = self.rows(split)
        return Examples(len(rows), lambda epoch, index: rows[index])

    def rows(self, split: Split) -> list[dict[str, Any]]:
        """The examples of all files of a split: ids and label."""
        rows = []
        for _, texts in self.parts(split):
            labels = texts.labels or [None] * len(texts.first)
            seconds = texts.second or [None] * len(texts.first)
            ids = self._ids(texts.first, seconds)
            rows += [{"tokens": tokens, "label": label} for tokens, label in zip(ids, labels, strict=True)]
        return rows

    def lengths(self) -> list[int] | None:
        if self.config.data.embedded or not self.config.by_length:
            return None
        return [len(row["tokens"]) for row in self.rows("train")]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad_texts([example["tokens"] for example in examples])
        if examples[0]["label"] is not None:
            kind = torch.float32 if self.form.regression else torch.long
            batch["labels"] = torch.tensor([example["label"] for example in examples]).to(kind)
        return batch

    def loss(self, net: TaskModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        logits = self._logits(net, batch)
        if not self.form.regression:
            return F.cross_entropy(logits, batch["labels"])
        mean, deviation = self.scale
        return F.mse_loss(logits[:, 0], (batch["labels"] - mean) / deviation)

    def evaluate(self, net: TaskModel, split: Split, *, autocast: Autocast, out: Path | None) -> dict[str, float | str]:
        device, rows = next(net.parameters()).device, self.rows(split)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["tokens"]))
        outputs = []
        for batch in self.batches(split, device, order=order):
            with autocast():
                outputs.append(self._logits(net, batch).float().cpu())
        logits = torch.cat(outputs)[torch.tensor(order).argsort()]
        mean, deviation = self.scale
        found = (logits[:, 0] * deviation + mean if self.form.regression else logits.argmax(1)).tolist()
        parts, metrics, start = self.parts(split), {}, 0
        for name, texts in parts:
            own, start = found[start : start + len(texts.first)], start + len(texts.first)
            if out is not None:
                self._write(out / f"{name or split}.tsv", texts, own)
            if texts.labels is not None and len(parts) > 1:
                metrics |= {f"{metric}_{name}": value for metric, value in self._metrics(own, texts.labels).items()}
        if all(texts.labels is not None for _, texts in parts):
            metrics = {**self._metrics(found, [label for _, texts in parts for label in texts.labels]), **metrics}
        elif out is None:
            raise UserError("--data.test: has no labels to compare with; --out DIR writes the predictions instead")
        return {**metrics, "examples": len(found)}

    def parts(self, split: Split) -> list[tuple[str, GlueTexts]]:
        """The files of a split with their names, such as matched; "" where there is one only."""
        if self.config.data.embedded:
            return [("", self._scenes(split))]
        if self.form is None:
            self._read_format()
        files = self._files(split)
        names = [file.stem.partition("_")[2] or file.stem for file in files]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"--data.{split}: two files go by the name {twice}, and so would their figures; rename one")
        texts = [read_glue(file, self.form, bad=self.bad, labelled=split != "test") for file in files]
        return list(zip(names if len(files) > 1 else [""], texts, strict=True))

    def _read_format(self) -> None:
        data = self.config.data
        if data.embedded:
            self.form = _scene_form(data)
            return
        self.form = glue_format(data.name, self._files("train")[0])
        if self.form.regression:
            scores = [label for _, texts in self.parts("train") for label in texts.labels]
            self.scale = statistics.fmean(scores), statistics.pstdev(scores) or 1.0

    def _files(self, split: Split) -> list[Path]:
        data = self.config.data
        given = {"train": (data.train,) if data.train else (), "val": data.val, "test": data.test}[split]
        if given:
            return list(given)
        if data.root is None:
            raise UserError(f"--data.root: names no folder, and --data.{split} no file; or add --data.embedded")
        if not data.root.is_dir():
            raise UserError(f"--data.root {data.root}: no such folder; pass the one that holds train.tsv")
        if split == "train":
            return [data.root / "train.tsv"]
        wanted = self.form.evaluation
        if split == "test":
            wanted = tuple(name.replace("dev", "test") for name in wanted)
        return [data.root / f"{name}.tsv" for name in wanted]

    def _scenes(self, split: Split) -> GlueTexts:
        part = scene_splits(self.config.data, self.image_size)[split]
        first, second, labels = [], [], []
        for index, scene in enumerate(part.scenes):
            # Every caption trains; one tells a scene whole, so the others would only repeat it in an evaluation.
            for number, caption in enumerate(part.captions[index][: None if split == "train" else 1]):
                first.append(caption)
                if self.config.data.label == "count":
                    labels.append(count_label(scene))
                else:
                    on_scene = partial(hypothesise, scene)
                    draw = on_scene if split == "test" else unspoiled(on_scene, lambda found: found.text)
                    claim = draw(self.rng(split, number, index))
                    second.append(claim.text)
                    labels.append(ENTAILMENT_LABELS.index(claim.label))
        return GlueTexts(first, second or None, labels, list(range(len(first))))

    def _ids(self, first: list[str], second: list[str | None]) -> list[list[int]]:
        """RoBERTa's layout: <s> first </s> or <s> first </s></s> second </s>, the longer of both cut to fit."""
        room, separator = self.config.data.max_text, self.tokenizer.sep_id
        if second[0] is None:
            return self.tokenizer.encode_batch(first, room)
        both = []
        for ids, others in zip(self.tokenizer.encode_batch(first), self.tokenizer.encode_batch(second), strict=True):
            head, tail = ids[1:-1], others[1:-1]
            while len(head) + len(tail) + 4 > room:
                (head if len(head) >= len(tail) else tail).pop()
            both.append([self.tokenizer.cls_id, *head, separator, separator, *tail, separator])
        return both

    def _logits(self, net: TaskModel, batch: dict[str, Tensor]) -> Tensor:
        joint = encode(net.base, tokens=batch["tokens"], valid=batch["valid"])
        return net.head(pooled(net.base, joint))

    def _metrics(self, found: list[float], labels: list[float]) -> dict[str, float]:
        if self.form.regression:
            return regression_metrics(found, labels)
        return classification_metrics(found, [int(label) for label in labels], classes=len(self.form.labels))

    def _write(self, path: Path, texts: GlueTexts, found: list[float]) -> None:
        """GLUE's submission: the row's number and the label's name, or the score."""
        words = [f"{value:.4f}" if self.form.regression else self.form.labels[int(value)] for value in found]
        lines = ["index\tprediction", *(f"{row}\t{word}" for row, word in zip(texts.rows, words, strict=True))]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def _scene_form(data: TextData) -> GlueFormat:
    labels = ("one", "two", "three") if data.label == "count" else ENTAILMENT_LABELS
    return GlueFormat(f"scenes/{data.label}", ("sentence",), "label", labels)
