"""parity.py on the original's files: it holds on them, fails on changed ones, and refuses what is none."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from vlblocks.training import run_main
from vlblocks_recipes.unimo2 import parity

SHIPPED = ("image_topk", "pairs_no_grounding", "text_topk")
ALL = (
    *("caption_seq2seq", "pairs_image256", "pairs_nearest", "pairs_positions", "pairs_projection", "pairs_topk"),
    *("pairs_topk_padded", *SHIPPED),
)


def failures(path):
    rows = list(parity.compare(parity.read_golden(path)))
    assert rows
    return [row for row in rows if not row.ok]


@pytest.fixture
def backend(request, monkeypatch):
    """Every attention of the model computed by the named back end."""
    own = parity.model_config
    monkeypatch.setattr(parity, "model_config", lambda *args: replace(own(*args), backend=request.param))


@pytest.mark.parametrize("backend", ["reference", "sdpa"], indirect=True)
@pytest.mark.parametrize("case", SHIPPED)
def test_shipped_files_hold(root, backend, case):
    assert failures(root / f"tests/golden/{case}.npz") == []


@pytest.mark.parametrize("backend", ["reference", "sdpa"], indirect=True)
@pytest.mark.parametrize("case", ALL)
def test_reference_files_hold(reference, backend, case):
    assert failures(reference / f"golden/unimo2/{case}.npz") == []


def test_every_reference_file_is_listed(reference):
    assert sorted(path.stem for path in (reference / "golden/unimo2").glob("*.npz")) == sorted(ALL)


def run_parity(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_main(parity.main)
    return stop.value.code


def changed(path, to, **arrays):
    """A copy of a file with some entries replaced, or, where None, left out."""
    with np.load(path) as file:
        content = {key: file[key] for key in file.files}
    content = {key: value for key, value in (content | arrays).items() if value is not None}
    np.savez(to, **content)
    return to


def test_main_prints_every_error_beside_its_tolerance(root, monkeypatch, capsys):
    assert run_parity(monkeypatch, *(root / f"tests/golden/{case}.npz" for case in SHIPPED)) == 0
    printed = capsys.readouterr().out
    assert printed.count("within tolerance") == 3 and "FAIL" not in printed
    for name in ("out.indices", "out.vit_out", "out.total_loss", "grad.vq_emb", "grad.topk_temperature"):
        assert f"  ok   {name} " in printed
    with np.load(root / "tests/golden/text_topk.npz") as file:
        rows = sum(key.startswith(("out.", "grad.")) for key in file.files)
    assert f"text_topk.npz: {rows} of {rows} within tolerance" in printed


@pytest.mark.parametrize(
    "name", ["text.word_embedding", "text.encoder_layer_1_multi_head_att_query_fc.w_0", "vq_emb", "topk_temperature"]
)
def test_a_changed_weight_fails(root, tmp_path, monkeypatch, capsys, name):
    path = root / "tests/golden/text_topk.npz"
    with np.load(path) as file:
        weight = file[f"param.{name}"] * 1.01
    other = changed(path, tmp_path / "other.npz", **{f"param.{name}": weight})
    assert run_parity(monkeypatch, path, other) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["num_attention_heads", "text_num_attention_heads"])
def test_heads_are_read_for_each_tower(root, tmp_path, field):
    path = root / "tests/golden/text_topk.npz"
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
    other = changed(path, tmp_path / "other.npz", config=json.dumps(config | {field: 2}))
    assert failures(other)


def test_an_output_that_ours_lacks_fails(root, tmp_path):
    other = changed(root / "tests/golden/text_topk.npz", tmp_path / "other.npz", **{"out.new_loss": np.ones(())})
    assert [row.name for row in failures(other)] == ["out.new_loss"]


@pytest.mark.parametrize("broken", ["text", "config", "entry", "objects", "field", "weight", "missing"])
def test_a_file_of_another_format_is_one_line_and_exit_2(root, tmp_path, monkeypatch, capsys, broken):
    good, path = root / "tests/golden/text_topk.npz", tmp_path / "broken.npz"
    with np.load(good) as file:
        config = json.loads(str(file["config"]))
    if broken == "text":
        path.write_text("not an archive")
    elif broken == "config":
        changed(good, path, config=None)
    elif broken == "entry":
        changed(good, path, **{"weights.extra": np.ones(2)})
    elif broken == "objects":
        np.savez(path, config=np.array({"a": 1}, dtype=object))
    elif broken == "field":
        changed(good, path, config=json.dumps({key: config[key] for key in config if key != "hidden_size"}))
    elif broken == "weight":
        changed(good, path, **{"param.text.encoder_layer_0_ffn_fc_1.b_0": None})
    assert run_parity(monkeypatch, good, path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(path) in error
