"""The two ways of the train_step suite compute the same losses and gradients."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlblocks_recipes.unimo2.model import Unimo2

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from suites import train_step

    yield train_step
    for name in ("suites", "suites.train_step", "harness", "memory"):
        sys.modules.pop(name, None)


def test_same_losses_and_gradients(suite):
    torch.manual_seed(0)
    config = suite.configs()["tiny"]
    ours = Unimo2(config).double()
    theirs = Unimo2(replace(config, backend="reference")).double()
    theirs.load_state_dict(ours.state_dict())
    batch = suite.make_batch(config, 5)
    batch = {
        stream: {key: value.double() if value.is_floating_point() else value for key, value in part.items()}
        for stream, part in batch.items()
    }
    losses = suite.original_losses(theirs, batch)
    for stream, part in losses.items():
        mine = suite.our_losses(ours, batch, stream)
        assert mine.keys() == part.keys()
        for name, value in part.items():
            message = f"{stream}/{name}: {mine[name].item()} and {value.item()}"
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12, msg=message)
    suite.our_step(ours, batch)
    suite.original_step(theirs, batch)
    compared = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared > 50
