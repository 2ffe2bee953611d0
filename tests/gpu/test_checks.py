"""The checks of benchmarks/gpu_check.py as tests, where there is a GPU."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SUITES = sorted(path.stem for path in (BENCHMARKS / "checks").glob("*.py"))


def cases():
    if not torch.cuda.is_available():
        return [pytest.param(None, id=name) for name in SUITES]
    sys.path.insert(0, str(BENCHMARKS))
    return [
        pytest.param(check, id=f"{name}: {what}")
        for name in SUITES
        for what, check in importlib.import_module(f"checks.{name}").checks("cuda", quick=True)
    ]


@pytest.mark.parametrize("check", cases())
def test_on_the_gpu(check):
    check()
