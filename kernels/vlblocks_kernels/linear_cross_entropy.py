"""Cross-entropy of a linear layer's logits without the logits: rows in chunks, the gradient in the forward.

States x [M, D], weight [V, D], bias [V] or none, target [M]. With z = x weight^T + bias, the loss of a row that counts
(target != ignore_index) is

    (1 - s) (lse(z) - z[target]) + s (lse(z) - mean(z)) + z_loss lse(z)^2,    s = label_smoothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .grounding import accumulation_dtype
from .registration import INTERPRETED, operation

CHUNK_BYTES = 2**28
"""Size of the logits that are held at once: large enough that the weight's gradient is written few times."""

CACHE_BYTES = 2**20
"""Size of the rows that the softmax works on at once, so that its passes stay in a CPU core's cache."""

HALF_UNIT = 1 / 64
"""float16 gradients of logits are made in this part of the largest row's weight: few vanish, none overflows."""

ALIGN = 64
"""Rows of logits start at multiples of this, for a vocabulary of any size (50265 is odd)."""


class Settings(NamedTuple):
    """What a loss per row depends on besides its tensors."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Softmaxed(NamedTuple):
    """What one chunk's softmax gives; the logits have become their gradient if one was asked for."""

    losses: Tensor  # [m]
    lse: Tensor  # [m]


# (logits [m, V], target [m], lse [m] if known, gradient of each row's loss [m] or None, settings) -> Softmaxed
RowSoftmax = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", Settings], Softmaxed]


class Chunked(NamedTuple):
    """Losses of all rows, 0 where ignored, and the gradients asked for (empty otherwise)."""

    losses: Tensor  # [M] float32 (float64 for float64)
    lse: Tensor  # [M]
    x_grad: Tensor  # [M, D], of `x_grad_dtype`
    weight_grad: Tensor  # [V, D] float32 (float64)
    bias_grad: Tensor  # [V] float32 (float64)


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, settings: Settings
) -> Tensor:
    """Losses [M] with the whole logits, by autograd: what the chunked forms are compared with."""
    dtype = accumulation_dtype(x, weight)
    logits = F.linear(x, weight, bias).to(dtype)
    losses = F.cross_entropy(
        logits,
        target,
        ignore_index=settings.ignore_index,
        label_smoothing=settings.label_smoothing,
        reduction="none",
    )
    if settings.z_loss:
        counted = target != settings.ignore_index
        losses = losses + settings.z_loss * (logits.logsumexp(1).square() * counted)
    return losses


def x_grad_dtype(x: Tensor) -> torch.dtype:
    """Of x's gradient before the loss's own is known: a loss scale of 65536 is none of float16's numbers."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def linear_cross_entropy_chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_grad: Tensor | None,
    lse: Tensor | None,
    settings: Settings,
    needed: tuple[bool, bool, bool],
    chunk_bytes: int,
    softmax: RowSoftmax | None = None,
) -> Chunked:
    """Losses, and gradients of sum(row_grad * losses), holding `chunk_bytes` of logits.

    Rows that do not count are left out before the product. On a GPU their number is read, which is a device sync.

    Args:
        row_grad: [1] or [M]; None: losses only.
        lse: [M] if known from a forward.
        needed: whether the gradients to x, weight and bias are wanted.
        chunk_bytes: size of a chunk of logits, so far as one row allows it.
        softmax: what works on a chunk; None: `softmax_rows`.
    """
    dtype = accumulation_dtype(x, weight)
    softmax = softmax or softmax_rows
    total, vocab = x.shape[0], weight.shape[0]
    counted = (target != settings.ignore_index).nonzero().squeeze(1)
    losses, lses = x.new_zeros(total, dtype=dtype), x.new_zeros(total, dtype=dtype)
    with_grad = row_grad is not None
    # Outputs of an operation must not be one tensor, so that each has an empty one of its own.
    x_grad = x.new_zeros(x.shape if with_grad and needed[0] else 0, dtype=x_grad_dtype(x))
    weight_grad = x.new_zeros(weight.shape if with_grad and needed[1] else 0, dtype=dtype)
    bias_grad = x.new_zeros(vocab if with_grad and needed[2] else 0, dtype=dtype)
    unit = None
    if row_grad is not None:
        row_grad = row_grad.expand(len(counted)) if row_grad.numel() == 1 else row_grad.index_select(0, counted)
        if x.dtype == torch.float16 and len(counted):
            largest = row_grad.abs().amax()
            unit = torch.where(largest > 0, largest * HALF_UNIT, torch.ones_like(largest)).to(dtype)
            row_grad = row_grad.to(dtype) / unit

    pitch = -(-vocab // ALIGN) * ALIGN
    rows = max(1, min(chunk_bytes // (pitch * x.element_size()), len(counted)))
    buffer = x.new_empty((rows if len(counted) else 0, pitch))
    # Products of half precision read past a row's end, up to the width of a tile: what lies there must be finite.
    buffer[:, vocab:] = 0
    for start in range(0, len(counted), rows):
        place = counted[start : start + rows]
        states = x.index_select(0, place)
        logits = buffer[: len(place), :vocab]
        if bias is None:
            torch.mm(states, weight.T, out=logits)
        else:
            torch.addmm(bias, states, weight.T, out=logits)
        grads = None if row_grad is None else row_grad[start : start + rows]
        known = None if lse is None else lse.index_select(0, place)
        found = softmax(logits, target.index_select(0, place), known, grads, settings)
        losses.index_copy_(0, place, found.losses)
        lses.index_copy_(0, place, found.lse)
        if not with_grad:
            continue
        if needed[0]:
            x_grad.index_copy_(0, place, _product(logits, weight, x_grad.dtype))
        if needed[1]:
            if x.dtype == dtype:
                weight_grad.addmm_(logits.T, states)
            else:
                weight_grad += _product(logits.T, states, dtype)
        if needed[2]:
            bias_grad += logits.sum(0, dtype=dtype)
    if unit is not None:
        for grad in (x_grad, weight_grad, bias_grad):
            grad *= unit
    return Chunked(losses, lses, x_grad, weight_grad, bias_grad)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, rounded to `dtype` only; on a CPU bfloat16 is rounded to itself first, which is several times faster."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a @ b if a.dtype == torch.bfloat16 else a.to(dtype) @ b.to(dtype)


def softmax_rows(
    logits: Tensor, target: Tensor, lse: Tensor | None, grads: Tensor | None, settings: Settings
) -> Softmaxed:
    """Losses and log-sum-exps of logits [m, V], which become their gradients in place if `grads` [m] is given."""
    vocab, smoothing = logits.shape[1], settings.label_smoothing
    dtype = accumulation_dtype(logits)
    losses, lses = logits.new_empty(len(target), dtype=dtype), logits.new_empty(len(target), dtype=dtype)
    rows = max(1, CACHE_BYTES // (vocab * dtype.itemsize)) if logits.device.type == "cpu" else max(1, len(target))
    for start in range(0, len(target), rows):
        part = slice(start, start + rows)
        z = logits[part].to(dtype)
        chosen = z.gather(1, target[part, None])[:, 0]
        mean = z.mean(1) if smoothing else None
        if lse is None:
            top = z.amax(1, keepdim=True)
            # In place where the rows are the chunk's own and are not needed as logits again.
            powers = (z - top if grads is None and z.dtype == logits.dtype else z.sub_(top)).exp_()
            sums = powers.sum(1)
            own = top[:, 0] + sums.log()
        else:
            own = lse[part]
            powers, sums = z.sub_(own[:, None]).exp_(), None
        loss = own - chosen
        if mean is not None:
            loss = (1 - smoothing) * loss + smoothing * (own - mean)
        if settings.z_loss:
            loss = loss + settings.z_loss * own.square()
        losses[part], lses[part] = loss, own
        if grads is None:
            continue
        scale = grads[part].to(dtype)
        factor = scale * (1 + 2 * settings.z_loss * own) if settings.z_loss else scale
        if sums is not None:
            factor = factor / sums
        gradient = powers.mul_(factor[:, None])
        if smoothing:
            gradient -= (smoothing / vocab * scale)[:, None]
        at = target[part, None]
        gradient.scatter_(1, at, gradient.gather(1, at) - ((1 - smoothing) * scale)[:, None])
        if gradient.data_ptr() != logits[part].data_ptr():
            logits[part] = gradient
    return Softmaxed(losses, lses)


def _softmax_for(x: Tensor, triton_kernel: bool) -> RowSoftmax:
    # The kernel takes its settings as float32, which float64 would notice.
    if triton_kernel and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64:
        from .linear_cross_entropy_triton import softmax_rows_triton

        return softmax_rows_triton
    return softmax_rows


def _fake_total(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    chunk_bytes: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x, weight)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(x.shape if need_x else (0,), dtype=x_grad_dtype(x)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        x.new_empty(weight.shape[:1] if need_bias else (0,), dtype=dtype),
    )


def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    # x, weight, bias, target, scale, ignore_index, label_smoothing, z_loss, need_x, need_weight, ...
    products = 1 + sum(bool(needed) for needed in args[6:8])
    return 2 * products * x_shape[0] * x_shape[1] * weight_shape[0]


@operation("linear_cross_entropy", fake=_fake_total, flops=_flops)
def linear_cross_entropy_total(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    chunk_bytes: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale [1] times the sum of all rows' losses, and its gradients to x, weight and bias, where needed."""
    needed = (need_x, need_weight, need_bias)
    found = linear_cross_entropy_chunked(
        x,
        weight,
        bias,
        target,
        scale if any(needed) else None,
        None,
        Settings(ignore_index, label_smoothing, z_loss),
        needed,
        chunk_bytes,
        _softmax_for(x, triton_kernel),
    )
    return found.losses.sum() * scale[0].to(found.losses.dtype), found.x_grad, found.weight_grad, found.bias_grad


def _keep_total(ctx, inputs, output) -> None:
    x, weight, bias = inputs[:3]
    _, x_grad, weight_grad, bias_grad = output
    ctx.save_for_backward(x_grad, weight_grad, bias_grad)
    ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.needed = inputs[8:11]


def _total_backward(ctx, grad, *unused):
    found = [
        (grad * kept).to(dtype) if want else None
        for kept, want, dtype in zip(ctx.saved_tensors, ctx.needed, ctx.dtypes, strict=True)
    ]
    return (*found, *[None] * 10)


linear_cross_entropy_total.register_autograd(_total_backward, setup_context=_keep_total)


def _fake_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_bytes: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x, weight)
    return x.new_empty(x.shape[:1], dtype=dtype), x.new_empty(x.shape[:1], dtype=dtype)


def _rows_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


@operation("linear_cross_entropy_rows", fake=_fake_rows, flops=_rows_flops)
def linear_cross_entropy_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_bytes: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps [M], 0 where ignored; the backward makes the logits again."""
    settings = Settings(ignore_index, label_smoothing, z_loss)
    softmax = _softmax_for(x, triton_kernel)
    found = linear_cross_entropy_chunked(
        x, weight, bias, target, None, None, settings, (False, False, False), chunk_bytes, softmax
    )
    return found.losses, found.lse


def _fake_rows_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    chunk_bytes: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_total(
        x,
        weight,
        bias,
        target,
        grad,
        ignore_index,
        label_smoothing,
        z_loss,
        need_x,
        need_weight,
        need_bias,
        chunk_bytes,
        triton_kernel,
    )[1:]


def _rows_backward_flops(grad_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    # ..., bias, target, lse, ignore_index, label_smoothing, z_loss, need_x, need_weight, ...; no recomputation
    return 2 * sum(bool(needed) for needed in args[6:8]) * x_shape[0] * x_shape[1] * weight_shape[0]


@operation("linear_cross_entropy_rows_backward", fake=_fake_rows_backward, flops=_rows_backward_flops)
def linear_cross_entropy_rows_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    chunk_bytes: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(grad * losses) to x, weight and bias, where needed (empty otherwise)."""
    needed = (need_x, need_weight, need_bias)
    found = linear_cross_entropy_chunked(
        x,
        weight,
        bias,
        target,
        grad.contiguous(),
        lse,
        Settings(ignore_index, label_smoothing, z_loss),
        needed,
        chunk_bytes,
        _softmax_for(x, triton_kernel),
    )
    return found.x_grad, found.weight_grad, found.bias_grad


def _keep_rows(ctx, inputs, output) -> None:
    x, weight, bias, target = inputs[:4]
    ctx.save_for_backward(x, weight, bias, target, output[1])
    ctx.settings = inputs[4:]


def _rows_backward(ctx, grad, lse_grad):
    x, weight, bias, target, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    found = linear_cross_entropy_rows_backward(
        grad, x, weight, bias, target, lse, *ctx.settings[:3], *needed, *ctx.settings[3:]
    )
    dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    grads = [part.to(dtype) if want else None for part, want, dtype in zip(found, needed, dtypes, strict=True)]
    return (*grads, *[None] * 6)


linear_cross_entropy_rows.register_autograd(_rows_backward, setup_context=_keep_rows)
