"""train.py: what it leaves, how it resumes, and what each objective trains."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlblocks.training import read_history
from vlblocks_recipes.unimo2 import train
from vlblocks_recipes.unimo2.objectives import STREAMS

METRICS = {
    *(f"val/{way}_{what}" for way in ("text_to_image", "image_to_text") for what in ("r1", "r5", "r10", "median_rank")),
    *("val/gallery_size", "val/codes_used", "val/code_perplexity_image", "val/code_perplexity_text"),
    *("val/code_overlap_pair", "val/code_overlap_random", "time/total_s"),
}
DEFAULT_CURVES = {
    *("pairs/contrast", "pairs/matching", "pairs/masked_tokens", "pairs/grounding"),
    *("images/two_views", "images/grounding", "texts/masked_tokens", "texts/grounding"),
}


def metrics_of(folder, *, time=True):
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if time or not name.startswith("time/")}


def curves_of(folder):
    return {name for name in read_history(folder / "history.jsonl") if name.split("/")[0] in STREAMS}


def test_a_run_leaves_what_the_readme_names(trained):
    assert trained.outcome.code == 0, trained.outcome.err
    assert trained.outcome.out.strip().splitlines()[-1] == "runs/unimo2-tiny"
    left = {path.name for path in trained.folder.iterdir()}
    assert left == {
        *("config.json", "model.safetensors", "tokenizer.json", "checkpoints", "tensorboard", "history.jsonl"),
        *("curves.png", "grounding.png", "metrics.json"),
    }
    assert {path.name for path in (trained.folder / "checkpoints").iterdir()} == {"step-00000024", "step-00000030"}
    assert any(path.name.startswith("events.") for path in (trained.folder / "tensorboard").iterdir())
    for name in ("curves.png", "grounding.png"):
        with Image.open(trained.folder / name) as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=2**24)
            assert min(picture.size) > 300 and len(colours) > 20


def test_metrics_are_flat_numbers_under_the_named_keys(trained):
    metrics = metrics_of(trained.folder)
    assert metrics.keys() >= METRICS
    assert all(type(value) in (int, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["val/gallery_size"] >= 200
    assert 0 < metrics["val/codes_used"] <= 32 and metrics["time/total_s"] > 0
    assert metrics["train/steps"] == 30 and metrics["train/skipped_steps"] == 0


def test_every_objective_is_recorded_at_every_step_and_printed(trained):
    history = read_history(trained.folder / "history.jsonl")
    assert curves_of(trained.folder) == DEFAULT_CURVES
    steps = {name: found for name, (found, _) in history.items()}
    codes = {f"codes/{what}_{side}" for what in ("used", "perplexity") for side in ("image", "text")}
    assert steps == {
        **{name: list(range(1, 31)) for name in (*DEFAULT_CURVES, "loss", "lr", "gradient_norm")},
        **{name: [8, 16, 24, 30] for name in codes},
    }
    for name in DEFAULT_CURVES:
        assert re.search(rf"^  {name} +\d+\.\d{{4}}$", trained.outcome.out, re.MULTILINE)
    parts = zip(*(history[name][1] for name in sorted(DEFAULT_CURVES)), strict=True)
    assert history["loss"][1] == pytest.approx([sum(step) for step in parts], rel=1e-5)


def test_the_saved_configuration_is_the_commands(trained):
    config = json.loads((trained.folder / "config.json").read_text())
    assert (config["preset"], config["task"], config["max_steps"]) == ("tiny", "pretrain", 30)
    assert config["model"]["width"] == 32 and config["batch"] == {"pairs": 8, "images": 4, "texts": 4, "accumulate": 1}


def test_a_finished_run_says_so_and_is_left_alone(trained, monkeypatch, call):
    monkeypatch.chdir(trained.cwd)
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    done = call(train, *trained.flags)
    assert done.code == 0
    first, last = done.out.strip().splitlines()
    assert "finished" in first and "--restart" in first and last == "runs/unimo2-tiny"
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == before


def wait_until(process, ready, seconds=120):
    """Poll until `ready` or the process ends; True when it was ready while the process lived."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return True
        time.sleep(0.005)
    return False


def last_step(folder):
    try:
        lines = (folder / "history.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(line.endswith("}") for line in lines)


def test_kill_9_and_the_same_command_end_like_an_uninterrupted_run(trained, root, script, tmp_path):
    command = [sys.executable, str(root / "recipes/unimo2/train.py"), *trained.flags]
    folder = tmp_path / "runs/unimo2-tiny"
    with open(tmp_path / "log", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            saved = folder / "checkpoints/step-00000008"
            reached = wait_until(process, lambda: saved.is_dir() and last_step(folder) >= 10)
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    assert reached, (tmp_path / "log").read_text()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists() and not (folder / "metrics.json").exists()

    # As the kill left them: what the last step wrote half, and a checkpoint that was never finished.
    with open(folder / "history.jsonl", "a") as history:
        history.write('{"step": 1')
    (folder / "checkpoints/.tmp-step-00000099-1").mkdir()
    again = script("train.py", *trained.flags, cwd=tmp_path)
    assert again.code == 0, again.err
    match = re.search(r"continues at step (\d+) of 30", again.out)
    assert match and int(match[1]) in (8, 16, 24)

    ours, theirs = load_file(folder / "model.safetensors"), load_file(trained.folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (folder / "model.safetensors").read_bytes() == (trained.folder / "model.safetensors").read_bytes()
    assert metrics_of(folder, time=False) == metrics_of(trained.folder, time=False)
    assert read_history(folder / "history.jsonl") == read_history(trained.folder / "history.jsonl")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000024", "step-00000030"}


def test_an_interrupted_run_counts_the_time_of_all_sittings(on_squares, tmp_path, call, no_report, monkeypatch):
    flags = (*on_squares, "--max-steps", "4", "--checkpoint-every", "2", "--out", tmp_path / "run")
    seconds = []
    monkeypatch.setattr(train, "report", lambda *a, **k: seconds.append(a[3]))
    mixer_step = train.STREAMS["pairs"]

    def stop_late(*args):
        if (tmp_path / "run/checkpoints/step-00000002").exists() and not seconds:
            raise KeyboardInterrupt
        return mixer_step(*args)

    monkeypatch.setitem(train.STREAMS, "pairs", stop_late)
    assert call(train, *flags).code == 130
    state = tmp_path / "run/checkpoints/step-00000002/state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"state": {**content["state"], "seconds": 1000.0}}))
    seconds.append(0.0)
    assert call(train, *flags).code == 0
    assert 1000 < seconds[-1] < 1100


def test_restart_begins_anew(on_squares, tmp_path, call, no_report):
    out = tmp_path / "run"
    flags = (*on_squares, "--max-steps", "2", "--checkpoint-every", "1", "--out", out)
    assert call(train, *flags).code == 0
    first = load_file(out / "model.safetensors")
    (out / "notes.txt").write_text("mine")
    done = call(train, *flags, "--restart", "--seed", "2")
    assert done.code == 0 and "continues" not in done.out
    assert read_history(out / "history.jsonl")["loss"][0] == [1, 2]
    assert json.loads((out / "config.json").read_text())["seed"] == 2
    assert (out / "notes.txt").read_text() == "mine"
    second = load_file(out / "model.safetensors")
    assert not torch.equal(first["text.embed.word.weight"], second["text.embed.word.weight"])


def test_no_grounding_trains_the_baseline_without_codes(on_squares, tmp_path, call):
    out = tmp_path / "run"
    done = call(train, *on_squares, "--max-steps", "1", "--no-grounding", "--objective.masked-codes", "1", "--out", out)
    assert done.code == 0, done.err
    weights = load_file(out / "model.safetensors")
    assert not [name for name in weights if name.startswith(("grounded", "masked_code"))]
    assert curves_of(out) == {name for name in DEFAULT_CURVES if "grounding" not in name}
    metrics = metrics_of(out)
    assert {name for name in METRICS if "code" not in name} <= metrics.keys()
    assert not [name for name in metrics if "code" in name] and not (out / "grounding.png").exists()
    assert (out / "curves.png").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--model.grounding.method", "nearest", "--objective.masked-codes", "1"),
        ("--model.grounding.project", "--model.contrast.share-grounding", "--model.grounding.positions"),
    ],
    ids=["nearest", "projected"],
)
def test_other_grounding_trains_and_evaluates(on_squares, tmp_path, call, flags):
    done = call(train, *on_squares, "--max-steps", "2", *flags, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    metrics = metrics_of(tmp_path / "run")
    assert {name for name in METRICS if "code" not in name} <= metrics.keys()
    assert ("val/codes_used" in metrics) == ("nearest" not in flags)
    codes = [name for name in load_file(tmp_path / "run/model.safetensors") if name.endswith("codebook")]
    assert codes == ["grounded.codebook"]


def test_init_takes_weights_and_tokenizer_of_a_run(trained, on_squares, tmp_path, call, no_report):
    same_model = ("--max-steps", "1", "--optim.lr", "0", "--init", trained.folder)
    done = call(train, *on_squares, *same_model, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (trained.folder / "tokenizer.json").read_bytes()
    ours, theirs = load_file(tmp_path / "run/model.safetensors"), load_file(trained.folder / "model.safetensors")
    # A learning rate of 0 leaves the weights that training began with.
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_accumulation_takes_as_many_batches_and_as_few_steps(on_squares, tmp_path, call, no_report, monkeypatch):
    batches = []
    own = train.STREAMS["pairs"]

    def counted(model, batch, weights, generator):
        batches.append((batch["image_id"].tolist(), generator.initial_seed()))
        return own(model, batch, weights, generator)

    monkeypatch.setitem(train.STREAMS, "pairs", counted)
    flags = ("--max-steps", "2", "--batch.accumulate", "3", "--out", tmp_path / "run")
    assert call(train, *on_squares, *flags).code == 0
    assert len(batches) == 6 and len({seed for _, seed in batches}) == 6
    assert read_history(tmp_path / "run/history.jsonl")["loss"][0] == [1, 2]


def test_accumulated_gradients_are_those_of_the_whole(on_squares, tmp_path, call, no_report):
    # The grounding loss of texts of about one length: the mean of two halves is about the mean of the whole.
    weights = []
    only = ("--objective.contrast", "0", "--objective.matching", "0", "--objective.masked-tokens", "0")
    flags = (*only, "--objective.two-views", "0", "--precision", "fp32", "--max-steps", "1", "--batch.images", "0")
    for name, texts, accumulate in (("whole", 8, 1), ("halves", 4, 2)):
        size = ("--batch.texts", texts, "--batch.accumulate", accumulate, "--out", tmp_path / name)
        assert call(train, *on_squares, *flags, "--batch.pairs", "0", *size).code == 0
        history = read_history(tmp_path / name / "history.jsonl")
        weights.append((history["gradient_norm"][1][0], history["texts/grounding"][1][0]))
    assert weights[0] == pytest.approx(weights[1], rel=0.05)


def test_folders_and_files_add_unaligned_streams(on_squares, squares, tmp_path, call, no_report):
    (tmp_path / "texts.txt").write_text("".join(f"A line of text, number {number}.\n" for number in range(9)))
    flags = ("--data.pair-share", "1", "--data.extra-images", squares / "images")
    done = call(
        train, *on_squares, *flags, "--data.extra-texts", tmp_path / "texts.txt", "--max-steps", "1",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert curves_of(tmp_path / "run") == DEFAULT_CURVES


@pytest.mark.parametrize("rate", ["0", "20"])
def test_temperatures_have_a_learning_rate_of_their_own(on_squares, tmp_path, call, no_report, rate):
    runs = {}
    for name, own in (("plain", "1"), ("own", rate)):
        flags = ("--max-steps", "2", "--precision", "fp32", "--optim.temperature-lr", own, "--out", tmp_path / name)
        assert call(train, *on_squares, *flags).code == 0
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    for name, began in (("contrastive.temperature", 0.07), ("grounded.temperature", 10.0)):
        plain, own = (abs(float(runs[run][name]) - began) for run in ("plain", "own"))
        # AdamW's steps are about as long as the rate says, whatever the gradient.
        assert plain > 0 and own == pytest.approx(plain * float(rate), rel=0.1, abs=1e-6)


TWO = """
import os, sys
sys.argv = sys.argv[1:]
import torch
from safetensors.torch import save_file
from vlblocks.training import run_main
from vlblocks_recipes.unimo2 import train

own = train.train
def kept(config, accelerator, model, *more):
    result = own(config, accelerator, model, *more)
    save_file(model.state_dict(), f"rank{accelerator.process_index}.safetensors")
    return result
train.train = kept
run_main(train.main)
"""


def test_two_processes_end_with_the_same_weights(on_squares, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "two.py", "train.py"]
    flags = (*on_squares, "--batch.pairs", "4", "--max-steps", "3", "--checkpoint-every", "2", "--out", "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *map(str, flags)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "run" and done.stdout.count("step 3/3") == 1
    first, second, saved = (
        load_file(tmp_path / name) for name in ("rank0.safetensors", "rank1.safetensors", "run/model.safetensors")
    )
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [name for name in first if not torch.equal(first[name], saved[name])] == []
    assert {name for name in METRICS if "code" not in name} <= metrics_of(tmp_path / "run").keys()
    state = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert len(state["ranks"]) == 2


def test_help_names_every_top_level_flag(call):
    done = call(train, "--help")
    assert done.code == 0
    for flag in ("preset", "out", "max-steps", "checkpoint-every", "init", "seed", "data.root", "task", "restart"):
        assert f"--{flag}" in done.out
    assert "--no-grounding" in done.out
