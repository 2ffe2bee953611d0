"""VQA accuracy: hand-computed cases, a slow reference over all nine of ten people, and how answers are normalised."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlblocks.evaluation import normalize_answer, vqa_accuracy, vqa_metrics


# n of ten agree: each of those n sees n - 1 others of his mind, the 10 - n see n.
@pytest.mark.parametrize(
    ("agreeing", "expected"),
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_accuracy_by_hand(agreeing, expected):
    answers = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    assert vqa_accuracy("yes", answers) == pytest.approx(expected)
    assert vqa_accuracy("yes", answers[::-1]) == pytest.approx(expected)
    # What everybody quotes: 0.3, 0.6, 0.9 and 1.
    assert vqa_accuracy("yes", answers) == pytest.approx(min(1.0, 0.3 * agreeing))


@given(
    st.lists(st.sampled_from(["red", "blue", "dark red"]), min_size=10, max_size=10), st.sampled_from(["red", "tan"])
)
def test_accuracy_is_the_mean_over_all_nine_of_ten(answers, prediction):
    nines = [[answers[i] for i in kept] for kept in combinations(range(10), 9)]
    slow = [min(1.0, nine.count(prediction) / 3) for nine in nines]
    assert vqa_accuracy(prediction, answers) == pytest.approx(sum(slow) / len(slow))


def test_both_sides_are_normalised():
    assert vqa_accuracy("The 2 Dogs.", ["two dogs"] * 4 + ["dogs"] * 6) == 1.0
    assert vqa_accuracy("two dogs", ["2 dogs", "a two dogs", "TWO, dogs"] + ["3"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Yes", "yes"),
        ("  two \n words\t", "2 words"),
        ("zero", "0"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),  # up to ten only
        ("someone", "someone"),  # a number word is a whole word
        ("a dog and the cat", "dog and cat"),
        ("an", ""),
        ("theatre", "theatre"),
        ("dont", "don't"),
        ("Couldnt", "couldn't"),
        ("theyre", "they're"),
        ("oclock", "o'clock"),
        ("well", "well"),  # no contraction, but a word
        ("its", "its"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("1,000,000", "1000000"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("black-and-white", "black and white"),
        ("yes!", "yes"),
        ('"stop"', "stop"),
        ("[a/b]", "b"),
        ("3.5", "3.5"),
        ("$2.50", "$2.50"),
        ("50%", "50%"),
        ("st. john", "st john"),
        ("u.s.a.", "usa"),
        ("5.", "5"),
        (".5", ".5"),
    ],
)
def test_normalisation_by_the_published_rules(written, expected):
    assert normalize_answer(written) == expected


@given(st.text(alphabet="aAnthe10 ,.'-:;t2done", max_size=20) | st.text(max_size=15))
def test_what_is_normalised_once_stays(text):
    once = normalize_answer(text)
    assert normalize_answer(once) == once


def test_accuracy_of_each_kind():
    answers = [["yes"] * 10, ["2"] * 2 + ["3"] * 8, ["cat"] * 10, ["dog"] * 10]
    found = vqa_metrics(["yes", "two", "dog", "dog"], answers, ["yes/no", "number", "other", ""])
    assert found == pytest.approx(
        {
            "accuracy": (1.0 + 0.6 + 0.0 + 1.0) / 4,
            "accuracy/yes/no": 1.0,
            "accuracy/number": 0.6,
            "accuracy/other": 0.0,
        }
    )
    assert vqa_metrics(["no"], [["no"] * 10]) == {"accuracy": 1.0}


def test_answers_must_be_as_many_as_questions():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        vqa_metrics(["yes"], [])
