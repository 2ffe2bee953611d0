"""A user's mistake is one line on stderr that names the file or field and the remedy, and exit code 2."""

import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlblocks.training import latest_checkpoint, read_history
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import train


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "tinny"], ["'tinny'", "tiny"]),
        (["--model.widht", "32"], ["--model.widht", "--model.width"]),
        (["--max-steps", "many"], ["--max-steps", "many"]),
        (["--max-steps", "0"], ["--max-steps", "at least 1"]),
        (["--seed", "-1"], ["--seed", "at least 0"]),
        (["--task", "sorting"], ["--task", "pretrain"]),
        (["--model.grounding.picks", "33"], ["model.grounding.picks", "33 of 32"]),
        (["--model.grounding.picks", "0"], ["model.grounding.picks", "1 <="]),
        (["--model.image-size", "50"], ["model.image-size", "multiple of 16"]),
        (["--model.patch-size", "0"], ["model.patch-size", "at least 1"]),
        (["--model.text.heads", "5"], ["model.text.heads", "divisor of 32"]),
        (["--model.joint.heads", "0"], ["model.joint.heads", "divisor of 32"]),
        (["--model.width", "0"], ["model.width", "at least 1"]),
        (["--model.contrast.share-grounding"], ["model.contrast.share-grounding", "model.grounding.project"]),
        (["--data.max-text", "65"], ["--data.max-text", "model.positions"]),
        (["--data.pair-share", "0"], ["--data.pair-share", "(0, 1]"]),
        (["--data.workers", "-1"], ["--data.workers", "at least 0"]),
        (["--batch.pairs", "0", "--batch.images", "0", "--batch.texts", "0"], ["--batch", "nothing to learn"]),
    ],
    ids=" ".join,
)
def test_flags(small, tmp_path, call, flags, words):
    one_line(call(train, *small, "--out", tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run").exists()


def test_half_precision_on_a_cpu(small, tmp_path, call):
    one_line(call(train, *small, "--precision", "fp16", "--out", tmp_path / "run"), "--precision fp16", "bf16")


def test_out_that_is_a_file_or_in_one(small, tmp_path, call):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        one_line(call(train, *small, "--out", out), f"--out {out}", "another folder")


def spoil(root, kind):
    """Damage a data set in Karpathy's layout; what the message has to name."""
    path = root / "dataset_squares.json"
    content = json.loads(path.read_text())
    if kind == "no folder":
        shutil.rmtree(root)
        return [root, "no such folder"]
    if kind == "no json":
        path.unlink()
        return [root, "dataset_*.json"]
    if kind == "no images":
        shutil.rmtree(root / "images")
        return [root, "images/"]
    if kind == "other images":
        shutil.rmtree(root / "images")
        (root / "images").mkdir()
        return [root / "images", "train_00.png"]
    if kind == "empty file":
        path.write_text("")
        return [path, "empty"]
    if kind == "not json":
        path.write_text("<html>")
        return [path, "not JSON"]
    if kind == "no examples":
        path.write_text(json.dumps({"images": []}))
        return [path, "empty"]
    if kind == "COCO's own":
        path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}))
        return [path, "Karpathy", "'filename'"]
    if kind == "a list":
        path.write_text(json.dumps(content["images"]))
        return [path, "Karpathy", "'images'"]
    if kind == "no training part":
        path.write_text(json.dumps({"images": [{**entry, "split": "test"} for entry in content["images"]]}))
        return [path, "'train'", "test"]
    if kind == "too few":
        path.write_text(json.dumps({"images": [*content["images"][:7], *content["images"][24:]]}))
        return ["pairs", "batch size 8", "7"]
    raise AssertionError(kind)


KINDS = (
    *("no folder", "no json", "no images", "other images", "empty file", "not json", "no examples", "COCO's own"),
    *("a list", "no training part", "too few"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_data(small, own_squares, tmp_path, call, kind):
    words = spoil(own_squares, kind)
    flags = ("--data.root", own_squares, "--data.vocab", "300", "--out", tmp_path / "run")
    one_line(call(train, *small, *flags), *words)


def test_the_corrected_command_needs_no_restart(small, on_squares, squares, tmp_path, call, no_report):
    out = ("--max-steps", "1", "--out", tmp_path / "run")
    # The first finds no data, the second finds too little of it and has trained a tokenizer by then.
    one_line(call(train, *small, "--data.root", tmp_path / "squares", *out), "no such folder")
    found = ("--data.root", squares, "--data.vocab", "280", "--batch.pairs", "100")
    one_line(call(train, *small, *found, *out), "batch size 100")
    done = call(train, *on_squares, *out)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["root"] == str(squares)
    weights = load_file(tmp_path / "run/model.safetensors")
    assert len(weights["text.embed.word.weight"]) == 300


@pytest.mark.parametrize("kind", ["missing", "text", "pickle"])
def test_tokenizer(small, squares, tmp_path, call, kind):
    path = tmp_path / "tokenizer.json"
    if kind != "missing":
        path.write_bytes(b"{}" if kind == "text" else pickle.dumps({}))
    flags = ("--data.root", squares, "--data.tokenizer", path, "--out", tmp_path / "run")
    one_line(call(train, *small, *flags), path)


@pytest.fixture
def own_run(on_squares, tmp_path, call, no_report):
    """A finished run on the small data set, to spoil."""
    done = call(train, *on_squares, "--max-steps", "2", "--checkpoint-every", "1", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    return tmp_path / "run"


def test_resuming_with_another_configuration(on_squares, own_run, call):
    flags = (*on_squares, "--max-steps", "2", "--out", own_run)
    assert call(train, *flags, "--checkpoint-every", "7").code == 0
    one_line(call(train, *flags, "--optim.lr", "0.5"), own_run / "config.json", "optim.lr", "0.5", "--restart")
    (own_run / "config.json").write_text("{")
    one_line(call(train, *flags), own_run / "config.json", "not valid JSON")


def add_key(path):
    save_file({**load_file(path), "surplus.weight": torch.ones(2)}, path)


def test_an_unknown_key_in_a_checkpoint(on_squares, own_run, call):
    (own_run / "metrics.json").unlink()
    checkpoint = latest_checkpoint(own_run / "checkpoints")
    add_key(checkpoint / "model.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"]["model.safetensors"] = (checkpoint / "model.safetensors").stat().st_size
    (checkpoint / "state.json").write_text(json.dumps(state))
    done = call(train, *on_squares, "--max-steps", "2", "--checkpoint-every", "1", "--out", own_run)
    one_line(done, checkpoint / "model.safetensors", "surplus.weight", "configuration")


def weights_cases(path):
    """Spoiled copies of a weights file and the words of each message."""
    add_key(path)
    yield ["surplus.weight", "configuration"]
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    yield ["pickle", "safetensors.torch.save_file"]
    torch.save({"weight": torch.ones(2)}, path)
    yield ["pickle", "safetensors.torch.save_file"]
    path.write_text("not weights at all")
    yield ["not a safetensors file"]
    path.unlink()
    yield ["no such file"]


def test_weights_to_begin_with(on_squares, own_run, tmp_path, call):
    path = own_run / "model.safetensors"
    for words in weights_cases(path):
        for init in (own_run, path):
            one_line(call(train, *on_squares, "--init", init, "--out", tmp_path / "new"), path, *words)
    assert not (tmp_path / "new/config.json").exists()


def test_weights_to_evaluate(own_run, call):
    path = own_run / "model.safetensors"
    for words in weights_cases(path):
        one_line(call(evaluation, "--run", own_run), path, *words)


def test_weights_of_another_size(on_squares, own_run, tmp_path, call):
    flags = (*on_squares, "--model.width", "48", "--init", own_run, "--out", tmp_path / "new")
    one_line(call(train, *flags), own_run / "model.safetensors", "[1, 1, 32]", "[1, 1, 48]")


def test_a_damaged_image_and_an_empty_caption_are_skipped_and_counted(
    on_squares, own_squares, tmp_path, call, no_report, caplog
):
    image = own_squares / "images/train_03.png"
    image.write_bytes(image.read_bytes()[:60])
    path = own_squares / "dataset_squares.json"
    content = json.loads(path.read_text())
    content["images"][5]["sentences"][1]["raw"] = "  "
    path.write_text(json.dumps(content))
    flags = (*on_squares, "--data.root", own_squares, "--data.pair-share", "1", "--batch.pairs", "12")
    with caplog.at_level(logging.WARNING):
        done = call(train, *flags, "--data.max-bad-share", "0.05", "--max-steps", "4", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if str(image) in line]) == 1
    assert len([line for line in said if "train_05.png" in line and "empty caption" in line]) == 1
    assert json.loads((tmp_path / "run/metrics.json").read_text())["data/skipped"] == 2

    one_line(call(train, *flags, "--out", tmp_path / "strict"), "train_05.png", "empty caption", "max_bad_share")
    content["images"][5]["sentences"][1]["raw"] = "Not empty."
    path.write_text(json.dumps(content))
    done = call(train, *flags, "--out", tmp_path / "strict2")
    one_line(done, image, "share 0.01", "max_bad_share")


def test_a_damaged_image_that_is_held_out(on_squares, own_squares, tmp_path, call):
    image = own_squares / "images/val_02.png"
    image.write_bytes(b"")
    flags = (*on_squares, "--data.root", own_squares, "--max-steps", "1", "--data.max-bad-share", "0.1")
    done = call(train, *flags, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["data/skipped"] == 1 and metrics["val/gallery_size"] == 9


def spoiled_from(monkeypatch, first, last=math.inf):
    """The texts' loss of every step from the first to the last is not finite; returns the steps seen."""
    own, seen = train.STREAMS["texts"], []

    def stream(*args):
        seen.append(len(seen) + 1)
        result = own(*args)
        if not first <= seen[-1] <= last:
            return result
        return result._replace(losses={name: value * math.nan for name, value in result.losses.items()})

    monkeypatch.setitem(train.STREAMS, "texts", stream)
    return seen


def test_a_loss_that_is_not_finite_skips_the_step(on_squares, tmp_path, call, no_report, monkeypatch):
    spoiled_from(monkeypatch, 2, 3)
    weights = {}

    def keep(folder, step, *, model, **_):
        weights[step] = {name: value.clone() for name, value in model.items()}

    monkeypatch.setattr("vlblocks.training.loop.save_checkpoint", keep)
    done = call(train, *on_squares, "--max-steps", "4", "--checkpoint-every", "1", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    changed = [
        any(not torch.equal(weights[step][name], weights[step - 1][name]) for name in weights[1]) for step in (2, 3, 4)
    ]
    assert changed == [False, False, True]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["train/skipped_steps"] == 2
    loss = read_history(tmp_path / "run/history.jsonl")["loss"][1]
    assert [math.isfinite(value) for value in loss] == [True, False, False, True]


def test_ten_in_a_row_stop_the_run_and_keep_the_checkpoint(on_squares, tmp_path, call, no_report, monkeypatch):
    seen = spoiled_from(monkeypatch, 4)
    flags = ("--max-steps", "40", "--checkpoint-every", "3", "--keep-checkpoints", "1", "--out", tmp_path / "run")
    done = call(train, *on_squares, *flags)
    one_line(done, "not finite", "step 13", "checkpoint", "--restart")
    assert seen[-1] == 13
    kept = latest_checkpoint(tmp_path / "run/checkpoints")
    assert kept.name == "step-00000012"
    weights = load_file(kept / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not (tmp_path / "run/model.safetensors").exists()


# One process imports torch once and fills a small file system at many different moments of a run.
FULL = """
import contextlib, io, os, subprocess, sys
from pathlib import Path
from vlblocks.training import latest_checkpoint, load_checkpoint, run_main
from vlblocks_recipes.unimo2 import train

disk, flags = Path(sys.argv[1]), sys.argv[2:]
for kilobytes in SIZES:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], check=True)
    sys.argv = ["train.py", *flags, "--out", str(disk / "run")]
    errors, lines = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(lines):
            run_main(train.main)
    except SystemExit as stop:
        code = stop.code
    found = latest_checkpoint(disk / "run/checkpoints")
    step = load_checkpoint(found).step if found else 0
    print(kilobytes, code, step, (disk / "run/metrics.json").exists(), repr(errors.getvalue()), sep="|", flush=True)
    subprocess.run(["umount", "-l", disk], check=True)
"""


def may_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small file system in a name space of its own")
def test_a_full_disk_at_any_moment(on_squares, tmp_path):
    sizes = [4, 12, 24, 60, 400, 1000, 1800, 2400, 3300, 4000, 4700, 5200, 16000]
    (tmp_path / "disk").mkdir()
    (tmp_path / "full.py").write_text(FULL.replace("SIZES", str(sizes)))
    flags = ("--max-steps", "3", "--checkpoint-every", "1", "--keep-checkpoints", "2")
    command = ["unshare", "-rm", sys.executable, "full.py", str(tmp_path / "disk"), *on_squares, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert [int(row[0]) for row in rows] == sizes
    *short, whole = rows
    assert whole[1:4] == ["0", "3", "True"], whole
    failed = [row for row in short if row[1] != "0"]
    for row in failed:
        message = eval(row[4])
        assert row[1] == "2" and row[3] == "False", row
        assert message.startswith("error: ") and message.count("\n") == 1, row
        assert str(tmp_path / "disk/run") in message, row
        assert "disk is full" in message or "No space left" in message, row
    # Some run out of room before the first checkpoint, some while they write one, and those keep the one before.
    assert {row[2] for row in failed} >= {"0", "1"}
    assert "Traceback" not in done.stderr
