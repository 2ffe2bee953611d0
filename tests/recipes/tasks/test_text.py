"""Text classification and regression: pairs of sentences, several validation files, scores, submissions."""

import json
from dataclasses import replace

import pytest
import torch

from vlblocks.data import BadData
from vlblocks.data.world import HELD_OUT
from vlblocks.evaluation import classification_metrics, regression_metrics
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import finetune, train
from vlblocks_recipes.unimo2.configs import PRESETS
from vlblocks_recipes.unimo2.runs import load_task, start_from
from vlblocks_recipes.unimo2.tasks.base import TaskModel
from vlblocks_recipes.unimo2.tasks.text_classification import TextClassification, TextConfig, TextData


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


SPLITS = ("train", "val", "test")
COLOURS = ("red", "green", "blue", "yellow")


def sentiment(folder, train=48, dev=24):
    """A data set of the SST-2 format, told by one word."""
    for name, count in (("train", train), ("dev", dev)):
        rows = [
            (f"a {COLOURS[n % 4]} square in the {'top' if n % 2 else 'bottom'} left", f"{n % 2}") for n in range(count)
        ]
        write(folder / f"{name}.tsv", ("sentence", "label"), *rows)
    write(folder / "test.tsv", ("index", "sentence"), *[(f"{n}", f"a large {COLOURS[n]} ring") for n in range(4)])
    return folder


@pytest.fixture
def flags(checkpoint):
    """Flags of a run of seconds on files."""
    return (
        *("--init", checkpoint, "--max-steps", "4", "--evaluate-every", "2", "--batch", "16"),
        *("--precision", "fp32"),
    )


@pytest.fixture
def run(call, flags, tmp_path, monkeypatch):
    """run(*flags) -> (outcome, folder)."""
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)

    def start(*more, name="run"):
        return call(train, "--task", "text", *flags, "--out", tmp_path / name, *more), tmp_path / name

    return start


def make(checkpoint, data, **changes):
    config = replace(TextConfig(init=checkpoint, data=data), **changes)
    start = start_from(config, scratch=PRESETS["tiny"], own_tokenizer=lambda: None)
    task = TextClassification(config, start.tokenizer, start.model.image_size, BadData())
    facts = task.facts()
    base = finetune.Unimo2(start.model)
    return task, TaskModel(base, task.make_head(base)), facts


def test_one_batch_can_be_learned_by_heart(checkpoint, tmp_path):
    task, net, _ = make(checkpoint, TextData(root=sentiment(tmp_path)), dropout=0.0)
    batch = task.batch([task.dataset("train")[0, index] for index in range(16)])
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(60):
        loss = task.loss(net, batch, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_predictions_are_those_of_each_sentence_alone(checkpoint, tmp_path):
    task, net, _ = make(checkpoint, TextData(root=sentiment(tmp_path)))
    net.eval()
    with torch.no_grad():
        found = task.evaluate(net, "val", autocast=torch.no_grad, out=tmp_path / "out")
        rows = (tmp_path / "dev.tsv").read_text().splitlines()[1:]
        alone = []
        for row in rows:
            tokens = torch.tensor([task.tokenizer.encode(row.split("\t")[0])])
            codes = net.base.states_to_ground(None, net.base.text(tokens))[0]
            joint = net.base.fuse(codes=net.base.grounded(codes).codes, text=net.base.text(tokens))
            alone.append(net.head(net.base.text_pool(joint.text[:, 0])).argmax().item())
    labels = [int(row.split("\t")[1]) for row in rows]
    assert {name: found[name] for name in ("accuracy", "matthews", "f1")} == classification_metrics(
        alone, labels, classes=2
    )
    lines = (tmp_path / "out/val.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and lines[1:] == [f"{n}\t{label}" for n, label in enumerate(alone)]


def test_pairs_are_encoded_as_roberta_does_and_the_longer_is_cut(checkpoint, tmp_path):
    rows = [("sentence1", "sentence2", "label"), ("a red ring", "a ring", "0"), ("red " * 40, "a blue ring", "1")]
    write(tmp_path / "train.tsv", *rows)
    task, _, _ = make(checkpoint, TextData(root=tmp_path, max_text=16))
    encode = task.tokenizer.encode
    short, long = (row["tokens"] for row in task.rows("train"))
    assert short == [*encode("a red ring"), 2, *encode("a ring")[1:]]
    second = encode("a blue ring")[1:]
    assert (
        len(long) == 16
        and long[-len(second) :] == second
        and long[: 12 - len(second) + 2] == encode("red " * 40, None)[: 12 - len(second) + 2]
    )


def test_regression_is_scaled_and_scaled_back(checkpoint, tmp_path):
    rows = [(f"a {COLOURS[n % 4]} ring", "a ring", f"{n % 4 + 1}.5") for n in range(32)]
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.tsv", ("sentence1", "sentence2", "score"), *rows)
    task, net, facts = make(checkpoint, TextData(root=tmp_path))
    assert facts["scale"] == pytest.approx((3.0, 1.25**0.5)) and task.watch == "pearson_spearman"
    net.eval()
    # A head that answers 0 says the mean; the loss is then the scaled scores' variance.
    torch.nn.init.zeros_(net.head.dense.weight), torch.nn.init.zeros_(net.head.dense.bias)
    batch = task.batch([task.dataset("train")[0, index] for index in range(32)])
    assert task.loss(net, batch, torch.Generator()).item() == pytest.approx(1.0, rel=1e-5)
    with torch.no_grad():
        task.evaluate(net, "val", autocast=torch.no_grad, out=tmp_path / "mean")
    assert {line.split("\t")[1] for line in (tmp_path / "mean/val.tsv").read_text().splitlines()[1:]} == {"3.0000"}
    # Answers far apart, so that the four decimals of the file tell them.
    torch.nn.init.normal_(net.head.dense.weight, std=100.0)
    with torch.no_grad():
        found = task.evaluate(net, "val", autocast=torch.no_grad, out=tmp_path / "out")
    said = [float(line.split("\t")[1]) for line in (tmp_path / "out/val.tsv").read_text().splitlines()[1:]]
    expected = regression_metrics(said, [float(row[2]) for row in rows])
    assert found["pearson"] == pytest.approx(expected["pearson"], abs=1e-3)


def test_mnli_has_matched_and_mismatched_figures(run, call, tmp_path):
    labels = ("entailment", "neutral", "contradiction")
    header = ("index", "sentence1", "sentence2", "gold_label")
    rows = [(f"{n}", f"a {COLOURS[n % 4]} ring", "a ring", labels[n % 3]) for n in range(48)]
    write(tmp_path / "mnli/train.tsv", header, *rows)
    write(tmp_path / "mnli/dev_matched.tsv", header, *rows[:12])
    write(tmp_path / "mnli/dev_mismatched.tsv", header, *rows[12:18])
    done, folder = run("--data.root", tmp_path / "mnli")
    assert done.code == 0, done.err
    assert json.loads((folder / "task.json").read_text())["name"] == "mnli"
    found = json.loads(call(evaluation, "--run", folder, "--split", "val", "--out", tmp_path / "said").out)
    assert found["accuracy"] == pytest.approx((12 * found["accuracy_matched"] + 6 * found["accuracy_mismatched"]) / 18)
    said = [line.split("\t") for line in (tmp_path / "said/mismatched.tsv").read_text().splitlines()[1:]]
    hits = [label == row[3] for (_, label), row in zip(said, rows[12:18], strict=True)]
    assert found["accuracy_mismatched"] == pytest.approx(sum(hits) / 6)
    assert (tmp_path / "said/matched.tsv").exists() and found["examples"] == 18


def test_two_files_of_one_name_are_refused(run, tmp_path):
    root = sentiment(tmp_path / "sst")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/dev.tsv").write_text((root / "dev.tsv").read_text())
    done, _ = run("--data.root", root, "--data.val", root / "dev.tsv", tmp_path / "other/dev.tsv")
    one_line(done, "--data.val", "the name dev", "rename")


def test_a_run_on_one_label_of_the_generated_corpus_is_not_evaluated_on_the_other(call, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)
    flags = ("--data.label", "entailment", "--max-steps", "1", "--out", tmp_path)
    assert call(train, "--task", "text", *quick, *flags).code == 0
    assert call(evaluation, "--run", tmp_path).code == 0
    # Both have three labels: nothing else would tell.
    one_line(call(evaluation, "--run", tmp_path, "--data.label", "count"), "scenes/entailment", "count", "--data.label")


def test_a_test_file_without_labels_gives_a_submission(run, call, tmp_path):
    done, folder = run("--data.root", sentiment(tmp_path / "sst"))
    assert done.code == 0, done.err
    one_line(call(evaluation, "--run", folder), "--data.test", "no labels", "--out")
    done = call(evaluation, "--run", folder, "--out", tmp_path / "said")
    assert done.code == 0 and json.loads(done.out)["examples"] == 4
    lines = (tmp_path / "said/test.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "0", "1", "2", "3"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


def test_data_that_does_not_fit_the_run(run, call, tmp_path):
    root = sentiment(tmp_path / "sst")
    done, folder = run("--data.root", root)
    assert done.code == 0, done.err
    other = write(tmp_path / "other.tsv", ("sentence", "label"), ("fine", "good"), ("poor", "bad"))
    pairs = write(tmp_path / "pairs.tsv", ("sentence1", "sentence2", "label"), ("a", "b", "1"))
    cases = [
        (("--data.val", other), [other, "label 'good' is none of 0, 1"]),
        (("--data.val", pairs), [pairs, "no column 'sentence'"]),
        (("--data.name", "mnli"), [folder / "task.json", "trained on auto, not on mnli"]),
        (("--data.root", tmp_path / "none"), ["--data.root", "no such folder"]),
        (("--data.val", tmp_path / "none.tsv"), [tmp_path / "none.tsv", "no such file"]),
    ]
    for flags, words in cases:
        one_line(call(evaluation, "--run", folder, "--split", "val", *flags), *words)
    # The generated corpus's labels would be taken for the run's own.
    one_line(call(evaluation, "--run", folder, "--data.embedded"), folder / "task.json", "trained on auto", "count")
    # In training it is the validation file that must fit, and it is read before the first step.
    done, _ = run("--data.root", root, "--data.val", other, name="second")
    one_line(done, other, "label 'good'")
    assert "step" not in done.out
    one_line(run(name="third")[0], "--data.root", "--data.train", "--data.embedded")


def test_malformed_rows_are_counted_in_the_metrics(run, tmp_path, caplog):
    root = sentiment(tmp_path / "sst", train=400)
    with open(root / "train.tsv", "a") as file:
        file.write("a line without its label\n")
    done, folder = run("--data.root", root)
    assert done.code == 0, done.err
    assert "train.tsv: line 402" in caplog.text
    assert json.loads((folder / "metrics.json").read_text())["data/skipped"] == 1


def test_entailment_between_sentences_of_the_generated_corpus(checkpoint):
    data = TextData(embedded=True, scenes=60, held_out=30, label="entailment")
    task, _, facts = make(checkpoint, data)
    assert facts["labels"] == ("entailment", "neutral", "contradiction")
    rows = task.parts("val")[0][1]
    assert len(rows.first) == len(rows.second) == 30
    words = ("wood", "metal", "heavy", "soft", "cold", "brand new", "older", "sale")
    for text, label in zip(rows.second, rows.labels, strict=True):
        assert (label == 1) == any(word in text for word in words)
    assert task.parts("val") == make(checkpoint, data)[0].parts("val")
    # Each of a scene's captions has a hypothesis of its own.
    # Training's captions never name what the test is about, so that of such a claim the label could be told.
    unseen = [f"{colour} {shape}" for colour, shape in HELD_OUT]
    named = {
        split: sum(any(words in text for words in unseen) for text in task.parts(split)[0][1].second)
        for split in SPLITS
    }
    assert named["train"] == named["val"] == 0 < named["test"]
    train = task.parts("train")[0][1]
    assert len(train.first) == 300 and len(set(zip(train.first, train.second, strict=True))) > 290


def test_counting_on_the_generated_corpus_beats_the_blind(call, quick, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)
    steps = ("--dropout", "0", "--max-steps", "60", "--evaluate-every", "60", "--optim.lr", "5e-3", "--batch", "32")
    found = {}
    for side in ("none", "text"):
        done = call(train, "--task", "text", *quick, *steps, "--blind", side, "--out", tmp_path / side)
        assert done.code == 0, done.err
        done = call(evaluation, "--run", tmp_path / side, "--split", "val")
        found[side] = json.loads(done.out)["accuracy"]
    counts = [label for label in load_task(tmp_path / "none", "text").task.parts("val")[0][1].labels]
    majority = max(counts.count(label) for label in set(counts)) / len(counts)
    assert found["text"] <= majority and found["none"] >= majority + 0.2


def test_sst2_itself(reference, run, tmp_path):
    for name, count in (("train", 2000), ("dev", 300)):
        lines = (reference / f"data/sst2/{name}.tsv").read_text().splitlines(keepends=True)[: count + 1]
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    done, folder = run("--data.root", tmp_path)
    assert done.code == 0, done.err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["val/examples"] == 300 and metrics["data/skipped"] == 0
