"""What else can be asked of a scene: questions, entailment, class labels. All answers follow from the scene alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from vlblocks.data.world import COLOURS, COLUMNS, PAIRS, ROWS, SHAPES, SIZES, Scene, Thing
from vlblocks.errors import UserError

T = TypeVar("T")

PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
NUMBERS = ("zero", "one", "two", "three", "four")
ANSWERS = (*COLOURS, *SHAPES, *SIZES, *PLACES, *NUMBERS, "yes", "no")
CLASSES = tuple(f"{colour} {shape}" for colour, shape in PAIRS)
ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")

_RELATIONS = ("left of", "right of", "above", "below")
_INVISIBLE = (
    "made of wood",
    "made of metal",
    "heavy",
    "soft",
    "cold",
    "brand new",
    "older than the others",
    "for sale",
)


class Question(NamedTuple):
    kind: str  # one of QUESTION_KINDS
    question: str
    answer: str  # one of ANSWERS


class Hypothesis(NamedTuple):
    text: str
    label: str  # one of ENTAILMENT_LABELS


def class_label(scene: Scene) -> int:
    """Index in CLASSES of the thing that the picture is of (`Scene.main`)."""
    return PAIRS.index(scene.main.pair)


def present(scene: Scene) -> np.ndarray:
    """Which of CLASSES the scene shows: bool [len(CLASSES)]."""
    shown = {thing.pair for thing in scene.things}
    return np.array([pair in shown for pair in PAIRS], dtype=bool)


def count_label(scene: Scene) -> int:
    """The number of things, less one: a label that its captions alone tell as well."""
    return len(scene.things) - 1


def ask(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
    """A question on the scene and its one right answer; `kind` None draws among the kinds that the scene allows.

    Raises:
        UserError: an unknown kind, or one that this scene does not allow ("relation" needs two neighbours).
    """
    allowed = [name for name in QUESTION_KINDS if name != "relation" or _neighbours(scene)]
    if kind is None:
        kind = _pick(allowed, rng)
    elif kind not in allowed:
        raise UserError(f"question kind {kind!r} does not fit this scene; use one of {', '.join(allowed)}")
    text, answer = _QUESTIONS[kind](scene, rng)
    return Question(kind, text, answer)


def hypothesise(scene: Scene, rng: np.random.Generator, label: str | None = None) -> Hypothesis:
    """A sentence that the picture (or a full caption) entails, contradicts, or leaves open; labels equally likely.

    True and false sentences come from the same templates, so that words alone do not give them away; open ones speak
    of what no picture shows.

    Raises:
        UserError: an unknown label.
    """
    if label is None:
        label = _pick(ENTAILMENT_LABELS, rng)
    if label not in ENTAILMENT_LABELS:
        raise UserError(f"entailment label {label!r} is unknown; use one of {', '.join(ENTAILMENT_LABELS)}")
    if label == "neutral":
        thing = _pick(scene.things, rng)
        return Hypothesis(f"the {thing.colour} {thing.shape} is {_pick(_INVISIBLE, rng)}", label)
    forms = [_claim_exists, _claim_size, _claim_place, _claim_count]
    if _neighbours(scene):
        forms.append(_claim_relation)
    return Hypothesis(_pick(forms, rng)(scene, label == "entailment", rng), label)


def related(first: Thing, second: Thing, relation: str) -> bool:
    """Whether `first` stands in `relation` to `second`, both in one row or one column."""
    if relation in ("above", "below"):
        step = second.row - first.row
        return first.column == second.column and step == (1 if relation == "above" else -1)
    step = second.column - first.column
    return first.row == second.row and step == (1 if relation == "left of" else -1)


def refer(scene: Scene, thing: Thing, rng: np.random.Generator, *, hide: str | None = None) -> str:
    """A phrase that fits one thing of the scene only and does not tell `hide` (size, colour, shape or place)."""
    place = f"in the {thing.place}"
    forms: list[tuple[str, Callable[[Thing], bool], set[str]]] = [
        (thing.shape, lambda t: t.shape == thing.shape, {"shape"}),
        (f"{thing.size} {thing.shape}", lambda t: (t.size, t.shape) == (thing.size, thing.shape), {"size", "shape"}),
        (f"{thing.colour} {thing.shape}", lambda t: t.pair == thing.pair, {"colour", "shape"}),
        (f"{thing.colour} thing", lambda t: t.colour == thing.colour, {"colour"}),
        (f"{thing.size} thing", lambda t: t.size == thing.size, {"size"}),
        (f"thing {place}", lambda t: t.place == thing.place, {"place"}),
        (f"{thing.shape} {place}", lambda t: t.place == thing.place, {"place", "shape"}),
    ]
    fitting = [text for text, fits, tells in forms if hide not in tells and sum(map(fits, scene.things)) == 1]
    return f"the {_pick(fitting, rng)}"


def _ask_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(scene.things, rng)
    name = refer(scene, thing, rng, hide="colour")
    return _pick((f"what colour is {name}?", f"which colour does {name} have?"), rng), thing.colour


def _ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(scene.things, rng)
    name = refer(scene, thing, rng, hide="shape")
    return _pick((f"what shape is {name}?", f"what is {name}?"), rng), thing.shape


def _ask_size(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(scene.things, rng)
    return f"is {refer(scene, thing, rng, hide='size')} small or large?", thing.size


def _ask_place(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(scene.things, rng)
    name = refer(scene, thing, rng, hide="place")
    return _pick((f"where is {name}?", f"in which corner is {name}?"), rng), thing.place


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    seen = rng.random() < 0.6
    thing = _pick(scene.things, rng)
    colour = thing.colour if seen else _pick(tuple(COLOURS), rng)
    shape = thing.shape if seen else _pick(SHAPES, rng)
    options = (
        ("things", len(scene.things)),
        (f"{colour} things", sum(t.colour == colour for t in scene.things)),
        (_plural(shape), sum(t.shape == shape for t in scene.things)),
        (f"{thing.size} things", sum(t.size == thing.size for t in scene.things)),
    )
    what, number = options[int(rng.integers(len(options)))]
    return f"how many {what} are there?", NUMBERS[number]


def _ask_exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    truth = bool(rng.random() < 0.5)
    colour, shape = _pick(scene.things, rng).pair if truth else _absent_pair(scene, rng)
    return f"is there {_article(colour)} {colour} {shape}?", "yes" if truth else "no"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    first, relation, second = _pick(_neighbours(scene), rng)
    where = f"to the {relation}" if relation.endswith(" of") else relation
    return f"what shape is {where} {refer(scene, second, rng)}?", first.shape


_QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str]]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "place": _ask_place,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
}
QUESTION_KINDS = tuple(_QUESTIONS)


def _claim_exists(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    colour, shape = _pick(scene.things, rng).pair if truth else _absent_pair(scene, rng)
    return f"there is {_article(colour)} {colour} {shape}"


def _claim_size(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    thing = _pick(scene.things, rng)
    size = thing.size if truth else _other(SIZES, thing.size, rng)
    return f"the {thing.colour} {thing.shape} is {size}"


def _claim_place(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    thing = _pick(scene.things, rng)
    place = thing.place if truth else _other(PLACES, thing.place, rng)
    return f"the {thing.colour} {thing.shape} is in the {place}"


def _claim_count(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    right = NUMBERS[len(scene.things)]
    number = right if truth else _other(NUMBERS[1:4], right, rng)
    return "there is one thing" if number == "one" else f"there are {number} things"


def _claim_relation(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    first, relation, second = _pick(_neighbours(scene), rng)
    said = relation if truth else _other(_RELATIONS, relation, rng)
    where = f"to the {said}" if said.endswith(" of") else said
    return f"the {first.colour} {first.shape} is {where} the {second.colour} {second.shape}"


def _neighbours(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    return [
        (first, relation, second)
        for first in scene.things
        for second in scene.things
        for relation in _RELATIONS
        if first != second and related(first, second, relation)
    ]


def _absent_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    # Near misses: one word of a thing that is there is changed.
    thing = _pick(scene.things, rng)
    near = [(colour, thing.shape) for colour in COLOURS] + [(thing.colour, shape) for shape in SHAPES]
    shown = {other.pair for other in scene.things}
    return _pick([pair for pair in near if pair not in shown], rng)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _other(options: Sequence[str], right: str, rng: np.random.Generator) -> str:
    return _pick([option for option in options if option != right], rng)


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
