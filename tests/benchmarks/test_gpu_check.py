"""The command for a GPU, run dry on a CPU: the same checks and benchmarks at small sizes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks/checks").glob("*.py"))


def run(root, *arguments):
    command = [sys.executable, str(root / "benchmarks" / "gpu_check.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("suite", SUITES)
def test_dry_run(request, tmp_path, suite):
    done = run(request.config.rootpath, "--out", tmp_path, "--suite", suite, "--device", "cpu")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "FAILED" not in done.stdout and done.stdout.count(": holds (") >= 3
    found = json.loads((tmp_path / f"{suite}.json").read_text())
    assert found["rows"] and "held" in found["header"]["checks"]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8 and f"{suite}.md" in files and any(name.endswith(".png") for name in files)
    # A provider may be missing here, but ours is not.
    assert all(row["p50_ms"] for row in found["rows"] if row["ours"])


def test_without_a_gpu_it_says_so(request, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(request.config.rootpath, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--device cpu" in done.stderr


def test_a_check_that_fails_stops_its_benchmark(request, tmp_path, monkeypatch):
    folder = request.config.rootpath / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("benchmarks_gpu_check", folder / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def fails():
        raise AssertionError("they differ")

    checks = type(sys)("checks.broken")
    checks.checks = lambda device, quick: [("holds", lambda: None), ("parity", fails)]
    monkeypatch.setitem(sys.modules, "checks.broken", checks)
    assert module.run_checks("broken", "cpu", True) == (1, 1)
