"""The embedded corpus: aligned, image-only, text-only and test parts of one small world, all from one seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vlblocks.data.captions import captions
from vlblocks.data.sources import CaptionedImages, Chosen, ImageSource
from vlblocks.data.world import HELD_OUT, PAIRS, SEEN, SIZES, Scene, Thing, render
from vlblocks.errors import UserError

_THING_COUNTS = (0.15, 0.45, 0.40)  # shares of scenes with one, two and three things


class RenderedScenes:
    """Pictures of scenes, uint8 [H, W, 3], drawn when first asked for and kept."""

    def __init__(self, scenes: Sequence[Scene], *, image_size: int, name: str) -> None:
        self.scenes = scenes
        self.image_size = image_size
        self._name = name
        self._drawn: list[np.ndarray | None] = [None] * len(scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> np.ndarray:
        drawn = self._drawn[index]
        if drawn is None:
            drawn = self._drawn[index] = render(self.scenes[index], self.image_size)
        return drawn

    def name(self, index: int) -> str:
        return f"{self._name} scene {index}"


class SceneCaptions:
    """Captions of scenes, written when first asked for and kept."""

    def __init__(self, scenes: Sequence[Scene], *, per_scene: int) -> None:
        self.scenes = scenes
        self.per_scene = per_scene
        self._written: list[tuple[str, ...] | None] = [None] * len(scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> tuple[str, ...]:
        written = self._written[index]
        if written is None:
            written = self._written[index] = captions(self.scenes[index], self.per_scene)
        return written


class ScenePart(NamedTuple):
    """One part of the corpus."""

    scenes: tuple[Scene, ...]
    images: ImageSource
    captions: SceneCaptions

    def chosen(self, indices: range) -> ScenePart:
        """Some of its scenes, each with the picture, name and captions that it has here."""
        scenes = tuple(self.scenes[index] for index in indices)
        # Captions depend on their scene alone.
        captions = SceneCaptions(scenes, per_scene=self.captions.per_scene)
        return ScenePart(scenes, Chosen(self.images, indices), captions)

    def pairs(self) -> CaptionedImages:
        """As pictures with captions, for training or as a retrieval gallery."""
        return CaptionedImages(self.images, self.captions, tuple(range(len(self.scenes))))


class SceneCorpus:
    """Scenes drawn from a seed; no description occurs twice in it, in whatever part.

    The training parts show only the (colour, shape) pairs of `world.SEEN`; every test scene shows at least one of
    `world.HELD_OUT`, so that no test description, nor a part of it, is met in training.

    Args:
        seed: of everything. Another seed gives other scenes and other pictures.
        pairs, images, texts, test: how many scenes each part holds.
        image_size: height and width, pixels.
        captions_per_scene: captions written for each scene of `pairs` and `test` (1 in `texts`).

    Raises:
        UserError: a part is too large for the world, or a size makes no sense.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        pairs: int = 4000,
        images: int = 1000,
        texts: int = 1000,
        test: int = 400,
        image_size: int = 64,
        captions_per_scene: int = 5,
    ) -> None:
        if image_size < 16:
            raise UserError(f"image size {image_size} is too small to show shapes; use 16 or more")
        if captions_per_scene < 1:
            raise UserError("captions_per_scene must be at least 1")
        if min(pairs, images, texts, test) < 0 or pairs + images + texts > 100_000 or test > 20_000:
            raise UserError(
                "corpus size: each part needs 0 or more scenes, at most 100000 in training and 20000 in test"
            )
        self.seed = seed
        self.image_size = image_size
        taken: set[tuple[Thing, ...]] = set()
        parts = []
        for number, count in enumerate((pairs, images, texts, test)):
            unseen = number == 3
            scenes = _draw_scenes(np.random.default_rng((seed, number)), count, taken, unseen=unseen)
            name = ("pairs", "images", "texts", "test")[number]
            pictures = RenderedScenes(scenes, image_size=image_size, name=name)
            wanted = 1 if name == "texts" else captions_per_scene
            parts.append(ScenePart(scenes, pictures, SceneCaptions(scenes, per_scene=wanted)))
        self.pair_part, self.image_part, self.text_part, self.test_part = parts

    @property
    def pairs(self) -> CaptionedImages:
        """Pictures with captions, to train on."""
        return self.pair_part.pairs()

    @property
    def images(self) -> ImageSource:
        """Pictures without captions, of scenes of their own."""
        return self.image_part.images

    @property
    def texts(self) -> list[str]:
        """Sentences without pictures, on scenes of their own."""
        return [written[0] for written in self.text_part.captions]

    @property
    def test(self) -> CaptionedImages:
        """Unseen combinations, for retrieval (`test.gallery()`): every caption fits one picture only."""
        return self.test_part.pairs()


def draw_scene(rng: np.random.Generator, *, unseen: bool = False) -> Scene:
    """Draw one scene: of seen (colour, shape) pairs only, or with at least one that training never shows."""
    count = 1 + int(np.searchsorted(np.cumsum(_THING_COUNTS)[:-1], rng.random(), side="right"))
    pool = PAIRS if unseen else SEEN
    chosen = [pool[i] for i in rng.choice(len(pool), size=count, replace=False)]
    if unseen and not any(pair in HELD_OUT for pair in chosen):
        chosen[0] = HELD_OUT[int(rng.integers(len(HELD_OUT)))]
    cells = rng.permutation(4)[:count]
    sizes = rng.integers(len(SIZES), size=count)
    things = [
        Thing(SIZES[size], colour, shape, int(cell) // 2, int(cell) % 2)
        for (colour, shape), cell, size in zip(chosen, cells, sizes, strict=True)
    ]
    return Scene(tuple(things), seed=int(rng.integers(2**31)))


def _draw_scenes(
    rng: np.random.Generator, count: int, taken: set[tuple[Thing, ...]], *, unseen: bool
) -> tuple[Scene, ...]:
    found: list[Scene] = []
    while len(found) < count:
        scene = draw_scene(rng, unseen=unseen)
        if scene.description not in taken:
            taken.add(scene.description)
            found.append(scene)
    return tuple(found)
