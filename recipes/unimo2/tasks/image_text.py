"""What tasks on a picture and a text share: examples of both, and what a head says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vlblocks.data import BadExampleError, ImageSource, Skipped, eval_transform, next_readable, train_transform
from vlblocks.data.sources import Chosen
from vlblocks.data.world import HELD_OUT

from .base import Autocast, Examples, Split, Task, TaskData, TaskModel, encode, pad_texts, pooled

Row = TypeVar("Row")


@dataclass(frozen=True)
class ImageTextData(TaskData):
    flip: bool = False
    """Mirror training images; wrong for texts that say left and right."""
    min_crop: float = 0.8
    """Smallest share of a training image that a random crop keeps."""


class Pairs(NamedTuple):
    """Texts on pictures, by index.

    Attributes:
        images: I pictures by index.
        owners: N indices of pictures.
        row: (index, rng) -> the text and what belongs to it; draws whatever is random from the rng alone.
    """

    images: ImageSource
    owners: Sequence[int]
    row: Callable[[int, np.random.Generator], Any]


def pair_examples(
    task: Task, split: Split, pairs: Pairs, entry: Callable[[Any], tuple[str, dict[str, Any]]]
) -> Examples:
    """Examples of a split: image, tokens, what `entry` makes of a row besides its text, index and readable.

    A picture that cannot be read is named under "skipped": in training the next example takes its place, elsewhere it
    is grey and not `readable`.
    """
    data: Any = task.config.data
    augment = train_transform(task.image_size, scale=(data.min_crop, 1.0), flip=0.5 * data.flip)
    upright, images = eval_transform(task.image_size), Chosen(pairs.images, pairs.owners)
    kind = f"{split}/image"

    def make(index: int, image: Tensor, rng: np.random.Generator, skipped: list[Skipped]) -> dict[str, Any]:
        text, more = entry(pairs.row(index, rng))
        tokens = task.tokenizer.encode(text, data.max_text)
        # Skipped pictures are counted once each, however many texts are on them.
        named = [one._replace(total=len(pairs.images)) for one in skipped]
        whole = {"image": image, "tokens": tokens, "index": index, "readable": not skipped, **more}
        return {**whole, "skipped": named}

    def train(epoch: int, index: int) -> dict[str, Any]:
        rng = task.rng(split, epoch, index)
        picture, found, skipped = next_readable(images, index, kind)
        return make(found, augment(picture, int(rng.integers(2**62))), rng, skipped)

    def evaluation(epoch: int, index: int) -> dict[str, Any]:
        skipped = []
        try:
            image = upright(images[index])
        except BadExampleError as error:
            skipped.append(Skipped(kind, error.name, error.reason, len(images)))
            image = torch.zeros(3, task.image_size, task.image_size)
        return make(index, image, task.rng(split, 0, index), skipped)

    return Examples(len(images), train if split == "train" else evaluation)


def collate_pairs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """image [B, 3, H, W]; tokens, valid [B, T]; index and readable [B]."""
    return {
        "image": torch.stack([example["image"] for example in examples]),
        **pad_texts([example["tokens"] for example in examples]),
        "index": torch.tensor([example["index"] for example in examples]),
        "readable": torch.tensor([example["readable"] for example in examples]),
    }


def pair_head(width: int, classes: int, *, dropout: float) -> nn.Sequential:
    """Two layers on what `pooled` gives, [B, width] -> [B, classes].

    The product of two pooled states is small at first, and a single layer on it learns slowly; with a norm between two
    it does not (as in ViLT: Kim et al., 2021).
    """
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.LayerNorm(2 * width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * width, classes),
    )


def pair_logits(net: TaskModel, batch: dict[str, Tensor]) -> Tensor:
    """What the head says of pictures and texts, [B, C]."""
    return net.head(pooled(net.base, encode(net.base, batch["image"], batch["tokens"], batch["valid"])))


class Classified(NamedTuple):
    """What a head says of a split's N examples, in their order.

    Attributes:
        classes: the likeliest.
        readable: whether its picture could be read, or is grey.
    """

    classes: list[int]
    readable: list[bool]

    @property
    def seen(self) -> list[int]:
        """Indices of those whose picture could be read."""
        return [index for index, readable in enumerate(self.readable) if readable]


def classify_pairs(task: Task, net: TaskModel, split: Split, autocast: Autocast) -> Classified:
    """The head's classes of all examples of a split."""
    device, found = next(net.parameters()).device, Classified([], [])
    for batch in task.batches(split, device):
        with autocast():
            found.classes.extend(pair_logits(net, batch).argmax(1).tolist())
        found.readable.extend(batch["readable"].tolist())
    return found


def unspoiled(draw: Callable[[np.random.Generator], Row], text: Callable[[Row], str]) -> Callable[..., Row]:
    """`draw`, until its text names none of the combinations that the test split is about.

    Training pictures never show them, so that a sentence on one would always be untrue, and that would be learnt.
    """

    def drawn(rng: np.random.Generator) -> Row:
        while True:
            row = draw(rng)
            if not any(f"{colour} {shape}" in text(row) for colour, shape in HELD_OUT):
                return row

    return drawn
