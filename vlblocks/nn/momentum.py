"""A slow copy of a module and a queue of its features; both change only in an explicit `update`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.ops.collectives import gather


class MomentumEncoder(nn.Module):
    """A copy of a module whose parameters follow it slowly (MoCo: He et al., 2020; ALBEF: Li et al., 2021).

    The copy computes without gradients and in evaluation mode always. The followed module is not part of this one: its
    parameters appear once in a state dict that holds both. Several modules are followed together as one
    `nn.ModuleDict`.

    Args:
        module: what to follow; the copy starts equal to it, as `module`.
        momentum: the share of the copy that an update keeps.

    Raises:
        UserError: a momentum outside [0, 1].
    """

    def __init__(self, module: nn.Module, *, momentum: float = 0.995) -> None:
        super().__init__()
        _check_momentum(momentum)
        self.momentum = momentum
        # In a tuple, where nn.Module does not find it.
        self._followed = (module,)
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        """Leaves the copy in evaluation mode: its outputs are targets."""
        return super().train(False)

    @torch.no_grad()
    def update(self, momentum: float | None = None) -> None:
        """copy = momentum * copy + (1 - momentum) * followed; buffers are copied. To be called once per optimiser step.

        Args:
            momentum: of this update, where it follows a schedule; 0 makes the copy equal (after loading weights, say).
        """
        momentum = self.momentum if momentum is None else momentum
        _check_momentum(momentum)
        followed = self._followed[0]
        for slow, fast in zip(self.module.parameters(), followed.parameters(), strict=True):
            slow.lerp_(fast.to(slow), 1.0 - momentum)
        for kept, current in zip(self.module.buffers(), followed.buffers(), strict=True):
            kept.copy_(current)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy returns for the same arguments as the followed module's."""
        return self.module(*args, **kwargs)


def _check_momentum(momentum: float) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise UserError(f"momentum is {momentum}: give a number from 0 to 1")


class FeatureQueue(nn.Module):
    """The latest `size` features of past batches, as further negatives (MoCo: He et al., 2020).

    A ring: buffers `features` [size, width] (zeros at first), `cursor`, where the next row goes, and `filled`, how many
    rows were ever written, at most size. All ranks hold the same.

    Args:
        size: number of rows kept.
        width: of a feature.

    Raises:
        UserError: a size below 1.
    """

    features: Tensor
    cursor: Tensor
    filled: Tensor

    def __init__(self, *, size: int, width: int, device=None, dtype=None) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"size is {size}: give 1 row or more")
        self.register_buffer("features", torch.zeros(size, width, device=device, dtype=dtype))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long, device=device))

    @property
    def size(self) -> int:
        """Number of rows kept."""
        return self.features.shape[0]

    @property
    def valid(self) -> Tensor:
        """[size] bool, True = the row holds a feature."""
        return torch.arange(self.size, device=self.features.device) < self.filled

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Adds features [b, width] of every rank, in rank order, in place of the oldest.

        Any b: it need not divide the size nor be the same on all ranks, and of more than `size` rows the last remain.

        Raises:
            UserError: another width.
        """
        if features.dim() != 2 or features.shape[1] != self.features.shape[1]:
            raise UserError(f"features have shape {list(features.shape)}: give [b, {self.features.shape[1]}]")
        rows = gather(features).to(self.features)
        n = rows.shape[0]
        kept = rows[max(n - self.size, 0) :]
        places = torch.arange(n - kept.shape[0], n, device=rows.device) + self.cursor
        self.features.index_copy_(0, places % self.size, kept)
        self.cursor.copy_((self.cursor + n) % self.size)
        self.filled.copy_((self.filled + n).clamp(max=self.size))
