"""The run's record: whole after a resume, quiet where there is no terminal, absent on other ranks."""

import io
import math

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.training import RunLog, read_history
from vlblocks.training import logging as run_logging


def run(folder, start, stop, *, scale=1.0, close=True, **keywords):
    log = RunLog(folder, total_steps=10, objectives=["loss/a", "loss/b"], start_step=start, lines=5, **keywords)
    for step in range(start + 1, stop + 1):
        log.step(step, {"loss/a": torch.tensor(scale * step, requires_grad=True), "loss/b": -step, "lr": 0.5})
    if close:
        log.close()
    return log


def test_history_after_a_kill_and_a_resume_shows_every_step_once(tmp_path):
    killed = run(tmp_path, 0, 8, stream=io.StringIO(), close=False)
    killed.flush()
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"step": 9, "loss/a": 4')
    run(tmp_path, 6, 10, scale=2.0, stream=io.StringIO())
    steps, values = read_history(tmp_path / "history.jsonl")["loss/a"]
    assert steps == list(range(1, 11))
    assert values == [1, 2, 3, 4, 5, 6, 14, 16, 18, 20]
    killed.close()


def test_history_is_readable_while_the_run_goes_on(tmp_path):
    log = run(tmp_path, 0, 3, stream=io.StringIO(), close=False)
    assert log.history()["loss/b"] == ([1, 2, 3], [-1.0, -2.0, -3.0])
    log.scalars(3, {"val/r1": 0.25})
    assert log.history()["val/r1"] == ([3], [0.25])
    log.close()
    log.close()


def test_console_has_progress_and_a_line_per_objective_with_means(tmp_path):
    stream = io.StringIO()
    run(tmp_path, 0, 4, stream=stream)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert len(lines) == 6
    assert lines[0].startswith("[#####...") and "step 2/10" in lines[0]
    assert lines[1].split() == ["loss/a", "1.5000"] and lines[2].split() == ["loss/b", "-1.5000"]
    assert lines[4].split() == ["loss/a", "3.5000"]


def test_a_terminal_gets_a_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    run(tmp_path, 0, 10, stream=stream)
    assert "10/10" in stream.getvalue() and "\r" in stream.getvalue()
    assert "loss/a" in stream.getvalue()


def test_tensorboard_holds_the_numbers_and_forgets_the_steps_that_were_lost(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 0, 8, stream=io.StringIO())
    run(tmp_path, 6, 10, scale=2.0, stream=io.StringIO())
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Scalars("loss/a")
    assert [event.step for event in events] == list(range(1, 11))
    assert events[7].value == 16.0


def test_numbers_that_are_not_finite_stay_in_the_history(tmp_path):
    log = RunLog(tmp_path, total_steps=1, stream=io.StringIO())
    log.step(1, {"loss": math.inf})
    log.close()
    assert "Infinity" not in (tmp_path / "history.jsonl").read_text()
    steps, values = read_history(tmp_path / "history.jsonl")["loss"]
    assert steps == [1] and math.isnan(values[0])
    RunLog(tmp_path, total_steps=1, start_step=1, stream=io.StringIO()).close()
    assert read_history(tmp_path / "history.jsonl")["loss"][0] == [1]


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_logging, "is_main", lambda: False)
    stream = io.StringIO()
    with RunLog(tmp_path / "run", total_steps=4, objectives=["a"], stream=stream) as log:
        log.step(4, {"a": 1.0})
        log.scalars(4, {"b": 1.0})
        log.note("hello")
        log.flush()
        assert log.history() == {}
    assert stream.getvalue() == "" and not (tmp_path / "run").exists()


def test_a_full_disk_at_the_end_does_not_hide_the_error_that_stopped_the_run(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyError, match="first"), RunLog(tmp_path, total_steps=4, stream=io.StringIO()):
        monkeypatch.setattr(run_logging.os, "fsync", full)
        raise KeyError("first")


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, total_steps=4, stream=io.StringIO())
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full") as error:
        patch.setattr(run_logging.os, "fsync", full)
        log.flush()
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    log.close()
