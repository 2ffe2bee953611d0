"""Image classification: zero-shot by prompts, linear probe, full fine-tuning; folders and the generated corpus."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from vlblocks.data.scene_tasks import CLASSES
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import finetune, train
from vlblocks_recipes.unimo2.configs import ContrastConfig
from vlblocks_recipes.unimo2.runs import load_task
from vlblocks_recipes.unimo2.tasks.image_classification import ImageConfig, ImageData

COLOURS = {"blue_square": (40, 60, 210), "green_ring": (30, 180, 40), "red_disc": (200, 30, 30)}


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


@pytest.fixture
def folders(tmp_path):
    """train/, val/ and test/ with a folder for each of three classes."""
    root, rng = tmp_path / "pictures", np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-20, 20, size=(40, 36, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def run(call, checkpoint, tmp_path, monkeypatch):
    """run(*flags) -> (outcome, folder) of a fine-tuning of seconds."""
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)
    flags = ("--init", checkpoint, "--max-steps", "6", "--evaluate-every", "3", "--batch", "12", "--precision", "fp32")

    def start(*more, name="run"):
        return call(train, "--task", "image", *flags, "--out", tmp_path / name, *more), tmp_path / name

    return start


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("mode", ["full", "probe"])
def test_training_on_folders(run, folders, call, checkpoint, mode):
    done, folder = run("--data.root", folders, "--mode", mode, "--optim.lr", "0.01", "--max-steps", "20")
    assert done.code == 0, done.err
    metrics = metrics_of(folder)
    assert json.loads((folder / "task.json").read_text()) == {"task": "image", "classes": sorted(COLOURS)}
    assert metrics["val/examples"] == 12 and metrics["val/classes"] == 3
    per_class = [metrics[f"val/class/{name}"] for name in COLOURS]
    assert metrics["val/top1"] == pytest.approx(sum(per_class) / 3) and "val/top5" not in metrics
    assert metrics["val/top1"] > 0.6
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    same = {name for name, value in before.items() if torch.equal(value, after[f"base.{name}"])}
    if mode == "probe":
        assert same == before.keys()
    else:
        assert {name for name in before if name.startswith(("image.", "joint."))}.isdisjoint(same)
    done = call(evaluation, "--run", folder, "--out", folder / "said")
    found = json.loads(done.out)
    assert found["split"] == "test" and found["examples"] == 12
    said = [line.split("\t") for line in (folder / "said/test.tsv").read_text().splitlines()[1:]]
    assert sum(path.split("/")[-2] == name for path, name in said) / 12 == pytest.approx(found["top1"])


def test_pictures_of_training_are_augmented_by_seed_and_epoch(checkpoint, folders):
    config = ImageConfig(mode="full", data=ImageData(root=folders))
    task = load_task(checkpoint, "image", config).task
    examples, still = task.dataset("train"), task.dataset("val")
    assert len(examples) == 36 and examples[0, 5]["image"].shape == (3, 32, 32)
    assert torch.equal(examples[2, 5]["image"], examples[2, 5]["image"])
    assert not torch.equal(examples[2, 5]["image"], examples[3, 5]["image"])
    assert torch.equal(still[0, 1]["image"], still[7, 1]["image"])
    assert [still[0, index]["label"] for index in range(12)] == [0] * 4 + [1] * 4 + [2] * 4


@torch.no_grad()
def test_zero_shot_compares_pictures_with_the_mean_prompt(checkpoint, folders, tmp_path, call):
    (tmp_path / "prompts.txt").write_text("a picture of a {}\na large {} in the top left\n")
    done = call(
        evaluation, "--run", checkpoint, "--task", "image", "--data.test", folders / "test",
        "--data.prompts", tmp_path / "prompts.txt", "--precision", "fp32", "--out", tmp_path / "said",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    run = load_task(checkpoint, "image", ImageConfig(mode="zero-shot", data=ImageData(root=folders)))
    model, names = run.net.base, sorted(COLOURS)
    classes = []
    for name in names:
        words, rows = name.replace("_", " "), []
        for text in (f"a picture of a {words}", f"a large {words} in the top left"):
            tokens = torch.tensor([run.tokenizer.encode(text)])
            rows.append(F.normalize(model.features("text", model.text(tokens)), dim=-1)[0])
        classes.append(F.normalize(sum(rows) / 2, dim=0))
    hits = []
    for label, name in enumerate(names):
        for number in range(4):
            picture = Image.open(folders / "test" / name / f"{number}.png")
            states = model.image(run.task.upright(picture)[None])
            scores = torch.stack(classes) @ model.features("image", states)[0]
            hits.append(scores.argmax().item() == label)
    assert found["top1"] == pytest.approx(sum(hits) / 12)
    assert len((tmp_path / "said/test.tsv").read_text().splitlines()) == 13


@torch.no_grad()
def test_a_class_is_the_mean_direction_of_its_prompts(make_checkpoint, tmp_path):
    # Without a projection of its own a text's feature has any length; no prompt shall weigh more by it.
    contrast = ContrastConfig(pool="mean", width=None, normalize="image")
    folder = make_checkpoint(tmp_path / "bare", contrast=contrast)
    run = load_task(folder, "image", ImageConfig(mode="zero-shot", data=ImageData(embedded=True, scenes=200)))
    model = run.net.base
    model.text.transformer.layers[-1].norm2.weight.copy_(torch.linspace(0.1, 5.0, 32))
    run.task.pictures("val")
    sentences = {name: [f"the {name}", f"there is one large {name} at the top left of it"] for name in CLASSES}
    (tmp_path / "prompts.json").write_text(json.dumps(sentences))
    run.task.config = replace(run.task.config, data=replace(run.task.config.data, prompts=tmp_path / "prompts.json"))
    found = run.task._prompted(model, torch.device("cpu"), nullcontext)
    norms = []
    for row, name in zip(found, CLASSES, strict=True):
        features = []
        for text in sentences[name]:
            tokens = torch.tensor([run.tokenizer.encode(text)])
            features.append(model.features("text", model.text(tokens), None)[0])
        norms += [feature.norm() for feature in features]
        mean = sum(feature / feature.norm() for feature in features)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert max(norms) > 1.05 * min(norms)


def test_zero_shot_on_the_generated_corpus(checkpoint, call):
    flags = ("--data.embedded", "--data.scenes", "200", "--data.held-out", "40")
    done = call(evaluation, "--run", checkpoint, "--task", "image", *flags)
    found = json.loads(done.out)
    assert (found["classes"], found["examples"]) == (len(CLASSES), 40) and 0 <= found["top1"] <= found["top5"] <= 1


def test_the_test_scenes_are_the_last_ones_and_no_more_than_there_are(checkpoint, call):
    config = ImageConfig(mode="zero-shot", data=ImageData(embedded=True, scenes=200, held_out=40))
    images = load_task(checkpoint, "image", config).task.pictures("test").images
    # By the first ones the pooling was chosen.
    assert [images.name(index) for index in (0, 39)] == ["texts scene 960", "texts scene 999"] and len(images) == 40
    flags = ("--run", checkpoint, "--task", "image", "--data.embedded", "--data.scenes", "200", "--data.held-out")
    for count in ("0", "-3", "1001"):
        one_line(call(evaluation, *flags, count), "--data.held-out", count, "1 to 1000")


def test_a_run_on_folders_does_not_fit_the_generated_corpus(run, folders, call):
    done, folder = run("--data.root", folders, "--max-steps", "1")
    assert done.code == 0, done.err
    one_line(call(evaluation, "--run", folder, "--data.embedded"), folder / "task.json", "has 3 classes", "--data.emb")


def test_the_generated_corpus_and_its_blind_baseline(call, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)
    said = {}
    for side in ("none", "image"):
        flags = ("--blind", side, "--optim.lr", "1e-2", "--dropout", "0", "--max-steps", "20", "--evaluate-every", "20")
        done = call(train, "--task", "image", *quick, *flags, "--out", tmp_path / side)
        assert done.code == 0, done.err
        assert metrics_of(tmp_path / side)["val/classes"] == len(CLASSES)
        done = call(evaluation, "--run", tmp_path / side, "--split", "val", "--out", tmp_path / side / "said")
        assert done.code == 0, done.err
        lines = (tmp_path / side / "said/val.tsv").read_text().splitlines()[1:]
        said[side] = {line.split("\t")[1] for line in lines}
    # Who sees nothing says the same of every picture.
    assert len(said["image"]) == 1


def test_an_unreadable_picture_is_replaced_in_training_and_left_out_of_evaluation(run, folders):
    (folders / "train/red_disc/3.png").write_bytes(b"no picture")
    (folders / "val/red_disc/1.png").write_bytes(b"")
    done, folder = run("--data.root", folders, "--data.max-bad-share", "0.1")
    assert done.code == 0, done.err
    metrics = metrics_of(folder)
    assert metrics["data/skipped"] == 2 and metrics["val/examples"] == 11
    done, _ = run("--data.root", folders, name="strict")
    one_line(done, "1.png", "max_bad_share")


def test_prompts_that_do_not_fit(checkpoint, folders, tmp_path, call):
    names = sorted(COLOURS)
    good = {name: [f"a {name}"] for name in names}
    files = {
        "none.txt": ["a picture\n", "'a picture'", "{} once"],
        "twice.txt": ["a {} and a {}\n", "{} once"],
        "fewer.json": [json.dumps({name: good[name] for name in names[1:]}), "class blue_square"],
        "more.json": [json.dumps({**good, "cat": ["a cat"]}), "names cat"],
        "empty.json": [json.dumps({**good, "red_disc": []}), "class red_disc"],
        "list.json": ["[]", "class blue_square"],
        "broken.json": ["{", "broken.json"],
    }
    where = ("--run", checkpoint, "--task", "image", "--data.test", folders / "test")
    for name, (content, *words) in files.items():
        path = tmp_path / name
        path.write_text(content)
        one_line(call(evaluation, *where, "--data.prompts", path), path, *words)
    one_line(call(evaluation, *where), "--data.prompts", "template")
    one_line(call(evaluation, *where, "--data.prompts", tmp_path / "gone.txt"), tmp_path / "gone.txt", "no such file")
    one_line(call(evaluation, *where, "--mode", "full"), "--mode full", "zero-shot")


def test_folders_that_do_not_fit(run, folders, tmp_path, call):
    (folders / "val/yellow_star").mkdir()
    one_line(run("--data.root", folders)[0], folders / "val/yellow_star", "none of the 3 classes")
    (folders / "val/yellow_star").rmdir()
    (tmp_path / "bare").mkdir()
    one_line(run("--data.root", tmp_path / "bare")[0], tmp_path / "bare/train", "no such folder")
    one_line(run("--data.train", tmp_path / "bare")[0], tmp_path / "bare", "no folder of a class")
    (tmp_path / "bare/cat").mkdir()
    one_line(run("--data.train", tmp_path / "bare")[0], tmp_path / "bare", "no picture")
    one_line(run()[0], "--data.train", "--data.embedded")
    one_line(run("--data.embedded", "--mode", "zero-shot")[0], "--mode zero-shot", "eval.py")
    done, folder = run("--data.root", folders, name="trained")
    assert done.code == 0, done.err
    other = tmp_path / "other/cat"
    other.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(other / "1.png")
    one_line(call(evaluation, "--run", folder, "--data.test", other.parent), other, "none of the 3 classes")


def test_a_probe_drops_nothing_and_freezes_the_base(checkpoint, folders):
    config = ImageConfig(mode="probe", dropout=0.5, data=ImageData(root=folders))
    run = load_task(checkpoint, "image", config)
    run.task.facts()
    head = run.task.make_head(run.net.base)
    assert head.dropout.p == 0.0 and head.dense.weight.shape == (3, 32)
    assert run.task.frozen(run.net) == [run.net.base]
    full = load_task(checkpoint, "image", replace(config, mode="full"))
    full.task.facts()
    assert full.task.make_head(full.net.base).dropout.p == 0.5 and full.task.frozen(full.net) == []
