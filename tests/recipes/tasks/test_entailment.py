"""Visual entailment: examples, loss, runs on the generated corpus and on files of SNLI-VE's form, mistakes."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlblocks.data import BadData, Tokenizer
from vlblocks.data.scene_tasks import ENTAILMENT_LABELS
from vlblocks.data.world import HELD_OUT
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import finetune, train
from vlblocks_recipes.unimo2.runs import load_run
from vlblocks_recipes.unimo2.tasks import entailment
from vlblocks_recipes.unimo2.tasks.base import TaskModel
from vlblocks_recipes.unimo2.tasks.entailment import EntailmentConfig, EntailmentData, VisualEntailment
from vlblocks_recipes.unimo2.tasks.image_text import Classified, pair_logits

SCENES = ("--data.embedded", "--data.scenes", "60", "--data.held-out", "12")


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


@pytest.fixture
def tuned(checkpoint, tmp_path, call, monkeypatch):
    """Fine-tune for entailment in this process: tuned(*flags, name="run") -> (outcome, folder)."""
    torch.set_num_threads(1)
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)

    def run(*flags, name="run"):
        fixed = ("--max-steps", "4", "--evaluate-every", "2", "--batch", "8", "--precision", "fp32")
        return call(
            train, "--task", "entailment", "--init", checkpoint, *fixed, "--out", tmp_path / name, *flags
        ), tmp_path / name

    return run


@pytest.fixture
def task(checkpoint):
    """The task on the generated corpus, as a run has it."""
    config = EntailmentConfig(data=EntailmentData(embedded=True, scenes=60, held_out=12), dropout=0.0)
    return VisualEntailment(config, Tokenizer.load(checkpoint / "tokenizer.json"), 32, BadData())


def write_snli_ve(root: Path) -> Path:
    """Grey pictures, light and dark, and what is said of them."""
    (root / "images").mkdir(parents=True)
    for split, count in (("train", 12), ("dev", 6), ("test", 6)):
        lines = []
        for number in range(count):
            name = f"{split}{number}"
            Image.fromarray(np.full((36, 40, 3), 30 + 17 * number, np.uint8)).save(root / f"images/{name}.jpg")
            for label in ENTAILMENT_LABELS:
                entry = {"Flickr30K_ID": name, "sentence2": f"It is {label}.", "gold_label": label}
                lines.append(json.dumps({**entry, "pairID": f"{name}#{label[0]}"}))
        # Nobody knows.
        lines.append(lines[0].replace('"entailment"', '"-"'))
        (root / f"snli_ve_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def files(tmp_path) -> Path:
    return write_snli_ve(tmp_path / "snli_ve")


def test_generated_sentences(task):
    words = [f"{colour} {shape}" for colour, shape in HELD_OUT]
    named = {}
    for split, count in (("train", 60), ("val", 36), ("test", 36)):
        data = task.dataset(split)
        assert len(data) == count
        examples = [data[epoch, index] for epoch in range(3) for index in range(count)]
        texts = [task.tokenizer.decode(example["tokens"]) for example in examples]
        named[split] = sum(any(word in text for word in words) for text in texts)
        labels = Counter(example["label"] for example in examples)
        if split == "train":
            assert texts[:60] != texts[60:120] and set(labels) == set(ENTAILMENT_LABELS)
        else:
            # One of each label on every scene, the same in every epoch.
            assert set(labels.values()) == {36} and texts[:count] == texts[count : 2 * count]
    # Training scenes never show those combinations: told of one, a model would learn that it is never there.
    assert named["train"] == 0 and named["val"] == 0 and named["test"] > 0


def test_one_batch_can_be_learnt(task, checkpoint):
    torch.manual_seed(1)
    model = load_run(checkpoint)[1]
    net = TaskModel(model, task.make_head(model)).train()
    data = task.dataset("train")
    examples = [data[0, index] for index in range(8)]
    batch = task.batch(examples)
    assert [ENTAILMENT_LABELS[label] for label in batch["labels"]] == [example["label"] for example in examples]
    assert len(batch["labels"].unique()) > 1
    logits = pair_logits(net, batch)
    by_hand = -sum(logits[i].log_softmax(0)[label] for i, label in enumerate(batch["labels"].tolist())) / 8
    assert task.loss(net, batch, torch.Generator()).item() == pytest.approx(by_hand.item(), rel=1e-5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        loss = task.loss(net, batch, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert pair_logits(net, batch).argmax(1).tolist() == batch["labels"].tolist()


def test_a_run_on_the_generated_corpus(tuned, tmp_path, call):
    done, folder = tuned(*SCENES)
    assert done.code == 0, done.err
    assert json.loads((folder / "task.json").read_text()) == {"task": "entailment", "labels": list(ENTAILMENT_LABELS)}
    metrics = json.loads((folder / "metrics.json").read_text())
    shown = call(evaluation, "--run", folder, "--split", "val", "--precision", "fp32", "--out", tmp_path / "out")
    found = json.loads(shown.out)
    assert found["accuracy"] == metrics["val/accuracy"] and found["sentences"] == 36
    shares = [found[f"accuracy/{label}"] for label in ENTAILMENT_LABELS]
    assert found["accuracy"] == pytest.approx(sum(shares) / 3)
    written = json.loads((tmp_path / "out/entailment_val.json").read_text())
    right = [row["pairID"].endswith(f"/{row['label']}") for row in written]
    assert len(right) == 36 and sum(right) / 36 == pytest.approx(found["accuracy"])
    again, _ = tuned(*SCENES, name="again")
    assert again.code == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_sentence_on_an_unreadable_picture_shifts_no_other(task, tmp_path, monkeypatch):
    # One of each label on every scene, in their order.
    true = [index % 3 for index in range(36)]
    lost = 7
    said = Classified(
        [(label + (index == lost)) % 3 for index, label in enumerate(true)], [i != lost for i in range(36)]
    )
    monkeypatch.setattr(entailment, "classify_pairs", lambda *_: said)
    found = task.evaluate(None, "val", autocast=None, out=tmp_path)
    assert found["accuracy"] == 1.0 and found["sentences"] == 35
    written = json.loads((tmp_path / "entailment_val.json").read_text())
    assert len(written) == 35 and all(row["pairID"].endswith(f"/{row['label']}") for row in written)


def test_a_run_on_snli_ve_s_files(tuned, files, tmp_path, call):
    (files / "images/dev2.jpg").write_bytes(b"no picture")
    flags = ("--data.root", files)
    one_line(tuned(*flags)[0], "dev2.jpg", "max_bad_share")
    done, folder = tuned(*flags, "--data.max-bad-share", "0.2", name="lenient")
    assert done.code == 0, done.err
    metrics = json.loads((folder / "metrics.json").read_text())
    # Three sentences are on the picture that nobody can see; the undecided one is no bad row.
    assert metrics["val/sentences"] == 15 and metrics["data/skipped"] == 1
    found = json.loads(call(evaluation, "--run", folder, "--out", tmp_path / "out").out)
    assert found["sentences"] == 18 and found["skipped"] == 0
    written = json.loads((tmp_path / "out/entailment_test.json").read_text())
    true = [(f"test{n}#{label[0]}", label) for n in range(6) for label in ENTAILMENT_LABELS]
    assert [row["pairID"] for row in written] == [name for name, _ in true]
    right = [row["label"] == label for row, (_, label) in zip(written, true, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(right) / 18)
    # A pairID that is there twice stands for two rows.
    lines = (files / "snli_ve_test.jsonl").read_text().splitlines()
    (files / "snli_ve_test.jsonl").write_text("\n".join([*lines, lines[1]]) + "\n")
    found = json.loads(call(evaluation, "--run", folder, "--out", tmp_path / "twice").out)
    again = json.loads((tmp_path / "twice/entailment_test.json").read_text())
    assert found["sentences"] == len(again) == 19 and again[:18] == written and again[18] == written[1]


def test_a_blind_run_does_not_see_its_side(task):
    data = task.dataset("val")
    examples = [data[0, index] for index in range(5)]
    task.config = replace(task.config, blind="image")
    assert not task.batch(examples)["image"].any()
    task.config = replace(task.config, blind="text")
    assert task.batch(examples)["tokens"].tolist() == [[0, 2]] * 5


def test_a_label_set_that_does_not_fit_is_one_line(tuned, files, tmp_path, call):
    done, folder = tuned("--data.root", files, "--max-steps", "2")
    assert done.code == 0, done.err
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled)
    (spoiled / "task.json").write_text('{"task": "entailment", "labels": ["yes", "no"]}')
    one_line(call(evaluation, "--run", spoiled, "--split", "val"), spoiled / "task.json", "labels is ['yes', 'no']")
    other = tmp_path / "nlvr.jsonl"
    other.write_text((files / "snli_ve_dev.jsonl").read_text().replace('"entailment"', '"True"'))
    one_line(call(evaluation, "--run", folder, "--split", "val", "--data.val", other), "'True'", other)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ("--data.train", "--data.embedded")),
        (("--data.root", "none"), ("none: no such folder",)),
        (("--data.train", "ROOT/snli_ve_train.jsonl"), ("--data.images",)),
        (("--data.root", "ROOT/images"), ("holds no *train.jsonl",)),
        (("--data.root", "ROOT", "--data.val", "none.jsonl"), ("none.jsonl: no such file",)),
    ],
)
def test_mistakes_are_one_line(tuned, files, flags, words):
    one_line(tuned(*(str(flag).replace("ROOT", str(files)) for flag in flags))[0], *words)
