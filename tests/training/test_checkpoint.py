"""Checkpoints: exact to the bit, whole or absent, and clear about what is wrong with them."""

import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from vlblocks.errors import UserError
from vlblocks.training import (
    adamw,
    get_rng_state,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_weights,
    parameter_groups,
    save_checkpoint,
    set_rng_state,
)


def make():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 4, bias=False))
    return model, adamw(parameter_groups(model, weight_decay=0.1), lr=1e-2)


def train(model, optimizer, steps):
    for _ in range(steps):
        # All three generators and the dropout's draws take part.
        x = torch.randn(5, 4) * float(np.random.rand()) + random.random()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def small(folder, step, **keywords):
    return save_checkpoint(folder, step, model={"w": torch.full((3,), float(step))}, **keywords)


def check_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model=model.state_dict(), optimizer=optimizer, state={"epoch": 1, "at": (2, 0.1)})
    train(model, optimizer, 4)

    other, other_optimizer = make()
    torch.manual_seed(99)
    saved = load_checkpoint(latest_checkpoint(tmp_path))
    load_weights(other, saved.model, source=saved.path)
    load_optimizer(other_optimizer, saved.optimizer, source=saved.path)
    set_rng_state(saved.of_rank(0, 1)["rng"])
    train(other, other_optimizer, 4)

    assert saved.step == 3 and saved.state == {"epoch": 1, "at": (2, 0.1)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    mine, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for index, entry in mine["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, theirs["state"][index][key])


def test_random_state_comes_back_through_a_file(tmp_path):
    np.random.randn()  # leaves a cached second draw in NumPy's generator
    path = small(tmp_path, 1)

    def draw():
        return random.random(), random.gauss(0, 1), float(np.random.randn()), torch.randn(3).tolist()

    first = draw()
    assert draw() != first
    set_rng_state(load_checkpoint(path).ranks[0]["rng"])
    assert draw() == first
    if not torch.cuda.is_available():
        assert "cuda" not in get_rng_state()


def test_only_the_last_are_kept_and_nothing_else_is_left(tmp_path):
    for step in (5, 10, 15, 20):
        path = small(tmp_path, step, keep=2)
    assert path.name == "step-00000020"
    assert sorted(os.listdir(tmp_path)) == ["step-00000015", "step-00000020"]
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if not name.endswith(("json", "tensors"))]


def test_a_step_saved_again_replaces_its_checkpoint_without_a_gap(tmp_path):
    small(tmp_path, 5)
    path = small(tmp_path, 5, state={"again": True})
    assert os.listdir(tmp_path) == ["step-00000005-1"]
    assert latest_checkpoint(tmp_path) == path and load_checkpoint(path).state == {"again": True}


@pytest.mark.parametrize("damage", ["no head", "half a head", "no tensors", "half the tensors"])
def test_half_written_folders_are_passed_over_and_cleared_away(tmp_path, damage):
    small(tmp_path, 5)
    broken = small(tmp_path, 10)
    file = broken / ("state.json" if "head" in damage else "model.safetensors")
    if damage.startswith("no"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20])
    assert latest_checkpoint(tmp_path).name == "step-00000005"
    with pytest.raises(UserError) as error:
        load_checkpoint(broken)
    check_line(error, file, "older checkpoint")
    small(tmp_path, 7)
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000007"]


def test_no_folder_and_other_folders_hold_no_checkpoint(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "step-00000003").write_text("a file")
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("kind", ["crash", "full"])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open"])
def test_whichever_system_call_fails_the_last_checkpoint_stays(tmp_path, monkeypatch, call, kind):
    small(tmp_path, 1, keep=1)
    real, failed = getattr(os, call), 0
    error = OSError(errno.ENOSPC, "No space left on device") if kind == "full" else RuntimeError("crash")
    for nth in range(1, 12):
        count = 0

        def fail(*args, nth=nth, **kwargs):
            nonlocal count
            count += 1
            if count == nth:
                raise error
            return real(*args, **kwargs)

        before = load_checkpoint(latest_checkpoint(tmp_path)).step
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                small(tmp_path, before + 1, keep=1)
            except (RuntimeError, UserError, OSError) as stopped:
                failed += 1
                if isinstance(stopped, UserError):
                    check_line(pytest.ExceptionInfo.from_exception(stopped), "disk is full", "kept")
        after = load_checkpoint(latest_checkpoint(tmp_path))
        assert after.step in (before, before + 1)
        assert torch.equal(after.model["w"], torch.full((3,), float(after.step)))
    assert failed >= (1 if call in ("rename", "mkdir", "open") else 3)


def test_a_full_disk_says_what_is_kept(tmp_path, monkeypatch):
    small(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(UserError) as error:
        small(tmp_path, 2)
    check_line(error, tmp_path / "step-00000002", "disk is full", "step-00000001 is kept")
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_later_format_names_the_remedy(tmp_path):
    path = small(tmp_path, 1)
    head = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**head, "format": 99}))
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    check_line(error, path, "99", "version")


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path):
    path = small(tmp_path, 1)
    torch.save({"w": torch.ones(3)}, path / "model.safetensors")
    head = json.loads((path / "state.json").read_text())
    head["files"]["model.safetensors"] = (path / "model.safetensors").stat().st_size
    (path / "state.json").write_text(json.dumps(head))
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    check_line(error, path / "model.safetensors", "pickle", "convert")


def test_unknown_missing_and_misshapen_keys_are_named(tmp_path):
    model, _ = make()
    good = model.state_dict()
    before = {name: tensor.clone() for name, tensor in good.items()}
    bad = {f"extra{i}": torch.ones(1) for i in range(5)} | {k: v for k, v in good.items() if k != "1.bias"}
    with pytest.raises(UserError) as error:
        load_weights(model, bad, source="f.safetensors")
    check_line(error, "f.safetensors", "unknown keys extra0, extra1, extra2 and 2 more", "missing keys 1.bias")
    with pytest.raises(UserError) as error:
        load_weights(model, {**good, "0.weight": torch.ones(4, 9)}, source="f.safetensors")
    check_line(error, "0.weight is [4, 9] in the file but [8, 4] in the model")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_runs_optimiser_is_refused(tmp_path):
    _, optimizer = make()
    saved = optimizer.state_dict()
    other = adamw(parameter_groups(nn.Linear(4, 4), weight_decay=0.1), lr=1e-2)
    with pytest.raises(UserError) as error:
        load_optimizer(other, saved, source="here")
    check_line(error, "here", "[2, 3]", "[1, 1]")
    saved["param_groups"][0]["names"] = ["0.weight", "5.weight"]
    with pytest.raises(UserError) as error:
        load_optimizer(optimizer, saved, source="here")
    check_line(error, "5.weight where this run has 3.weight")


def test_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(UserError, match="saved by 1 processes, resumed by 2"):
        load_checkpoint(small(tmp_path, 1)).of_rank(0, 2)


def test_a_moved_checkpoint_still_loads(tmp_path):
    path = small(tmp_path / "a", 1)
    shutil.move(path, tmp_path / path.name)
    assert load_checkpoint(tmp_path / path.name).step == 1
