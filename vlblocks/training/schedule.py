"""The learning rate as a pure function of the step: nothing to store, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vlblocks.errors import UserError

__all__ = ["Schedule", "set_lr"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then decay: `schedule(step)` is the factor on the base rate of the step'th optimiser step, from 0.

    The factor rises linearly over the first `warmup` steps, whose last has 1. Then it falls from 1 to `floor` at
    step `total`, along a line or half a cosine; or, with `step`, is multiplied by `gamma` at each of `milestones`
    (in steps; UNIMO-2's retrieval: 0.1 after epochs 24 and 32 of 40); or, with `constant`, stays.

    Raises: UserError for an unknown kind, a negative warm-up, or one that is longer than `total`.
    """

    kind: Literal["linear", "cosine", "step", "constant"] = "linear"
    total: int
    warmup: int = 0
    floor: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine", "step", "constant"):
            raise UserError(f"schedule kind {self.kind!r}: choose linear, cosine, step or constant")
        if not 0 <= self.warmup <= self.total:
            raise UserError(f"warm-up of {self.warmup} steps: must lie between 0 and the {self.total} steps of the run")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        if self.kind == "step":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (1.0 - self.floor) * left


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's rate to `factor` times the rate it was made with; returns the first group's.

    The first call notes the base rate in the group as "initial_lr", which checkpoints keep.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])
