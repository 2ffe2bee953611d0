"""Masked prediction: words of a text, and codes of the grounded space."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.losses._reduce import mean_cross_entropy
from vlblocks.ops.linear_cross_entropy import LinearCrossEntropyBackend, linear_cross_entropy


class MaskedRows(NamedTuple):
    """The M positions of a batch that are to be predicted, in order of example and position.

    Attributes:
        rows: [M, D] states.
        labels: [M] long.
        positions: [M] long: b * N + n.
    """

    rows: Tensor
    labels: Tensor
    positions: Tensor


class MaskedCodes(NamedTuple):
    """Codes of which some are hidden.

    Attributes:
        codes: [B, K, D], hidden ones zero.
        labels: [B, K] long: the index of a hidden code, -100 elsewhere.
    """

    codes: Tensor
    labels: Tensor


def masked_rows(states: Tensor, labels: Tensor, *, ignore_index: int = -100) -> MaskedRows:
    """Gathers the states that have a label, so that a head computes logits for no others.

    Args:
        states: [B, N, D].
        labels: [B, N] long, ignore_index where nothing is predicted.

    Raises:
        UserError: shapes that do not fit.
    """
    if states.ndim != 3 or labels.shape != states.shape[:2]:
        raise UserError(f"states {list(states.shape)} and labels {list(labels.shape)}: give [B, N, D] and [B, N]")
    flat = labels.reshape(-1)
    positions = (flat != ignore_index).nonzero().squeeze(1)
    # Through the embedding because the backward of indexing adds up in no fixed order.
    return MaskedRows(F.embedding(positions, states.flatten(0, 1)), flat[positions], positions)


def masked_token_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy at masked positions, averaged by weight.

    Over ranks: times `ops.collectives.rank_share` of the number of predicted tokens (or the sum of their weights).

    Args:
        logits: [M, V].
        labels: [M] long; rows of ignore_index do not count.
        weight: [M]; all 1 if None.

    Returns:
        sum(weight * CE) / sum(weight), scalar; 0 with zero gradients if nothing counts.

    Raises:
        UserError: shapes that do not fit.

    Source: Devlin et al. 2019 (BERT); unimo2_spec item 27.
    """
    return mean_cross_entropy(logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)


def mask_codes(
    codes: Tensor,
    indices: Tensor,
    *,
    probability: float = 0.15,
    generator: torch.Generator | None = None,
    ignore_index: int = -100,
) -> MaskedCodes:
    """Hides each picked code with a probability, before the joint tower sees it.

    Args:
        codes: [B, K, D] code vectors.
        indices: [B, K] their indices in the codebook.
        probability: of a code's being hidden, in [0, 1].
        generator: makes the draw repeatable; on codes' device.

    Raises:
        UserError: shapes that do not fit, or a probability outside [0, 1].

    Source: unimo2_spec item 19.
    """
    if codes.ndim != 3 or indices.shape != codes.shape[:2]:
        raise UserError(f"codes {list(codes.shape)} and indices {list(indices.shape)}: give [B, K, D] and [B, K]")
    if not 0 <= probability <= 1:
        raise UserError(f"probability is {probability}: give a number in [0, 1]")
    hidden = torch.rand(indices.shape, device=codes.device, generator=generator) < probability
    return MaskedCodes(
        codes.masked_fill(hidden[..., None], 0), torch.where(hidden, indices, torch.full_like(indices, ignore_index))
    )


def masked_grounding_loss(
    states: Tensor,
    labels: Tensor,
    codebook: Tensor,
    *,
    bias: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    ignore_index: int = -100,
    backend: LinearCrossEntropyBackend = "auto",
) -> Tensor:
    """Predicts which codes were hidden from their states after the joint tower, without holding the logits [M, C].

    Over ranks: times `ops.collectives.rank_share` of the number of hidden codes.

    Args:
        states: [B, K, D] joint states of the codes.
        labels: [B, K] of `mask_codes`.
        codebook: [C, E], what the features of a state are multiplied with.
        bias: [C], added to the logits.
        features: [M, D] -> [M, E], such as `MaskedTokenHead.features`; None: the states themselves.
        backend: see `ops.linear_cross_entropy`; "reference" is the plain twin, which holds the logits.

    Returns:
        Mean cross-entropy over hidden codes, scalar; 0 if none is hidden.

    Raises:
        UserError: shapes that do not fit, or an unknown back end.

    Source: unimo2_spec item 19.
    """
    rows, targets, _ = masked_rows(states, labels, ignore_index=ignore_index)
    rows = rows if features is None else features(rows)
    return linear_cross_entropy(rows, codebook, bias, targets, ignore_index=ignore_index, backend=backend)
