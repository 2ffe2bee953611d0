"""Renderings of a SegmentMask for kernels: runs of keys, and FlexAttention block masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from vlblocks.ops.segments import SegmentMask


def segment_of(mask: SegmentMask, device: torch.device) -> Tensor:
    """The index of the segment that each position belongs to, [T] long."""
    index = [i for i, length in enumerate(mask.lengths) for _ in range(length)]
    return torch.tensor(index, dtype=torch.long, device=device)


def table_of(mask: SegmentMask, device: torch.device) -> Tensor:
    """Which segment sees which, [S, S] bool (rows are queries)."""
    count = len(mask.names)
    return torch.tensor(mask.table, dtype=torch.bool, device=device).reshape(count, count)


class KeyRuns(NamedTuple):
    """A mask as runs of keys: the few integers per example that a kernel needs. S segments, R = the most runs of any.

    A query row of segment s attends to the keys of runs 0 .. counts[b, s] - 1 of that segment, unless the row is padded
    (`query_valid`). Rows of the causal segment clip: with i the row's position in that segment, a run that starts
    before `causal_stop` ends at ``min(stop, causal_start + max(i + 1, prefix[b]))`` (empty when that is not past its
    start); no run of that segment reaches across `causal_stop`. A row left without a key gives zeros, or, if
    `open_rows`, an ordinary softmax over all `total` keys.

    Attributes:
        starts: [B or 1, S, R] int32, first key; 0 past the last run.
        stops: [B or 1, S, R] int32, one past the last key; 0 past the last run.
        counts: [B or 1, S] int32, number of runs.
        query_bounds: S pairs: the query rows [first, last + 1) of each segment.
        query_offset: key position of query row 0.
        query_valid: [B, Tq] bool, True = real; None: all real.
        causal_segment: index of the causal segment, -1 without one.
        causal_start: its first key position.
        causal_stop: one past its last key position.
        prefix: [B] integer; None: 0 everywhere.
        total: T.
        open_rows: what a row without a key gives, see above.
    """

    starts: Tensor
    stops: Tensor
    counts: Tensor
    query_bounds: tuple[tuple[int, int], ...]
    query_offset: int
    query_valid: Tensor | None
    causal_segment: int
    causal_start: int
    causal_stop: int
    prefix: Tensor | None
    total: int
    open_rows: bool

    def dense(self) -> Tensor:
        """The mask that these runs stand for, [B or 1, 1, Tq, T] bool, built run by run."""
        device = self.starts.device
        key = torch.arange(self.total, device=device)
        blocks = []
        for s, (first, last) in enumerate(self.query_bounds):
            starts, stops = self.starts[:, s, None, :], self.stops[:, s, None, :]
            if s == self.causal_segment:
                row = torch.arange(first, last, device=device) + self.query_offset - self.causal_start
                reach = row[None] + 1
                if self.prefix is not None:
                    reach = torch.maximum(reach, self.prefix[:, None])
                limit = self.causal_start + reach[:, :, None]
                stops = torch.where(starts < self.causal_stop, torch.minimum(stops, limit), stops)
            inside = ((key >= starts[..., None]) & (key < stops[..., None])).any(dim=2)
            blocks.append(inside.expand(-1, last - first, -1))
        batch = max((block.shape[0] for block in blocks), default=1)
        blocks = [block.expand(batch, -1, -1) for block in blocks]
        allowed = torch.cat(blocks, dim=1) if blocks else key.new_zeros(1, 0, self.total, dtype=torch.bool)
        if self.query_valid is not None:
            allowed = allowed & self.query_valid[:, :, None]
        if self.open_rows:
            allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        return allowed[:, None]


def make_key_runs(mask: SegmentMask, device: torch.device) -> KeyRuns:
    """The runs of keys of every query segment; adjacent visible segments merge where no padding lies between."""
    segment = segment_of(mask, device)
    table = table_of(mask, device)
    seen = table[:, segment][None]
    valid = mask.valid_tokens()
    if valid is not None:
        seen = seen & valid[:, None, :]
    starts_here = seen & ~F.pad(seen, (1, 0))[..., :-1]
    stops_here = seen & ~F.pad(seen, (0, 1))[..., 1:]
    causal = mask.causal_within()
    causal_segment, causal_start, causal_stop = -1, 0, 0
    if causal is not None:
        causal_segment = mask.names.index(causal)
        causal_start, causal_stop = mask.slice(causal).start, mask.slice(causal).stop
        # Clipping the stop must not cut what lies behind the causal segment, so no run may reach across its end.
        starts_here[:, causal_segment, causal_stop : causal_stop + 1] = seen[
            :, causal_segment, causal_stop : causal_stop + 1
        ]
        stops_here[:, causal_segment, causal_stop - 1] = seen[:, causal_segment, causal_stop - 1]
    counts = starts_here.sum(dim=-1)
    most = int(counts.max()) if counts.numel() else 0
    position = torch.arange(mask.total, device=device)
    used = torch.arange(most, device=device) < counts[..., None]

    def pack(here: Tensor) -> Tensor:
        first = torch.where(here, position, mask.total).sort(dim=-1).values[..., :most]
        return torch.where(used, first, -1)

    bounds = [mask.query_slice(name) for name in mask.names]
    return KeyRuns(
        starts=pack(starts_here).clamp(min=0).int(),
        stops=(pack(stops_here) + 1).int(),
        counts=counts.int(),
        query_bounds=tuple((rows.start, rows.stop) for rows in bounds),
        query_offset=mask.total - mask.queries,
        query_valid=mask.valid_queries(),
        causal_segment=causal_segment,
        causal_start=causal_start,
        causal_stop=causal_stop,
        prefix=mask.prefix,
        total=mask.total,
        open_rows=mask.masked_rows == "open",
    )


def masked_rows_of(mask: SegmentMask, names: Iterable[str], device: torch.device) -> Tensor | None:
    """Query rows of these segments that may attend to nothing, [B or 1, rows] bool; None: known that there are none."""
    parts: list[tuple[int, Tensor | None]] = []
    for name in names:
        rows = mask.query_slice(name)
        if rows.stop > rows.start:
            parts.append((rows.stop - rows.start, mask.masked_queries(name)))
    found = [part for _, part in parts if part is not None]
    if not found:
        return None
    batch = max(part.shape[0] for part in found)
    none = torch.zeros(1, 1, dtype=torch.bool, device=device)
    return torch.cat([(none if part is None else part.to(device)).expand(batch, n) for n, part in parts], dim=1)


def make_mask_mod(mask: SegmentMask, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as FlexAttention's predicate; sizes are captured as tensors, since each new integer would recompile."""
    hidden = mask.total - mask.queries
    key_segment = segment_of(mask, device)
    query_segment = key_segment[hidden:]
    table = table_of(mask, device)
    key_position = torch.arange(mask.total, device=device)
    query_position = key_position[hidden:]
    causal = mask.causal_within()
    in_causal = torch.zeros_like(key_segment, dtype=torch.bool)
    local = key_position
    if causal is not None:
        in_causal = key_segment == mask.names.index(causal)
        local = key_position - mask.offset(causal)
    query_in_causal = in_causal[hidden:]
    prefix = mask.prefix
    key_valid = mask.valid_tokens()
    query_valid = mask.valid_queries()
    opened = masked_rows_of(mask, mask.names, device) if mask.masked_rows == "open" else None
    if opened is not None and mask.batch is not None:
        opened = opened.expand(mask.batch, -1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = table[query_segment[q_idx], key_segment[kv_idx]]
        if causal is not None:
            early = key_position[kv_idx] <= query_position[q_idx]
            if prefix is not None:
                early = early | (local[kv_idx] < prefix[b])
            allowed = allowed & (early | ~(query_in_causal[q_idx] & in_causal[kv_idx]))
        if key_valid is not None and query_valid is not None:
            allowed = allowed & key_valid[b, kv_idx] & query_valid[b, q_idx]
        if opened is not None:
            allowed = allowed | (opened[0, q_idx] if opened.shape[0] == 1 else opened[b, q_idx])
        return allowed

    return mask_mod


def make_block_mask(mask: SegmentMask, block_size: int, device: torch.device) -> BlockMask:
    """FlexAttention's block mask from per-block summaries of segments and validity; memory O(B (T + blocks^2))."""
    from torch.nn.attention.flex_attention import BlockMask

    count = len(mask.names)
    hidden = mask.total - mask.queries
    member = F.one_hot(segment_of(mask, device), count).bool()[None]
    real = mask.valid_tokens()
    valid = torch.ones(1, mask.total, dtype=torch.bool, device=device) if real is None else real
    table = table_of(mask, device).float()

    def blocks(x: Tensor) -> Tensor:
        """[b, T, ...] -> [b, blocks, block_size, ...], filled up with False."""
        short = -x.shape[1] % block_size
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, short))
        return x.unflatten(1, (-1, block_size))

    k_there, q_there = blocks(member), blocks(member[:, hidden:])
    k_real, q_real = blocks(member & valid[..., None]), blocks((member & valid[..., None])[:, hidden:])
    k_whole, q_whole = blocks(valid).all(dim=2), blocks(valid[:, hidden:]).all(dim=2)

    def pairs(q: Tensor, between: Tensor, k: Tensor) -> Tensor:
        """Whether a block of queries and one of keys hold segments s, t with between[s, t]: [b, Q, K] bool."""
        return torch.einsum("bqs,st,bkt->bqk", q.any(dim=2).float(), between, k.any(dim=2).float()) > 0

    causal = mask.causal_within()
    index = -1 if causal is None else mask.names.index(causal)
    unordered = table.clone()
    if causal is not None:
        unordered[index, index] = 0
    some = pairs(q_real, unordered, k_real)
    every = q_whole[:, :, None] & k_whole[:, None, :] & ~pairs(q_there, 1 - table, k_there)
    if causal is not None:
        position = torch.arange(mask.total, device=device)[None]
        k_at, q_at = blocks(position), blocks(position[:, hidden:])
        far = mask.total
        k_first = k_at.masked_fill(~k_real[..., index], far).amin(dim=2)[:, None, :]
        q_last = q_at.masked_fill(~q_real[..., index], -1).amax(dim=2)[:, :, None]
        k_last = k_at.masked_fill(~k_there[..., index], -1).amax(dim=2)[:, None, :]
        q_first = q_at.masked_fill(~q_there[..., index], far).amin(dim=2)[:, :, None]
        ordered, all_ordered = k_first <= q_last, k_last <= q_first
        if mask.prefix is not None:
            end = (mask.offset(causal) + mask.prefix)[:, None, None]
            ordered, all_ordered = ordered | (k_first < end), all_ordered | (k_last < end)
        some = some | (ordered & (q_last >= 0) & (k_first < far))
        every = every & all_ordered
    opened = masked_rows_of(mask, mask.names, device) if mask.masked_rows == "open" else None
    if opened is not None:
        some = some | blocks(opened).any(dim=2)[:, :, None]
        full_keys = blocks(torch.ones(1, mask.total, dtype=torch.bool, device=device)).all(dim=2)
        every = every | (blocks(opened).all(dim=2)[:, :, None] & full_keys[:, None, :])
    some, every = torch.broadcast_tensors(some, every)

    def ordered_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
        chosen = chosen[:, None].int()
        order = chosen.argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32).contiguous()

    return BlockMask.from_kv_blocks(
        *ordered_blocks(some & ~every),
        *ordered_blocks(every),
        BLOCK_SIZE=block_size,
        mask_mod=make_mask_mod(mask, device),
        seq_lengths=(mask.queries, mask.total),
    )
