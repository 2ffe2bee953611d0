"""What a downstream task is: its settings, its head, its examples, its loss and its metric. The loop knows no more."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tyro.constructors import PrimitiveConstructorSpec

from vlblocks.data import BadData, SceneCorpus, Tokenizer, pad_tokens
from vlblocks.data.scenes import ScenePart
from vlblocks.errors import UserError
from vlblocks.models import JointStates

from ..configs import OptimConfig, RunConfig
from ..model import Unimo2
from ..objectives import lookup

HELD_OUT_SCENES = 1000  # in each part of the generated corpus that is evaluated
CODES = ("grounded", "ground_image", "ground_text")  # the parts of the model that --freeze codes names
Split = Literal["train", "val", "test"]
Key = tuple[int, int]  # epoch, index
Autocast = Callable[[], AbstractContextManager]
Numbers = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,N,...",
        instance_from_str=lambda words: tuple(int(word) for word in words[0].split(",") if word.strip()),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]


@dataclass(frozen=True)
class TaskData:
    """Data of a task; subclasses add its paths."""

    embedded: bool = False
    """The generated corpus instead of files."""
    scenes: int = 12000
    """Training scenes of the generated corpus."""
    held_out: int = 400
    """Scenes of the generated corpus in each of the validation and test splits, at most 1000."""
    max_text: int = 64
    """Longest text in tokens, CLS and SEP included."""
    max_bad_share: float = 0.01
    """Share of malformed rows and unreadable images past which the run stops."""
    workers: int = 0
    """Data-loading processes."""


@dataclass(frozen=True)
class TaskOptim(OptimConfig):
    """The optimiser of pre-training, and the step-wise decay of the original's fine-tuning."""

    lr: float = 5e-4
    decay: Literal["linear", "cosine", "step", "constant"] = "linear"
    """step: times gamma at each of the milestones."""
    milestones: tuple[float, ...] = (24.0, 32.0)
    """In epochs."""
    gamma: float = 0.1


@dataclass(frozen=True)
class TaskConfig:
    """Fine-tuning of a pre-trained UNIMO-2; each task has its own defaults."""

    task: str = ""
    preset: str = "tiny"
    """Whose model is trained from scratch where there is no --init."""
    out: Path | None = None
    """Folder of the run; the same folder resumes. Default: runs/unimo2-TASK."""
    restart: bool = False
    """Delete what the folder holds of an earlier run and begin anew."""
    init: Path | None = None
    """A finished run's folder (pre-trained, fine-tuned or converted), or its model.safetensors."""
    tokenizer: Path | None = None
    """tokenizer.json, or a folder with GPT-2 / RoBERTa BPE files, where --init has none beside it."""
    epochs: float = 3.0
    max_steps: int | None = None
    """Optimiser steps of the whole run; None: as many as --epochs takes."""
    batch: int = 32
    """Examples a step and process."""
    accumulate: int = 1
    """Batches whose gradients are summed before the optimiser moves."""
    seed: int = 1
    seeds: Numbers = ()
    """Several runs (--seeds 1,2,3) in OUT/seed-N, and their mean and deviation in OUT/metrics.json."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware has it, else fp32."""
    optim: TaskOptim = TaskOptim()
    layer_decay: float = 1.0
    """Learning rate of each layer as a multiple of the one above it."""
    freeze: tuple[Literal["image", "text", "joint", "codes"], ...] = ()
    """Parts that stay as they are: without gradient, dropout or statistics."""
    image_size: int | None = None
    """Pixels; the position table is interpolated where it differs from the checkpoint's."""
    dropout: float | None = None
    """Of all towers and the head; None: the towers' as pre-trained, 0.1 for the head."""
    blind: Literal["none", "image", "text"] = "none"
    """A baseline that does not see this side: grey pictures or empty texts, in training and evaluation."""
    evaluate_every: int | None = None
    """Steps from one evaluation (and checkpoint) to the next; None: an epoch."""
    watch: str | None = None
    """Metric by which the best weights are chosen; "-NAME" where lower is better. None: the task's."""
    patience: int | None = None
    """Evaluations without a better watched metric after which the run stops; None: it never does."""
    keep_checkpoints: int = 1
    data: TaskData = field(default_factory=TaskData)


class TaskModel(nn.Module):
    """A pre-trained model and a task's head: state dict keys base.* and head.*."""

    def __init__(self, base: Unimo2, head: nn.Module) -> None:
        super().__init__()
        self.base, self.head = base, head


class Examples(Dataset[dict[str, Any]]):
    """`count` examples, each made on demand from its (epoch, index); a plain index is one of epoch 0."""

    def __init__(self, count: int, make: Callable[[int, int], dict[str, Any]]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.make(epoch, index)


class Task(abc.ABC):
    """One downstream task. A subclass is a file: its settings, head, examples, loss and metrics.

    Args:
        config: an instance of `Config`.
        tokenizer: the checkpoint's.
        image_size: pixels that the model takes.
        bad: counts malformed rows and unreadable images.
    """

    Config: ClassVar[type[TaskConfig]]
    watch: ClassVar[str]  # higher is better unless it starts with "-"
    zero_shot: ClassVar[bool] = False  # whether eval.py takes a run that was not fine-tuned for it

    sides: ClassVar[tuple[str, ...]] = ("image", "text")  # what it reads, and --blind may hide

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, image_size: int, bad: BadData) -> None:
        if config.blind not in ("none", *self.sides):
            sides = ", ".join(self.sides)
            raise UserError(f"--blind {config.blind}: {config.task} reads no {config.blind}; give {sides} or none")
        self.config, self.tokenizer, self.image_size, self.bad = config, tokenizer, image_size, bad

    @classmethod
    def untrained(cls, run: RunConfig) -> TaskConfig:
        """The settings to evaluate a pre-trained run with, of a task with `zero_shot`."""
        return cls.Config()

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the head's outputs mean, for JSON (answers, labels, ...); saved as task.json."""

    def adopt(self, saved: dict[str, Any], source: Path) -> None:
        """Take up a run's facts, from its task.json, instead of reading them off the data.

        A task whose facts come from data (an answer list, label names) overrides it and keeps what was saved; its
        `dataset` then refuses data with other labels.

        Raises:
            UserError: they do not fit this task.
        """
        facts = self.facts()
        differing = next((name for name in facts if facts[name] != saved.get(name)), None)
        if differing is not None:
            raise UserError(
                f"{source}: {differing} is {_short(saved.get(differing))} but the data has {_short(facts[differing])}; "
                "evaluate on data of the kind that the run was trained on"
            )

    @abc.abstractmethod
    def make_head(self, model: Unimo2) -> nn.Module:
        """A new head on the model; `nn.Identity()` for a task without one."""

    @abc.abstractmethod
    def dataset(self, split: Split) -> Dataset[dict[str, Any]]:
        """Examples by (epoch, index), such as `Examples`: the same for the same seed, epoch and index.

        An example's "skipped" (a list of `vlblocks.data.Skipped`), where it has one, is counted by the loop.
        """

    @abc.abstractmethod
    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Examples to tensors. By custom: image [B, 3, H, W]; tokens, valid [B, T]; labels [B]."""

    @abc.abstractmethod
    def loss(self, net: TaskModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """The mean loss of a batch, a scalar; all draws from `generator`."""

    @abc.abstractmethod
    def evaluate(self, net: TaskModel, split: Split, *, autocast: Autocast, out: Path | None) -> dict[str, float | str]:
        """Metrics, fractions in [0, 1] where they can be; may write predictions under `out`.

        `net` is in evaluation mode and gradients are off. Called in the main process only.
        """

    def frozen(self, net: TaskModel) -> list[nn.Module]:
        """What does not train: the parts that --freeze names."""
        names = [name for part in self.config.freeze for name in (CODES if part == "codes" else (part,))]
        return [module for name in names if (module := getattr(net.base, name)) is not None]

    def batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """`collate`, blinded as the configuration says; "skipped" holds what the examples name."""
        skipped = [one for example in examples for one in example.get("skipped", ())]
        return {**self.blinded(self.collate(examples)), "skipped": skipped}

    def blinded(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch without the side that --blind names. A task with other keys for it overrides this."""
        if self.config.blind == "image" and "image" in batch:
            return {**batch, "image": torch.zeros_like(batch["image"])}
        if self.config.blind == "text" and "tokens" in batch:
            empty = torch.tensor([self.tokenizer.cls_id, self.tokenizer.sep_id]).expand(len(batch["tokens"]), 2)
            return {**batch, "tokens": empty.contiguous(), "valid": torch.ones_like(empty, dtype=torch.bool)}
        return batch

    def lengths(self) -> Sequence[int] | None:
        """Tokens of each training example, where batches shall be of like lengths; None: they need not."""
        return None

    def batches(
        self, split: Split, device: torch.device, *, size: int = 64, order: Sequence[int] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """All examples of a split, in order or in the one given, for evaluation; the last batch may be short."""
        examples = self.dataset(split)
        order = range(len(examples)) if order is None else order
        for first in range(0, len(order), size):
            batch = self.batch([examples[0, index] for index in order[first : first + size]])
            for skipped in batch.pop("skipped"):
                self.bad.record(skipped)
            yield {key: value.to(device) for key, value in batch.items()}

    @property
    def head_dropout(self) -> float:
        """What --dropout says, else 0.1."""
        return 0.1 if self.config.dropout is None else self.config.dropout

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """tokens [B, T] and valid [B, T] of texts."""
        return pad_texts([self.tokenizer.encode(text, self.config.data.max_text) for text in texts])

    def rng(self, split: Split, epoch: int, index: int) -> np.random.Generator:
        """Draws of one example: training's depend on the run's seed and the epoch, the others' on neither."""
        if split == "train":
            return np.random.default_rng((self.config.seed, 41, epoch, index))
        return np.random.default_rng((43, ("val", "test").index(split), index))


def encode(
    model: Unimo2,
    image: Tensor | None = None,
    tokens: Tensor | None = None,
    valid: Tensor | None = None,
) -> JointStates:
    """Joint states of pairs, images alone or texts alone: towers, codes looked up, joint tower.

    Args:
        image: [B, 3, H, W], or None.
        tokens, valid: [B, T], or None.
    """
    image_states = None if image is None else model.image(image)
    text_states = None if tokens is None else model.text(tokens, valid)
    found = lookup(model, image_states, text_states, text_valid=valid, with_loss=False)
    return model.fuse(image=image_states, codes=found.codes, text=text_states, text_valid=valid)


def pooled(model: Unimo2, joint: JointStates) -> Tensor:
    """What a head reads, [B, D]: the product of both pooled CLS states, or the one side's (spec 26, 27)."""
    sides = []
    if joint.text is not None:
        sides.append(model.text_pool(joint.text[:, 0]))
    if joint.image is not None:
        sides.append(model.image_pool(joint.image[:, 0]))
    return sides[0] * sides[1] if len(sides) == 2 else sides[0]


def pad_texts(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids of texts of any lengths to tokens [B, T] and valid [B, T]."""
    tokens = pad_tokens(rows)
    lengths = torch.tensor([len(row) for row in rows])
    return {"tokens": tokens, "valid": torch.arange(tokens.shape[1]) < lengths[:, None]}


def scene_splits(data: TaskData, image_size: int) -> dict[Split, ScenePart]:
    """The generated corpus that pre-training uses: its captioned scenes to train on, others to evaluate.

    val: scenes whose pictures (no captions) pre-training has seen; test: scenes that show at least one combination of
    colour and shape that no training scene, here or there, shows.

    Raises:
        UserError: more scenes than there are.
    """
    corpus = scene_corpus(data, image_size)
    first = range(data.held_out)
    return {
        "train": corpus.pair_part,
        "val": corpus.image_part.chosen(first),
        "test": corpus.test_part.chosen(first),
    }


def scene_corpus(data: TaskData, image_size: int) -> SceneCorpus:
    """The generated corpus, whose parts to evaluate have `held_out` scenes or more.

    Raises:
        UserError: more scenes than there are.
    """
    if not 1 <= data.held_out <= HELD_OUT_SCENES:
        raise UserError(f"--data.held-out: {data.held_out} scenes; choose 1 to {HELD_OUT_SCENES}")
    return _scene_corpus(data.scenes, image_size)


@lru_cache(maxsize=1)
def _scene_corpus(scenes: int, image_size: int) -> SceneCorpus:
    part = HELD_OUT_SCENES
    return SceneCorpus(pairs=scenes, images=part, texts=part, test=part, image_size=image_size)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
