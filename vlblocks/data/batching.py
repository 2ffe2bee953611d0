"""Batches: examples padded and stacked for training, and galleries in order for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlblocks.data.masking import IGNORED
from vlblocks.data.sources import BadExampleError, ImageSource
from vlblocks.data.tokenizer import PAD_ID, Tokenizer
from vlblocks.errors import UserError

Example = dict[str, Any]
Batch = dict[str, Any]


def pad_tokens(rows: Sequence[Any], fill: int = PAD_ID, *, multiple: int = 8, max_length: int | None = None) -> Tensor:
    """Rows of ids of any lengths to long [B, T]: T the longest, rounded up to `multiple` but not past `max_length`."""
    longest = max(len(row) for row in rows)
    width = -(-longest // multiple) * multiple
    if max_length is not None:
        width = max(longest, min(width, max_length))
    padded = np.full((len(rows), width), fill, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)


class Collate:
    """Examples of one stream to a batch: images stacked, texts padded to a multiple of 8 tokens.

    Gives what the examples hold of: image, image2 float32 [B, 3, H, W]; tokens, masked_tokens, labels long [B, T]
    (labels -100 where nothing is to be predicted), valid bool [B, T]; image_id long [B]; and "skipped", a list.
    """

    def __init__(self, *, max_length: int | None = None) -> None:
        self.max_length = max_length

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch: Batch = {"skipped": [skipped for example in examples for skipped in example["skipped"]]}
        for name in ("image", "image2"):
            if name in examples[0]:
                batch[name] = torch.stack([example[name] for example in examples])
        for name, fill in (("tokens", PAD_ID), ("masked_tokens", PAD_ID), ("labels", IGNORED)):
            if name in examples[0]:
                rows = [example[name] for example in examples]
                batch[name] = pad_tokens(rows, fill, max_length=self.max_length)
        if "tokens" in batch:
            batch["valid"] = batch["tokens"] != PAD_ID
        if "image_id" in examples[0]:
            batch["image_id"] = torch.tensor([example["image_id"] for example in examples], dtype=torch.long)
        return batch


def image_batches(
    images: ImageSource, transform: Callable[[np.ndarray], Tensor], *, batch_size: int = 64
) -> Iterator[Tensor]:
    """All pictures in order as float32 [B, 3, H, W], for evaluation; the last batch may be short.

    Raises:
        UserError: a picture cannot be read (`CaptionedImages.gallery(bad=...)` leaves such ones out).
    """
    for first in range(0, len(images), batch_size):
        rows = []
        for index in range(first, min(first + batch_size, len(images))):
            try:
                rows.append(transform(images[index]))
            except BadExampleError as error:
                raise UserError(f"{error.name}: {error.reason}; repair or remove it") from None
        yield torch.stack(rows)


def text_batches(
    texts: Sequence[str], tokenizer: Tokenizer, *, batch_size: int = 64, max_length: int = 64
) -> Iterator[tuple[Tensor, Tensor]]:
    """All texts in order as tokens long [B, T] and valid bool [B, T], for evaluation; the last batch may be short."""
    for first in range(0, len(texts), batch_size):
        tokens = pad_tokens(
            tokenizer.encode_batch(texts[first : first + batch_size], max_length), max_length=max_length
        )
        yield tokens, tokens != PAD_ID
