"""Classes of pictures: zero-shot by prompts, a linear probe, or full fine-tuning, on a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.data import (
    BadExampleError,
    ImageSource,
    Skipped,
    eval_transform,
    next_readable,
    read_image_classes,
    read_texts,
    text_batches,
    train_transform,
)
from vlblocks.data.scene_tasks import CLASSES, PLACES, class_label
from vlblocks.data.sources import Chosen
from vlblocks.errors import UserError
from vlblocks.evaluation import class_accuracies, top_k_metrics
from vlblocks.nn import ClassificationHead
from vlblocks.training import read_json, write_atomic

from ..configs import RunConfig
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
    pooled,
    scene_corpus,
)

# Sentences as the generated corpus's captions say them.
SCENE_PROMPTS = tuple(f"a {size} {{}} in the {place}" for size in ("large", "small") for place in PLACES)


@dataclass(frozen=True)
class ImageData(TaskData):
    root: Path | None = None
    """Folder with train/, val/ and perhaps test/, each with a folder of pictures for every class."""
    train: Path | None = None
    """Folder in place of the root's."""
    val: Path | None = None
    test: Path | None = None
    prompts: Path | None = None
    """Zero-shot: templates, one a line with {} for the class, or a JSON of sentences for each class."""
    flip: bool = True
    """Mirror training pictures at random."""
    min_crop: float = 0.8
    """Smallest share of a training picture that a random crop keeps."""


@dataclass(frozen=True)
class ImageConfig(TaskConfig):
    task: str = "image"
    mode: Literal["full", "probe", "zero-shot"] = "full"
    """full: all weights train; probe: the head alone; zero-shot: nothing, eval.py compares pictures with prompts."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the picture's joint states, or its pooled CLS state."""
    epochs: float = 3.0
    batch: int = 64
    optim: TaskOptim = field(default_factory=lambda: TaskOptim(lr=1e-3))
    data: ImageData = field(default_factory=ImageData)


class Labelled(NamedTuple):
    """Pictures with one class each."""

    images: ImageSource
    labels: Sequence[int]


class ImageClassification(Task):
    """The class of a picture."""

    Config = ImageConfig
    watch = "top1"
    sides = ("image",)
    zero_shot = True

    def __init__(self, config: ImageConfig, *context: Any) -> None:
        super().__init__(config, *context)
        self.names: list[str] | None = None
        crop = (config.data.min_crop, 1.0)
        self.augment = train_transform(self.image_size, scale=crop, flip=0.5 * config.data.flip)
        self.upright = eval_transform(self.image_size)
        self.pictures = cache(self.pictures)

    @classmethod
    def untrained(cls, run: RunConfig) -> ImageConfig:
        return ImageConfig(mode="zero-shot")

    def facts(self) -> dict[str, Any]:
        if self.config.mode == "zero-shot":
            raise UserError("--mode zero-shot: there is nothing to train; eval.py --run DIR --task image evaluates it")
        self.pictures("train")
        return {"classes": self.names}

    def adopt(self, saved: dict[str, Any], source: Path) -> None:
        if not isinstance(saved.get("classes"), list):
            raise UserError(f"{source}: has no list of classes; use the file that the run wrote")
        self.names = saved["classes"]
        if self.config.data.embedded and self.names != list(CLASSES):
            raise UserError(
                f"{source}: has {len(self.names)} classes, which are not the {len(CLASSES)} of the generated corpus; "
                "evaluate the run on pictures of its own, without --data.embedded"
            )

    def make_head(self, model: Unimo2) -> nn.Module:
        if self.names is None:
            return nn.Identity()
        # A probe is linear: what it reads is not dropped.
        dropout = 0.0 if self.config.mode == "probe" else self.head_dropout
        return ClassificationHead(width=model.config.width, classes=len(self.names), dropout=dropout)

    def frozen(self, net: TaskModel) -> list[nn.Module]:
        return [net.base] if self.config.mode == "probe" else super().frozen(net)

    def dataset(self, split: Split) -> Examples:
        images, labels = self.pictures(split)

        def train(epoch: int, index: int) -> dict[str, Any]:
            picture, found, skipped = next_readable(images, index, f"{split}/image")
            seed = int(self.rng(split, epoch, index).integers(2**62))
            return {"image": self.augment(picture, seed), "label": labels[found], "skipped": skipped}

        def upright(epoch: int, index: int) -> dict[str, Any]:
            return {"image": self.upright(images[index]), "label": labels[index]}

        return Examples(len(images), train if split == "train" else upright)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "image": torch.stack([example["image"] for example in examples]),
            "labels": torch.tensor([example["label"] for example in examples]),
        }

    def loss(self, net: TaskModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return F.cross_entropy(self._logits(net, batch["image"]), batch["labels"])

    def evaluate(self, net: TaskModel, split: Split, *, autocast: Autocast, out: Path | None) -> dict[str, float | str]:
        device, (images, labels), scores = next(net.parameters()).device, self.pictures(split), []
        by_prompt = self.config.mode == "zero-shot"
        if not by_prompt and isinstance(net.head, nn.Identity):
            raise UserError(f"--mode {self.config.mode}: this run was not fine-tuned for it; choose zero-shot")
        classes = self._prompted(net.base, device, autocast) if by_prompt else None
        for batch in self.batches(split, device):
            with autocast():
                if by_prompt:
                    features = net.base.features("image", net.base.image(batch["image"]))
                    scores.append((F.normalize(features.float(), dim=-1) @ classes.T).cpu())
                else:
                    scores.append(self._logits(net, batch["image"]).float().cpu())
        table = torch.cat(scores)
        found = table.argmax(1).tolist()
        if out is not None:
            self._write(out / f"{split}.tsv", images, found)
        per_class = class_accuracies(found, labels, self.names)
        return {
            **top_k_metrics(table, labels),
            **{f"class/{name}": share for name, share in per_class.items()},
            "examples": len(found),
            "classes": len(self.names),
        }

    def pictures(self, split: Split) -> Labelled:
        """The pictures of a split that can be read (in training that shows only when they are opened)."""
        data = self.config.data
        if data.embedded:
            self.names = self.names or list(CLASSES)
            return self._scenes(split)
        folder = getattr(data, split) or (data.root / split if data.root else None)
        if folder is None:
            raise UserError(
                f"--data.{split}: names no folder of pictures, nor does --data.root; or add --data.embedded"
            )
        found = read_image_classes(folder, names=self.names, resolution=self.image_size)
        self.names = found.names
        if split == "train":
            return Labelled(found.images, found.labels)
        kept = [index for index in range(len(found.images)) if self._readable(found.images, index, split)]
        return Labelled(Chosen(found.images, kept), [found.labels[index] for index in kept])

    def _scenes(self, split: Split) -> Labelled:
        data = self.config.data
        corpus = scene_corpus(data, self.image_size)
        # The test part shows classes that no training scene shows, which a head cannot know: these are of its classes.
        part = {"train": corpus.pair_part, "val": corpus.image_part, "test": corpus.text_part}[split]
        if split == "val":
            part = part.chosen(range(data.held_out))
        if split == "test":
            # By the first ones the default of `pool` was chosen, so that they would flatter it.
            part = part.chosen(range(len(part.scenes))[-data.held_out :])
        return Labelled(part.images, [class_label(scene) for scene in part.scenes])

    def _readable(self, images: ImageSource, index: int, split: Split) -> bool:
        try:
            images[index]
        except BadExampleError as error:
            self.bad.record(Skipped(f"{split}/image", error.name, error.reason, len(images)))
            return False
        return True

    def _logits(self, net: TaskModel, image: Tensor) -> Tensor:
        joint = encode(net.base, image=image)
        return net.head(pooled(net.base, joint) if self.config.pool == "cls" else joint.image.mean(dim=1))

    def _prompted(self, model: Unimo2, device: torch.device, autocast: Autocast) -> Tensor:
        """What each class is like, [C, F] of norm 1: the mean of its sentences' features (Radford et al., 2021)."""
        rows = []
        for sentences in self._sentences():
            features = []
            for tokens, valid in text_batches(sentences, self.tokenizer, max_length=self.config.data.max_text):
                tokens, valid = tokens.to(device), valid.to(device)
                with autocast():
                    found = model.features("text", model.text(tokens, valid), valid)
                features.append(F.normalize(found.float(), dim=-1))
            rows.append(torch.cat(features).mean(0))
        return F.normalize(torch.stack(rows), dim=-1)

    def _sentences(self) -> list[list[str]]:
        """The sentences of every class."""
        path, names = self.config.data.prompts, self.names
        if path is not None and path.suffix == ".json":
            given = read_json(path)
            known = isinstance(given, dict)
            wrong = next((name for name in names if not known or not _texts(given.get(name))), None)
            extra = next((name for name in given if name not in names), None) if known else None
            if wrong is not None or extra is not None:
                what = f"has no list of sentences for class {wrong}" if wrong else f"names {extra}, which is no class"
                raise UserError(f"{path}: {what}; give a JSON object of class: [sentence, ...] for exactly the classes")
            return [given[name] for name in names]
        if path is None and not self.config.data.embedded:
            raise UserError("--data.prompts: zero-shot needs a file of templates such as 'a photo of a {}.'")
        templates = list(SCENE_PROMPTS) if path is None else read_texts(path)
        wrong = next((template for template in templates if template.count("{}") != 1), None)
        if wrong is not None:
            raise UserError(f"{path}: the template {wrong!r} needs {{}} once, where the class goes")
        return [[template.replace("{}", name.replace("_", " ")) for template in templates] for name in names]

    def _write(self, path: Path, images: ImageSource, found: list[int]) -> None:
        lines = [f"{images.name(index)}\t{self.names[label]}" for index, label in enumerate(found)]
        text = "\n".join(["image\tprediction", *lines]) + "\n"
        write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)
