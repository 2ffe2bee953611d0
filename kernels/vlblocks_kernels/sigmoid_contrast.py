"""Sigmoid losses over all pairs of two sets of features, tile by tile: the matrix of pairs is never whole.

Rows are left [m, D], columns right [n, D], logits z[i, j] = scale <left_i, right_j> + bias. A row's loss sums over
columns -log sigmoid(z) where they match (partner and others of `Pairing`) and of -log sigmoid(-z) where they do not.
Every pair is on its own, so that the forward makes the gradient too, where it is known what a row's loss weighs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contrastive import LOG2E, Pairing, Products, in_triton, product_into, tile_shape, tiles
from .grounding import accumulation_dtype
from .registration import operation


def sigmoid_chunked(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairing: Pairing,
    row_weight: Tensor | None,
    needed: tuple[bool, bool],
    chunk_bytes: int | None,
) -> tuple[Tensor, Products, Tensor]:
    """Losses [m]; and the gradients of sum(row_weight * losses) to the features and to bias [1], in PyTorch.

    Without row_weight there are no gradients.
    """
    dtype = accumulation_dtype(left, right)
    left, right = left.to(dtype), right.to(dtype)
    scaled, made = left * scale, Products(left, right, needed)
    losses, bias_grad = left.new_zeros(len(left)), left.new_zeros(1)
    shape = tile_shape(len(left), len(right), left.element_size(), chunk_bytes, left.is_cuda)
    logits, gradient, *scratch = (left.new_empty(shape[0] * shape[1]) for _ in range(4))
    for r, c, (others, _) in tiles(len(left), len(right), shape, pairing):
        z = product_into(logits, scaled[r], right[c]).add_(bias)
        # A match's loss is that of -z for a pair that does not match: a difference of both would lose what is small.
        place = sign = None
        if pairing.partner is not None:
            place = pairing.partner[r, None] - c.start
            own = (place >= 0) & (place < z.shape[1])
            place, own_sign = place.clamp_(0, z.shape[1] - 1), 1 - 2 * own.to(dtype)
            z.scatter_(1, place, z.gather(1, place) * own_sign)
        if others is not None:
            sign = 1 - 2 * others.to(dtype)
            z *= sign
        if row_weight is not None:
            dz = torch.sigmoid(z, out=gradient[: z.numel()].view_as(z))
            if sign is not None:
                dz *= sign
            if place is not None:
                dz.scatter_(1, place, dz.gather(1, place) * own_sign)
            dz *= row_weight[r, None]
            bias_grad += dz.sum()
            made.add(dz, r, c)
        losses[r] += _softplus_sums(z, *scratch)
    return losses, made, bias_grad


def _softplus_sums(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sums of log(1 + e^z) along rows; z is used up. torch.log1p takes ten times as long as torch.log."""
    e = torch.abs(z, out=first[: z.numel()].view_as(z)).mul_(-LOG2E).exp2_()
    total = z.clamp_min_(0).sum(1)
    whole = torch.add(e, 1, out=z)
    # What is lost in rounding 1 + e, which is all of a small e, comes back to first order.
    lost = torch.sub(whole, 1, out=second[: z.numel()].view_as(z)).sub_(e).div_(whole)
    return total + whole.log_().sub_(lost).sum(1)


def _fake_total(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_weight: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
    need_left: bool,
    need_right: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(left, right)
    return (
        left.new_empty((), dtype=dtype),
        left.new_empty(left.shape if need_left else (0,), dtype=dtype),
        right.new_empty(right.shape if need_right else (0,), dtype=dtype),
        left.new_empty((1,), dtype=dtype),
        left.new_empty((1,), dtype=dtype),
    )


def _total_flops(left, right, *args, out_shape=None, **kwargs) -> int:
    return 2 * (1 + sum(bool(need) for need in args[-2:])) * left[0] * left[1] * right[0]


@operation("sigmoid_contrast", fake=_fake_total, flops=_total_flops)
def sigmoid_contrast(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_weight: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
    need_left: bool,
    need_right: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum(row_weight * losses), and its gradients to left, right (empty if not needed), scale [1] and bias [1].

    Gradients are float32 (float64 for float64); those to scale and bias need that of a side.

    Args:
        left: [m, D].
        right: [n, D].
        scale: [1], float32 (float64 for float64), as bias.
        row_weight: [m]; it has no gradient.
        partner: see `Pairing`, as for row_ids; column_ids are as rows see them.
        chunk_bytes: size of the logits held at once; None: what suits the device.
        triton_kernel: whether Triton makes them, where it can.
    """
    pairing = Pairing(partner, row_ids, column_ids)
    needed = (need_left, need_right)
    weight = row_weight if any(needed) else None
    if in_triton(left, right, triton_kernel):
        from .sigmoid_contrast_triton import sigmoid_triton

        losses, made, bias_grad = sigmoid_triton(left, right, scale, bias, pairing, weight, needed, chunk_bytes)
    else:
        losses, made, bias_grad = sigmoid_chunked(left, right, scale, bias, pairing, weight, needed, chunk_bytes)
    return (losses * row_weight).sum(), *made.finish(scale), bias_grad


def _keep_total(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[:4]]


def _total_backward(ctx, grad, *unused):
    found = [
        (grad * kept).to(dtype) if need else None
        for kept, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*found, *[None] * 8)


sigmoid_contrast.register_autograd(_total_backward, setup_context=_keep_total)


def _fake_rows(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
) -> Tensor:
    return left.new_empty(left.shape[:1], dtype=accumulation_dtype(left, right))


def _rows_flops(left, right, *args, out_shape=None, **kwargs) -> int:
    return 2 * left[0] * left[1] * right[0]


@operation("sigmoid_contrast_rows", fake=_fake_rows, flops=_rows_flops)
def sigmoid_contrast_rows(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
) -> Tensor:
    """Losses [m]; the backward makes the logits again, since only then it is known what a loss weighs."""
    pairing = Pairing(partner, row_ids, column_ids)
    needed = (False, False)
    if in_triton(left, right, triton_kernel):
        from .sigmoid_contrast_triton import sigmoid_triton

        return sigmoid_triton(left, right, scale, bias, pairing, None, needed, chunk_bytes)[0]
    return sigmoid_chunked(left, right, scale, bias, pairing, None, needed, chunk_bytes)[0]


def _keep_rows(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _rows_backward(ctx, grad):
    left, right, scale, bias, *ids = ctx.saved_tensors
    need_left, need_right, *need_numbers = ctx.needs_input_grad[:4]
    need_left = need_left or (any(need_numbers) and not need_right)
    made = sigmoid_contrast(left, right, scale, bias, grad, *ids, *ctx.settings, need_left, need_right)[1:]
    found = [
        kept.to(x.dtype) if need else None
        for kept, x, need in zip(made, (left, right, scale, bias), ctx.needs_input_grad, strict=False)
    ]
    return (*found, *[None] * 5)


sigmoid_contrast_rows.register_autograd(_rows_backward, setup_context=_keep_rows)
