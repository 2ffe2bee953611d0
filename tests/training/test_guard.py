"""Steps whose loss is not finite are skipped and counted, and ten in a row stop the run."""

import math

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.training import NonFiniteError, NonFiniteGuard


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(-math.inf), torch.tensor([1.0, math.nan])])
def test_skips_what_is_not_finite_and_counts_it(bad):
    guard = NonFiniteGuard()
    assert guard.check(1, loss=1.0, gradient_norm=torch.tensor(2.0))
    assert not guard.check(2, loss=1.0, gradient_norm=bad)
    assert guard.check(3, loss=0.5)
    assert guard.state_dict() == {"skipped": 1, "in_a_row": 0}


def test_ten_in_a_row_stop_the_run_with_one_line():
    guard = NonFiniteGuard()
    for step in range(9):
        assert not guard.check(step, loss=math.nan)
    with pytest.raises(NonFiniteError) as error:
        guard.check(9, loss=math.nan)
    assert isinstance(error.value, UserError)
    text = str(error.value)
    assert "\n" not in text and "loss: not finite in 10 steps in a row" in text and "checkpoint is kept" in text


def test_nine_and_one_good_step_go_on():
    guard = NonFiniteGuard()
    for step in range(40):
        guard.check(step, loss=1.0 if step % 10 == 9 else math.nan)
    assert guard.skipped == 36


def test_skipped_steps_are_said_each_time_twice_as_many(caplog):
    guard = NonFiniteGuard()
    for step in range(1, 21):
        guard.check(step, loss=1.0, gradient=math.nan if step % 2 else 1.0)
    assert [record.getMessage() for record in caplog.records] == [
        f"step {step}: gradient not finite, so it is skipped ({count} so far)"
        for step, count in ((1, 1), (3, 2), (7, 4), (15, 8))
    ]


def test_counts_survive_a_resume():
    guard = NonFiniteGuard(limit=3)
    guard.check(1, loss=math.nan)
    guard.check(2, loss=math.nan)
    resumed = NonFiniteGuard(limit=3)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError):
        resumed.check(3, loss=math.nan)
    assert resumed.skipped == 3


def test_an_impossible_limit_is_refused():
    with pytest.raises(UserError, match="limit=0"):
        NonFiniteGuard(limit=0)
