"""Grounding loss: picked codes and tokens approach one another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vlblocks.ops.grounding import GroundingBackend, grounding_losses


class GroundingLoss(NamedTuple):
    """The grounding loss and its two terms, all scalars.

    Attributes:
        loss: token_loss + code_weight * code_loss.
        token_loss: codes move to tokens: mean over valid tokens and D.
        code_loss: tokens move to codes: mean over examples with a valid token, K and D.
    """

    loss: Tensor
    token_loss: Tensor
    code_loss: Tensor


def grounding_loss(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: Tensor | float,
    valid: Tensor | None = None,
    *,
    code_weight: float = 0.25,
    backend: GroundingBackend = "auto",
) -> GroundingLoss:
    """Loss of the grounded space for codes that are picked already; `nn.GroundedSpace` computes it for its own picks.

    Over ranks the two terms have their own shares: token_loss * rank_share(number of valid tokens) + code_weight *
    code_loss * rank_share(number of examples with a valid token).

    Args:
        x: [B, N, D] tokens.
        codes: [C, D] codebook.
        indices: [B, K] long, picked codes.
        temperature: factor of the similarities, a number or a tensor of one element.
        valid: [B, N] bool, True = real; all real if None.
        code_weight: weight of code_loss.
        backend: of `ops.grounding_losses`.

    Raises:
        UserError: shapes that do not fit.

    Source: Li et al. 2022 (UNIMO-2); unimo2_spec items 15 to 17.
    """
    token_loss, code_loss = grounding_losses(x, codes, indices, temperature, valid, backend=backend)
    return GroundingLoss(token_loss + code_weight * code_loss, token_loss, code_loss)
