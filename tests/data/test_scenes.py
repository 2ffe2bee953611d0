"""The embedded corpus: deterministic, discriminating, with unseen combinations; answers that follow from the scene."""

import re

import numpy as np
import pytest

from vlblocks.data import Scene, SceneCorpus, Thing, render
from vlblocks.data.captions import SYNONYMS, caption, captions
from vlblocks.data.scene_tasks import (
    ANSWERS,
    CLASSES,
    ENTAILMENT_LABELS,
    NUMBERS,
    PLACES,
    QUESTION_KINDS,
    ask,
    class_label,
    count_label,
    hypothesise,
    present,
    refer,
    related,
)
from vlblocks.data.scenes import draw_scene
from vlblocks.data.world import COLOURS, HELD_OUT, PAIRS, SEEN, SHAPES
from vlblocks.errors import UserError


@pytest.fixture(scope="module")
def corpus() -> SceneCorpus:
    return SceneCorpus(seed=3, pairs=600, images=150, texts=150, test=300, captions_per_scene=4)


CANONICAL = {spoken: name for name, options in SYNONYMS.items() for spoken in options}
NOUN = re.compile(rf"(?:a )?(large|big|small|little) ({'|'.join(COLOURS)}) (\w+)")


def understand(text: str) -> tuple[Thing, ...]:
    """Read a caption back: the inverse of the grammar, written apart from it."""
    nouns = [tuple(CANONICAL.get(w, w) for w in match) for match in NOUN.findall(text)]
    rest = NOUN.sub("X", text)
    for spoken, name in (("upper", "top"), ("lower", "bottom"), ("over", "above"), ("under", "below")):
        rest = re.sub(rf"\b{spoken}\b", name, rest)
    rest = re.sub(r"\b(there is|a picture of) ", "", rest)
    rest = rest.replace("to the left of", "leftof").replace("to the right of", "rightof")
    rest = rest.replace("left of", "leftof").replace("right of", "rightof")
    place = r"(?:in|at) the (top|bottom) (left|right)"
    side = r"(?:at|on) the (top|bottom|left|right)"
    relation = r"(leftof|rightof|above|below)"
    found: list[tuple[int, int]] = []
    while rest:
        rest = re.sub(r"^(, | and )", "", rest)
        if match := (re.match(rf"{side} X {relation} X", rest) or re.match(rf"X {relation} X {side}", rest)):
            groups = match.groups()
            where, how = groups if groups[0] in ("top", "bottom", "left", "right") else groups[::-1]
            if how in ("leftof", "rightof"):
                row = int(where == "bottom")
                first = int(how == "rightof")
                found += [(row, first), (row, 1 - first)]
            else:
                column = int(where == "right")
                first = int(how == "below")
                found += [(first, column), (1 - first, column)]
        elif match := (re.match(rf"{place} X", rest) or re.match(rf"X {place}", rest)):
            found.append((int(match[1] == "bottom"), int(match[2] == "right")))
        else:
            raise AssertionError(f"not understood: {rest!r} of {text!r}")
        rest = rest[match.end() :]
    assert len(nouns) == len(found)
    return Scene(tuple(Thing(*noun, *cell) for noun, cell in zip(nouns, found, strict=True))).things


def test_a_corpus_is_fixed_by_its_seed(corpus: SceneCorpus) -> None:
    again = SceneCorpus(seed=3, pairs=600, images=150, texts=150, test=300, captions_per_scene=4)
    other = SceneCorpus(seed=4, pairs=600, images=150, texts=150, test=300, captions_per_scene=4)
    assert [again.pairs.captions[i] for i in range(600)] == [corpus.pairs.captions[i] for i in range(600)]
    assert again.texts == corpus.texts
    assert all((again.test.images[i] == corpus.test.images[i]).all() for i in range(20))
    assert other.texts != corpus.texts
    assert not (other.test.images[0] == corpus.test.images[0]).all()


def test_parts_have_the_sizes_asked_for(corpus: SceneCorpus) -> None:
    assert (len(corpus.pairs.images), len(corpus.images), len(corpus.texts), len(corpus.test.images)) == (
        600,
        150,
        150,
        300,
    )
    assert all(len(corpus.test.captions[i]) == 4 for i in range(300))
    picture = corpus.images[0]
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert {len(scene.things) for scene in corpus.test_part.scenes} == {1, 2, 3}


def test_every_caption_tells_the_whole_scene(corpus: SceneCorpus) -> None:
    for part in (corpus.pair_part, corpus.test_part, corpus.text_part):
        for scene, written in zip(part.scenes, part.captions, strict=True):
            for text in written:
                assert understand(text) == scene.description


def test_no_two_scenes_share_a_description_and_no_caption_fits_two_pictures(corpus: SceneCorpus) -> None:
    parts = (corpus.pair_part, corpus.image_part, corpus.text_part, corpus.test_part)
    descriptions = [scene.description for part in parts for scene in part.scenes]
    assert len(set(descriptions)) == len(descriptions)
    gallery = corpus.test.gallery()
    assert len(gallery.images) == 300
    assert len(gallery.captions) == len(gallery.owners) == 1200
    owners: dict[str, set[int]] = {}
    for text, owner in zip(gallery.captions, gallery.owners, strict=True):
        owners.setdefault(text, set()).add(owner)
    assert all(len(fitting) == 1 for fitting in owners.values())
    assert corpus.test.gallery(captions_per_image=1).owners == list(range(300))


def test_every_test_scene_holds_a_combination_that_training_never_shows(corpus: SceneCorpus) -> None:
    trained = (*corpus.pair_part.scenes, *corpus.image_part.scenes, *corpus.text_part.scenes)
    shown = {thing.pair for scene in trained for thing in scene.things}
    assert shown == set(SEEN)
    assert all(any(thing.pair not in shown for thing in scene.things) for scene in corpus.test_part.scenes)
    assert {colour for colour, _ in SEEN} == set(COLOURS)
    assert {shape for _, shape in SEEN} == set(SHAPES)
    assert not set(SEEN) & set(HELD_OUT)
    training = {text for written in corpus.pairs.captions for text in written} | set(corpus.texts)
    assert not training & {text for written in corpus.test.captions for text in written}


def test_captions_vary_in_words_and_order() -> None:
    scene = Scene((Thing("large", "red", "circle", 0, 0), Thing("small", "blue", "square", 0, 1)), seed=5)
    written = captions(scene, 12)
    assert len(set(written)) == 12
    assert {"disc", "circle"} <= {word for text in written for word in text.split()}
    assert any(text.index("red") < text.index("blue") for text in written)
    assert any(text.index("red") > text.index("blue") for text in written)
    assert any("left of" in text or "right of" in text for text in written)
    assert captions(scene, 12) == written


def test_pictures_show_what_the_scene_says() -> None:
    small = Scene((Thing("small", "green", "square", 1, 0),), seed=9)
    large = Scene((Thing("large", "green", "square", 1, 0),), seed=9)
    counts = []
    for scene in (small, large):
        picture = render(scene, 64).astype(int)
        green = (picture[..., 1] - np.maximum(picture[..., 0], picture[..., 2])) > 40
        rows, columns = np.nonzero(green)
        assert rows.min() >= 30
        assert columns.max() <= 34
        counts.append(green.sum())
    assert counts[1] > 2.5 * counts[0] > 0
    assert render(small, 128).shape == (128, 128, 3)


@pytest.mark.parametrize("seed", range(3))
def test_questions_have_one_right_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = set()
    for _ in range(400):
        scene = draw_scene(rng, unseen=bool(rng.random() < 0.5))
        found = ask(scene, rng)
        kinds.add(found.kind)
        assert found.answer in ANSWERS
        assert found.question.endswith("?")
        assert check_answer(scene, found.question, found.answer), (scene, found)
    assert kinds == set(QUESTION_KINDS)


def check_answer(scene: Scene, question: str, answer: str) -> bool:
    if match := re.match(r"is there an? (\w+) (\w+)\?", question):
        return (answer == "yes") == any(thing.pair == (match[1], match[2]) for thing in scene.things)
    if match := re.match(r"how many (.+) are there\?", question):
        words = match[1].split()
        return NUMBERS.index(answer) == sum(fits(thing, words) for thing in scene.things)
    if match := re.match(r"what shape is (?:to the )?(left of|right of|above|below) the (.+)\?", question):
        target = only(scene, match[2])
        return [thing.shape for thing in scene.things if related(thing, target, match[1])] == [answer]
    phrase = re.sub(r" small or large\?| have\?|\?", "", question.split(" the ", 1)[1])
    thing = only(scene, phrase)
    return answer in (thing.size, thing.colour, thing.shape, thing.place) and answer not in phrase


def fits(thing: Thing, words: list[str]) -> bool:
    known = {thing.size, thing.colour, thing.shape, f"{thing.shape}s", f"{thing.shape}es", "thing", "things"}
    return all(word in known for word in words)


def only(scene: Scene, phrase: str) -> Thing:
    head, _, place = phrase.partition(" in the ")
    matching = [t for t in scene.things if fits(t, head.split()) and (not place or t.place == place)]
    assert len(matching) == 1, (phrase, scene)
    return matching[0]


@pytest.mark.parametrize("label", ["entailment", "contradiction"])
def test_hypotheses_are_true_or_false_as_labelled(label: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(400):
        scene = draw_scene(rng)
        text = hypothesise(scene, rng, label).text
        assert holds(scene, text) == (label == "entailment"), (scene, text)


def holds(scene: Scene, text: str) -> bool:
    if match := re.fullmatch(r"there (?:is|are) (\w+) things?", text):
        return NUMBERS.index(match[1]) == len(scene.things)
    if match := re.fullmatch(r"there is an? (\w+) (\w+)", text):
        return (match[1], match[2]) in {thing.pair for thing in scene.things}
    if match := re.fullmatch(r"the (\w+) (\w+) is (small|large)", text):
        return only(scene, f"{match[1]} {match[2]}").size == match[3]
    if match := re.fullmatch(rf"the (\w+) (\w+) is in the ({'|'.join(PLACES)})", text):
        return only(scene, f"{match[1]} {match[2]}").place == match[3]
    match = re.fullmatch(r"the (\w+) (\w+) is (?:to the )?(left of|right of|above|below) the (\w+) (\w+)", text)
    assert match, text
    return related(only(scene, f"{match[1]} {match[2]}"), only(scene, f"{match[4]} {match[5]}"), match[3])


def test_labels_are_balanced_and_open_sentences_speak_of_what_is_not_seen() -> None:
    rng = np.random.default_rng(2)
    labels = [hypothesise(draw_scene(rng), rng).label for _ in range(600)]
    for label in ENTAILMENT_LABELS:
        assert 150 < labels.count(label) < 250
    visible = {*COLOURS, *SHAPES, "small", "large", *PLACES}
    for _ in range(50):
        tail = hypothesise(draw_scene(rng), rng, "neutral").text.split(" is ", 1)[1]
        assert tail not in visible


def test_class_labels_follow_from_the_scene() -> None:
    scene = Scene((Thing("small", "red", "circle", 0, 0), Thing("large", "blue", "star", 1, 1)))
    assert CLASSES[class_label(scene)] == "blue star"
    assert [CLASSES[i] for i in np.flatnonzero(present(scene))] == ["red circle", "blue star"]
    assert count_label(scene) == 1
    assert len(CLASSES) == len(PAIRS) == 48


def test_a_reference_names_one_thing_and_keeps_the_secret() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = draw_scene(rng)
        thing = scene.things[0]
        for hide in ("colour", "shape", "size", "place"):
            phrase = refer(scene, thing, rng, hide=hide)
            assert only(scene, phrase.removeprefix("the ")) == thing
            assert getattr(thing, hide) not in phrase


def test_some_scenes_of_a_part_keep_their_pictures_names_and_captions() -> None:
    part = SceneCorpus(pairs=30, images=0, texts=0, test=0, image_size=32, captions_per_scene=3).pair_part
    some = part.chosen(range(20, 26))
    assert len(some.scenes) == len(some.images) == len(some.captions) == 6
    for here, there in enumerate(range(20, 26)):
        assert some.scenes[here] == part.scenes[there] and some.images.name(here) == f"pairs scene {there}"
        assert (some.images[here] == part.images[there]).all() and some.captions[here] == part.captions[there]
    assert [list(texts) for texts in some.captions] == [list(part.captions[there]) for there in range(20, 26)]


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="image size"):
        SceneCorpus(image_size=4)
    with pytest.raises(UserError, match="corpus size"):
        SceneCorpus(pairs=10**7)
    scene = Scene((Thing("small", "red", "circle", 0, 0),))
    with pytest.raises(UserError, match="relation"):
        ask(scene, np.random.default_rng(0), "relation")
    with pytest.raises(UserError, match="label"):
        hypothesise(scene, np.random.default_rng(0), "maybe")
    with pytest.raises(ValueError, match="cell"):
        Scene((Thing("small", "red", "circle", 0, 0), Thing("small", "blue", "circle", 0, 0)))


def test_one_caption_is_drawn_by_its_generator() -> None:
    scene = draw_scene(np.random.default_rng(0))
    assert caption(scene, np.random.default_rng(4)) == caption(scene, np.random.default_rng(4))
