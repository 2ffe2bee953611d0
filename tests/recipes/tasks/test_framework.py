"""What every downstream task shares: what a run leaves and starts from, resuming, freezing, seeds, mistakes."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlblocks.data import BadData, Tokenizer
from vlblocks.nn import interpolate_positions
from vlblocks.training import config_from_dict, latest_checkpoint, read_history
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import finetune, train
from vlblocks_recipes.unimo2.runs import load_task
from vlblocks_recipes.unimo2.tasks import TASKS
from vlblocks_recipes.unimo2.tasks.base import Task, TaskModel, encode, pooled
from vlblocks_recipes.unimo2.tasks.text_classification import TextClassification, TextConfig, TextData


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def weights(folder, prefix=""):
    found = load_file(folder / "model.safetensors")
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def metrics_of(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.fixture
def tuned(quick, tmp_path, call, monkeypatch):
    """Fine-tune for `text` in this process: tuned(*flags, name="run") -> (outcome, folder)."""
    torch.set_num_threads(1)
    own = finetune.plot_curves

    def run(*flags, name="run", drawn=False):
        monkeypatch.setattr(finetune, "plot_curves", own if drawn else lambda *_, **__: None)
        return call(train, "--task", "text", *quick, "--out", tmp_path / name, *flags), tmp_path / name

    return run


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_registry_names_every_task(name):
    kind = TASKS[name]
    assert issubclass(kind, Task) and kind.Config().task == name


def test_a_run_leaves_its_folder_and_evaluates(tuned, checkpoint, tmp_path, call):
    done, folder = tuned(drawn=True)
    assert done.code == 0, done.err
    assert done.out.strip().splitlines()[-1] == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "task.json", "tokenizer.json", "model.safetensors", "metrics.json", "history.jsonl"),
        *("curves.png", "checkpoints", "tensorboard"),
    }
    history = read_history(folder / "history.jsonl")
    assert history["loss"][0] == [1, 2, 3, 4, 5, 6] and history["val/accuracy"][0] == [3, 6]
    metrics = metrics_of(folder)
    assert metrics["val/accuracy"] == max(history["val/accuracy"][1]) and metrics["train/steps"] == 6
    assert {name.partition(".")[0] for name in weights(folder)} == {"base", "head"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["task"], config["max_steps"], config["model"]["width"]) == ("text", 6, 32)
    assert json.loads((folder / "task.json").read_text())["labels"] == ["one", "two", "three"]

    shown = call(evaluation, "--run", folder, "--task", "text", "--split", "val", "--precision", "fp32")
    found = json.loads(shown.out)
    assert {name: found[name] for name in ("task", "split", "skipped", "examples")} == {
        **{"task": "text", "split": "val", "skipped": 0, "examples": 40}
    }
    assert found["accuracy"] == metrics["val/accuracy"] and found["f1"] == metrics["val/f1"]
    # Without --task it is the run's own; --split is the test split by default.
    assert json.loads(call(evaluation, "--run", folder).out)["split"] == "test"

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again, _ = tuned()
    assert again.code == 0 and "finished" in again.out and "--restart" in again.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    one_line(tuned("--optim.lr", "1")[0], folder / "config.json", "optim.lr was 0.0005, now 1.0", "--restart")
    # No file of the checkpoint has changed either.
    assert latest_checkpoint(checkpoint / "checkpoints") is None


def test_kill_9_and_the_same_command_end_with_the_same_bits(tuned, quick, root, tmp_path):
    flags = ("--dropout", "0.2", "--max-steps", "24", "--evaluate-every", "3", "--accumulate", "2")
    done, whole = tuned(*flags, name="whole")
    assert done.code == 0, done.err
    cut = tmp_path / "cut"
    command = [sys.executable, root / "recipes/unimo2/train.py", "--task", "text", *quick, "--out", cut, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and latest_checkpoint(cut / "checkpoints") is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert latest_checkpoint(cut / "checkpoints") is not None and not (cut / "metrics.json").exists()
    done, _ = tuned(*flags, name="cut")
    assert done.code == 0 and "continues at step" in done.out, done
    assert weights(cut).keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(cut).items())
    assert metrics_of(cut) == metrics_of(whole)
    assert read_history(cut / "history.jsonl") == read_history(whole / "history.jsonl")


def test_two_processes_take_the_steps_of_one(tuned, quick, script, tmp_path):
    # Without dropout the mean over two halves of a batch is the whole batch's.
    flags = ("--dropout", "0", "--max-steps", "4", "--evaluate-every", "4")
    done, alone = tuned(*flags, "--batch", "16", name="alone")
    assert done.code == 0, done.err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = tmp_path / "both"
    done = script(
        "train.py", "--task", "text", *quick, *flags, "--batch", "8", "--out", both, cwd=tmp_path, prefix=torchrun
    )
    assert done.code == 0, done.err
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(both)[name], value, atol=2e-5, rtol=1e-3)
    losses = [read_history(folder / "history.jsonl")["val/accuracy"] for folder in (alone, both)]
    assert losses[0] == losses[1]


def test_freezing(tuned, checkpoint):
    before = weights(checkpoint)
    done, folder = tuned("--freeze", "image", "text", "codes", "--max-steps", "3")
    assert done.code == 0, done.err
    after = weights(folder, "base.")
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"joint", "text_pool"}


@pytest.mark.parametrize("part", ["image", "text", "joint", "codes"])
def test_a_frozen_part_keeps_its_weights_and_is_in_evaluation_mode(checkpoint, part):
    task, net = make_task(checkpoint, freeze=(part,))
    modules = task.frozen(net)
    names = {"codes": ["grounded", "ground_image", "ground_text"]}.get(part, [part])
    assert [next(n for n, m in net.base.named_children() if m is module) for module in modules] == names


def make_task(checkpoint, **changes):
    """A task and its model on the generated corpus, with some settings changed."""
    config = replace(TextConfig(init=checkpoint, data=TextData(embedded=True, scenes=50, held_out=10)), **changes)
    start = finetune.start_from(config, scratch=None, own_tokenizer=None)
    task = TextClassification(config, start.tokenizer, start.model.image_size, BadData())
    task.facts()
    base = finetune.Unimo2(start.model)
    finetune.load_parts(base, start.tensors, start.file)
    return task, TaskModel(base, task.make_head(base))


def test_layer_wise_rates_of_the_model(checkpoint):
    _, net = make_task(checkpoint)
    scale = finetune.layer_scales(net, stages=finetune.STAGES, decay=0.1)
    depth = {name: round(-math.log10(scale(name))) for name, _ in net.named_parameters()}
    assert {depth[f"head.dense.{kind}"] for kind in ("weight", "bias")} == {0}
    assert depth["base.text_pool.dense.weight"] == depth["base.masked_token.bias"] == 1
    assert {depth[name] for name in depth if name.startswith("base.joint.transformer.layers.0.")} == {2}
    assert depth["base.grounded.codebook"] == 4
    assert {depth[name] for name in depth if name.startswith("base.text.transformer.layers.0.")} == {5}
    lowest = {name for name in depth if depth[name] == max(depth.values())}
    assert lowest == {
        *("base.image.cls", "base.image.positions", "base.image.patch_embed.proj.weight"),
        *("base.image.patch_embed.proj.bias", "base.text.embed.word.weight", "base.text.embed.position.weight"),
        *("base.text.embed.norm.weight", "base.text.embed.norm.bias"),
    }


def test_layer_decay_slows_the_lower_layers(tuned, checkpoint):
    _, plain = tuned("--max-steps", "1", name="plain")
    _, decayed = tuned("--max-steps", "1", "--layer-decay", "0.3", name="decayed")
    before = weights(checkpoint)

    def moved(folder, name):
        return (weights(folder, "base.")[name] - before[name]).abs().mean().item()

    for name, factor in (("text_pool.dense.weight", 0.3), ("text.embed.position.weight", 0.3**6)):
        assert moved(decayed, name) == pytest.approx(factor * moved(plain, name), rel=0.1)
    assert moved(plain, "text.embed.position.weight") > 0


def test_a_higher_resolution_interpolates_the_positions(tuned, checkpoint, call):
    done, folder = tuned("--image-size", "64", "--freeze", "image", "--max-steps", "1")
    assert done.code == 0, done.err
    found, before = weights(folder, "base.")["image.positions"], weights(checkpoint)["image.positions"]
    assert found.shape == (1, 1 + 16, 32)
    assert torch.equal(found, interpolate_positions(before, old_grid=(2, 2), new_grid=(4, 4)))
    assert json.loads((folder / "config.json").read_text())["model"]["image_size"] == 64
    assert call(evaluation, "--run", folder).code == 0
    assert load_task(folder, "text").task.image_size == 64


def test_early_stopping_on_a_named_metric(tuned):
    flags = ("--watch=-matthews", "--patience", "1", "--evaluate-every", "1", "--max-steps", "30", "--optim.lr", "0.01")
    done, folder = tuned(*flags)
    assert done.code == 0, done.err
    values = read_history(folder / "history.jsonl")["val/matthews"][1]
    metrics = metrics_of(folder)
    assert metrics["train/steps"] == len(values) < 30
    # It ends at the first that is not lower than all before it.
    assert all(after < before for before, after in itertools.pairwise(values[:-1]))
    assert values[-1] >= values[-2] and metrics["train/best_step"] == len(values) - 1
    one_line(tuned("--watch", "bleu", name="other")[0], "--watch bleu", "accuracy, matthews, f1")


def test_seeds_give_a_mean_and_a_deviation(tuned, call):
    done, folder = tuned("--seeds", "1,3", "--max-steps", "4", "--optim.lr", "0.01")
    assert done.code == 0, done.err
    found, runs = metrics_of(folder), [metrics_of(folder / f"seed-{seed}") for seed in (1, 3)]
    losses = [read_history(folder / f"seed-{seed}/history.jsonl")["loss"][1] for seed in (1, 3)]
    assert losses[0] != losses[1]
    values = [run["val/accuracy"] for run in runs]
    assert found["seeds"] == [1, 3]
    assert found["val/accuracy"] == pytest.approx(sum(values) / 2)
    assert found["val/accuracy_deviation"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    # Evaluated together, too: the same figures, for each a mean and a deviation.
    shown = call(evaluation, "--run", folder, "--split", "val", "--precision", "fp32", "--out", folder / "said")
    together = json.loads(shown.out)
    assert together["seeds"] == [1, 3] and together["task"] == "text" and together["split"] == "val"
    for name in ("accuracy", "accuracy_deviation", "f1"):
        assert together[name] == pytest.approx(found[f"val/{name}"])
    assert {path.name for path in (folder / "said").iterdir()} == {"seed-1", "seed-3"}
    alone = json.loads(call(evaluation, "--run", folder / "seed-3", "--split", "val", "--precision", "fp32").out)
    assert alone["accuracy"] == runs[1]["val/accuracy"]
    one_line(tuned("--init", folder, name="x")[0], "--init", folder, "each seed", folder / "seed-1")
    one_line(tuned("--seeds", "1,1", name="x")[0], "--seeds")
    one_line(tuned("--seeds", "1,b", name="x")[0], "--seeds")


def test_blind_sides(checkpoint):
    task, _ = make_task(checkpoint, blind="text")
    batch = task.batch([task.dataset("val")[0, index] for index in range(3)])
    assert batch["tokens"].tolist() == [[0, 2]] * 3 and batch["valid"].all() and batch["labels"].shape == (3,)
    # A task on both sides hides either.
    task.sides, task.config = ("image", "text"), replace(task.config, blind="image")
    image = torch.ones(2, 3, 4, 4)
    assert task.blinded({"image": image})["image"].eq(0).all() and image.eq(1).all()
    assert task.batch([task.dataset("val")[0, 0]])["tokens"].shape[1] > 2


def test_encoding_a_side_alone_or_both(checkpoint):
    _, net = make_task(checkpoint)
    model, image = net.base.eval(), torch.randn(2, 3, 32, 32)
    tokens = torch.tensor([[0, 9, 2, 1], [0, 8, 7, 2]])
    valid = tokens != 1
    with torch.no_grad():
        both = encode(model, image, tokens, valid)
        assert both.image.shape == (2, 5, 32) and both.codes.shape == (2, 4, 32) and both.text.shape == (2, 4, 32)
        text, picture = encode(model, tokens=tokens, valid=valid), encode(model, image)
        assert text.image is None and picture.text is None
        # Padding changes nothing.
        short = encode(model, tokens=tokens[:1, :3])
        torch.testing.assert_close(short.text, text.text[:1, :3])
        assert torch.equal(pooled(model, both), model.text_pool(both.text[:, 0]) * model.image_pool(both.image[:, 0]))
        assert torch.equal(pooled(model, text), model.text_pool(text.text[:, 0]))
        assert torch.equal(pooled(model, picture), model.image_pool(picture.image[:, 0]))


def test_what_a_run_may_start_from(tuned, checkpoint, tmp_path):
    _, first = tuned("--max-steps", "2", name="first")
    # A file in place of its folder, and a fine-tuned run, whose head is left behind.
    for name, init in (("file", checkpoint / "model.safetensors"), ("tuned", first)):
        done, folder = tuned("--init", init, "--max-steps", "1", "--optim.lr", "0", name=name)
        assert done.code == 0, done.err
        before = weights(checkpoint if name == "file" else first, "" if name == "file" else "base.")
        assert all(torch.equal(value, before[key]) for key, value in weights(folder, "base.").items())
        assert Tokenizer.load(folder).vocab_size == Tokenizer.load(checkpoint).vocab_size


def test_parts_that_a_converted_checkpoint_lacks_are_reported(tuned, checkpoint, tmp_path):
    converted = shutil.copytree(checkpoint, tmp_path / "converted")
    kept = {name: value for name, value in weights(checkpoint).items() if not name.startswith(("image.", "matching."))}
    save_file(kept, converted / "model.safetensors")
    done, folder = tuned("--init", converted, "--optim.lr", "0")
    assert done.code == 0, done.err
    assert "no weights of image, which starts at random" in done.out and "no weights of matching" in done.out
    found = weights(folder, "base.")
    assert all(torch.equal(found[name], value) for name, value in kept.items())
    # Half a tower is no absent tower.
    kept.pop("text.embed.word.weight")
    save_file(kept, converted / "model.safetensors")
    one_line(tuned("--init", converted, name="half")[0], converted / "model.safetensors", "text.embed.word.weight")


def test_without_init_a_preset_is_trained_from_scratch(tuned, tmp_path, quick, call):
    flags = [*quick[2:], "--max-steps", "1", "--batch", "4"]
    done = call(train, "--task", "text", *flags, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "no --init, so the model of preset tiny is trained from scratch" in done.out
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["width"] == 128
    flags = [flag for flag in flags if flag != "--data.embedded"]
    done = call(train, "--task", "text", *flags, "--data.root", tmp_path, "--out", tmp_path / "other")
    one_line(done, "--tokenizer", "--init")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "sorting"], ["--task sorting", "pretrain, retrieval"]),
        (["--max-steps", "0"], ["--max-steps", "less than 1"]),
        (["--batch", "0"], ["--batch", "less than 1"]),
        (["--batch", "5000"], ["text training data", "batch size 5000"]),
        (["--patience", "0"], ["--patience"]),
        (["--layer-decay", "1.5"], ["--layer-decay", "up to 1"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--freeze", "head"], ["--freeze", "head"]),
        (["--data.max-text", "65"], ["--data.max-text", "64"]),
        (["--image-size", "50"], ["image-size", "multiple of 16"]),
        (["--init", "nowhere"], ["--init nowhere", "no such folder"]),
        (["--mdoe", "full"], ["--mdoe", "--mode"]),
        (["--preset", "huge"], ["--preset huge", "tiny"]),
        (["--data.held-out", "2000"], ["--data.held-out", "1000"]),
        (["--data.max-bad-share", "2"], ["max_bad_share"]),
        (["--max-steps", "None", "--epochs", "0"], ["--epochs", "--max-steps"]),
        (["--precision", "fp16"], ["--precision fp16", "GPU"]),
        (["--freeze", "image", "text", "joint", "codes", "--optim.lr", "x"], ["--optim.lr"]),
    ],
    ids=" ".join,
)
def test_flags(tuned, flags, words):
    if flags[0] == "--mdoe":
        words = [flags[0], "unknown flag"]
    done, folder = tuned(*flags)
    one_line(done, *words)
    assert not (folder / "config.json").exists()


def test_folders_that_are_no_checkpoint(tuned, checkpoint, tmp_path, make_checkpoint):
    bare = tmp_path / "bare"
    bare.mkdir()
    one_line(tuned("--init", bare)[0], bare / "config.json", "no such file")
    (bare / "config.json").write_text("[]")
    one_line(tuned("--init", bare)[0], bare / "config.json", "no run's configuration")
    shutil.copy(checkpoint / "config.json", bare)
    one_line(tuned("--init", bare)[0], "--tokenizer", bare)
    shutil.copy(checkpoint / "tokenizer.json", bare)
    one_line(tuned("--init", bare)[0], bare / "model.safetensors", "no such file")
    save_file({"other.weight": torch.zeros(2)}, bare / "model.safetensors")
    one_line(tuned("--init", bare)[0], bare / "model.safetensors", "unknown keys other.weight")
    wide = make_checkpoint(tmp_path / "wide", width=64)
    shutil.copy(wide / "model.safetensors", bare)
    one_line(tuned("--init", bare)[0], bare / "model.safetensors", "[1, 1, 64]")


def test_evaluating_a_run_for_another_task(tuned, checkpoint, call, tmp_path):
    _, folder = tuned("--max-steps", "1")
    one_line(call(evaluation, "--run", folder, "--task", "vqa"), folder, "trained for text, not for vqa")
    one_line(call(evaluation, "--run", checkpoint, "--task", "text"), checkpoint, "trained for pretrain", "--init")
    one_line(call(evaluation, "--run", folder, "--optim.lr", "1"), "--optim.lr", "changes nothing")
    one_line(call(evaluation, "--run", folder, "--task", "sorting"), "--task sorting", "captioning")
    facts = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({**facts, "labels": ["one", "two"]}))
    one_line(call(evaluation, "--run", folder), folder / "model.safetensors", "head.dense", "[3")
    (folder / "task.json").write_text("{}")
    one_line(call(evaluation, "--run", folder), folder / "task.json", "name")


def test_settings_survive_the_file(tuned):
    _, folder = tuned("--freeze", "image", "codes", "--optim.milestones", "1", "2", "--max-steps", "1")
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("model")
    config = config_from_dict(TextConfig, saved, source=folder)
    assert config.freeze == ("image", "codes") and config.optim.milestones == (1.0, 2.0)
    assert config.data.label == "count" and config.seeds == ()
