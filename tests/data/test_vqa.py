"""VQA v2's files: which picture a question is on, what is malformed, the answer list and its soft targets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlblocks.data import (
    BadData,
    VqaFiles,
    VqaQuestion,
    answer_list,
    locate_vqa,
    read_answer_list,
    read_vqa,
    soft_targets,
)
from vlblocks.errors import UserError


def draw(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 32, 3), shade, dtype=np.uint8)).save(path)
    return path


def question(number, image, text="What is it?"):
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number, image, answers, **more):
    given = [{"answer": a, "answer_id": i + 1, "answer_confidence": "yes"} for i, a in enumerate(answers)]
    return {"question_id": number, "image_id": image, "answers": given, "question_type": "what is", **more}


def write(root: Path, split: str, questions, annotations=None) -> VqaFiles:
    """A split as it is published."""
    root.mkdir(exist_ok=True)
    asked = root / f"v2_OpenEnded_mscoco_{split}_questions.json"
    asked.write_text(json.dumps({"data_subtype": split, "task_type": "Open-Ended", "questions": questions}))
    answered = None
    if annotations is not None:
        answered = root / f"v2_mscoco_{split}_annotations.json"
        answered.write_text(json.dumps({"data_subtype": split, "annotations": annotations}))
    return VqaFiles(asked, answered, root / "images")


TEN = ["cat"] * 6 + ["a cat"] * 3 + ["dog"]


@pytest.fixture
def files(tmp_path):
    """Three questions on two pictures."""
    root = tmp_path / "vqa"
    draw(root / "images/COCO_train2014_000000000042.jpg", 200)
    draw(root / "images/train2014/COCO_train2014_000000262145.jpg", 40)
    questions = [question(42001, 262145), question(42000, 42), question(42002, 42, " Is it a cat? ")]
    annotations = [
        annotation(42002, 42, ["yes"] * 10, multiple_choice_answer="yes", answer_type="yes/no"),
        annotation(42000, 42, TEN, multiple_choice_answer="cat", answer_type="other"),
        annotation(42001, 262145, ["2"] * 9 + ["3"], answer_type="number"),
    ]
    return write(root, "train2014", questions, annotations)


def test_questions_answers_and_pictures_find_each_other(files):
    found = read_vqa(files)
    assert found.rows == [
        VqaQuestion(42001, "What is it?", ("2",) * 9 + ("3",), "2", "number"),
        VqaQuestion(42000, "What is it?", tuple(TEN), "cat", "other"),
        VqaQuestion(42002, "Is it a cat?", ("yes",) * 10, "yes", "yes/no"),
    ]
    # One picture for its two questions, opened when asked for.
    assert len(found.images) == 2 and found.owners == [0, 1, 1]
    assert [round(found.images[owner].mean()) for owner in found.owners] == [40, 200, 200]
    assert found.images.name(1).endswith("COCO_train2014_000000000042.jpg")


def test_answers_are_cleaned_when_read(files):
    rows = read_vqa(files, clean=lambda answer: answer.removeprefix("a ").upper()).rows
    assert rows[1].answers == ("CAT",) * 9 + ("DOG",) and rows[1].commonest == "CAT"


def test_the_folder_as_it_is_published(files, tmp_path):
    root = files.questions.parent
    write(root, "val2014", [question(1, 42)], [annotation(1, 42, TEN)])
    write(root, "test2015", [question(2, 42)])
    write(root, "test-dev2015", [question(2, 42)])
    assert locate_vqa(root, "train") == files
    assert locate_vqa(root, "val").annotations.name == "v2_mscoco_val2014_annotations.json"
    # test-dev's file is not taken for the test's.
    assert locate_vqa(root, "test") == (root / "v2_OpenEnded_mscoco_test2015_questions.json", None, root / "images")
    assert [row.answers for row in read_vqa(locate_vqa(root, "test")).rows] == [None]
    # COCO's folders may lie beside the questions.
    (root / "images").rename(root / "elsewhere")
    assert locate_vqa(root, "train").images == root


def test_of_two_pictures_with_one_number_the_split_s_own_counts(tmp_path):
    root = tmp_path / "vqa"
    for name, shade in (("COCO_test2015_000000000007.png", 90), ("000000000007.png", 10), ("COCO_val2014_7.png", 50)):
        draw(root / "images" / name, shade)
    for split, shade in (("test-dev2015", 90), ("val2014", 50)):
        found = read_vqa(write(root, split, [question(1, 7)]))
        assert found.images[0].mean() == shade


BROKEN = {
    "no object": (7, None, "is no object"),
    "no number": ({"image_id": 42, "question": "?"}, None, "has no number 'question_id'"),
    "no text": ({"question_id": 5, "image_id": 42, "question": " "}, None, "has no 'question'"),
    "no answers": (question(5, 42), None, "no answers to question 5"),
    "odd answers": (question(5, 42), {**annotation(5, 42, TEN), "answers": ["cat"]}, "no list of objects"),
    "few answers": (question(5, 42), annotation(5, 42, ["cat"] * 3), "3 answers to question 5, at least 4"),
    "other picture": (question(5, 42), annotation(5, 262145, TEN), "on picture 262145, not 42"),
    "no picture": (question(5, 99), annotation(5, 99, TEN), "no picture 99"),
    "number twice": (question(42000, 42), None, "question_id 42000 is there before"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_question_is_skipped_counted_and_named(files, name):
    asked, answered, problem = BROKEN[name]
    content = json.loads(files.questions.read_text())
    files.questions.write_text(json.dumps({**content, "questions": [*content["questions"], asked]}))
    if answered is not None:
        content = json.loads(files.annotations.read_text())
        files.annotations.write_text(json.dumps({"annotations": [*content["annotations"], answered]}))
    bad = BadData(share=0.3)
    assert [row.id for row in read_vqa(files, bad=bad).rows] == [42001, 42000, 42002]
    ((where, reason),) = bad.state_dict()["v2_OpenEnded_mscoco_train2014_questions.json/question"].items()
    assert where == f"{files.questions}: questions[3]" and problem in reason
    with pytest.raises(UserError, match=r"questions\[3\].*repair the data"):
        read_vqa(files)


def test_wrong_files_are_one_line(files, tmp_path):
    with pytest.raises(UserError, match=r"annotations\.json: is not VQA's JSON, which has a list 'questions'"):
        read_vqa(files._replace(questions=files.annotations))
    empty = tmp_path / "other"
    empty.mkdir()
    with pytest.raises(UserError, match=r"other: holds no COCO_train2014_000000262145\.jpg"):
        read_vqa(files._replace(images=empty))
    with pytest.raises(UserError, match="no such folder of images"):
        read_vqa(files._replace(images=tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no \*val20\?\?_questions\.json"):
        locate_vqa(files.questions.parent, "val")
    write(files.questions.parent, "train2015", [question(1, 42)], [annotation(1, 42, TEN)])
    with pytest.raises(UserError, match="leave one of them"):
        locate_vqa(files.questions.parent, "train")
    files.annotations.write_text("[")
    with pytest.raises(UserError, match="is not JSON"):
        read_vqa(files)


def rows(**counts):
    return [VqaQuestion(0, "?", (answer,) * 10, answer) for answer, count in counts.items() for _ in range(count)]


def test_the_list_holds_the_answers_that_are_commonest_often_enough():
    data = rows(no=3, yes=9, cat=4, dog=4, rare=1)
    # People's other answers do not count, however many they are.
    data.append(VqaQuestion(0, "?", ("rare",) * 4 + ("cat",) * 5, "cat"))
    assert answer_list(data, min_count=3) == ["yes", "cat", "dog", "no"]
    assert answer_list(data, min_count=5) == ["yes", "cat"]
    assert answer_list(data, min_count=1, most=2) == ["yes", "cat"]
    assert answer_list(rows(b=2, a=2), min_count=1) == ["a", "b"]
    with pytest.raises(UserError, match=r"commonest of 10 questions \(the most frequent 9 times\)"):
        answer_list(data, min_count=10)


def test_soft_targets_by_hand():
    places = {"cat": 0, "dog": 1, "cow": 2}
    found = soft_targets(["cat"] * 5 + ["dog"] * 2 + ["cow"] + ["emu"] * 2, places)
    assert found == pytest.approx({0: 1.0, 1: 2 / 3, 2: 1 / 3})
    assert soft_targets(["emu"] * 10, places) == {}


@pytest.mark.parametrize("content", [["b", "a"], {"a": 1, "b": 0}, {"a": "1", "b": "0"}])
def test_answer_lists_as_the_field_writes_them(tmp_path, content):
    (tmp_path / "answers.json").write_text(json.dumps(content))
    assert read_answer_list(tmp_path / "answers.json") == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "no list of answers"), ({"a": 2, "b": 0}, "no list of answers"), (["a", 3], "no list of answers"),
     (["a", "a"], "has the answer 'a' twice")],
)  # fmt: skip
def test_other_files_are_no_answer_list(tmp_path, content, message):
    (tmp_path / "answers.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_answer_list(tmp_path / "answers.json")
