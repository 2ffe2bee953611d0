"""Attention over runs of keys: what the kernels are told about a mask, and the same in plain PyTorch.

Query rows lie in segments; all rows of a segment see the same few runs [first, last) of keys, which may differ from
example to example and be cut short by causality. Queries q [B, H, Tq, D], keys k [B, Hk, Tk, D], values
v [B, Hk, Tk, Dv]; H is a multiple of Hk (grouped-query attention: Ainslie et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .grounding import accumulation_dtype

GRAIN = 64
"""Keys per entry of `Runs.seen_by`."""

ROUNDS = 7
"""Of Philox in the dropout mask; the fewest that pass BigCrush (Salmon et al., 2011)."""


_P = ParamSpec("_P")
_R = TypeVar("_R")

LOG2_E = 1.4426950408889634


class Runs(NamedTuple):
    """Which keys each query row attends to, in S segments of query rows.

    A row without a key gives zeros. Nothing is said by values that the host would have to read off the device.
    """

    bounds: Tensor
    """[S + 1] int32: segment s has the rows bounds[s] .. bounds[s + 1] - 1; from 0 to Tq, never falling."""
    runs: Tensor
    """[B or 1, S, R, 2] int32: first key and one past the last, ascending, then (0, 0)."""
    segments: Tensor
    """[B or 1, S, 3] int32: the number of runs; a key c; a key p. A run that begins before c ends for row i at
    max(i + offset + 1, p) if that comes first. c = 0: no causality; p: one past a prefix that all rows see."""
    seen_by: Tensor
    """[B or 1, ceil(Tk / GRAIN), 2] int32: the first segment that may see a key of these, one past the last."""
    valid: Tensor | None
    """[B or 1, Tq] bool, False = the row attends to nothing."""
    offset: int
    """Position among the keys of query row 0."""
    pairs: int
    """Pairs of a query and a key that it sees, per example and head, without padding: for counting FLOPs."""


def make_runs(
    bounds: Tensor,
    runs: Tensor,
    segments: Tensor,
    *,
    keys: int,
    valid: Tensor | None = None,
    offset: int = 0,
    pairs: int = 0,
) -> Runs:
    """Runs with `seen_by` filled in. Arguments as the fields; `keys` is Tk."""
    grain = torch.arange(0, keys, GRAIN, device=runs.device)
    first, last = runs[:, :, 0, 0, None], runs[..., 1].amax(dim=2)[..., None]
    reaches = (first < grain + GRAIN) & (last > grain) & (bounds[1:] > bounds[:-1])[:, None]
    count = runs.shape[1]
    index = torch.arange(count, device=runs.device)[:, None]
    seen_by = torch.stack([torch.where(reaches, index, count).amin(1), torch.where(reaches, index + 1, 0).amax(1)], -1)
    return Runs(bounds, runs, segments, seen_by.int(), valid, offset, pairs)


def packed_runs(bounds: Tensor, *, keys: int, causal: bool = False, pairs: int = 0) -> Runs:
    """Examples side by side on one axis, each seeing itself, as Runs for B = 1.

    Args:
        bounds: [N + 1] int32, where each example begins ("cu_seqlens"); it may live on a device.
        keys: tokens in all, bounds[-1].
        causal: within each example.
        pairs: as in `Runs`.
    """
    bounds = bounds.contiguous()
    runs = torch.stack([bounds[:-1], bounds[1:]], dim=-1)[None, :, None]
    stops = bounds[1:] if causal else torch.zeros_like(bounds[1:])
    segments = torch.stack([torch.ones_like(stops), stops, torch.zeros_like(stops)], dim=-1)[None]
    return make_runs(bounds, runs, segments, keys=keys, pairs=pairs)


def dense_of(runs: Runs, queries: int, keys: int) -> Tensor:
    """The mask that runs stand for, [B or 1, 1, Tq, Tk] bool."""
    return _dense(runs.bounds, runs.runs, runs.segments, runs.valid, runs.offset, queries, keys)


def _dense(
    bounds: Tensor, runs: Tensor, segments: Tensor, valid: Tensor | None, offset: int, queries: int, keys: int
) -> Tensor:
    key = torch.arange(keys, device=runs.device, dtype=torch.int32)
    row = torch.arange(queries, device=runs.device, dtype=torch.int32)
    segment = torch.searchsorted(bounds, row, right=True) - 1
    first, last = runs[..., 0, None], runs[..., 1, None]
    inside = (key >= first) & (key < last)
    is_clipped = first < segments[:, :, 1, None, None]
    free, ordered = (inside & ~is_clipped).any(2), (inside & is_clipped).any(2)
    limit = torch.maximum(row + offset + 1, segments[:, segment, 2])
    seen = free[:, segment] | (ordered[:, segment] & (key < limit[..., None]))
    if valid is not None:
        seen = seen & valid[..., None]
    return seen[:, None]


def dropout_keep(seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """Which attention weights dropout keeps, bool of `shape` [B, H, Tq, Tk]: the kernels' mask, bit for bit.

    Entry (b, h, i, j) is kept if the first word of Philox 4x32-7 with counter (j, i, b H + h, 0) and key `seed`,
    shifted right by 8, is at least round(dropout_p 2^24). So a mask is made again from its seed, whatever the tiles.

    Args:
        seed: [1] long.
        shape: B, H, Tq, Tk.
        dropout_p: probability of dropping.

    Source: Salmon et al., 2011 (Parallel random numbers: as easy as 1, 2, 3).
    """
    b, h, queries, keys = shape
    counter = [torch.arange(n, device=seed.device) for n in (keys, queries, b * h)]
    words = philox(seed, counter[0], counter[1][:, None], counter[2][:, None, None])
    return ((words >> 8) >= threshold_of(dropout_p)).reshape(shape)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, rounds: int = ROUNDS) -> Tensor:
    """First word of Philox 4x32 with counter (c0, c1, c2, 0), which broadcast, and key seed; all of it long."""
    low = 0xFFFFFFFF
    c3 = torch.zeros_like(c2)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(rounds):
        # Wrapping int64 products hold the 64 bits of the unsigned ones.
        left, right = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c1 = ((left >> 32) & low) ^ c1 ^ k0, left & low
        c2, c3 = ((right >> 32) & low) ^ c3 ^ k1, right & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


def threshold_of(dropout_p: float) -> int:
    """The 24-bit number below which a weight is dropped."""
    return round(dropout_p * 2**24)


def keep_scale_of(dropout_p: float) -> float:
    """What kept weights are multiplied by; 0 where none is kept."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def memory_order(x: Tensor, heads: int, length: int, width: int) -> Tensor:
    """An empty [B, heads, length, width] that lies as [B, length, heads, width]: the caller need not transpose."""
    return x.new_empty(x.shape[0], length, heads, width).transpose(1, 2)


def _without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Autocast's dtype is chosen before an operation, not inside of it."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call


class _Inputs(NamedTuple):
    q: Tensor  # wide, zeros in rows that see nothing
    k: Tensor  # wide, repeated for H heads, zeros in keys that nobody sees
    v: Tensor
    allowed: Tensor
    keep: Tensor | None


def _prepare(q, k, v, bounds, runs, segments, valid, seed, dropout_p, offset) -> _Inputs:
    wide, group = accumulation_dtype(q, k), q.shape[1] // k.shape[1]
    allowed = _dense(bounds, runs, segments, valid, offset, q.shape[2], k.shape[2])
    unseen = ~allowed.any(dim=2)[..., None]
    keep = None
    if dropout_p:
        keep = dropout_keep(seed, (*q.shape[:3], k.shape[2]), dropout_p)
    k, v = (x.masked_fill(unseen, 0.0).to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    return _Inputs(q.masked_fill(~allowed.any(dim=3, keepdim=True), 0.0).to(wide), k, v, allowed, keep)


@_without_autocast
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    runs: Tensor,
    segments: Tensor,
    seen_by: Tensor,
    valid: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    offset: int,
    pairs: int,
) -> tuple[Tensor, Tensor]:
    """Attention with the whole matrix of weights.

    Args:
        q: [B, H, Tq, D].
        k: [B, Hk, Tk, D].
        v: [B, Hk, Tk, Dv].
        bounds, runs, segments, seen_by, valid, offset, pairs: fields of `Runs`.
        seed: [1] long, of `dropout_keep`; read only if dropout_p.
        scale: factor of q k^T.
        dropout_p: share of the weights dropped.

    Returns:
        out [B, H, Tq, Dv] in q's dtype; lse [B, H, Tq] float32 or wider, log2 of the sum of 2^(scores log2(e)), inf in
        a row without a key.
    """
    x = _prepare(q, k, v, bounds, runs, segments, valid, seed, dropout_p, offset)
    scores = (x.q @ x.k.mT).mul_(scale).masked_fill_(~x.allowed, float("-inf"))
    lse = scores.logsumexp(dim=3)
    lse = torch.where(lse == float("-inf"), float("inf"), lse)
    weights = (scores - lse[..., None]).exp_()
    if x.keep is not None:
        weights = weights * x.keep * keep_scale_of(dropout_p)
    out = memory_order(q, q.shape[1], q.shape[2], v.shape[3])
    out.copy_(weights @ x.v)
    return out, lse * LOG2_E


@_without_autocast
def attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    runs: Tensor,
    segments: Tensor,
    seen_by: Tensor,
    valid: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    offset: int,
    pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for a gradient of `out`; arguments and the two results as in `attention_reference`."""
    x = _prepare(q, k, v, bounds, runs, segments, valid, seed, dropout_p, offset)
    blind = ~x.allowed.any(dim=3, keepdim=True)
    grad = grad.masked_fill(blind, 0.0).to(x.q.dtype)
    weights = ((x.q @ x.k.mT).mul_(scale) - lse[..., None] / LOG2_E).exp_().masked_fill_(~x.allowed, 0.0)
    weights_grad = grad @ x.v.mT
    dropped = weights
    if x.keep is not None:
        factor = x.keep * keep_scale_of(dropout_p)
        dropped, weights_grad = weights * factor, weights_grad * factor
    delta = (grad * out.to(grad.dtype)).sum(dim=3, keepdim=True)
    scores_grad = weights * (weights_grad - delta) * scale
    group = (k.shape[1], -1)
    results = []
    for like, value in (
        (q, scores_grad @ x.k),
        (k, (scores_grad.mT @ x.q).unflatten(1, group).sum(2)),
        (v, (dropped.mT @ grad).unflatten(1, group).sum(2)),
    ):
        results.append(memory_order(like, *like.shape[1:]).copy_(value))
    return results[0], results[1], results[2]
