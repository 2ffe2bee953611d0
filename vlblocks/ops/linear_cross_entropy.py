"""Cross-entropy of a linear layer's logits that never holds the logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.ops.grounding import _autocast_dtype, _without_autocast
from vlblocks_kernels.linear_cross_entropy import (
    CHUNK_BYTES,
    Settings,
    linear_cross_entropy_reference,
    linear_cross_entropy_rows,
    linear_cross_entropy_total,
)

LinearCrossEntropyBackend = Literal["auto", "chunked", "triton", "reference"]
BACKENDS = ("auto", "chunked", "triton", "reference")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
    backend: LinearCrossEntropyBackend = "auto",
) -> Tensor:
    """Cross-entropy of the logits z = x weight^T + bias against target, of which only a chunk is ever held.

    A row's loss is (1 - s) (lse(z) - z[target]) + s (lse(z) - mean(z)) + z_loss lse(z)^2 with s = label_smoothing. Rows
    of ignore_index are left out before the product; on a GPU their number is read, the only device sync. With "mean"
    and "sum" the gradients are made in the forward, with the weight's in float32; with "none" the backward makes the
    logits again. Under autocast the products run in autocast's dtype, the softmax in float32. Gradients are taken once:
    there is no second derivative.

    Args:
        x: [..., D] states.
        weight: [V, D], tied to an embedding or not.
        bias: [V] or None.
        target: [...] long, in [0, V) or ignore_index. Not checked: any other is an IndexError on a CPU, a loss and
            gradients of NaN with "triton", and a CUDA error with the other back ends.
        label_smoothing: in [0, 1].
        reduction: "mean" over the rows that count (0 if none does), "sum", or "none".
        z_loss: weight of the squared log-sum-exp, which keeps logits from drifting (PaLM: 1e-4).
        chunk_bytes: size of the logits that are held at once.
        backend: "chunked" (PyTorch), "triton" (the softmax in Triton), "reference" (whole logits, autograd), "auto":
            triton on CUDA, else chunked.

    Returns:
        Scalar, or [...] with "none"; float32 (float64 for float64).

    Raises:
        UserError: shapes or settings that do not fit, or an unknown back end.

    Source: Chowdhery et al. 2022 (PaLM, z-loss); Szegedy et al. 2016 (label smoothing); gradient in the forward as in
        Hsu et al. 2024 (Liger Kernel).
    """
    chosen = _check(x, weight, bias, target, label_smoothing, reduction, chunk_bytes, backend)
    half = _autocast_dtype(x)
    dtype = half if half is not None and x.dtype != torch.float64 else torch.promote_types(x.dtype, weight.dtype)
    rows, targets = x.reshape(-1, x.shape[-1]).to(dtype), target.reshape(-1)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    settings = Settings(ignore_index, label_smoothing, z_loss)
    with _without_autocast(x):
        if chosen == "reference":
            losses = linear_cross_entropy_reference(rows, weight, bias, targets, settings)
        elif reduction == "none":
            losses = linear_cross_entropy_rows(rows, weight, bias, targets, *settings, chunk_bytes, chosen == "triton")[
                0
            ]
        else:
            wide = torch.promote_types(dtype, torch.float32)
            scale = torch.ones(1, dtype=wide, device=x.device)
            if reduction == "mean":
                scale = scale / (targets != ignore_index).sum().clamp_min(1)
            learning = torch.is_grad_enabled()
            needed = [learning and part is not None and part.requires_grad for part in (rows, weight, bias)]
            return linear_cross_entropy_total(
                rows, weight, bias, targets, scale, *settings, *needed, chunk_bytes, chosen == "triton"
            )[0]
        if reduction == "none":
            return losses.reshape(target.shape)
        return losses.sum() / ((targets != ignore_index).sum().clamp_min(1) if reduction == "mean" else 1)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    reduction: str,
    chunk_bytes: int,
    backend: str,
) -> str:
    """Raises UserError for what does not fit; returns the back end that "auto" stands for."""
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f'reduction is {reduction!r}: use "mean", "sum" or "none"')
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise UserError(f"x {list(x.shape)} and weight {list(weight.shape)}: give [..., D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"bias {list(bias.shape)}: give [V] = {list(weight.shape[:1])}")
    if target.shape != x.shape[:-1] or target.dtype != torch.long:
        raise UserError(f"target {list(target.shape)} {target.dtype}: give long {list(x.shape[:-1])}")
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"label_smoothing is {label_smoothing}: give a number in [0, 1]")
    if chunk_bytes < 1:
        raise UserError(f"chunk_bytes is {chunk_bytes}: give at least 1")
    if backend == "auto":
        return "triton" if x.is_cuda and _has_triton() else "chunked"
    if backend == "triton" and not _has_triton():
        raise UserError("backend='triton': Triton is not installed; use backend='chunked'")
    return backend


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None
