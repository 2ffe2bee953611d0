"""Renderings of a SegmentMask for kernels: runs of keys, and FlexAttention block masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlblocks_kernels.attention import Runs, make_runs

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from vlblocks.ops.segments import SegmentMask


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of Python numbers on a device, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def segment_of(mask: SegmentMask, device: torch.device) -> Tensor:
    """The index of the segment that each position belongs to, [T] long."""
    index = [i for i, length in enumerate(mask.lengths) for _ in range(length)]
    return on_device(index, torch.long, device)


def table_of(mask: SegmentMask, device: torch.device) -> Tensor:
    """Which segment sees which, [S, S] bool (rows are queries)."""
    count = len(mask.names)
    return on_device(mask.table, torch.bool, device).reshape(count, count)


class KeyRuns(NamedTuple):
    """A mask as runs of keys: the few integers per example that a kernel needs. S segments, R = the most runs of any.

    A query row of segment s attends to the keys of runs 0 .. counts[b, s] - 1 of that segment, unless the row is padded
    (`query_valid`). Rows of a causal segment [first, last) clip: with i the row's position in that segment, a run that
    starts before `last` ends at ``min(stop, first + max(i + 1, prefix[b]))`` (empty when that is not past its start);
    no run of that segment reaches across its own `last`. A row left without a key gives zeros, or, if
    `open_rows`, an ordinary softmax over all `total` keys.

    Attributes:
        starts: [B or 1, S, R] int32, first key; 0 past the last run.
        stops: [B or 1, S, R] int32, one past the last key; 0 past the last run.
        counts: [B or 1, S] int32, number of runs.
        query_bounds: S pairs: the query rows [first, last + 1) of each segment.
        query_offset: key position of query row 0.
        query_valid: [B, Tq] bool, True = real; None: all real.
        causal: for each segment its key positions [first, last) if it is causal, else (0, 0).
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
    causal: tuple[tuple[int, int], ...]
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
            begin, end = self.causal[s]
            if end:
                row = torch.arange(first, last, device=device) + self.query_offset - begin
                reach = row[None] + 1
                if self.prefix is not None:
                    reach = torch.maximum(reach, self.prefix[:, None])
                limit = begin + reach[:, :, None]
                stops = torch.where(starts < end, torch.minimum(stops, limit), stops)
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
    causal = mask.causal_within()
    spans = [mask.slice(name) for name in mask.names]
    ordered = tuple((s.start, s.stop) if name in causal else (0, 0) for name, s in zip(mask.names, spans, strict=True))
    valid = mask.valid_tokens()
    starts, stops, counts = _static_runs(mask, device) if valid is None else _padded_runs(mask, valid, ordered, device)
    bounds = [mask.query_slice(name) for name in mask.names]
    return KeyRuns(
        starts=starts,
        stops=stops,
        counts=counts,
        query_bounds=tuple((rows.start, rows.stop) for rows in bounds),
        query_offset=mask.total - mask.queries,
        query_valid=mask.valid_queries(),
        causal=ordered,
        prefix=mask.prefix,
        total=mask.total,
        open_rows=mask.masked_rows == "open",
    )


def _static_runs(mask: SegmentMask, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, stops and counts of a mask without padding, from its lengths alone."""
    causal = mask.causal_within()
    runs: list[list[tuple[int, int]]] = []
    for name in mask.names:
        own: list[tuple[int, int]] = []
        for key in mask.visible(name):
            here = mask.slice(key)
            # Clipping the stop must not cut what lies behind the causal segment, so no run may reach across its end.
            is_past_own = name in causal and here.start == mask.slice(name).stop
            if own and own[-1][1] == here.start and not is_past_own:
                own[-1] = (own[-1][0], here.stop)
            else:
                own.append((here.start, here.stop))
        runs.append(own)
    most = max(map(len, runs), default=0)
    filled = [own + [(0, 0)] * (most - len(own)) for own in runs]
    packed = on_device(filled, torch.int32, device).reshape(1, len(runs), most, 2)
    return packed[..., 0], packed[..., 1], on_device([[len(own) for own in runs]], torch.int32, device)


def _padded_runs(
    mask: SegmentMask, valid: Tensor, causal: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    seen = table_of(mask, device)[:, segment_of(mask, device)][None] & valid[:, None, :]
    cuts = None
    if any(stop for _, stop in causal):
        ends = on_device([stop or -1 for _, stop in causal], torch.int32, device)
        cuts = torch.arange(mask.total + 1, device=device) == ends[:, None]
    padding = dict(zip(mask.names, mask.padding(), strict=True))
    lengths = dict(zip(mask.names, mask.lengths, strict=True))
    # Real tokens of n lie in (n + 1) // 2 runs at most.
    most = max(
        sum(1 if padding[key] is None else (lengths[key] + 1) // 2 for key in mask.visible(name)) for name in mask.names
    )
    return runs_of(seen, most, cuts)


def runs_of(seen: Tensor, most: int, cuts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of True.

    Args:
        seen: [B, S, T] bool.
        most: no row has more runs.
        cuts: [S, T + 1] bool; True: no run reaches across the border before this position.

    Returns:
        starts, stops [B, S, R] int32, 0 past the last run, and counts [B, S] int32. R is `most`, or where reading the
        counts costs nothing, the largest of them.
    """
    before, after = F.pad(seen, (1, 0))[..., :-1], F.pad(seen, (0, 1))[..., 1:]
    if cuts is not None:
        before, after = before & ~cuts[:, :-1], after & ~cuts[:, 1:]
    starts_here, stops_here = seen & ~before, seen & ~after
    counts = starts_here.sum(dim=-1, dtype=torch.int32)
    if _is_free_to_read(counts):
        most = int(counts.max()) if counts.numel() else 0
    position = torch.arange(seen.shape[-1], device=seen.device, dtype=torch.int32)
    used = torch.arange(most, device=seen.device) < counts[..., None]

    def pack(here: Tensor) -> Tensor:
        first = torch.where(here, position, seen.shape[-1]).sort(dim=-1).values[..., :most]
        return torch.where(used, first, -1)

    return pack(starts_here).clamp(min=0).int(), (pack(stops_here) + 1).int(), counts


def _is_free_to_read(x: Tensor) -> bool:
    from vlblocks.ops import segments

    return segments.is_free_to_read(x)


def make_kernel_runs(mask: SegmentMask, device: torch.device) -> Runs:
    """The runs as the Triton kernels take them; rows without a key give zeros."""
    runs = mask.key_runs(device)
    # The kernels read a first run, so that there must be one, if only an empty one.
    packed = torch.stack([runs.starts, runs.stops], dim=-1)
    if packed.shape[2] == 0:
        packed = packed.new_zeros(*packed.shape[:2], 1, 2)
    ends = on_device([[stop for _, stop in runs.causal]], torch.int32, device)
    prefix = torch.zeros_like(ends)
    if runs.prefix is not None:
        begins = on_device([first for first, _ in runs.causal], torch.int32, device)
        prefix = begins + runs.prefix[:, None].clamp(max=mask.total).int()
    batch = max(runs.counts.shape[0], prefix.shape[0])
    facts = [x.expand(batch, -1) for x in (runs.counts, ends, prefix)]
    return make_runs(
        on_device([0, *(stop for _, stop in runs.query_bounds)], torch.int32, device),
        packed,
        torch.stack(facts, dim=-1),
        keys=mask.total,
        valid=runs.query_valid,
        offset=runs.query_offset,
        pairs=_pairs(mask),
    )


def _pairs(mask: SegmentMask) -> int:
    """Pairs of a query and a key that it sees, without padding and prefixes."""
    lengths, causal, pairs = dict(zip(mask.names, mask.lengths, strict=True)), mask.causal_within(), 0
    for name in mask.names:
        rows = mask.query_slice(name)
        count = rows.stop - rows.start
        pairs += count * sum(lengths[key] for key in mask.visible(name))
        if name in causal:
            # The last row sees all of its segment, the one before it one key less, and so on.
            pairs -= count * (count - 1) // 2
    return pairs


def runs_of_keys(valid: Tensor, queries: int) -> Runs:
    """Runs of keys that every one of `queries` rows sees: valid [B or 1, T] bool."""
    keys = valid.shape[1]
    starts, stops, counts = runs_of(valid[:, None], (keys + 1) // 2)
    runs = torch.stack([starts, stops], dim=-1)
    if runs.shape[2] == 0:
        runs = runs.new_zeros(*runs.shape[:2], 1, 2)
    facts = torch.stack([counts, torch.zeros_like(counts), torch.zeros_like(counts)], dim=-1)
    bounds = on_device([0, queries], torch.int32, valid.device)
    return make_runs(bounds, runs, facts, keys=keys, pairs=queries * keys)


def runs_of_all(queries: int, keys: int, device: torch.device) -> Runs:
    """Runs by which every row sees every key."""
    bounds = on_device([0, queries], torch.int32, device)
    runs = on_device([[[[0, keys]]]], torch.int32, device)
    facts = on_device([[[1, 0, 0]]], torch.int32, device)
    return make_runs(bounds, runs, facts, keys=keys, pairs=queries * keys)


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
    in_causal = on_device([name in causal for name in mask.names], torch.bool, device)[key_segment]
    local = key_position - on_device([mask.offset(name) for name in mask.names], torch.long, device)[key_segment]
    prefix = mask.prefix
    key_valid = mask.valid_tokens()
    query_valid = mask.valid_queries()
    opened = masked_rows_of(mask, mask.names, device) if mask.masked_rows == "open" else None
    if opened is not None and mask.batch is not None:
        opened = opened.expand(mask.batch, -1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = table[query_segment[q_idx], key_segment[kv_idx]]
        if causal:
            early = key_position[kv_idx] <= query_position[q_idx]
            if prefix is not None:
                early = early | (local[kv_idx] < prefix[b])
            is_ordered = in_causal[kv_idx] & (query_segment[q_idx] == key_segment[kv_idx])
            allowed = allowed & (early | ~is_ordered)
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
    indices = [mask.names.index(name) for name in causal]
    unordered = table.clone()
    for index in indices:
        unordered[index, index] = 0
    some = pairs(q_real, unordered, k_real)
    every = q_whole[:, :, None] & k_whole[:, None, :] & ~pairs(q_there, 1 - table, k_there)
    position = torch.arange(mask.total, device=device)[None]
    k_at, q_at = blocks(position), blocks(position[:, hidden:])
    far = mask.total
    for name, index in zip(causal, indices, strict=True):
        k_first = k_at.masked_fill(~k_real[..., index], far).amin(dim=2)[:, None, :]
        q_last = q_at.masked_fill(~q_real[..., index], -1).amax(dim=2)[:, :, None]
        k_last = k_at.masked_fill(~k_there[..., index], -1).amax(dim=2)[:, None, :]
        q_first = q_at.masked_fill(~q_there[..., index], far).amin(dim=2)[:, :, None]
        ordered, all_ordered = k_first <= q_last, k_last <= q_first
        if mask.prefix is not None:
            end = (mask.offset(name) + mask.prefix)[:, None, None]
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
