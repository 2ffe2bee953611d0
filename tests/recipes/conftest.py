"""Small runs of the UNIMO-2 recipe and small data sets, for every test of the recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from vlblocks.training import run_main

# A model of one small layer per tower, on batches of a few examples. What tests count on is said, whatever the preset.
SMALL = (
    *("--model.image-size", "64", "--model.patch-size", "16", "--model.positions", "66", "--data.max-text", "64"),
    *(word for name in ("contrast", "matching", "masked-tokens") for word in (f"--objective.{name}", "1")),
    *("--objective.grounding", "1", "--objective.two-views", "1", "--objective.masked-codes", "0"),
    *("--objective.fused-share", "0.5"),
    *("--model.width", "32", "--model.grounding.codes", "32", "--model.grounding.picks", "4"),
    *(word for tower in ("image", "text", "joint") for word in (f"--model.{tower}.heads", "2")),
    *(word for tower in ("image", "text", "joint") for word in (f"--model.{tower}.layers", "1")),
    *("--batch.pairs", "8", "--batch.images", "4", "--batch.texts", "4"),
)
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210), "white": (240, 240, 240)}


class Outcome(NamedTuple):
    """What a script left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Flags of a model that trains in a second or two."""
    return SMALL


@pytest.fixture(scope="session")
def script(root):
    """Run a script of the recipe in a process of its own: script("train.py", *flags, cwd=..., prefix=[...])."""

    def run(name: str, *flags, cwd: Path, prefix=(sys.executable,), timeout=240) -> Outcome:
        command = [*map(str, prefix), str(root / "recipes/unimo2" / name), *map(str, flags)]
        # On the CPU, where numbers repeat, also where there is a GPU.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def call(monkeypatch, capfd):
    """Run a script's `main` in this process as its command line would: call(module, *flags)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    filled = torch.utils.deterministic.fill_uninitialized_memory

    def run(module, *flags) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        AcceleratorState._reset_state(True)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(module.main)
        return Outcome(stop.value.code or 0, *capfd.readouterr())

    yield run
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    AcceleratorState._reset_state(True)


@pytest.fixture
def no_report(monkeypatch):
    """Training without the evaluation and the pictures after it; metrics.json still says that the run is finished."""
    from vlblocks_recipes.unimo2 import train

    def short(model, pairs, out, seconds, *, extra, autocast):
        (out / "metrics.json").write_text(json.dumps(extra))

    monkeypatch.setattr(train, "report", short)


def write_karpathy(root: Path, *, splits=(("train", 24), ("val", 10), ("test", 12)), captions: int = 2) -> Path:
    """A data set in Karpathy's layout: squares of one colour on another, two sentences each."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(5)
    entries = []
    for split, count in splits:
        for number in range(count):
            inner, outer = rng.choice(list(COLOURS), 2, replace=False)
            picture = np.full((40, 40, 3), COLOURS[outer], dtype=np.uint8)
            row, column = rng.integers(2, 20, size=2)
            picture[row : row + 16, column : column + 16] = COLOURS[inner]
            name = f"{split}_{number:02d}.png"
            Image.fromarray(picture).save(root / "images" / name)
            place = "near the top" if row < 10 else "near the bottom"
            texts = [f"A {inner} square on {outer} {place}.", f"There is {outer} around {inner}, number {number}."]
            sentences = [{"raw": text} for text in texts[:captions]]
            entries.append({"filename": name, "split": split, "sentences": sentences})
    (root / "dataset_squares.json").write_text(json.dumps({"images": entries, "dataset": "squares"}))
    return root


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    """A small data set in Karpathy's layout; not to be changed."""
    return write_karpathy(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def own_squares(tmp_path) -> Path:
    """The same, to spoil."""
    return write_karpathy(tmp_path / "squares")


@pytest.fixture(scope="session")
def on_squares(squares) -> tuple[str, ...]:
    """Flags that train the small model on the small data set, pairs and unaligned streams."""
    return (
        *SMALL,
        "--data.root",
        str(squares),
        "--data.pair-share",
        "0.5",
        "--data.workers",
        "0",
        "--data.vocab",
        "300",
    )


class Trained(NamedTuple):
    """A finished run of the default preset's corpus."""

    folder: Path  # the run's
    cwd: Path  # where the command was given
    flags: tuple[str, ...]
    outcome: Outcome


@pytest.fixture(scope="session")
def trained(script, tmp_path_factory) -> Trained:
    """The README's command with a smaller model and few steps, given in a folder that is not the repository."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    flags = (*SMALL, "--data.scenes", "1000", "--max-steps", "30", "--checkpoint-every", "8", "--keep-checkpoints", "2")
    return Trained(cwd / "runs/unimo2-tiny", cwd, flags, script("train.py", *flags, cwd=cwd))
