"""Accuracy of answers to visual questions, where ten people answered each (Antol et al., 2015; VQA v2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["normalize_answer", "vqa_accuracy", "vqa_metrics"]

_AGREED = 3  # people of one mind who make an answer fully right

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = frozenset({"a", "an", "the"})

# Stems by what is joined to them; those that make another word (were, hell, ill, its, shed) are not among them.
_JOINED = {
    "n't": (
        *("ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "might", "must", "need"),
        *("ought", "sha", "should", "was", "were", "wo", "would"),
    ),
    "'ve": ("could", "i", "might", "must", "should", "they", "we", "what", "who", "would", "you"),
    "'ll": ("how", "it", "that", "they", "there", "what", "who", "you"),
    "'re": ("they", "what", "you"),
    "'d": ("he", "how", "it", "that", "there", "they", "what", "where", "who", "you"),
    "'s": (
        *("he", "here", "how", "she", "somebody", "someone", "something", "that", "there", "what", "when", "where"),
        *("who", "why"),
    ),
    "'m": ("i",),
}
_CONTRACTIONS = {
    **{f"{stem}{end.replace(chr(39), '')}": f"{stem}{end}" for end, stems in _JOINED.items() for stem in stems},
    **{"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"},
}

_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9])")
# Signs that carry meaning ($, %, &, #, *) stay, as in the official evaluation.
_PUNCTUATION = re.compile(r'[;/\[\]"{}()=+\\_\-<>@`,?!]')
_PERIOD = re.compile(r"\.(?![0-9])")


def normalize_answer(text: str) -> str:
    """An answer as VQA compares it: what is normalised once stays as it is.

    In lower case; commas within numbers go and other punctuation, but apostrophes and colons, becomes a space; periods
    go where no digit follows; number words up to ten become digits, contractions get their apostrophe, articles go.

    Source: the rules at visualqa.org/evaluation.html. They hold for people's answers too; the script published there
    spares those the articles and number words, which VQA v2's own answers no longer hold.
    """
    text = _PERIOD.sub("", _PUNCTUATION.sub(" ", _THOUSANDS.sub("", text.lower())))
    words = (_DIGITS.get(word) or _CONTRACTIONS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How right an answer is, in [0, 1]: min(1, matches / 3) among all but one of the people, averaged over that one.

    Args:
        answers: of all people (ten in VQA v2). Of fewer than four, no answer reaches 1.
    """
    wanted = normalize_answer(prediction)
    same = [normalize_answer(answer) == wanted for answer in answers]
    matches = sum(same)
    return sum(min(1.0, (matches - own) / _AGREED) for own in same) / len(same)


def vqa_metrics(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """accuracy of N answers to questions that people answered, and accuracy/KIND of those of each kind."""
    scores = [vqa_accuracy(found, given) for found, given in zip(predictions, answers, strict=True)]
    groups: dict[str, list[float]] = {"accuracy": scores}
    for score, kind in zip(scores, kinds or [""] * len(scores), strict=True):
        if kind:
            groups.setdefault(f"accuracy/{kind}", []).append(score)
    return {name: sum(group) / len(group) if group else float("nan") for name, group in groups.items()}
