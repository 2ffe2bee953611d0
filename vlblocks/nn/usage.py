"""How much of a codebook is in use, by modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.ops.collectives import all_reduce_sum


class CodeUsage(NamedTuple):
    """How a codebook is used.

    Attributes:
        used: codes picked at least once.
        perplexity: exp of the picks' entropy in nats: as many evenly used codes; 0 before the first pick.
    """

    used: int
    perplexity: float


class CodeUsageTracker(nn.Module):
    """Counts how often each code was picked, by modality, over all ranks. Changes in `update` and `reset` only.

    Args:
        codes: C, size of the codebook.
        modalities: names that `update` and `usage` accept.
        decay: each update multiplies a modality's former counts with it; None counts everything since `reset`.

    Raises:
        UserError: no modality, or a decay outside (0, 1).
    """

    counts: Tensor  # [modalities, C]; long without decay, whole at any module dtype

    def __init__(
        self,
        *,
        codes: int,
        modalities: Sequence[str] = ("image", "text"),
        decay: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not modalities:
            raise UserError("modalities is empty: name at least one")
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"usage decay is {decay}: give a number between 0 and 1, or None to count everything")
        self.modalities, self.decay = tuple(modalities), decay
        dtype = torch.long if decay is None else torch.float32
        self.register_buffer("counts", torch.zeros(len(self.modalities), codes, dtype=dtype, device=device))

    def row(self, modality: str) -> int:
        """Index of a modality in `counts`. Raises UserError for an unknown one."""
        if modality not in self.modalities:
            raise UserError(f"modality is {modality!r}: choose one of {', '.join(self.modalities)}")
        return self.modalities.index(modality)

    @torch.no_grad()
    def update(self, indices: Tensor, modality: str, valid: Tensor | None = None) -> None:
        """Adds the picks of this step, summed over ranks; all ranks must call it.

        Args:
            indices: [...] long, picked codes.
            modality: what picked them.
            valid: [...] bool, picks that count; all if None.

        Raises:
            UserError: an unknown modality.
        """
        row = self.counts[self.row(modality)]
        picks = torch.ones_like(indices) if valid is None else valid.to(indices.dtype)
        # Counted as integers, whose sum does not depend on the order of the additions.
        picked = torch.zeros_like(row, dtype=torch.long).scatter_add_(0, indices.flatten(), picks.flatten())
        if self.decay is not None:
            row.mul_(self.decay)
        row.add_(all_reduce_sum(picked))

    def usage(self, modality: str | None = None) -> CodeUsage:
        """Usage by one modality, or by all together."""
        counts = (self.counts.sum(0) if modality is None else self.counts[self.row(modality)]).double()
        total = counts.sum()
        if total == 0:
            return CodeUsage(0, 0.0)
        entropy = torch.special.entr(counts / total).sum()
        return CodeUsage(int((counts > 0).sum()), float(entropy.exp()))

    def reset(self) -> None:
        """Forgets all counts."""
        self.counts.zero_()
