"""The grounded space's operations: scores of all codes, losses of the picked ones, nearest codes, sums by code.

`backend`: "auto" takes "triton" on CUDA, where Triton is installed, and elsewhere "reference", the chunked PyTorch one.
On a CPU, "triton" runs the reference behind the operations that it registers, or its kernels in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Literal

import torch
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks_kernels.grounding import (
    GroundingLosses,
    accumulation_dtype,
    as_temperature,
    grounding_losses_reference,
    grounding_scores_reference,
)
from vlblocks_kernels.nearest import METRICS, SegmentSums, nearest_code_reference, segment_sum_reference

GroundingBackend = Literal["auto", "triton", "reference"]
Metric = Literal["l2", "cosine"]

BACKENDS = ("auto", "triton", "reference")

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")

HAS_TRITON = importlib.util.find_spec("triton") is not None


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
        backend: "auto", "triton" or "reference", as the module says.

    Returns:
        [B, C] float32 (float64 for float64); 0 for an example without valid tokens.

    Raises:
        UserError: shapes that do not fit, or an unknown back end.

    Source: Li et al. 2022 (UNIMO-2), section 2.2.
    """
    chosen = _chosen(backend, x)
    _check(x, codes, temperature, valid)
    half = _autocast_dtype(x)
    with _without_autocast(x):
        x, codes = x.detach(), codes.detach()
        if half is not None and x.dtype != torch.float64:
            x, codes = x.to(half), codes.to(half)
        if chosen == "reference":
            return grounding_scores_reference(x, codes, temperature, valid)
        from vlblocks_kernels import grounding_triton

        x, codes = _alike(x, codes)
        t = as_temperature(temperature, x, accumulation_dtype(x)).detach()
        return grounding_triton.grounding_scores(x, codes, t, valid)


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
        indices: [B, K] long, picked codes of each example, in [0, C): on a GPU this is not checked, and others would
            read memory that is not the codebook's.
        temperature: t, a number or a tensor of one element.
        valid: [B, N] bool, True = real; all real if None.
        backend: "auto", "triton" or "reference", as the module says.

    Returns:
        (token_loss, code_loss), scalars: means over valid tokens and D, and over examples with a valid token, K and D.
        An example without any contributes 0.

    Raises:
        UserError: shapes that do not fit, or an unknown back end.

    Source: Li et al. 2022 (UNIMO-2), section 2.2.
    """
    chosen = _chosen(backend, x)
    _check(x, codes, temperature, valid)
    if indices.ndim != 2 or indices.shape[0] != x.shape[0]:
        raise UserError(f"indices {list(indices.shape)}: give [B, K] with x's B = {x.shape[0]}")
    with _without_autocast(x):
        if chosen == "reference":
            return grounding_losses_reference(x, codes, indices, temperature, valid)
        from vlblocks_kernels import grounding_losses_triton

        x, codes = _alike(x, codes)
        t = as_temperature(temperature, x, accumulation_dtype(x))
        token_loss, code_loss, *_ = grounding_losses_triton.grounding_losses(x, codes, indices, t, valid)
        return GroundingLosses(token_loss, code_loss)


def nearest_code(x: Tensor, codes: Tensor, *, metric: Metric = "l2", backend: GroundingBackend = "auto") -> Tensor:
    """Index of the nearest code of each token, [..., D] -> [...] long, without a [tokens, C] tensor.

    Compared in float32 also under autocast. Of equally near codes the lowest index wins.

    Args:
        x: [..., D] tokens.
        codes: [C, D] codebook.
        metric: "l2" (Euclidean distance) or "cosine".
        backend: "auto", "triton" or "reference", as the module says.

    Raises:
        UserError: shapes that do not fit, an empty codebook, an unknown metric or back end.

    Source: van den Oord et al. 2017 (VQ-VAE).
    """
    chosen = _chosen(backend, x)
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}: choose one of {', '.join(METRICS)}")
    if x.ndim < 1 or codes.ndim != 2 or x.shape[-1] != codes.shape[1] or codes.shape[0] == 0:
        raise UserError(f"x {list(x.shape)} and codes {list(codes.shape)}: give [..., D] and [C, D] with C >= 1")
    with _without_autocast(x):
        if chosen == "reference":
            return nearest_code_reference(x, codes, metric)
        from vlblocks_kernels import nearest_triton

        flat, codes = _alike(x.detach().reshape(-1, x.shape[-1]), codes.detach())
        return nearest_triton.nearest_code(flat, codes, metric).view(x.shape[:-1])


def segment_sum(
    x: Tensor, indices: Tensor, segments: int, valid: Tensor | None = None, *, backend: GroundingBackend = "auto"
) -> SegmentSums:
    """Sums [C, D] and counts [C] of tokens by code, in an order that is fixed; without gradient.

    Args:
        x: [M, D] tokens.
        indices: [M] long, each token's code.
        segments: C.
        valid: [M] bool, True = real; all real if None.
        backend: "auto", "triton" or "reference", as the module says.

    Raises:
        UserError: shapes that do not fit, or an unknown back end.
    """
    chosen = _chosen(backend, x)
    if x.ndim != 2 or indices.shape != x.shape[:1] or (valid is not None and valid.shape != indices.shape):
        raise UserError(f"x {list(x.shape)} and indices {list(indices.shape)}: give [M, D] and [M], and valid as [M]")
    with _without_autocast(x):
        if chosen == "reference":
            return segment_sum_reference(x, indices, segments, valid)
        from vlblocks_kernels import nearest_triton

        return SegmentSums(*nearest_triton.segment_sum(x.detach(), indices, segments, valid))


def _chosen(backend: str, x: Tensor) -> str:
    """The back end that runs; raises UserError for one that cannot."""
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if x.is_cuda and HAS_TRITON else "reference"
    if backend == "triton":
        if not HAS_TRITON:
            raise UserError("backend='triton' needs Triton: pip install triton, or use backend='reference'")
        if x.device.type not in ("cuda", "cpu"):
            raise UserError(f"backend='triton' does not run on {x.device.type}: use backend='reference'")
    return backend


def _alike(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider one's dtype, as the references compute."""
    dtype = torch.promote_types(x.dtype, codes.dtype)
    return x.to(dtype), codes.to(dtype)


def _check(x: Tensor, codes: Tensor, temperature: Tensor | float, valid: Tensor | None) -> None:
    if x.ndim != 3 or codes.ndim != 2 or x.shape[2] != codes.shape[1]:
        raise UserError(f"x {list(x.shape)} and codes {list(codes.shape)}: give [B, N, D] and [C, D]")
    if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
        raise UserError(f"valid {list(valid.shape)} {valid.dtype}: give bool [B, N] = {list(x.shape[:2])}")
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise UserError(f"temperature {list(temperature.shape)}: give one number")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    # Not torch.amp.is_autocast_available, which torch 2.10 and 2.11 cannot compile.
    if kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    if _autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
