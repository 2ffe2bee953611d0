"""The grounded space's operations: scores of all codes, losses of the picked ones, nearest codes, sums by code.

`backend`: "auto" takes the fastest that runs where the tensors live; "reference" the chunked PyTorch one.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks_kernels.grounding import (
    GroundingLosses,
    grounding_losses_reference,
    grounding_scores_reference,
)
from vlblocks_kernels.nearest import METRICS, SegmentSums, nearest_code_reference, segment_sum_reference

GroundingBackend = Literal["auto", "reference"]
Metric = Literal["l2", "cosine"]

BACKENDS = ("auto", "reference")


def grounding_scores(
    x: Tensor,
    codes: Tensor,
    temperature: Tensor | float,
    valid: Tensor | None = None,
    *,
    backend: GroundingBackend = "auto",
) -> Tensor:
    """Accumulated similarity of every code with an example's tokens, without gradient and without a [B, N, C] tensor.

    S[b, c] = sum over valid n of sigmoid(t <x[b, n], codes[c]>). Under autocast the product runs in autocast's dtype;
    sigmoid and sum are float32 always.

    Args:
        x: [B, N, D] tokens.
        codes: [C, D] codebook.
        temperature: t, a number or a tensor of one element.
        valid: [B, N] bool, True = real; all real if None. Invalid tokens count 0, NaN included.

    Returns:
        [B, C] float32 (float64 for float64); 0 for an example without valid tokens.

    Raises:
        UserError: shapes that do not fit, or an unknown back end.

    Source: Li et al. 2022 (UNIMO-2), section 2.2.
    """
    _check(x, codes, temperature, valid, backend)
    half = _autocast_dtype(x)
    with _without_autocast(x):
        if half is not None and x.dtype != torch.float64:
            x, codes = x.detach().to(half), codes.detach().to(half)
        return grounding_scores_reference(x, codes, temperature, valid)


def grounding_losses(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: Tensor | float,
    valid: Tensor | None = None,
    *,
    backend: GroundingBackend = "auto",
) -> GroundingLosses:
    """Losses of the picked codes, with gradients to x, codes and temperature; float32 also under autocast.

    With A = sigmoid(t x picked^T) over the picked codes: token_loss (q) compares each token with its A-weighted mean of
    codes, code_loss (e) each picked code with its A-weighted mean of tokens. Only the targets carry no gradient.

    Args:
        x: [B, N, D] tokens.
        codes: [C, D] codebook.
        indices: [B, K] long, picked codes of each example.
        temperature: t, a number or a tensor of one element.
        valid: [B, N] bool, True = real; all real if None.

    Returns:
        (token_loss, code_loss), scalars: means over valid tokens and D, and over examples with a valid token, K and D.
        An example without any contributes 0.

    Raises:
        UserError: shapes that do not fit, or an unknown back end.

    Source: Li et al. 2022 (UNIMO-2), section 2.2.
    """
    _check(x, codes, temperature, valid, backend)
    if indices.ndim != 2 or indices.shape[0] != x.shape[0]:
        raise UserError(f"indices {list(indices.shape)}: give [B, K] with x's B = {x.shape[0]}")
    with _without_autocast(x):
        return grounding_losses_reference(x, codes, indices, temperature, valid)


def nearest_code(x: Tensor, codes: Tensor, *, metric: Metric = "l2", backend: GroundingBackend = "auto") -> Tensor:
    """Index of the nearest code of each token, [..., D] -> [...] long, without a [tokens, C] tensor.

    Compared in float32 also under autocast. Of equally near codes the lowest index wins.

    Args:
        x: [..., D] tokens.
        codes: [C, D] codebook.
        metric: "l2" (Euclidean distance) or "cosine".

    Raises:
        UserError: shapes that do not fit, an empty codebook, an unknown metric or back end.

    Source: van den Oord et al. 2017 (VQ-VAE).
    """
    _check_backend(backend)
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}: choose one of {', '.join(METRICS)}")
    if x.ndim < 1 or codes.ndim != 2 or x.shape[-1] != codes.shape[1] or codes.shape[0] == 0:
        raise UserError(f"x {list(x.shape)} and codes {list(codes.shape)}: give [..., D] and [C, D] with C >= 1")
    with _without_autocast(x):
        return nearest_code_reference(x, codes, metric)


def segment_sum(
    x: Tensor, indices: Tensor, segments: int, valid: Tensor | None = None, *, backend: GroundingBackend = "auto"
) -> SegmentSums:
    """Sums [C, D] and counts [C] of tokens by code, in an order that is fixed; without gradient.

    Args:
        x: [M, D] tokens.
        indices: [M] long, each token's code.
        segments: C.
        valid: [M] bool, True = real; all real if None.

    Raises:
        UserError: shapes that do not fit, or an unknown back end.
    """
    _check_backend(backend)
    if x.ndim != 2 or indices.shape != x.shape[:1] or (valid is not None and valid.shape != indices.shape):
        raise UserError(f"x {list(x.shape)} and indices {list(indices.shape)}: give [M, D] and [M], and valid as [M]")
    with _without_autocast(x):
        return segment_sum_reference(x, indices, segments, valid)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")


def _check(x: Tensor, codes: Tensor, temperature: Tensor | float, valid: Tensor | None, backend: str) -> None:
    _check_backend(backend)
    if x.ndim != 3 or codes.ndim != 2 or x.shape[2] != codes.shape[1]:
        raise UserError(f"x {list(x.shape)} and codes {list(codes.shape)}: give [B, N, D] and [C, D]")
    if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
        raise UserError(f"valid {list(valid.shape)} {valid.dtype}: give bool [B, N] = {list(x.shape[:2])}")
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise UserError(f"temperature {list(temperature.shape)}: give one number")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    if _autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
