"""What turns states into features and logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.nn.layers import Linear


class Projection(nn.Module):
    """A dense layer, a ReLU if asked for, and L2 normalisation if asked for.

    With "relu" and no normalisation it is UNIMO-2's pooler of a CLS state; with both, its grounding projection;
    without an activation and normalised, CLIP's projection.

    Args:
        in_width: of the input.
        out_width: of the output.
        activation: "relu" or None.
        normalize: whether the output has L2 norm 1 (or is all zeros, as a ReLU can leave it).

    Raises:
        UserError: an unknown activation.
    """

    def __init__(
        self,
        *,
        in_width: int,
        out_width: int,
        activation: Literal["relu"] | None = None,
        normalize: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if activation not in ("relu", None):
            raise UserError(f"activation is {activation!r}: choose 'relu' or None")
        self.activation, self.normalize = activation, normalize
        self.dense = Linear(in_width, out_width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_width] -> [..., out_width]"""
        x = self.dense(x)
        if self.activation == "relu":
            x = F.relu(x)
        if not self.normalize:
            return x
        # float16 can hold neither the squares nor the epsilon of a norm.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.normalize(wide, dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, normalize={self.normalize}"


class ClassificationHead(nn.Module):
    """Dropout and a dense layer on pooled features.

    Args:
        width: of the features.
        classes: number of logits.
        dropout: share of feature elements dropped.
    """

    def __init__(self, *, width: int, classes: int, dropout: float = 0.1, device=None, dtype=None) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = Linear(width, classes, device=device, dtype=dtype)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled [..., width] -> logits [..., classes]"""
        return self.dense(self.dropout(pooled))


class MatchingHead(nn.Module):
    """Whether an image and a text belong together, from the product of their pooled features (UNIMO-2).

    Args:
        width: of the features.
    """

    def __init__(self, *, width: int, device=None, dtype=None) -> None:
        super().__init__()
        self.dense = Linear(width, 2, device=device, dtype=dtype)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """pooled text and image, [..., width] each -> logits [..., 2], index 1 = match"""
        return self.dense(text * image)


class MaskedTokenHead(nn.Module):
    """Dense, GELU, layer norm, then the product with a tied table and a bias per entry (BERT: Devlin et al., 2019).

    The table (word embeddings, or a codebook) is given at each call, so that it belongs to one module only and a state
    dict holds it once.

    Args:
        width: of the states, and of the table's rows.
        vocab: number of the table's rows.
        norm_eps: of the layer norm.
    """

    def __init__(self, *, width: int, vocab: int, norm_eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.dense = Linear(width, width, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(width, eps=norm_eps, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(vocab, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, states: Tensor, weight: Tensor) -> Tensor:
        """states [..., width], weight [vocab, width] -> logits [..., vocab]"""
        return F.linear(self.features(states), weight, self.bias)

    def features(self, states: Tensor) -> Tensor:
        """states [..., width] -> [..., width], what the table is multiplied with: for a loss that makes no logits."""
        return self.norm(F.gelu(self.dense(states)))
