"""Image transforms by timm: uint8 pictures to float32 [3, H, W] in [-1, 1], seeded per example."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from vlblocks.errors import UserError

Size = int | tuple[int, int]


@contextmanager
def seeded(seed: int, *, numpy: bool = False) -> Iterator[None]:
    """Run a block under global random states of its own and put the caller's back: some 20 microseconds.

    timm and torchvision draw from the global states of Python and torch (CPU) by turns, so both are forked. They are
    the process's, so two threads must not be inside at once; loader workers are processes.

    Args:
        numpy: fork NumPy's too, which timm's RandAugment and AugMix use (200 microseconds more).
    """
    python, torch_state = random.getstate(), torch.default_generator.get_state()
    legacy = np.random.get_state() if numpy else None
    try:
        random.seed(seed)
        torch.default_generator.manual_seed(seed % 2**63)
        if legacy is not None:
            np.random.seed(seed % 2**32)
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(torch_state)
        if legacy is not None:
            np.random.set_state(legacy)


class ImageTransform:
    """A timm transform as `(picture, seed) -> float32 [3, H, W]` in [-1, 1] (x / 127.5 - 1, spec item 6).

    The same picture and seed give the same tensor whatever ran before; without a seed the global states are used.

    Args:
        transform: a PIL image to uint8 [3, H, W], as `timm.data.create_transform(..., use_prefetcher=True)` makes it.
        size: output height and width, pixels.
        numpy: it draws from NumPy's global state too (see :func:`seeded`).
    """

    def __init__(self, transform: Callable[[Image.Image], Any], size: tuple[int, int], *, numpy: bool = False) -> None:
        self.transform = transform
        self.size = size
        self.numpy = numpy

    def __call__(self, picture: np.ndarray | Image.Image, seed: int | None = None) -> Tensor:
        """`picture`: uint8 [H, W, 3] or a PIL image."""
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        if seed is None:
            pixels = self.transform(image)
        else:
            with seeded(seed, numpy=self.numpy):
                pixels = self.transform(image)
        return to_unit_range(torch.as_tensor(pixels))


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] to float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def train_transform(
    size: Size,
    *,
    scale: tuple[float, float] = (0.8, 1.0),
    ratio: tuple[float, float] = (0.9, 1.1),
    flip: float = 0.0,
    color_jitter: float | tuple[float, ...] = 0.0,
    grayscale: float = 0.0,
    interpolation: str = "bilinear",
) -> ImageTransform:
    """Random crop, resize, optional flip and colour changes (timm's training transform).

    Args:
        size: output height and width, pixels.
        scale, ratio: the crop's share of the area, and its aspect ratio.
        flip: probability of a horizontal flip; 0 by default, since captions that say "left" become wrong.
        color_jitter: strength for brightness, contrast and saturation, or one number each (a fourth: hue).
        grayscale: probability of dropping colour.

    Raises:
        UserError: a size, range or probability that makes no sense.
    """
    height, width = _checked_size(size)
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0.0 < low <= high:
            raise UserError(f"{name} {(low, high)} is not a range; use two positive numbers, the smaller first")
    for name, value in (("flip", flip), ("grayscale", grayscale)):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{name} {value} is not a probability; use a number from 0 to 1")
    jitters = any(color_jitter) if isinstance(color_jitter, tuple) else color_jitter > 0.0
    transform = create_transform(
        (3, height, width),
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=flip,
        color_jitter=color_jitter if jitters else None,  # type: ignore[arg-type]
        grayscale_prob=grayscale,
        interpolation=interpolation,
        use_prefetcher=True,  # leaves uint8, so that the scaling is exactly ours and quick
    )
    return ImageTransform(transform, (height, width))


def eval_transform(size: Size, *, crop: float = 1.0, interpolation: str = "bicubic") -> ImageTransform:
    """Resize the shorter side to size / crop, then cut the centre (timm's evaluation transform)."""
    height, width = _checked_size(size)
    if not 0.0 < crop <= 1.0:
        raise UserError(f"crop {crop} is not a share of the picture; use a number above 0, up to 1")
    transform = create_transform(
        (3, height, width), is_training=False, crop_pct=crop, interpolation=interpolation, use_prefetcher=True
    )
    return ImageTransform(transform, (height, width))


class Views(NamedTuple):
    """Two views of one picture.

    Attributes:
        image: float32 [3, H, W].
        image2: float32 [3, H, W].
    """

    image: Tensor
    image2: Tensor


class TwoViews:
    """Two independent draws of one transform, for contrast between views of a picture (spec item 28)."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self.size = transform.size

    def __call__(self, picture: np.ndarray | Image.Image, seed: int) -> Views:
        """`picture`: uint8 [H, W, 3] or a PIL image."""
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        with seeded(seed, numpy=self.transform.numpy):
            return Views(self.transform(image), self.transform(image))


def _checked_size(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"image size {size} is not positive; use e.g. 64 or 64 96")
    return height, width
