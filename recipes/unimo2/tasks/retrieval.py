"""Image-text retrieval: circle loss with sampled negatives, or contrast and matching with mined ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vlblocks.data import (
    CaptionedImages,
    Collate,
    Gallery,
    PairDataset,
    eval_transform,
    locate,
    read_karpathy,
    train_transform,
)
from vlblocks.data.sources import Chosen
from vlblocks.errors import UserError
from vlblocks.losses import circle_loss
from vlblocks.ops import take_rows

from ..configs import ObjectiveConfig
from ..corpus import EvalPairs
from ..model import Unimo2
from ..objectives import lookup, pair_codes, pair_losses
from ..retrieval import CONTRAST_SHARE, evaluate_pairs
from .base import Autocast, Split, Task, TaskConfig, TaskData, TaskModel, TaskOptim, scene_splits


@dataclass(frozen=True)
class RetrievalData(TaskData):
    root: Path | None = None
    """Folder with a Karpathy JSON (splits train, val and test) and its images."""
    val_images: int | None = None
    """How many images of the validation split are looked at on the way, with their captions; None: all."""
    flip: bool = False
    """Mirror training images; wrong for captions that say left and right."""
    min_crop: float = 0.8
    """Smallest share of a training image that a random crop keeps."""


@dataclass(frozen=True)
class RetrievalConfig(TaskConfig):
    """Fine-tune UNIMO-2 for image-text retrieval."""

    task: str = "retrieval"
    objective: Literal["circle", "itc_itm"] = "circle"
    """circle: circle loss over a true pair and sampled wrong ones (the original); itc_itm: contrast, and matching with
    mined negatives."""
    negatives: int = 10
    """circle: wrong images for each caption and wrong captions for each image, drawn from the batch."""
    margin: float = 0.2
    """circle: its margin."""
    scale: float = 1.0
    """circle: its scale."""
    grounding: float = 1.0
    """Weight of the grounding loss beside the objective."""
    rerank: int = 16
    """Candidates per query that the joint tower scores in evaluations; 0: none."""
    optim: TaskOptim = field(default_factory=TaskOptim)
    data: RetrievalData = field(default_factory=RetrievalData)


class Retrieval(Task):
    """Fine-tune UNIMO-2 for image-text retrieval."""

    Config: ClassVar = RetrievalConfig
    watch: ClassVar = "recall_mean"
    zero_shot: ClassVar = True
    config: RetrievalConfig

    def __init__(self, config: RetrievalConfig, *args: Any) -> None:
        super().__init__(config, *args)
        checks = (
            ("negatives", config.negatives >= 1, "give at least 1"),
            ("scale", config.scale > 0, "give a positive number"),
            ("rerank", config.rerank >= 0, "give 0 or more"),
            ("data.min-crop", 0 < config.data.min_crop <= 1, "give a share above 0, up to 1"),
            ("data.val-images", (config.data.val_images or 1) >= 1, "give at least 1"),
        )
        for flag, fine, remedy in checks:
            if not fine:
                raise UserError(f"--{flag}: makes no sense; {remedy}")
        self._galleries: dict[str, Gallery] = {}

    def facts(self) -> dict[str, Any]:
        return {}

    def make_head(self, model: Unimo2) -> nn.Module:
        return nn.Identity()

    def dataset(self, split: Split) -> Dataset[dict[str, Any]]:
        data, size = self.config.data, self.image_size
        transform = eval_transform(size)
        if split == "train":
            transform = train_transform(size, scale=(data.min_crop, 1.0), flip=0.5 * data.flip)
        return PairDataset(
            self._captioned(split),
            tokenizer=self.tokenizer,
            transform=transform,
            seed=self.config.seed,
            max_length=data.max_text,
        )

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = Collate(max_length=self.config.data.max_text)(examples)
        return {name: batch[name] for name in ("image", "tokens", "valid", "image_id")}

    def loss(self, net: TaskModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        config, model = self.config, net.base
        if config.objective == "circle":
            return circle_objective(model, batch, config, generator)
        weights = ObjectiveConfig(masked_tokens=0.0, grounding=config.grounding, whole_text=False)
        found = pair_losses(model, {**batch, "masked_tokens": batch["tokens"]}, weights, generator).losses
        return found["contrast"] + found["matching"] + config.grounding * found.get("grounding", 0.0)

    def evaluate(self, net: TaskModel, split: Split, *, autocast: Autocast, out: Path | None) -> dict[str, float | str]:
        found = evaluate_pairs(
            net.base, self.pairs(self.gallery(split)), depth=self.config.rerank, out=out, autocast=autocast, quiet=True
        )
        best = "rerank_" if self.config.rerank else ""
        recalls = [found[f"{best}{way}_r{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
        return {"recall_mean": sum(recalls) / len(recalls), **found}

    def gallery(self, split: Split) -> Gallery:
        """The pictures and captions of a split; one caption of each scene, for it tells the scene whole."""
        if split not in self._galleries:
            self._galleries[split] = self._gallery(split)
        return self._galleries[split]

    def _gallery(self, split: Split) -> Gallery:
        whole = self._captioned(split)
        if split == "val" and self.config.data.val_images is not None:
            kept = range(min(self.config.data.val_images, len(whole.images)))
            whole = CaptionedImages(Chosen(whole.images, kept), whole.captions, whole.image_ids)
        return whole.gallery(captions_per_image=1 if self.config.data.embedded else None, bad=self.bad)

    def pairs(self, gallery: Gallery) -> EvalPairs:
        """A gallery as the model gets it, blinded as the configuration says."""
        return TaskPairs(self, gallery)

    def _captioned(self, split: Split) -> CaptionedImages:
        data = self.config.data
        if data.embedded:
            parts = scene_splits(data, self.image_size)
            if split not in parts:
                raise UserError(f"--split {split}: the generated corpus has none; choose one of {', '.join(parts)}")
            return parts[split].pairs()
        if data.root is None:
            raise UserError("--data.root: name a folder with dataset_*.json and images/, or use --data.embedded")
        json, folder = locate(data.root)
        return read_karpathy(json, folder, split=split, bad=self.bad, resolution=self.image_size)


class TaskPairs(EvalPairs):
    """A task's gallery, without the side that it does not see."""

    def __init__(self, task: Retrieval, gallery: Gallery) -> None:
        super().__init__(gallery, task.tokenizer, task.image_size, task.config.data.max_text)
        self.task = task

    def image_batches(self) -> Iterator[Tensor]:
        for image in super().image_batches():
            yield self.task.blinded({"image": image})["image"]

    def text_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, valid in super().text_batches():
            batch = self.task.blinded({"tokens": tokens, "valid": valid})
            yield batch["tokens"], batch["valid"]


def circle_objective(
    model: Unimo2, batch: dict[str, Tensor], config: RetrievalConfig, generator: torch.Generator
) -> Tensor:
    """Circle loss of each true pair's score against those of wrong images and wrong captions (spec 26)."""
    image, text = model.image(batch["image"]), model.text(batch["tokens"], batch["valid"])
    found = lookup(model, image, text, text_valid=batch["valid"], with_loss=config.grounding > 0)
    image_rows, text_rows = sampled_pairs(batch["image_id"], config.negatives, generator)
    joint = model.fuse(
        image=take_rows(image, image_rows.flatten()),
        codes=pair_codes(model, found, image.shape[1] - 1, image_rows.flatten(), text_rows.flatten()),
        text=take_rows(text, text_rows.flatten()),
        text_valid=batch["valid"][text_rows.flatten()],
    )
    image_features = F.normalize(model.features("image", image), dim=-1)
    text_features = model.features("text", text, batch["valid"])
    contrast = take_rows(image_features, image_rows.flatten()) * take_rows(text_features, text_rows.flatten())
    scores = (model.match_logits(joint)[:, 1] + CONTRAST_SHARE * contrast.sum(-1)).view(image_rows.shape)
    loss = circle_loss(scores[:, :1], scores[:, 1:], margin=config.margin, scale=config.scale)
    return loss if found.loss is None else loss + config.grounding * found.loss


def sampled_pairs(image_ids: Tensor, negatives: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of images and of texts, [B, 1 + 2 n] each: the true pair, n wrong images for its text, n wrong texts.

    They are drawn without replacement from the batch's other pictures; n is `negatives`, or as many as each has.
    """
    wrong = image_ids[:, None] != image_ids
    count = min(negatives, int(wrong.sum(1).min()))
    own = torch.arange(len(image_ids), device=image_ids.device)[:, None]

    def drawn() -> Tensor:
        keys = torch.rand(wrong.shape, generator=generator, device=wrong.device)
        return keys.masked_fill(~wrong, -1.0).topk(count, dim=1).indices

    kept = own.expand(-1, count)
    return torch.cat([own, drawn(), kept], dim=1), torch.cat([own, kept, drawn()], dim=1)
