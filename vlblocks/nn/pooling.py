"""From states [B, T, D] to one vector per example [B, D]. All take the states' validity, and ignore it if they can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlblocks.nn.attention import Attention
from vlblocks.nn.layers import STD


class ClsPool(nn.Module):
    """The first state, which is CLS by convention."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [B, T, D]; valid is not needed -> [B, D]"""
        return x[:, 0]


class MeanPool(nn.Module):
    """The mean of the real states; an example without one gives zeros."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [B, T, D]; valid [B, T] bool, True = real, None: all -> [B, D]"""
        if valid is None:
            return x.mean(dim=1)
        real = valid[:, :, None]
        # Filled, not multiplied: 0 * NaN would let padding through.
        return x.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1).clamp(min=1)


class AttentionPool(nn.Module):
    """One learned query attends to the real states (as in Set Transformer: Lee et al., 2019; CoCa: Yu et al., 2022).

    Args:
        width: D.
        heads: H, must divide D.
        norm_eps: of the layer norm before the states are read.
        backend: of `vlblocks.ops.attention`.
    """

    def __init__(
        self, *, width: int, heads: int, norm_eps: float = 1e-5, backend: str = "auto", device=None, dtype=None
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width, device=device, dtype=dtype))
        self.norm = nn.LayerNorm(width, eps=norm_eps, device=device, dtype=dtype)
        self.attn = Attention(
            width=width, heads=heads, context_width=width, backend=backend, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.query, std=STD)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [B, T, D]; valid [B, T] bool, True = real, None: all -> [B, D]"""
        mask = None if valid is None else valid[:, None, None, :]
        return self.attn(self.query.expand(len(x), -1, -1), self.norm(x), mask=mask)[:, 0]
