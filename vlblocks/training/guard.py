"""A guard against losses and gradients that are not finite."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.training.distributed import is_main, true_on_all

__all__ = ["NonFiniteError", "NonFiniteGuard"]

LOG = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class NonFiniteGuard:
    """Counts the steps to skip because a number was not finite, warns, and stops the run after `limit` in a row.

    Skipped steps leave the weights as they were, so a checkpoint saved in between is good. Counts go into the
    checkpoint through `state_dict`.
    """

    def __init__(self, *, limit: int = 10) -> None:
        if limit < 1:
            raise UserError(f"limit={limit}: allow at least 1 step")
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def check(self, step: int, **values: Tensor | float) -> bool:
        """True when every value is finite on every rank, so that the step may be taken.

        Call it on every rank. The names of `values` are those of the message.

        Raises: NonFiniteError, a UserError, at the `limit`'th step in a row that is not.
        """
        bad = [name for name, value in values.items() if not _finite(value)]
        if true_on_all(not bad):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        what = ", ".join(bad) or "a loss on another rank"
        # Each time twice as many: seen at once, and a long run's log is not full of it.
        if is_main() and self.skipped & (self.skipped - 1) == 0:
            LOG.warning("step %d: %s not finite, so it is skipped (%d so far)", step, what, self.skipped)
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"{what}: not finite in {self.in_a_row} steps in a row, the last of them step {step}: the last good "
                "checkpoint is kept; begin anew (--restart) with a lower learning rate or without mixed precision"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])


def _finite(value: Tensor | float) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    return math.isfinite(value)
