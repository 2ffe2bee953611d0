"""VQA v2 (Goyal et al., 2017): questions on COCO's pictures, ten answers to each, and the list to choose from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlblocks.data.formats import IMAGE_FOLDERS, IMAGE_SUFFIXES, _read
from vlblocks.data.sources import BadData, ImageFiles, ImageSource, Skipped
from vlblocks.errors import UserError

__all__ = [
    "VqaFiles",
    "VqaQuestion",
    "VqaQuestions",
    "answer_list",
    "check_answer_list",
    "locate_vqa",
    "read_answer_list",
    "read_vqa",
    "soft_targets",
]

_LEAST_ANSWERS = 4  # with fewer, VQA's accuracy cannot reach 1
_FULL = 3  # people of one mind who make a full target
_NUMBERED = re.compile(r"(?:COCO_\w+_)?([0-9]+)")


class VqaFiles(NamedTuple):
    """Where one split lies.

    Attributes:
        questions: JSON of the questions.
        annotations: JSON of the answers; None: there are none (VQA's test splits).
        images: folder of the pictures, or of folders of them.
    """

    questions: Path
    annotations: Path | None
    images: Path


class VqaQuestion(NamedTuple):
    """A question.

    Attributes:
        id: its number, by which a submission names it.
        text: the question.
        answers: what people answered; None where that is kept secret.
        commonest: of the answers; "" without any.
        kind: of the answer ("yes/no", "number", "other"), or "".
    """

    id: int
    text: str
    answers: tuple[str, ...] | None
    commonest: str = ""
    kind: str = ""


class VqaQuestions(NamedTuple):
    """The questions of a file, in its order.

    Attributes:
        images: I pictures by index, each there once.
        owners: N indices of pictures, one of each question.
        rows: N questions.
    """

    images: ImageSource
    owners: list[int]
    rows: list[VqaQuestion]


def locate_vqa(root: str | Path, split: str) -> VqaFiles:
    """One split's files in a folder, by the names under which VQA v2 is published, in whatever folder of it they lie.

    The folder holds v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json and so on, and
    images/ or COCO's train2014/, val2014/ and test2015/.

    Raises:
        UserError: there is no such folder, it has no questions, or several files of them.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; pass the one that holds VQA's questions, annotations and images")
    questions, annotations = (_only(root, f"*{split}20[0-9][0-9]_{what}.json") for what in ("questions", "annotations"))
    if questions is None:
        raise UserError(f"{root}: holds no *{split}20??_questions.json; put VQA's questions there, or name the file")
    if annotations is None and split != "test":
        raise UserError(f"{root}: holds no *{split}20??_annotations.json; put VQA's annotations there")
    return VqaFiles(questions, annotations, next((root / n for n in IMAGE_FOLDERS if (root / n).is_dir()), root))


def read_vqa(
    files: VqaFiles,
    *,
    bad: BadData | None = None,
    clean: Callable[[str], str] = str.strip,
    resolution: int | None = None,
    cache_bytes: int = 2**30,
) -> VqaQuestions:
    """Questions and answers in VQA v2's JSON. Pictures open on demand.

    Of picture 42 are COCO_train2014_000000000042.jpg, COCO_val2014_000000000042.jpg (that of the questions'
    `data_subtype` first), 000000000042.jpg and 42.png, in the folder of the pictures or a folder in it.

    Args:
        bad: counts questions that are malformed, or without answers or (where there are answers) picture.
        clean: how answers are written.
        resolution, cache_bytes: as in :class:`ImageFiles`.

    Raises:
        UserError: a file or folder is missing or not of this format, or nothing of it fits.
    """
    path, bad = files.questions, bad or BadData()
    content, entries = _entries(path, "questions")
    answered = None if files.annotations is None else _answered(files.annotations)
    if not files.images.is_dir():
        raise UserError(f"{files.images}: no such folder of images; pass the one that {path.name} belongs to")
    # test-dev2015 asks about pictures of test2015.
    subtype = str(content.get("data_subtype") or "train2014").replace("test-dev", "test")
    pictures = _numbered(files.images, subtype)
    wanted = [entry["image_id"] for entry in entries if not _question_problem(entry)]
    if wanted and not any(number in pictures for number in wanted[:20]):
        raise UserError(
            f"{files.images}: holds no COCO_{subtype}_{wanted[0]:012d}.jpg, which {path.name} asks about; "
            "pass the folder with its pictures"
        )
    places: dict[Path, int] = {}
    owners: list[int] = []
    rows: list[VqaQuestion] = []
    seen: set[int] = set()
    for number, entry in enumerate(entries):
        row, problem = _row(entry, answered, clean)
        if not problem and entry["image_id"] not in pictures:
            if answered is None:
                # A submission answers every question, so that the picture is missed only when it is opened.
                pictures[entry["image_id"]] = files.images / f"COCO_{subtype}_{entry['image_id']:012d}.jpg"
            else:
                problem = f"no picture {entry['image_id']} in {files.images}"
        if not problem and entry["question_id"] in seen:
            problem = f"question_id {entry['question_id']} is there before"
        if row is None or problem:
            bad.record(Skipped(f"{path.name}/question", f"{path}: questions[{number}]", problem, len(entries)))
            continue
        seen.add(row.id)
        owners.append(places.setdefault(pictures[entry["image_id"]], len(places)))
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no question that can be used; pass another file")
    return VqaQuestions(ImageFiles(list(places), resolution=resolution, cache_bytes=cache_bytes), owners, rows)


def answer_list(rows: Iterable[VqaQuestion], *, min_count: int = 9, most: int | None = None) -> list[str]:
    """The answers to choose from: those that are the commonest one of at least `min_count` questions, frequent first.

    Source: Teney et al. (2018), whose least count of 9 gives VQA v2's 3,129 answers from training and validation data.

    Args:
        most: keep no more than so many; None: all.

    Raises:
        UserError: none is that frequent.
    """
    counts = Counter(row.commonest for row in rows if row.commonest)
    found = sorted((answer for answer in counts if counts[answer] >= min_count), key=lambda a: (-counts[a], a))[:most]
    if not found:
        top = f"{counts.most_common(1)[0][1]} times" if counts else "never"
        raise UserError(f"no answer is the commonest of {min_count} questions (the most frequent {top}); ask for fewer")
    return found


def read_answer_list(path: str | Path) -> list[str]:
    """An answer list in JSON: a list, or an object of answer: place, as the field passes them on.

    Raises:
        UserError: it is neither, or an answer is empty or there twice.
    """
    path = Path(path)
    content = _json(path)
    if isinstance(content, dict) and sorted(map(str, content.values())) == sorted(map(str, range(len(content)))):
        content = sorted(content, key=lambda answer: int(content[answer]))
    return check_answer_list(content, path)


def check_answer_list(content: Any, source: str | Path) -> list[str]:
    """`content`, if it is a list of different texts.

    Raises:
        UserError: it is none, naming `source`.
    """
    if not isinstance(content, list) or not content or not all(isinstance(a, str) and a.strip() for a in content):
        raise UserError(f"{source}: holds no list of answers; give a JSON list of texts, or an object answer: place")
    twice = next((answer for answer, count in Counter(content).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{source}: has the answer {twice!r} twice; leave one")
    return content


def soft_targets(answers: Sequence[str], places: Mapping[str, int]) -> dict[int, float]:
    """What a classifier over an answer list should say: min(1, count / 3) at each answer of the list that people gave.

    Empty where all their answers are outside the list.
    """
    counts = Counter(places[answer] for answer in answers if answer in places)
    return {place: min(1.0, count / _FULL) for place, count in counts.items()}


def _row(
    entry: Any, answered: dict[int, dict[str, Any]] | None, clean: Callable[[str], str]
) -> tuple[VqaQuestion | None, str]:
    """A question, or what is wrong with it or its answers."""
    problem = _question_problem(entry)
    if problem:
        return None, problem
    number, text = entry["question_id"], entry["question"].strip()
    if answered is None:
        return VqaQuestion(number, text, None), ""
    found = answered.get(number)
    if found is None:
        return None, f"no answers to question {number}"
    given = found.get("answers")
    if not isinstance(given, list) or not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in given):
        return None, f"the answers to question {number} are no list of objects with an 'answer'"
    if len(given) < _LEAST_ANSWERS:
        return None, f"{len(given)} answers to question {number}, at least {_LEAST_ANSWERS} are needed"
    if found.get("image_id", entry["image_id"]) != entry["image_id"]:
        return None, f"the answers to question {number} are on picture {found['image_id']}, not {entry['image_id']}"
    answers = tuple(clean(a["answer"]) for a in given)
    chosen = found.get("multiple_choice_answer")
    # A tie goes to the answer that was given first.
    commonest = clean(chosen) if isinstance(chosen, str) else Counter(answers).most_common(1)[0][0]
    kind = found.get("answer_type")
    return VqaQuestion(number, text, answers, commonest, kind if isinstance(kind, str) else ""), ""


def _question_problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "is no object"
    for name in ("question_id", "image_id"):
        if not isinstance(entry.get(name), int) or isinstance(entry[name], bool):
            return f"has no number {name!r}"
    if not isinstance(entry.get("question"), str) or not entry["question"].strip():
        return "has no 'question'"
    return ""


def _answered(path: Path) -> dict[int, dict[str, Any]]:
    """Annotations by the number of their question; whoever asks for one that is malformed finds none."""
    entries = _entries(path, "annotations")[1]
    return {
        entry["question_id"]: entry
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("question_id"), int)
    }


def _entries(path: Path, name: str) -> tuple[dict[str, Any], list[Any]]:
    content = _json(path)
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: is not VQA's JSON, which has a list {name!r}; pass a *_{name}.json")
    if not entries:
        raise UserError(f"{path}: its list {name!r} is empty; pass another file")
    return content, entries


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON (line {error.lineno}: {error.msg}); download it again") from None


def _numbered(folder: Path, subtype: str) -> dict[int, Path]:
    """Pictures by number, those of the subtype before others of the same number."""
    found: dict[int, Path] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        match = _NUMBERED.fullmatch(path.stem)
        if match and path.suffix.lower() in IMAGE_SUFFIXES:
            number = int(match[1])
            if number not in found or (subtype and f"_{subtype}_" in path.stem):
                found[number] = path
    return found


def _only(root: Path, pattern: str) -> Path | None:
    found = sorted({*root.glob(pattern), *root.glob(f"*/{pattern}")})
    if len(found) > 1:
        raise UserError(f"{root}: holds {found[0].name} and {found[1].name}; leave one of them, or name the file")
    return found[0] if found else None
