"""Collectives over the ranks of a process group, with exact gradients where one is asked for.

Every function is the identity (or the obvious constant) without a process group or on a single rank, so that code
which uses them needs no second version. All ranks must call them in the same order, with tensors that agree in
`requires_grad` (a gradient's backward is a collective, too), in all dimensions but the first, and in dtype.

How losses come out right. Rank r computes its loss L_r as a mean over its own amount n_r of something: rows, tokens.
The full batch's loss is sum_r n_r L_r / sum_r n_r. Each rank multiplies its loss by `rank_share(n_r)` = n_r * ranks /
sum_r n_r before its backward; the mean over ranks of losses and of gradients, which is what DistributedDataParallel
computes, is then that of the full batch. Equal amounts give a share of 1, and the factor may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = Any  # torch.distributed.ProcessGroup, a name that builds without distributed support lack


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group | None = None) -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def rank(group: Group | None = None) -> int:
    """Index of this process among the ranks; 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def gather_sizes(size: int, *, device: torch.device | str = "cpu", group: Group | None = None) -> list[int]:
    """Every rank's `size`, in rank order. `device` must be one that the group's back end can send from."""
    if world_size(group) == 1:
        return [size]
    return _gather_equal(torch.tensor([size], device=device), group).tolist()


def row_offset(sizes: Sequence[int], group: Group | None = None) -> int:
    """Index of this rank's first row among the gathered rows, given every rank's number of rows."""
    return sum(sizes[: rank(group)])


def gather(x: Tensor, *, sizes: Sequence[int] | None = None, group: Group | None = None) -> Tensor:
    """Concatenates x [b, ...] of all ranks in rank order -> [sum b, ...], without gradient.

    Args:
        x: [b, ...]; b may differ between ranks and may be 0.
        sizes: every rank's b where it is known already (`gather_sizes`); spares a collective.
    """
    if world_size(group) == 1:
        return x.detach()
    sizes = gather_sizes(x.shape[0], device=x.device, group=group) if sizes is None else sizes
    return _gather_rows(x.detach(), sizes, group)


def gather_with_grad(x: Tensor, *, sizes: Sequence[int] | None = None, group: Group | None = None) -> Tensor:
    """Concatenates x [b, ...] of all ranks in rank order -> [sum b, ...], with the exact gradient.

    A rank's rows receive the sum over all ranks of the gradients to those rows, for each rank's loss depends on them.

    Args:
        x: [b, ...]; b may differ between ranks and may be 0.
        sizes: every rank's b where it is known already (`gather_sizes`); spares a collective.
    """
    if world_size(group) == 1:
        return x
    sizes = gather_sizes(x.shape[0], device=x.device, group=group) if sizes is None else sizes
    return _GatherWithGrad.apply(x, tuple(sizes), group)


def all_reduce_sum(x: Tensor, *, group: Group | None = None) -> Tensor:
    """Sum of x over the ranks, without gradient; x itself is left as it is."""
    if world_size(group) == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def broadcast(x: Tensor, source: int = 0, *, group: Group | None = None) -> Tensor:
    """Rank `source`'s x (its rank in the group) on every rank, without gradient; x itself is left as it is."""
    if world_size(group) == 1:
        return x.detach()
    copy = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(copy, dist.get_global_rank(group, source) if group is not None else source, group=group)
    return copy


def rank_share(amount: Tensor | float, *, device: torch.device | str = "cpu", group: Group | None = None) -> Tensor:
    """This rank's amount over the ranks' mean amount -> float32 scalar: the weight of a rank's mean loss.

    See the module's text: losses times their shares average to the full batch's loss, and so do their gradients. It is
    1 on a single rank, and where no rank has anything.

    Args:
        amount: what the loss is a mean over: its number of rows, or the sum of its weights.
        device: where the result lives if amount is a number; the group's back end must be able to send from it.
    """
    if isinstance(amount, Tensor):
        own = amount.detach().to(torch.float32).reshape(())
    else:
        own = torch.tensor(float(amount), device=device)
    total = all_reduce_sum(own, group=group)
    return torch.where(total > 0, own * world_size(group) / total, torch.ones_like(own))


def _gather_equal(x: Tensor, group: Group | None) -> Tensor:
    gathered = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def _gather_rows(x: Tensor, sizes: Sequence[int], group: Group | None) -> Tensor:
    if max(sizes) == min(sizes):
        return _gather_equal(x, group)
    longest = max(sizes)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    gathered = _gather_equal(padded, group).unflatten(0, (len(sizes), longest))
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def _reduce_scatter_rows(x: Tensor, sizes: Sequence[int], group: Group | None) -> Tensor:
    longest = max(sizes)
    if longest != min(sizes):
        padded = x.new_zeros((len(sizes), longest, *x.shape[1:]))
        for slot, rows in zip(padded, x.split(list(sizes)), strict=True):
            slot[: rows.shape[0]] = rows
        x = padded.flatten(0, 1)
    own = x.new_empty((longest, *x.shape[1:]))
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own[: sizes[rank(group)]]


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: Group | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather_rows(x, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_rows(grad, ctx.sizes, ctx.group), None, None
