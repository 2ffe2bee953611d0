"""Visual question answering: examples, loss, runs on the generated corpus and on files of VQA v2's form, mistakes."""

import json
import math
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlblocks.data import BadData, Tokenizer
from vlblocks.data.scene_tasks import QUESTION_KINDS
from vlblocks.data.world import HELD_OUT
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import finetune, train
from vlblocks_recipes.unimo2.runs import load_run
from vlblocks_recipes.unimo2.tasks.base import TaskModel
from vlblocks_recipes.unimo2.tasks.vqa import SCENE_ANSWERS, VisualQuestionAnswering, VqaConfig, VqaData

COLOURS = {"red": (210, 30, 30), "blue": (40, 60, 210), "green": (40, 170, 50)}
PER_SPLIT = 12


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


@pytest.fixture
def tuned(checkpoint, tmp_path, call, monkeypatch):
    """Fine-tune for vqa in this process: tuned(*flags, name="run") -> (outcome, folder)."""
    torch.set_num_threads(1)
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)

    def run(*flags, name="run"):
        fixed = ("--max-steps", "4", "--evaluate-every", "2", "--batch", "8", "--precision", "fp32")
        return call(
            train, "--task", "vqa", "--init", checkpoint, *fixed, "--out", tmp_path / name, *flags
        ), tmp_path / name

    return run


SCENES = ("--data.embedded", "--data.scenes", "60", "--data.held-out", "12")


@pytest.fixture
def task(checkpoint):
    """task(**data) -> the task, as a run has it."""

    def make(**data):
        config = VqaConfig(data=VqaData(**data), dropout=0.0)
        found = VisualQuestionAnswering(config, Tokenizer.load(checkpoint / "tokenizer.json"), 32, BadData(share=0.5))
        found.facts()
        return found

    return make


def write_vqa(root: Path) -> Path:
    """A picture of one colour each, and what ten people call it: nine the colour, one something else."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for part, split in enumerate(("train2014", "val2014", "test2015")):
        questions, annotations = [], []
        for number in range(PER_SPLIT):
            colour, image = list(COLOURS)[number % 3], 1000 * part + number
            noise = rng.integers(-9, 10, size=(40, 40, 3))
            picture = np.clip(np.asarray(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / f"images/COCO_{split}_{image:012d}.png")
            # One question in each split has an answer that no other has.
            word = "Turquoise!" if number == 0 else f"{colour.title()}."
            ids = {"question_id": 10 * image, "image_id": image}
            questions.append({**ids, "question": "What colour is it?"})
            answers = [{"answer": word, "answer_id": i} for i in range(9)] + [{"answer": "shiny", "answer_id": 9}]
            annotations.append({**ids, "answers": answers, "multiple_choice_answer": word, "answer_type": "other"})
        name = root / f"v2_OpenEnded_mscoco_{split}_questions.json"
        name.write_text(json.dumps({"data_subtype": split, "questions": questions}))
        if part < 2:
            (root / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


@pytest.fixture
def files(tmp_path) -> Path:
    return write_vqa(tmp_path / "vqa")


def test_generated_questions_are_new_each_epoch_and_the_same_each_time(task):
    train_set, again = (task(embedded=True, scenes=60, held_out=12).dataset("train") for _ in range(2))
    assert len(train_set) == 60
    differ = 0
    for index in range(60):
        first, same, later = train_set[0, index], again[0, index], train_set[1, index]
        assert first["tokens"] == same["tokens"] and first["targets"] == same["targets"]
        assert torch.equal(first["image"], same["image"])
        differ += first["tokens"] != later["tokens"]
    assert differ > 40


def test_the_test_split_alone_speaks_of_unseen_combinations(task):
    vqa = task(embedded=True, scenes=60, held_out=12)
    words = [f"{colour} {shape}" for colour, shape in HELD_OUT]
    named = {}
    for split in ("train", "val", "test"):
        data = vqa.dataset(split)
        texts = [vqa.tokenizer.decode(data[e, i]["tokens"]) for e in range(3) for i in range(len(data))]
        named[split] = sum(any(word in text for word in words) for text in texts)
    assert named["train"] == 0 and named["val"] == 0 and named["test"] > 0
    kinds = defaultdict(int)
    pairs = vqa.questions("test")
    for index in range(len(pairs.owners)):
        row = pairs.row(index, None)
        kinds[row.kind] += 1
        assert row.answers == (row.commonest,) * 10 and row.commonest in SCENE_ANSWERS
    # One of each kind on every scene; only neighbours can be asked after.
    assert kinds.keys() == set(QUESTION_KINDS) and {kinds[k] for k in kinds if k != "relation"} == {12}


def test_the_loss_by_hand(task, files, checkpoint):
    vqa = task(root=files, min_count=3)
    assert vqa.answers == ["blue", "green", "red"]  # "turquoise" is the answer to one question only
    data = vqa.dataset("train")
    batch = vqa.batch([data[0, 0], data[0, 3], data[0, 1]])
    # Nine of ten say so: more than the three that make a full target. Those outside the list leave zeros.
    assert batch["targets"].tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0]]
    # Where fewer agree, a target is a share.
    soft = vqa.batch([{**data[0, 3], "targets": {0: 0.6, 2: 1.0}}])
    assert soft["targets"].tolist() == [[pytest.approx(0.6), 0, 1]]
    net = TaskModel(load_run(checkpoint)[1], nn.Identity()).train()
    logits = torch.tensor([[0.0, -1.0, 2.0], [1.0, 0.5, -0.5], [3.0, 0.0, -2.0]])
    net.head = nn.Sequential()
    net.head.forward = lambda pooled: logits
    total = 0.0
    for row, targets in zip(logits.tolist(), batch["targets"].tolist(), strict=True):
        for value, target in zip(row, targets, strict=True):
            p = 1 / (1 + math.exp(-value))
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    assert vqa.loss(net, batch, torch.Generator()).item() == pytest.approx(total / 3, rel=1e-5)


def test_one_batch_can_be_learnt(task, checkpoint):
    torch.manual_seed(1)
    vqa = task(embedded=True, scenes=60, held_out=12)
    model = load_run(checkpoint)[1]
    net = TaskModel(model, vqa.make_head(model)).train()
    data = vqa.dataset("train")
    batch = vqa.batch([data[0, index] for index in range(8)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = vqa.loss(net, batch, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.3, (losses[0], losses[-1])


def test_a_run_on_the_generated_corpus(tuned, tmp_path, call):
    done, folder = tuned(*SCENES)
    assert done.code == 0, done.err
    assert json.loads((folder / "task.json").read_text()) == {"task": "vqa", "answers": SCENE_ANSWERS}
    metrics = json.loads((folder / "metrics.json").read_text())
    shown = call(evaluation, "--run", folder, "--split", "val", "--precision", "fp32", "--out", tmp_path / "out")
    found = json.loads(shown.out)
    assert found["accuracy"] == metrics["val/accuracy"] and found["answerable"] == 1.0
    assert {f"accuracy/{kind}" for kind in QUESTION_KINDS} <= found.keys()
    written = json.loads((tmp_path / "out/vqa_val.json").read_text())
    assert [entry["question_id"] for entry in written] == list(range(found["questions"]))
    assert all(entry.keys() == {"question_id", "answer"} and entry["answer"] in SCENE_ANSWERS for entry in written)
    again, _ = tuned(*SCENES, name="again")
    assert again.code == 0
    for name in ("model.safetensors", "task.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_on_vqa_s_files_and_the_submission(tuned, files, tmp_path, call):
    done, folder = tuned("--data.root", files, "--data.min-count", "3", "--max-steps", "30", "--optim.lr", "3e-3")
    assert done.code == 0, done.err
    assert json.loads((folder / "task.json").read_text())["answers"] == ["blue", "green", "red"]
    found = json.loads(call(evaluation, "--run", folder, "--split", "val", "--out", tmp_path / "val").out)
    written = json.loads((tmp_path / "val/vqa_val.json").read_text())
    colours = [list(COLOURS)[number % 3] for number in range(PER_SPLIT)]
    right = [w["answer"] == colour for w, colour in zip(written, colours, strict=True)]
    # What is outside the list cannot be answered, but counts.
    assert found["questions"] == PER_SPLIT and found["answerable"] == pytest.approx(1 - 1 / PER_SPLIT)
    assert found["accuracy"] == pytest.approx(sum(right[1:]) / PER_SPLIT) == pytest.approx(found["accuracy/other"])
    # The test's answers are secret.
    one_line(call(evaluation, "--run", folder), "--data.test-annotations", "--out DIR")
    found = json.loads(call(evaluation, "--run", folder, "--out", tmp_path / "test").out)
    assert "accuracy" not in found and found["questions"] == PER_SPLIT
    written = json.loads((tmp_path / "test/vqa_test.json").read_text())
    assert [entry["question_id"] for entry in written] == [10 * (2000 + number) for number in range(PER_SPLIT)]
    assert {entry["answer"] for entry in written} <= {"blue", "green", "red"}


def test_an_unreadable_picture_is_answered_counted_and_left_out_of_the_accuracy(tuned, files, tmp_path, call):
    for name in ("COCO_train2014_000000000004.png", "COCO_val2014_000000001005.png"):
        (files / "images" / name).write_bytes(b"no picture")
    flags = ("--data.root", files, "--data.min-count", "3")
    one_line(tuned(*flags)[0], "000000", "max_bad_share")
    done, folder = tuned(*flags, "--data.max-bad-share", "0.2", name="lenient")
    assert done.code == 0, done.err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["data/skipped"] == 2 and metrics["val/questions"] == PER_SPLIT - 1
    assert metrics["val/questions_unseen"] == 1
    # The server wants every question answered, also on a picture that is damaged or not there.
    (files / "images/COCO_test2015_000000002003.png").write_bytes(b"no picture")
    (files / "images/COCO_test2015_000000002006.png").unlink()
    for split, first, lost in (("val", 1000, [5]), ("test", 2000, [3, 6])):
        done = call(evaluation, "--run", folder, "--split", split, "--out", tmp_path / split)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert (found["questions"], found["questions_unseen"]) == (PER_SPLIT - len(lost), len(lost))
        assert found["skipped"] == len(lost)
        written = json.loads((tmp_path / split / f"vqa_{split}.json").read_text())
        assert [entry["question_id"] for entry in written] == [10 * (first + number) for number in range(PER_SPLIT)]
        if split == "val":
            right = [entry["answer"] == list(COLOURS)[n % 3] for n, entry in enumerate(written) if n not in (0, 5)]
            assert found["accuracy"] == pytest.approx(sum(right) / (PER_SPLIT - 1))


def test_a_blind_run_does_not_see_its_side(task):
    vqa = task(embedded=True, scenes=60, held_out=12)
    data = vqa.dataset("val")
    examples = [data[0, index] for index in range(5)]
    whole = vqa.batch(examples)
    vqa.config = replace(vqa.config, blind="image")
    blind = vqa.batch(examples)
    assert whole["image"].std() > 0 and not blind["image"].any() and torch.equal(blind["tokens"], whole["tokens"])
    vqa.config = replace(vqa.config, blind="text")
    blind = vqa.batch(examples)
    assert torch.equal(blind["image"], whole["image"]) and blind["tokens"].tolist() == [[0, 2]] * 5


def test_an_answer_list_that_does_not_fit_is_one_line(tuned, files, tmp_path, call):
    done, folder = tuned("--data.root", files, "--data.min-count", "3", "--max-steps", "2")
    assert done.code == 0, done.err
    for source, flags in (
        ("the generated corpus", ("--data.embedded",)),
        ("own.json", ("--data.answers", tmp_path / "own.json")),
    ):
        (tmp_path / "own.json").write_text('["blue", "red"]')
        one_line(call(evaluation, "--run", folder, "--split", "val", *flags), folder / "task.json", source)
    # Data that asks for nothing which is in the list.
    content = (files / "v2_mscoco_val2014_annotations.json").read_text()
    for colour in COLOURS:
        content = content.replace(colour.title(), "Large")
    (tmp_path / "large.json").write_text(content)
    questions = files / "v2_OpenEnded_mscoco_val2014_questions.json"
    others = ("--data.val-questions", questions, "--data.val-annotations", tmp_path / "large.json")
    one_line(call(evaluation, "--run", folder, "--split", "val", *others), "none of its 12 questions", "(blue, ")
    # A list of another length than the head.
    for answers, words in ((["blue", "red"], "head.4.weight is [3, 64]"), (["blue", 3, "red"], "list of answers")):
        spoiled = tmp_path / "spoiled"
        shutil.copytree(folder, spoiled, dirs_exist_ok=True)
        (spoiled / "task.json").write_text(json.dumps({"task": "vqa", "answers": answers}))
        one_line(call(evaluation, "--run", spoiled, "--split", "val"), spoiled, words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.train-questions", "q.json"), ("--data.train-annotations", "q.json")),
        ((), ("--data.train-questions", "--data.embedded")),
        (("--data.root", "none"), ("none: no such folder",)),
        (("--data.root", "ROOT"), ("--data.min-count", "the most frequent 4 times")),
        (("--data.root", "ROOT", "--data.min-count", "0"), ("--data.min-count",)),
        (("--data.root", "ROOT", "--data.answers", "none.json"), ("none.json: no such file",)),
    ],
)
def test_mistakes_are_one_line(tuned, files, flags, words):
    one_line(tuned(*(files if flag == "ROOT" else flag for flag in flags))[0], *words)


def test_an_answer_list_of_ones_own(tuned, files, tmp_path, task):
    (tmp_path / "own.json").write_text(json.dumps({"red": 0, "blue": 1, "mauve": 2, "green": 3}))
    # Written as its authors like: the first of what comes to the same is the one.
    (tmp_path / "loose.json").write_text(json.dumps(["two", "a Red", "red", "Blue"]))
    targets = task(root=files, answers=tmp_path / "loose.json").dataset("train")
    assert [targets[0, index]["targets"] for index in (3, 1, 2)] == [{1: 1.0}, {3: 1.0}, {}]
    done, folder = tuned("--data.root", files, "--data.answers", tmp_path / "own.json", "--max-steps", "2")
    assert done.code == 0, done.err
    assert json.loads((folder / "task.json").read_text())["answers"] == ["red", "blue", "mauve", "green"]
