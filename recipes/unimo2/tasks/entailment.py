"""Whether a picture entails a sentence, contradicts it or leaves it open: three classes, accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.data import EntailmentFiles, locate_entailment, read_entailment
from vlblocks.data.scene_tasks import ENTAILMENT_LABELS, Hypothesis, hypothesise
from vlblocks.errors import UserError
from vlblocks.evaluation import class_accuracies, classification_metrics
from vlblocks.training import write_json_atomic

from ..model import Unimo2
from .base import Autocast, Examples, Split, Task, TaskConfig, TaskModel, scene_splits
from .image_text import (
    ImageTextData,
    Pairs,
    classify_pairs,
    collate_pairs,
    pair_examples,
    pair_head,
    pair_logits,
    unspoiled,
)


@dataclass(frozen=True)
class EntailmentData(ImageTextData):
    root: Path | None = None
    """Folder of SNLI-VE: snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl, and Flickr30k's pictures."""
    train: Path | None = None
    """JSONL in place of the root's."""
    val: Path | None = None
    test: Path | None = None
    images: Path | None = None
    """Folder of the pictures in place of the root's."""


@dataclass(frozen=True)
class EntailmentConfig(TaskConfig):
    task: str = "entailment"
    epochs: float = 8.0
    batch: int = 64
    data: EntailmentData = field(default_factory=EntailmentData)


class VisualEntailment(Task):
    """Whether a picture entails, contradicts or leaves open what a sentence says (SNLI-VE)."""

    Config = EntailmentConfig
    watch = "accuracy"

    def __init__(self, config: EntailmentConfig, *context: Any) -> None:
        super().__init__(config, *context)
        self.rows = cache(self.rows)

    def facts(self) -> dict[str, Any]:
        return {"labels": list(ENTAILMENT_LABELS)}

    def make_head(self, model: Unimo2) -> nn.Module:
        return pair_head(model.config.width, len(ENTAILMENT_LABELS), dropout=self.head_dropout)

    def dataset(self, split: Split) -> Examples:
        return pair_examples(self, split, self.rows(split)[0], lambda row: (row.text, {"label": row.label}))

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [ENTAILMENT_LABELS.index(example["label"]) for example in examples]
        return {**collate_pairs(examples), "labels": torch.tensor(labels)}

    def loss(self, net: TaskModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return F.cross_entropy(pair_logits(net, batch), batch["labels"])

    def evaluate(self, net: TaskModel, split: Split, *, autocast: Autocast, out: Path | None) -> dict[str, float | str]:
        """accuracy, and that of each label; with `out` the labels found in entailment_SPLIT.json."""
        pairs, ids = self.rows(split)
        said = classify_pairs(self, net, split, autocast)
        found = [said.classes[index] for index in said.seen]
        labels = [ENTAILMENT_LABELS.index(pairs.row(i, self.rng(split, 0, i)).label) for i in said.seen]
        if out is not None:
            # A list, since a pairID may be there twice.
            written = [{"pairID": ids[i], "label": ENTAILMENT_LABELS[said.classes[i]]} for i in said.seen]
            write_json_atomic(out / f"entailment_{split}.json", written)
        accuracy = classification_metrics(found, labels, classes=len(ENTAILMENT_LABELS))["accuracy"]
        each = class_accuracies(found, labels, ENTAILMENT_LABELS)
        shares = {f"accuracy/{name}": value for name, value in each.items()}
        return {"accuracy": accuracy, **shares, "sentences": len(found)}

    def rows(self, split: Split) -> tuple[Pairs, list[str]]:
        """The sentences of a split, and the names of their rows."""
        if self.config.data.embedded:
            return self._scenes(split)
        found = read_entailment(self._files(split), bad=self.bad, resolution=self.image_size)
        rows = [Hypothesis(text, ENTAILMENT_LABELS[n]) for text, n in zip(found.texts, found.labels, strict=True)]
        return Pairs(found.images, found.owners, lambda index, rng: rows[index]), found.ids

    def _files(self, split: Split) -> EntailmentFiles:
        data, given = self.config.data, getattr(self.config.data, split)
        if given is None and data.root is None:
            raise UserError(f"--data.{split}: names no file, nor does --data.root a folder; or add --data.embedded")
        if given is None:
            files = locate_entailment(data.root, split)
            return files._replace(images=data.images or files.images)
        images = data.images or data.root
        if images is None:
            raise UserError("--data.images: names no folder; give the one with Flickr30k's pictures")
        return EntailmentFiles(given, images)

    def _scenes(self, split: Split) -> tuple[Pairs, list[str]]:
        """In training a new sentence on every scene each epoch; else one of each label."""
        part = scene_splits(self.config.data, self.image_size)[split]

        def draw(index: int, rng: np.random.Generator, label: str | None = None) -> Hypothesis:
            on_scene = partial(hypothesise, part.scenes[index], label=label)
            return on_scene(rng) if split == "test" else unspoiled(on_scene, lambda found: found.text)(rng)

        if split == "train":
            return Pairs(part.images, range(len(part.scenes)), draw), []
        owners = [index for index in range(len(part.scenes)) for _ in ENTAILMENT_LABELS]
        each = len(ENTAILMENT_LABELS)
        pairs = Pairs(part.images, owners, lambda i, rng: draw(i // each, rng, ENTAILMENT_LABELS[i % each]))
        return pairs, [f"{i // each}/{ENTAILMENT_LABELS[i % each]}" for i in range(len(owners))]
