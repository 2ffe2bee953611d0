"""Atomic files, and errors of one line for files that are not what they should be."""

import errno
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.training import read_json, read_tensors, write_atomic, write_json_atomic, write_tensors_atomic
from vlblocks.training.packing import pack, unpack


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text
    return text


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path):
    table = torch.randn(4, 6)
    tensors = {
        "float": table,
        "tied": table,
        "row": table[1],
        "transposed": table.t(),
        "bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "empty2": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    write_tensors_atomic(tmp_path / "a" / "m.safetensors", tensors, {"made": "here"})
    found = read_tensors(tmp_path / "a" / "m.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert os.listdir(tmp_path / "a") == ["m.safetensors"]


def test_json_comes_back_and_numbers_that_are_not_finite_become_null(tmp_path):
    write_json_atomic(tmp_path / "m.json", {"a": 1.5, "b": math.nan, "c": [math.inf, "ü"]})
    assert read_json(tmp_path / "m.json") == {"a": 1.5, "b": None, "c": [None, "ü"]}
    assert "Infinity" not in (tmp_path / "m.json").read_text(encoding="utf-8")


def test_files_get_the_permissions_that_any_new_file_gets(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_json_atomic(tmp_path / "m.json", {})
    assert (tmp_path / "m.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch, failing):
    path = tmp_path / "m.json"
    write_json_atomic(path, {"old": 1})

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        if failing == "write":
            write_atomic(path, full)
        else:
            patch.setattr(os, failing, full)
            write_json_atomic(path, {"new": 2})
    one_line(error, path, "disk is full", "free")
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["m.json"]


def test_other_system_errors_keep_their_own_type(tmp_path):
    def broken(_path):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        write_atomic(tmp_path / "a", broken)


@pytest.mark.parametrize(("name", "content"), [("j.json", b"{'a': 1}"), ("k.json", b"\xff\xfe\x00"), ("l.json", b"")])
def test_bad_json_names_its_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / name)
    one_line(error, tmp_path / name)


def test_missing_files_and_folders_in_their_place_are_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        for read in (read_json, read_tensors):
            with pytest.raises(UserError) as error:
                read(path)
            one_line(error, path)


@pytest.mark.parametrize("name", ["weights.pt", "model.safetensors"])
@pytest.mark.parametrize("legacy", ["zip", "torch", "pickle"])
def test_a_pickle_is_recognised_under_any_name(tmp_path, name, legacy):
    path = tmp_path / name
    if legacy == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=legacy == "zip")
    with pytest.raises(UserError) as error:
        read_tensors(path)
    one_line(error, path, "pickle", "convert")


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_a_file_that_was_cut_short_says_so(tmp_path, left):
    path = tmp_path / "m.safetensors"
    write_tensors_atomic(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError) as error:
        read_tensors(path)
    one_line(error, path, "cut short" if left in (40, -1) else "safetensors")


def test_packing_loses_nothing():
    tree = {
        "ints": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}, 7: None},
        "tuple": (0.9, 0.98, (1, [2, "x"])),
        "marks": {"$tensor": "not a mark"},
        "floats": [math.inf, -math.inf, 0.1, np.float64(0.25)],
        "keys": {True: 1, 2.5: 2, None: 3},
        "empty": {},
    }
    packed, tensors = pack(tree, "t")
    back = unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors)
    assert torch.equal(back["ints"][0].pop("exp_avg"), tree["ints"][0].pop("exp_avg"))
    assert torch.equal(back["ints"][0].pop("step"), tree["ints"][0].pop("step"))
    assert back == tree
    assert isinstance(back["tuple"][2], tuple) and isinstance(back["tuple"][2][1], list)
    nan = unpack(json.loads(json.dumps(pack(math.nan, "t")[0])), {})
    assert math.isnan(nan)


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, {(1, 2): 3}])
def test_packing_refuses_what_it_could_not_give_back(value):
    with pytest.raises(TypeError, match="cannot be stored"):
        pack(value, "state")
