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

from collections.abc import Iterator, Sequence
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


def exchange_rows(x: Tensor, *, sizes: Sequence[int], group: Group | None = None) -> Tensor:
    """What every rank has for this rank's rows, x [sum b, ...] -> [ranks, b, ...], in rank order; without gradient.

    Args:
        x: [sum b, ...], something for every rank's rows.
        sizes: every rank's b (`gather_sizes`).
    """
    ranks, own = world_size(group), sizes[rank(group)]
    if ranks == 1:
        return x.detach()[None]
    received = x.new_empty((ranks * own, *x.shape[1:]))
    dist.all_to_all_single(received, x.detach().contiguous(), [own] * ranks, list(sizes), group=group)
    return received.unflatten(0, (ranks, own))


def reduce_scatter(x: Tensor, *, sizes: Sequence[int], group: Group | None = None) -> Tensor:
    """Sum over ranks of x [sum b, ...], of which each rank gets its own rows [b, ...]; without gradient.

    Args:
        x: [sum b, ...], something for every rank's rows.
        sizes: every rank's b (`gather_sizes`).
    """
    return x.detach() if world_size(group) == 1 else _reduce_scatter_rows(x.detach(), sizes, group)


class RingSum:
    """Sums of every rank's parts for a block of rows, which follow the blocks of `ring` around the ranks.

    A block's sum arrives where the block itself was one step before: it moves while the next part is computed.

    Args:
        sizes: every rank's b (`gather_sizes`).
    """

    def __init__(self, *, sizes: Sequence[int], group: Group | None = None) -> None:
        self._sizes, self._group = sizes, group
        self._moving = _Moving()
        self._arriving: Tensor | None = None

    def add(self, owner: int, part: Tensor) -> None:
        """Adds this rank's part [b of owner, ...] and passes the sum on; owners in the order of `ring`."""
        total = part if self._arriving is None else part + self._arrived()
        ranks = world_size(self._group)
        if ranks == 1:
            self._arriving = total
            return
        self._arriving = total.new_empty((self._sizes[(owner - 1) % ranks], *total.shape[1:]))
        self._moving.start([total], [self._arriving], 1, self._group)

    def finish(self) -> Tensor:
        """The sum [b, ...] over all ranks for this rank's own rows, once each rank has added to every block."""
        return self._arrived()

    def _arrived(self) -> Tensor:
        self._moving.wait()
        assert self._arriving is not None
        return self._arriving


def ring(
    tensors: Sequence[Tensor], *, sizes: Sequence[int], group: Group | None = None
) -> Iterator[tuple[int, list[Tensor]]]:
    """Every rank's blocks in turn, this rank's own first: (owner, tensors [b of owner, ...]); without gradient.

    The blocks go round a ring of ranks. The next ones arrive while the caller works on the present ones, of which two
    are held at a time, instead of all. A rank of no rows takes part with empty blocks.

    Args:
        tensors: this rank's blocks, each [b, ...].
        sizes: every rank's b (`gather_sizes`).
    """
    ranks, own = world_size(group), rank(group)
    present = [x.detach().contiguous() for x in tensors]
    for step in range(ranks):
        moving, following = _Moving(), []
        if step + 1 < ranks:
            size = sizes[(own - step - 1) % ranks]
            following = [x.new_empty((size, *x.shape[1:])) for x in present]
            moving.start(present, following, 0, group)
        yield (own - step) % ranks, present
        moving.wait()
        present = following


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


class _Moving:
    """Tensors on their way to the next rank, and from the one before."""

    def __init__(self) -> None:
        self._work: list[Any] = []
        self._sent: list[Tensor] = []  # kept alive until they have left

    def start(self, sent: Sequence[Tensor], received: Sequence[Tensor], tag: int, group: Group | None) -> None:
        ranks, own = world_size(group), rank(group)
        after, before = (own + 1) % ranks, (own - 1) % ranks
        if group is not None:
            after, before = dist.get_global_rank(group, after), dist.get_global_rank(group, before)
        self._sent = [x.contiguous() for x in sent]
        steps = [dist.P2POp(dist.isend, x, after, group, tag) for x in self._sent if x.numel()]
        steps += [dist.P2POp(dist.irecv, x, before, group, tag) for x in received if x.numel()]
        self._work = dist.batch_isend_irecv(steps) if steps else []

    def wait(self) -> None:
        for work in self._work:
            work.wait()
        self._work, self._sent = [], []


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: Group | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather_rows(x, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_rows(grad, ctx.sizes, ctx.group), None, None
