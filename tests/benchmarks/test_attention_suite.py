"""The attention suite's floor and errors mean what its tables say."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from suites import attention

    yield attention
    for name in ("suites", "suites.attention", "harness", "memory"):
        sys.modules.pop(name, None)


def test_the_floor_counts_the_operations_own_products(suite):
    pytest.importorskip("vlblocks_kernels.attention_triton")
    problem = suite.Problem("pairs", 2, 2, 9, 12, "float32", "cpu")
    real = problem._replace(text=1)  # Of which nothing is padded.
    with FlopCounterMode(display=False) as counted:
        suite.through("triton", real, *real.inputs())
    assert counted.get_total_flops() == suite.flops_of(real, False)
    with FlopCounterMode(display=False) as counted:
        suite.with_backward(partial(suite.through, "triton"))(real, *real.inputs())
    assert counted.get_total_flops() == suite.flops_of(real, True)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", ["pairs", "captioning", "text only"])
def test_a_dense_mask_is_compared_where_rows_see_a_key(suite, mode, backward):
    problem = suite.Problem(mode, 3, 2, 9, 12, "float32", "cpu")
    assert not problem.mask().dense().any(-1).all(), "no row is blind"
    exact, dense = (
        suite.compared(call, backward, problem, qkv)
        for call, qkv in (
            (partial(suite.through, "reference"), [x.double() for x in problem.inputs()]),
            (partial(suite.dense, None), problem.inputs()),
        )
    )
    assert len(exact) == (3 if backward else 1)
    assert suite.relative_error(dense, exact) < 1e-5
    wrong = [x + 0.01 * torch.randn_like(x) for x in dense]
    assert suite.relative_error(wrong, exact) > 1e-3
