"""Vector quantizer: replaces every token by its nearest code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.ops.collectives import all_reduce_sum, broadcast, gather_sizes, row_offset
from vlblocks.ops.grounding import GroundingBackend, Metric, nearest_code, segment_sum

from .usage import CodeUsage, CodeUsageTracker

SMOOTHING = 1e-5
"""Laplace smoothing of the EMA counts."""


class QuantizerOutput(NamedTuple):
    """What a quantizer makes of tokens [..., D].

    Attributes:
        codes: [..., D] the tokens' codes; 0 where invalid.
        indices: [...] long; 0 where invalid.
        loss: scalar, codebook_loss + commitment * commitment_loss; None without loss.
        codebook_loss: scalar, moves codes to tokens; 0 with an EMA codebook.
        commitment_loss: scalar, moves tokens to codes.
    """

    codes: Tensor
    indices: Tensor
    loss: Tensor | None
    codebook_loss: Tensor | None
    commitment_loss: Tensor | None


class VectorQuantizer(nn.Module):
    """Nearest code per token, with a codebook trained by gradient or by moving averages in `update`.

    With metric "cosine" codes and tokens are compared, returned and trained at unit length. No [tokens, C] tensor, and
    no one-hot one, is ever held.

    Args:
        width: D.
        codes: C, size of the codebook.
        metric: "l2" or "cosine".
        codebook: "gradient" (the codebook loss trains it) or "ema" (`update` moves codes to their tokens' moving mean).
        decay: of the moving averages, per update.
        commitment: weight of the commitment loss.
        revive_after: `update` puts a random token of the batch in the place of a code that no token took in so many
            updates in a row; None leaves such codes. It reads the device: only then does `update` wait for it.
        count_padding: treat invalid tokens as real, as the original implementation does.
        modalities: names by which `update`, `track` and `usage` tell tokens apart.
        backend: of the operations in `vlblocks.ops.grounding`.

    Raises:
        UserError: no codes, an unknown metric or kind of codebook, a decay outside [0, 1), or a revive_after below 1.

    Source: van den Oord et al. 2017 (VQ-VAE), appendix A.1 for the moving averages; unimo2_spec item 18.
    """

    idle: Tensor  # [C] long, updates since a token took the code
    ema_counts: Tensor  # [C] float32, codebook "ema" only
    ema_sums: Tensor  # [C, D] float32, codebook "ema" only

    def __init__(
        self,
        *,
        width: int,
        codes: int,
        metric: Metric = "l2",
        codebook: Literal["gradient", "ema"] = "gradient",
        decay: float = 0.99,
        commitment: float = 0.25,
        revive_after: int | None = None,
        count_padding: bool = False,
        modalities: Sequence[str] = ("image", "text"),
        backend: GroundingBackend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if codes < 1:
            raise UserError(f"codes is {codes}: a codebook needs at least 1")
        if metric not in ("l2", "cosine"):
            raise UserError(f"metric is {metric!r}: choose l2 or cosine")
        if codebook not in ("gradient", "ema"):
            raise UserError(f"codebook is {codebook!r}: choose gradient or ema")
        if not 0 <= decay < 1:
            raise UserError(f"decay is {decay}: give a number from 0 to below 1")
        if revive_after is not None and revive_after < 1:
            raise UserError(f"revive_after is {revive_after}: give at least 1 update, or None to leave unused codes")
        self.metric: Metric = metric
        self.ema, self.decay, self.commitment = codebook == "ema", decay, commitment
        self.revive_after, self.count_padding, self.backend = revive_after, count_padding, backend
        vectors = torch.empty(codes, width, device=device, dtype=dtype)
        self.codebook = nn.Parameter(vectors, requires_grad=not self.ema)
        self.tracker = CodeUsageTracker(codes=codes, modalities=modalities, device=device)
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.long, device=device))
        if self.ema:
            self.register_buffer("ema_counts", torch.empty(codes, device=device))
            self.register_buffer("ema_sums", torch.empty(codes, width, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codes from N(0, 0.02), of unit length with metric "cosine"; averages that stand for one token per code."""
        nn.init.normal_(self.codebook, std=0.02)
        if self.metric == "cosine":
            self.codebook.copy_(F.normalize(self.codebook, dim=1))
        self.idle.zero_()
        if self.ema:
            self.ema_counts.fill_(1)
            self.ema_sums.copy_(self.codebook)

    def extra_repr(self) -> str:
        codes, width = self.codebook.shape
        kind = "ema" if self.ema else "gradient"
        return (
            f"width={width}, codes={codes}, metric={self.metric}, codebook={kind}, count_padding={self.count_padding}"
        )

    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, with_loss: bool = True, straight_through: bool = False
    ) -> QuantizerOutput:
        """Looks up every token's code.

        Args:
            x: [..., D] tokens.
            valid: [...] bool, True = real; all real if None.
            with_loss: compute the losses, means over valid tokens and D; float32 also under autocast.
            straight_through: give the codes' gradient to x instead of to the codebook. An EMA codebook takes none:
                without this its codes carry no gradient at all.

        Raises:
            UserError: shapes that do not fit.
        """
        valid = self._counted(x, valid)
        if valid is not None:
            x = torch.where(valid[..., None], x, 0)
        indices = nearest_code(x, self.codebook, metric=self.metric, backend=self.backend)
        codes = self._at_length(F.embedding(indices, self.codebook))
        if valid is not None:
            indices = torch.where(valid, indices, 0)
            codes = torch.where(valid[..., None], codes, 0)
        target = self._at_length(x)
        losses: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if with_loss:
            codebook_loss = _mean_square(codes, target.detach(), valid)
            commitment_loss = _mean_square(target, codes.detach(), valid)
            losses = (codebook_loss + self.commitment * commitment_loss, codebook_loss, commitment_loss)
            if self.ema:
                losses = (self.commitment * commitment_loss, torch.zeros_like(commitment_loss), commitment_loss)
        if straight_through:
            codes = target + (codes - target).detach()
        return QuantizerOutput(codes, indices, *losses)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        indices: Tensor,
        valid: Tensor | None = None,
        *,
        modality: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Once a step: moves an EMA codebook, revives unused codes, counts usage. All ranks call it and end alike.

        Args:
            x: [..., D] the tokens that `forward` saw.
            indices: [...] the indices it gave.
            valid: [...] bool, True = real; all real if None.
            modality: count these picks as its usage. For tokens of several modalities leave it out and call `track`.
            generator: on the CPU; draws the tokens that revive codes. Rank 0's decides.

        Raises:
            UserError: shapes that do not fit, or an unknown modality.
        """
        valid = self._counted(x, valid)
        if modality is not None:
            self.track(indices, modality, valid)
        tokens = self._at_length(x.detach().float().flatten(0, -2))
        real = None if valid is None else valid.flatten()
        own = segment_sum(tokens, indices.flatten(), self.codebook.shape[0], real, backend=self.backend)
        counts = all_reduce_sum(own.counts)
        if self.ema:
            self._move(counts, all_reduce_sum(own.sums))
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        if self.revive_after is not None:
            self._revive(tokens if real is None else tokens[real], self.revive_after, generator)

    def track(self, indices: Tensor, modality: str, valid: Tensor | None = None) -> None:
        """Counts picks [...] of a modality over all ranks; only valid ones [...] if given. See `vlblocks.nn.usage`."""
        self.tracker.update(indices, modality, valid)

    def usage(self, modality: str | None = None) -> CodeUsage:
        """Codes in use and perplexity of the counted picks, of one modality or of all."""
        return self.tracker.usage(modality)

    def reset_usage(self) -> None:
        """Forgets the counted picks."""
        self.tracker.reset()

    def _move(self, counts: Tensor, sums: Tensor) -> None:
        self.ema_counts.lerp_(counts.to(self.ema_counts), 1 - self.decay)
        self.ema_sums.lerp_(sums.to(self.ema_sums), 1 - self.decay)
        total = self.ema_counts.sum()
        smoothed = (self.ema_counts + SMOOTHING) / (total + self.ema_counts.numel() * SMOOTHING) * total
        # Counts that have decayed to nothing say nothing: such codes stay.
        means = torch.where(smoothed[:, None] > 0, self.ema_sums / smoothed[:, None], self.codebook)
        self.codebook.copy_(self._at_length(means))

    def _revive(self, tokens: Tensor, after: int, generator: torch.Generator | None) -> None:
        dead = (self.idle >= after).nonzero()[:, 0]
        sizes = gather_sizes(tokens.shape[0], device=tokens.device)
        amount = min(len(dead), sum(sizes))
        if amount == 0:
            return
        # Distinct tokens of the whole batch, by position, each from the rank that holds it: the split does not matter.
        drawn = torch.randperm(sum(sizes), generator=generator)[:amount].to(tokens.device)
        position = broadcast(drawn) - row_offset(sizes)
        here = (position >= 0) & (position < tokens.shape[0])
        fresh = tokens.new_zeros((amount, tokens.shape[1]))
        fresh[here] = tokens[position[here]]
        fresh = all_reduce_sum(fresh)
        revived = dead[:amount]
        self.codebook[revived] = fresh.to(self.codebook.dtype)
        self.idle[revived] = 0
        if self.ema:
            self.ema_counts[revived] = 1
            self.ema_sums[revived] = fresh.to(self.ema_sums.dtype)

    def _at_length(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors

    def _counted(self, x: Tensor, valid: Tensor | None) -> Tensor | None:
        if valid is not None and (valid.shape != x.shape[:-1] or valid.dtype != torch.bool):
            raise UserError(f"valid {list(valid.shape)} {valid.dtype}: give bool {list(x.shape[:-1])}")
        return None if self.count_padding else valid


def _mean_square(x: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared difference over valid tokens and D, of tensors that are both 0 where invalid."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, target.dtype), torch.float32)
    error = F.mse_loss(x.to(dtype), target.to(dtype), reduction="sum")
    tokens = x.shape[:-1].numel() if valid is None else valid.sum()
    count = tokens * x.shape[-1]
    return error / (count.clamp_min(1) if isinstance(count, Tensor) else max(1, count))
