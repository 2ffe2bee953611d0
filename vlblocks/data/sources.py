"""Where examples come from: pictures opened when asked for, captions beside them, and a count of the bad ones."""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from vlblocks.errors import UserError

log = logging.getLogger("vlblocks.data")


class BadExampleError(Exception):
    """A picture that cannot be read. Carries the file's name and what is wrong."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


class Skipped(NamedTuple):
    """One example that was left out.

    Attributes:
        kind: what it is, such as "pairs/image".
        name: file, or file and line.
        reason: what is wrong with it.
        total: how many of its kind there are.
    """

    kind: str
    name: str
    reason: str
    total: int


class ImageSource(Protocol):
    """Pictures by index: uint8 [H, W, 3]. `__getitem__` raises BadExampleError for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...

    def name(self, index: int) -> str:
        """What to call a picture in messages."""
        ...


class CaptionSource(Protocol):
    """The captions of each picture by index, none of them empty."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence[str]: ...


class CaptionedImages(NamedTuple):
    """Pictures, the captions of each, and ids that are equal exactly for the same picture.

    Attributes:
        images: N pictures by index, uint8 [H, W, 3].
        captions: N sequences of captions by index.
        image_ids: N integers.
    """

    images: ImageSource
    captions: CaptionSource
    image_ids: Sequence[int]

    def gallery(self, *, captions_per_image: int | None = None, bad: BadData | None = None) -> Gallery:
        """All pictures with their captions (the first few of each), to retrieve one from the other.

        With `bad`, every picture is opened once, and one that cannot be read is left out with its captions.
        """
        kept = [i for i in range(len(self.images)) if bad is None or _readable(self.images, i, bad)]
        written = [list(self.captions[i])[:captions_per_image] for i in kept]
        return Gallery(
            images=self.images if len(kept) == len(self.images) else Chosen(self.images, kept),
            captions=[text for texts in written for text in texts],
            owners=[owner for owner, texts in enumerate(written) for _ in texts],
        )


class Gallery(NamedTuple):
    """Pictures and captions to retrieve one from the other; caption i belongs to picture `owners[i]`.

    Attributes:
        images: I pictures by index, uint8 [H, W, 3].
        captions: T texts.
        owners: T indices of pictures; as a tensor, the `text_image` of `vlblocks.evaluation`.
    """

    images: ImageSource
    captions: list[str]
    owners: list[int]


class BadData:
    """Counts what was skipped, names it in the log once, and stops the run past a share.

    Args:
        share: largest share of a kind (pictures of a part, captions of a file) that may be skipped, in [0, 1].

    Raises:
        UserError: `share` is no share; on :meth:`record`, more than that is bad.
    """

    def __init__(self, *, share: float = 0.01) -> None:
        if not 0.0 <= share <= 1.0:
            raise UserError(f"max_bad_share {share} is not a share; use a number from 0 to 1")
        self.share = share
        self._names: dict[str, dict[str, str]] = {}

    def record(self, skipped: Skipped) -> None:
        """Count one skipped example; one already counted changes nothing."""
        names = self._names.setdefault(skipped.kind, {})
        if skipped.name in names:
            return
        names[skipped.name] = skipped.reason
        log.warning(
            "skipped %s: %s (%s, %d of %d)", skipped.name, skipped.reason, skipped.kind, len(names), skipped.total
        )
        if len(names) > self.share * skipped.total:
            raise UserError(
                f"{skipped.name}: {skipped.reason}; {len(names)} of {skipped.total} {skipped.kind}s are bad, more "
                f"than the allowed share {self.share:g}: repair the data or raise max_bad_share"
            )

    def counts(self) -> dict[str, int]:
        """How many of each kind were skipped."""
        return {kind: len(names) for kind, names in self._names.items()}

    @property
    def total(self) -> int:
        """How many were skipped in all."""
        return sum(self.counts().values())

    def state_dict(self) -> dict[str, dict[str, str]]:
        """What was skipped and why, for JSON."""
        return {kind: dict(names) for kind, names in self._names.items()}

    def load_state_dict(self, state: dict[str, dict[str, str]]) -> None:
        """Take up a saved count; what was skipped since stays counted."""
        for kind, names in state.items():
            self._names[kind] = {**names, **self._names.get(kind, {})}


class Chosen:
    """Some pictures of a source, by their indices there."""

    def __init__(self, images: ImageSource, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[self.indices[index]]

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])


def _readable(images: ImageSource, index: int, bad: BadData) -> bool:
    try:
        images[index]
    except BadExampleError as error:
        bad.record(Skipped("gallery/image", error.name, error.reason, len(images)))
        return False
    return True


class ImageFiles:
    """Pictures in files, opened when asked for, made RGB and upright.

    Args:
        paths: the files.
        resolution: shrink the shorter side to this many pixels on reading (never enlarge); None keeps the size.
        cache_bytes: keep decoded pictures in memory up to this much, so that later epochs read no files.
    """

    def __init__(self, paths: Sequence[Path], *, resolution: int | None = None, cache_bytes: int = 2**30) -> None:
        self.paths = list(paths)
        self.resolution = resolution
        self.cache_bytes = cache_bytes
        self._room = cache_bytes
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        picture = read_image(self.paths[index], resolution=self.resolution)
        if picture.nbytes <= self._room:
            self._room -= picture.nbytes
            self._kept[index] = picture
        return picture

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills its own cache; sending ours would copy it through a pipe.
        return {**self.__dict__, "_kept": {}, "_room": self.cache_bytes}

    def name(self, index: int) -> str:
        return str(self.paths[index])


def read_image(path: Path, *, resolution: int | None = None) -> np.ndarray:
    """Read a picture as uint8 [H, W, 3], upright, its shorter side at most `resolution`.

    Raises:
        BadExampleError: it is missing, damaged or not a picture.
    """
    try:
        with Image.open(path) as file:
            if resolution is not None:
                file.draft("RGB", (resolution, resolution))  # JPEG: decode no larger than needed
            image = ImageOps.exif_transpose(file).convert("RGB")
            shorter = min(image.size)
            if resolution is not None and shorter > resolution:
                width, height = (max(1, round(side * resolution / shorter)) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
            return np.asarray(image).copy()
    except FileNotFoundError:
        raise BadExampleError(str(path), "no such file") from None
    # What Pillow's readers raise on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        text = str(error).splitlines() or [type(error).__name__]
        raise BadExampleError(str(path), text[0]) from None
