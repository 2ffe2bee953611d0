"""Training streams: examples keyed by (epoch, index), batches, and a mixer of pairs, images and texts that resumes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from vlblocks.data.batching import Batch, Collate, Example
from vlblocks.data.masking import SpanMasking
from vlblocks.data.sources import BadData, BadExampleError, CaptionedImages, ImageSource, Skipped
from vlblocks.data.tokenizer import Tokenizer
from vlblocks.data.transforms import ImageTransform, TwoViews
from vlblocks.errors import UserError

Key = tuple[int, int]  # epoch, index
STREAMS = ("pairs", "images", "texts")
_STRETCH = 32  # batches among which examples of like length find each other


class MaskedTexts:
    """Encodes and masks texts; the ids of a text are kept, since epochs bring it again.

    Args:
        max_length: tokens kept of a text, CLS and SEP among them.
        keep: how many texts' ids to keep.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, max_length: int = 64, masking: SpanMasking | None = None, keep: int = 200_000
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.masking = masking or SpanMasking()
        self.keep = keep
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, text: str, rng: np.random.Generator) -> Example:
        """tokens, masked_tokens and labels, int64 [T] each."""
        known = self._known.get(text)
        if known is None:
            tokens = np.asarray(self.tokenizer.encode(text, self.max_length), dtype=np.int64)
            known = tokens, self.tokenizer.word_starts(tokens)
            if len(self._known) < self.keep:
                self._known[text] = known
        tokens, word_starts = known
        masked = self.masking(tokens, word_starts, rng, mask_id=self.tokenizer.mask_id)
        return {"tokens": tokens, "masked_tokens": masked.tokens, "labels": masked.labels}


class PairDataset(Dataset[Example]):
    """Pictures with a caption each, drawn anew every epoch, and masked text.

    `dataset[epoch, index]` depends on the seed, the epoch and the index alone. A picture that cannot be read is
    replaced by the next that can, and named under "skipped".

    Args:
        data: pictures, captions and ids.
        transform: for training, an :class:`ImageTransform`.
        seed: of captions, transforms and masks.
        max_length: tokens kept of a caption, CLS and SEP among them.
        masking: how tokens are hidden; None: as `SpanMasking()` does. The unmasked ids are there too, as "tokens".
    """

    def __init__(
        self,
        data: CaptionedImages,
        *,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        seed: int = 0,
        max_length: int = 64,
        masking: SpanMasking | None = None,
    ) -> None:
        if len({len(data.images), len(data.captions), len(data.image_ids)}) != 1:
            raise UserError("pairs: images, captions and image_ids differ in number; pass one of each per picture")
        self.data = data
        self.transform = transform
        self.seed = seed
        self.max_length = max_length
        self._masked_text = MaskedTexts(tokenizer, max_length=max_length, masking=masking)

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, key: Key) -> Example:
        epoch, index = key
        rng = np.random.default_rng((self.seed, 1, epoch, index))
        picture, found, skipped = next_readable(self.data.images, index, "pairs/image")
        captions = self.data.captions[found]
        text = captions[int(rng.integers(len(captions)))]
        return {
            "image": self.transform(picture, int(rng.integers(2**62))),
            **self._masked_text(text, rng),
            "image_id": self.data.image_ids[found],
            "skipped": skipped,
        }


class ImageDataset(Dataset[Example]):
    """Pictures alone, two views each. Keys, seeds and replacement as in :class:`PairDataset`.

    Args:
        images: the pictures, such as :func:`read_image_folder` gives.
        transform: a :class:`TwoViews`, not an :class:`ImageTransform`.
    """

    def __init__(self, images: ImageSource, *, transform: TwoViews, seed: int = 0) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Example:
        epoch, index = key
        rng = np.random.default_rng((self.seed, 2, epoch, index))
        picture, _, skipped = next_readable(self.images, index, "images/image")
        views = self.transform(picture, int(rng.integers(2**62)))
        return {"image": views.image, "image2": views.image2, "skipped": skipped}


class TextDataset(Dataset[Example]):
    """Texts alone, masked. Keys, seeds and masking as in :class:`PairDataset`."""

    def __init__(
        self,
        texts: Sequence[str],
        *,
        tokenizer: Tokenizer,
        seed: int = 0,
        max_length: int = 64,
        masking: SpanMasking | None = None,
    ) -> None:
        self.texts = texts
        self.seed = seed
        self.max_length = max_length
        self._masked_text = MaskedTexts(tokenizer, max_length=max_length, masking=masking)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: Key) -> Example:
        epoch, index = key
        rng = np.random.default_rng((self.seed, 3, epoch, index))
        return {**self._masked_text(self.texts[index], rng), "skipped": []}


class EpochBatches(Sampler[list[Key]]):
    """Endless full batches of (epoch, index): every index once an epoch, in an order of the seed and the epoch.

    The epochs are laid end to end and cut into global batches, of which each rank takes its part; so a batch may begin
    in one epoch and end in the next, none is short, and a position is one integer, the number of batches gone by.

    Args:
        size: of the data.
        lengths: [size] of the examples; given, those of like length share a batch, so that little of it is padding.

    Raises:
        UserError: the global batch is larger than the data, or the data is empty.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        name: str = "data",
        lengths: Sequence[int] | None = None,
    ) -> None:
        if size < 1:
            raise UserError(f"{name}: no examples; check the data's path and split")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not one of {world_size} processes")
        if batch_size < 1 or batch_size * world_size > size:
            ranks = f" on {world_size} processes" if world_size > 1 else ""
            limit = size // world_size
            raise UserError(
                f"{name}: batch size {batch_size}{ranks} for {size} examples; use 1 to {limit}, or more data"
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.start = 0

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self, self.start)

    def batch(self, step: int, orders: dict[int, np.ndarray] | None = None) -> list[Key]:
        """The keys of one batch; `orders` keeps the epochs' orders between calls."""
        orders = {} if orders is None else orders
        first = (step * self.world_size + self.rank) * self.batch_size
        keys = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.size)
            if epoch not in orders:
                orders.pop(epoch - 2, None)
                orders[epoch] = self.order(epoch)
            keys.append((epoch, int(orders[epoch][place])))
        return keys

    def order(self, epoch: int) -> np.ndarray:
        """The order of an epoch, [size]; with lengths, sorted within stretches of batches that are then shuffled."""
        rng = np.random.default_rng((self.seed, 5, epoch))
        order = rng.permutation(self.size)
        if self.lengths is None:
            return order
        whole = self.batch_size * self.world_size
        # An epoch begins within a batch of the one before.
        first = -epoch * self.size % whole
        pieces = [order[:first]]
        for start in range(first, self.size, _STRETCH * whole):
            stretch = order[start : start + _STRETCH * whole]
            stretch = stretch[np.argsort(self.lengths[stretch], kind="stable")]
            batches = np.split(stretch, range(whole, len(stretch), whole))
            short = [batches.pop()] if len(batches[-1]) < whole else []
            pieces += [batches[i] for i in rng.permutation(len(batches))] + short
        return np.concatenate(pieces)


class BatchIterator(Iterator[list[Key]]):
    """Position in :class:`EpochBatches`; its state is one integer."""

    def __init__(self, batches: EpochBatches, step: int) -> None:
        self.batches = batches
        self.step = step
        self._orders: dict[int, np.ndarray] = {}

    def __next__(self) -> list[Key]:
        keys = self.batches.batch(self.step, self._orders)
        self.step += 1
        return keys

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]


def stream_loader(
    dataset: PairDataset | ImageDataset | TextDataset,
    batches: EpochBatches,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> StatefulDataLoader:
    """An endless loader of one stream, with torchdata's own `state_dict` too."""
    if num_workers > 0:
        # `tokenizers` warns on every fork after it has used threads; examples are encoded one by one, without any.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata 0.11 on torch 2.15
        return StatefulDataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Its own, or else every start of the loader would draw from torch's global state and resuming would show.
            generator=torch.Generator(),
            collate_fn=Collate(max_length=getattr(dataset, "max_length", None)),
            # Positions are kept here, so the workers need not send theirs with every batch.
            snapshot_every_n_steps=1000 if num_workers > 0 else 1,
        )


class StreamMixer(Iterator[dict[str, Batch]]):
    """Endless training steps, each one batch of every stream: {"pairs": ..., "images": ..., "texts": ...}.

    What a batch holds is listed at :class:`Collate`.

    Streams advance together and wrap around on their own, so the position is one integer, and a resumed mixer gives the
    tensors that the first would have given, for any number of workers.

    Args:
        datasets: some of "pairs", "images", "texts" by name.
        batch_sizes: examples a step and process of each; a stream with 0, or without an entry, is left out.
        seed: of the order; the datasets have their own.
        rank, world_size: this process and how many there are.
        num_workers: loader processes per stream; 0 loads in this one and starts at once.
        bad: counts what cannot be read and stops past a share.

    Raises:
        UserError: an unknown stream, none left, or a batch larger than its data; while iterating, too much bad data.
    """

    def __init__(
        self,
        datasets: Mapping[str, PairDataset | ImageDataset | TextDataset],
        batch_sizes: Mapping[str, int],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        bad: BadData | None = None,
    ) -> None:
        for name in (*datasets, *batch_sizes):
            if name not in STREAMS:
                raise UserError(f"stream {name!r} is unknown; use {', '.join(STREAMS)}")
        used = [name for name in STREAMS if batch_sizes.get(name, 0) != 0]
        if not used:
            raise UserError("batch_sizes: every stream has 0; give one at least 1")
        for name in used:
            if name not in datasets:
                raise UserError(f"stream {name!r} has batch size {batch_sizes[name]} but no data; set it to 0")
        self.bad = bad or BadData()
        self.step = 0
        self.world_size = world_size
        self._batches = {
            name: EpochBatches(
                len(datasets[name]),
                batch_sizes[name],
                seed=seed + 1000003 * STREAMS.index(name),
                rank=rank,
                world_size=world_size,
                name=name,
            )
            for name in used
        }
        self._loaders = {
            name: stream_loader(datasets[name], batches, num_workers=num_workers, pin_memory=pin_memory)
            for name, batches in self._batches.items()
        }
        self._running: dict[str, Iterator[Batch]] = {}

    def __next__(self) -> dict[str, Batch]:
        if not self._running:
            for name, loader in self._loaders.items():
                self._batches[name].start = self.step
                self._running[name] = iter(loader)
        try:
            step = {name: next(running) for name, running in self._running.items()}
        except UserError as error:
            # A loader process sends its traceback along; the line that matters is the last.
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
        self.step += 1
        for batch in step.values():
            for skipped in batch.pop("skipped"):
                self.bad.record(skipped)
        return step

    def epochs(self) -> dict[str, float]:
        """How many times each stream's data has been gone through."""
        return {name: self.step * b.batch_size * b.world_size / b.size for name, b in self._batches.items()}

    def state_dict(self) -> dict[str, Any]:
        """The position, what it belongs to, and what was skipped: plain numbers and strings, for JSON."""
        return {"step": self.step, "streams": self._streams(), "bad": self.bad.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UserError: it was saved with other data, batch sizes, seed or number of processes, or is no mixer's state.
        """
        if absent := {"step", "streams", "bad"} - state.keys():
            raise UserError(f"state has no {sorted(absent)[0]!r}: pass what a StreamMixer's state_dict gave")
        ours = self._streams()
        for name in sorted(ours.keys() | state["streams"].keys()):
            saved, here = state["streams"].get(name), ours.get(name)
            if saved != here:
                raise UserError(
                    f"stream {name!r} was saved as {saved} but is {here}; resume with the same data and sizes"
                )
        self.step = int(state["step"])
        self.bad.load_state_dict(state["bad"])
        self._running = {}

    def close(self) -> None:
        """Stop loader processes; the next step starts them again where this one ended."""
        self._running = {}

    def _streams(self) -> dict[str, dict[str, int]]:
        return {
            name: {
                "examples": batches.size,
                "batch_size": batches.batch_size,
                "seed": batches.seed,
                "processes": batches.world_size,
            }
            for name, batches in self._batches.items()
        }


def next_readable(images: ImageSource, index: int, kind: str) -> tuple[np.ndarray, int, list[Skipped]]:
    """The picture at `index`, or the next one that can be read: it, its index, and those passed over.

    Raises:
        UserError: none can be read.
    """
    skipped: list[Skipped] = []
    total = len(images)
    for offset in range(total):
        found = (index + offset) % total
        try:
            return images[found], found, skipped
        except BadExampleError as error:
            skipped.append(Skipped(kind, error.name, error.reason, total))
    raise UserError(f"{images.name(index)}: {skipped[0].reason}, as is every picture with it; repair the data")
