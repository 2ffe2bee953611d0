"""A grammar that describes scenes: synonyms, several word orders, and always all there is to tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlblocks.data.world import COLUMNS, ROWS, Scene, Thing

SYNONYMS: dict[str, tuple[str, ...]] = {
    "large": ("large", "big"),
    "small": ("small", "little"),
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus"),
    "top": ("top", "top", "upper"),
    "bottom": ("bottom", "bottom", "lower"),
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence that names every thing with size, colour, shape and place (a place may follow from a relation)."""
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    if len(order) == 1:
        return _one(order[0], rng)
    if len(order) == 2:
        related = _beside(order[0], order[1])
        return _related(order[0], order[1], rng) if related and rng.random() < 0.6 else _listed(order, rng)
    pairs = [(i, j) for i in range(len(order)) for j in range(len(order)) if i != j and _beside(order[i], order[j])]
    if len(order) == 3 and rng.random() < 0.5:
        first, second = pairs[int(rng.integers(len(pairs)))]
        third = order[3 - first - second]
        return f"{_related(order[first], order[second], rng)} and {noun(third, rng)} {_place(third, rng)}"
    return _listed(order, rng)


def captions(scene: Scene, count: int, seed: int = 0) -> tuple[str, ...]:
    """`count` captions of a scene, different as far as the grammar allows; the same arguments give the same ones."""
    rng = np.random.default_rng((scene.seed, seed, 11))
    found: dict[str, None] = {}
    for _ in range(4 * count):
        found.setdefault(caption(scene, rng))
        if len(found) == count:
            return tuple(found)
    distinct = list(found)
    return tuple(distinct[i % len(distinct)] for i in range(count))


def noun(thing: Thing, rng: np.random.Generator, article: str = "a") -> str:
    """A noun phrase with size, colour and shape, such as "a big red disc"."""
    return f"{article} {_pick(SYNONYMS[thing.size], rng)} {thing.colour} {word(thing.shape, rng)}"


def word(name: str, rng: np.random.Generator) -> str:
    """A name or one of its synonyms."""
    return _pick(SYNONYMS.get(name, (name,)), rng)


def _one(thing: Thing, rng: np.random.Generator) -> str:
    name, place = noun(thing, rng), _place(thing, rng)
    forms = (f"{name} {place}", f"there is {name} {place}", f"{place} there is {name}", f"a picture of {name} {place}")
    return _pick(forms, rng)


def _listed(things: Sequence[Thing], rng: np.random.Generator) -> str:
    place_first = rng.random() < 0.35
    parts = [
        f"{_place(thing, rng)} {noun(thing, rng)}" if place_first else f"{noun(thing, rng)} {_place(thing, rng)}"
        for thing in things
    ]
    joined = f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"there is {joined}" if len(things) == 2 and not place_first and rng.random() < 0.25 else joined


def _related(first: Thing, second: Thing, rng: np.random.Generator) -> str:
    a, b = noun(first, rng), noun(second, rng)
    if first.row == second.row:
        side = COLUMNS[first.column]
        relation = _pick((f"to the {side} of", f"{side} of"), rng)
        where = f"at the {ROWS[first.row]}"
    else:
        above = first.row < second.row
        relation = _pick(("above", "over") if above else ("below", "under"), rng)
        where = f"on the {COLUMNS[first.column]}"
    return f"{where} {a} {relation} {b}" if rng.random() < 0.4 else f"{a} {relation} {b} {where}"


def _beside(first: Thing, second: Thing) -> bool:
    return first.row == second.row or first.column == second.column


def _place(thing: Thing, rng: np.random.Generator) -> str:
    return f"{_pick(('in', 'at'), rng)} the {word(ROWS[thing.row], rng)} {COLUMNS[thing.column]}"


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
