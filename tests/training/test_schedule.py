"""The learning rate at the steps where it matters, and through a real optimiser."""

import math

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.training import Schedule, set_lr


def test_linear_warms_up_to_one_and_falls_to_zero_after_the_last_step():
    schedule = Schedule(kind="linear", total=10, warmup=4)
    assert [schedule(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [schedule(s) for s in (4, 7, 10, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert schedule(9) > 0  # the last step still moves the weights


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    schedule = Schedule(kind="cosine", total=12, warmup=2, floor=0.1)
    assert schedule(2) == 1.0
    assert schedule(7) == pytest.approx(0.55)
    assert schedule(12) == pytest.approx(0.1)
    values = [schedule(s) for s in range(2, 13)]
    assert values == sorted(values, reverse=True)


def test_step_decay_multiplies_at_each_milestone():
    schedule = Schedule(kind="step", total=40, milestones=(24, 32), gamma=0.1)
    assert [schedule(s) for s in (0, 23, 24, 31)] == [1.0, 1.0, 0.1, 0.1]
    assert schedule(32) == pytest.approx(0.01)


def test_constant_stays_after_warm_up():
    schedule = Schedule(kind="constant", total=10, warmup=2)
    assert [schedule(s) for s in (0, 1, 5, 10)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_run_that_is_all_warm_up_divides_by_nothing(kind):
    schedule = Schedule(kind=kind, total=3, warmup=3)
    assert all(math.isfinite(schedule(s)) for s in range(5))


@pytest.mark.parametrize(("arguments", "word"), [({"warmup": 11}, "11"), ({"warmup": -1}, "-1"), ({"kind": "x"}, "x")])
def test_impossible_schedules_are_refused(arguments, word):
    with pytest.raises(UserError, match=word):
        Schedule(total=10, **arguments)


def test_set_lr_scales_every_group_from_its_own_base_again_and_again():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.4)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert set_lr(optimizer, 0.5) == pytest.approx(0.05)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.1])
