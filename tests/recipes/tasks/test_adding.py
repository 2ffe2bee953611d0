"""docs/adding_a_task.md: its task of two pictures, as it stands there, trains and evaluates."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import finetune, train
from vlblocks_recipes.unimo2.tasks import TASKS


@pytest.fixture
def written(root, tmp_path):
    """The page's code in a file."""
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/adding_a_task.md").read_text(), re.DOTALL)
    (tmp_path / "nlvr2.py").write_text(code)
    return tmp_path / "nlvr2.py"


@pytest.fixture
def nlvr2(written, monkeypatch):
    """The module, its task known to the programs for one test."""
    monkeypatch.setattr(TASKS, "_added", {})
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)
    spec = importlib.util.spec_from_file_location("nlvr2", written)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "nlvr2", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pictures(tmp_path):
    """NLVR2's layout: true where both pictures are of one colour."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    colours = ((200, 30, 30), (40, 60, 210))
    for name, count in (("train", 16), ("dev", 6), ("test1", 4)):
        lines = []
        for number in range(count):
            left, right = number % 2, number // 2 % 2
            for side, colour in enumerate((left, right)):
                Image.new("RGB", (40, 40), colours[colour]).save(folder / f"images/{name}-{number}-img{side}.png")
            row = {
                "identifier": f"{name}-{number}-0",
                "sentence": "both are of one colour",
                "label": str(left == right),
            }
            lines.append(json.dumps(row))
        (folder / f"{name}.json").write_text("\n".join(lines) + "\n")
    return folder


def test_it_is_short(written):
    assert len(written.read_text().splitlines()) < 120


def test_its_command_runs(written, quick, tmp_path):
    command = [sys.executable, str(written), "train", "--task", "nlvr2", *quick, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["val/examples"] == 20 and 0 <= metrics["val/accuracy"] <= 1


def test_it_trains_and_evaluates_on_files(nlvr2, pictures, checkpoint, tmp_path, call):
    flags = ("--init", checkpoint, "--data.root", pictures, "--max-steps", "4", "--evaluate-every", "2", "--batch", "8")
    done = call(train, "--task", "nlvr2", *flags, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    done = call(evaluation, "--run", tmp_path / "run", "--task", "nlvr2")
    assert done.code == 0, done.err
    assert json.loads(done.out)["examples"] == 4
    with open(pictures / "train.json", "a") as file:
        file.write('{"identifier": "train-0-1", "sentence": "x", "label": "Maybe"}\n')
    done = call(train, "--task", "nlvr2", *flags, "--out", tmp_path / "strict")
    assert done.code == 2 and "line 17" in done.err and done.err.count("\n") == 1
    done = call(train, "--task", "nlvr2", *flags, "--data.max-bad-share", "0.1", "--out", tmp_path / "lenient")
    assert done.code == 0 and json.loads((tmp_path / "lenient/metrics.json").read_text())["data/skipped"] == 1


def test_a_row_with_an_unreadable_picture(nlvr2, pictures, checkpoint):
    for name in ("train-2-img1.png", "dev-1-img0.png", "train-15-img0.png"):
        (pictures / "images" / name).write_bytes(b"no picture")
    config = nlvr2.Nlvr2Config(init=checkpoint, data=nlvr2.Nlvr2Data(root=pictures))
    start = finetune.start_from(config, scratch=None, own_tokenizer=None)
    task = nlvr2.Nlvr2(config, start.tokenizer, 32, finetune.BadData(share=0.5))
    data = task.dataset("train")
    # Another row's pictures, label and sentence together, not another picture under the same sentence.
    for lost, other in ((2, 3), (15, 0)):
        assert torch.equal(data[0, lost]["image"], data[0, other]["image"])
        assert data[0, lost]["label"] == data[0, other]["label"] and len(data[0, lost]["skipped"]) == 1
    assert data[0, 2]["label"] != task.rows("train")[1][2][1]
    base = finetune.Unimo2(start.model)
    net = finetune.TaskModel(base, task.make_head(base)).eval()
    with torch.no_grad():
        found = task.evaluate(net, "val", autocast=torch.no_grad, out=None)
    assert found["examples"] == 5 and task.bad.counts() == {"val/image": 1}


def test_it_learns_what_takes_both_pictures(nlvr2, pictures, checkpoint):
    config = nlvr2.Nlvr2Config(init=checkpoint, dropout=0.0, data=nlvr2.Nlvr2Data(root=pictures))
    start = finetune.start_from(config, scratch=None, own_tokenizer=None)
    task = nlvr2.Nlvr2(config, start.tokenizer, 32, finetune.BadData())
    base = finetune.Unimo2(start.model)
    finetune.load_parts(base, start.tensors, start.file)
    net = finetune.TaskModel(base, task.make_head(base))
    batch = task.batch([task.dataset("train")[0, index] for index in range(8)])
    assert batch["image"].shape == (8, 2, 3, 32, 32) and batch["labels"].tolist() == [1, 0, 0, 1, 1, 0, 0, 1]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        loss = task.loss(net, batch, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    blind = nlvr2.Nlvr2(nlvr2.Nlvr2Config(blind="image"), start.tokenizer, 32, finetune.BadData())
    assert blind.blinded(batch)["image"].abs().sum() == 0
