"""Mistakes on the command line are answered in one line, with exit code 2."""

import errno
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.training.cli import parse_config, run_main


@dataclass(frozen=True)
class Model:
    width: int = 64
    kind: Literal["pre", "post"] = "pre"
    image: tuple[int, int] = (32, 32)

    def __post_init__(self):
        if self.width % 4:
            raise UserError(
                f"model.width={self.width}: 4 heads do not divide it: choose a multiple of 4, such as 64 or 128"
            )


@dataclass(frozen=True)
class Data:
    root: Path | None = None


@dataclass(frozen=True)
class Config:
    preset: str = "tiny"
    out: Path | None = None
    max_steps: int | None = None
    restart: bool = False
    grounding: bool = True
    lr: float = 1e-3
    model: Model = Model()
    data: Data = Data()


PRESETS = {"tiny": Config(), "base": replace(Config(), preset="base", lr=1e-4, model=Model(width=768))}


def test_flags_change_the_preset_and_nothing_else():
    assert parse_config(PRESETS, []) == PRESETS["tiny"]
    assert parse_config(PRESETS, [], default="base") == PRESETS["base"]
    flags = ["--max-steps", "4", "--model.width", "256", "--data.root", "/d"]
    given = [*flags, "--no-grounding", "--restart", "--out=/o", "--preset", "base"]
    assert parse_config(PRESETS, given) == replace(
        PRESETS["base"],
        max_steps=4,
        model=Model(width=256),
        data=Data(Path("/d")),
        grounding=False,
        restart=True,
        out=Path("/o"),
    )
    assert parse_config(PRESETS, ["--preset=base", "--model.image", "8", "16"]).model == Model(768, image=(8, 16))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "tinny"], ["unknown preset 'tinny'", "did you mean tiny", "tiny, base"]),
        (["--preset", "zzz"], ["unknown preset 'zzz'", "tiny, base"]),
        (["--preset"], ["--preset", "tiny, base"]),
        (["--preset", "--restart"], ["--preset", "tiny, base"]),
        (["--model.widht", "8"], ["unknown flag --model.widht", "--model.width"]),
        (["--max-step=8"], ["unknown flag --max-step:", "--max-steps"]),
        (["--width", "8"], ["unknown flag --width", "--model.width"]),
        (["--no-groundin"], ["unknown flag --no-groundin", "--no-grounding"]),
        (["--zebra", "1"], ["unknown flag --zebra", "--help"]),
        (["more"], ["'more'", "flags"]),
        (["--restart", "True"], ["'True'"]),
        (["--model.width", "wide"], ["--model.width", "wide", "--help"]),
        (["--model.width"], ["--model.width", "value"]),
        (["--model.image", "8"], ["--model.image", "2 values"]),
        (["--model.kind", "mid"], ["--model.kind", "mid", "pre"]),
        (
            ["--model.width", "66"],
            ["model.width=66: 4 heads do not divide it: choose a multiple of 4, such as 64 or 128"],
        ),
    ],
)
def test_every_mistake_is_one_line_that_names_it(argv, words, capfd):
    with pytest.raises(UserError) as error:
        parse_config(PRESETS, argv)
    text = str(error.value)
    assert "\n" not in text and not set("│╭╰─") & set(text)
    for word in words:
        assert word in text, text
    assert capfd.readouterr() == ("", "")


def test_help_lists_the_flags_and_the_presets_own_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(PRESETS, ["--preset", "base", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--model.width" in printed and "768" in printed and "--max-steps" in printed


@pytest.fixture(autouse=True)
def thread_hook(monkeypatch):
    """Puts back, at the test's end, the hook that `run_main` replaces for the rest of its process."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def outcome(main, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


def test_user_errors_and_full_disks_are_one_line_and_code_2(capsys):
    assert outcome(raising(UserError("a: wrong:\n  do b")), capsys) == (2, "error: a: wrong: do b\n")
    code, text = outcome(raising(OSError(errno.ENOSPC, "No space left on device", "/o/log")), capsys)
    assert code == 2 and text.startswith("error: /o/log: the disk is full") and text.count("\n") == 1
    code, text = outcome(raising(OSError(errno.ENOSPC, "No space left on device")), capsys)
    assert code == 2 and text.startswith("error: the disk is full")


def test_a_thread_that_met_the_full_disk_first_adds_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: print("traceback of", args.exc_value, file=sys.stderr))

    def main_after(error):
        thread = threading.Thread(target=raising(error))
        thread.start()
        thread.join()

    full = OSError(errno.ENOSPC, "No space left on device")
    assert outcome(lambda: main_after(full), capsys) == (0, "")
    assert outcome(lambda: main_after(ValueError("a bug")), capsys) == (0, "traceback of a bug\n")


def test_interrupts_end_with_130_and_results_pass_through(capsys):
    assert outcome(raising(KeyboardInterrupt()), capsys) == (130, "interrupted\n")
    assert outcome(lambda: None, capsys) == (0, "")
    assert outcome(lambda: 1, capsys) == (1, "")


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))
    with pytest.raises(OSError, match="denied"):
        run_main(raising(OSError(errno.EACCES, "denied")))


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("captions.json: empty: name another file")


def test_a_user_error_inside_a_loaders_worker_is_one_line_too(capsys):
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")
    code, text = outcome(lambda: len(list(loader)), capsys)
    assert (code, text) == (2, "error: captions.json: empty: name another file\n")


def test_a_real_process_prints_no_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from vlblocks.training.cli import parse_config, run_main\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n    preset: str = 'tiny'\n    steps: int = 1\n"
        "run_main(lambda: print(parse_config({'tiny': Config()}).steps))\n"
    )
    good = subprocess.run([sys.executable, script, "--steps", "7"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout, good.stderr) == (0, "7\n", "")
    bad = subprocess.run([sys.executable, script, "--stepz", "7"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown flag --stepz: did you mean --steps? (--help lists every flag)\n"
