"""Zeroing padded rows and taking stretches of positions, cheaply in both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlblocks.ops.segments import is_free_to_read, is_settled_false


def rows_of(flags: Tensor | None, batch: int) -> Tensor | None:
    """Flagged rows, [B or 1, T] bool, as they are or, where that costs no sync, as indices into [B * T]; None: none.

    On a CPU filling a few whole rows is several times as fast as filling by a mask that is broadcast over heads.
    """
    if flags is None or is_settled_false(flags):
        return None
    if not is_free_to_read(flags):
        return flags
    return flags.expand(batch, -1).reshape(-1).nonzero().squeeze(1)


def zero_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """x [B, H, T, D] with zeros in these rows, NaN and inf included; rows as `rows_of` gives them."""
    if rows is None:
        return x
    if rows.dtype == torch.bool:
        return x.masked_fill(rows[:, None, :, None], 0.0)
    b, h, t, d = x.shape
    flat = x.transpose(1, 2).reshape(b * t, h * d).index_fill(0, rows, 0.0)
    return flat.view(b, t, h, d).transpose(1, 2)


def zero_rows_(x: Tensor, rows: Tensor | None) -> None:
    """Zeros in these rows of x, contiguous [B, T, H, D]; rows as `rows_of` gives them."""
    if rows is None:
        return
    if rows.dtype == torch.bool:
        x.masked_fill_(rows[:, :, None, None], 0.0)
    else:
        x.flatten(0, 1).index_fill_(0, rows, 0.0)


def take_stretches(x: Tensor, zeroed: Tensor | None, wanted: list[tuple[slice, ...]]) -> list[Tensor]:
    """For each entry of `wanted` those stretches of x [B, H, T, D] side by side, with zeros in the rows `zeroed`."""
    if wanted == [(slice(0, x.shape[2]),)]:
        return [zero_rows(x, zeroed)]
    bounds = [bound for parts in wanted for part in parts for bound in (part.start, part.stop)]
    views = iter(_Stretches.apply(x, zeroed, *bounds))
    picked = [[next(views) for _ in parts] for parts in wanted]
    return [parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in picked]


class _Stretches(torch.autograd.Function):
    """Stretches of positions of x [B, H, T, D], after zeroing some rows: views of one tensor, which may overlap.

    Slices of autograd's own would each bring back a gradient of x's full size; here a single one is filled in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, zeroed: Tensor | None, *bounds: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(zeroed)
        ctx.set_materialize_grads(False)
        ctx.x_shape, ctx.bounds = x.shape, bounds
        x = zero_rows(x, zeroed)
        return tuple(x[:, :, start:stop] for start, stop in zip(bounds[::2], bounds[1::2], strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (zeroed,) = ctx.saved_tensors
        b, h, t, d = ctx.x_shape
        none = (None,) * (1 + len(ctx.bounds))
        parts = zip(ctx.bounds[::2], ctx.bounds[1::2], grads, strict=True)
        known = sorted(((start, stop, grad) for start, stop, grad in parts if grad is not None), key=lambda p: p[:2])
        if not known:
            return (None, *none)
        whole = known[0][2].new_empty(b, t, h, d)
        total = whole.transpose(1, 2)
        done = 0
        for start, stop, grad in known:
            if start > done:
                total[:, :, done:start].zero_()
                done = start
            shared = min(stop, done) - start
            if shared:
                total[:, :, start : start + shared].add_(grad[:, :, :shared])
            if stop > done:
                total[:, :, done:stop].copy_(grad[:, :, shared:])
                done = stop
        if done < t:
            total[:, :, done:].zero_()
        zero_rows_(whole, zeroed)
        return (total, *none)
