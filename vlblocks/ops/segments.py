"""A sequence as named segments: which segment sees which, what is padding, and what is causal after which prefix."""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.ops.renderings import (
    KeyRuns,
    make_block_mask,
    make_kernel_runs,
    make_key_runs,
    on_device,
    segment_of,
    table_of,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from vlblocks_kernels.attention import Runs

__all__ = ["KeyRuns", "MaskedRows", "SegmentMask"]

MaskedRows = Literal["zeros", "open"]
_R = TypeVar("_R")


def is_free_to_read(x: Tensor) -> bool:
    """Whether Python may look at x's values at no cost: not on an accelerator (a sync), not while tracing or faking."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu"


def is_settled_false(flags: Tensor) -> bool:
    """Whether a bool tensor is known to hold no True; False also where finding out is not free."""
    return is_free_to_read(flags) and not bool(flags.any())


@dataclass(frozen=True, eq=False, repr=False)
class SegmentMask:
    """The one way a mask travels: a table over named segments; made by `build`, `single` or `packed`.

    ``allowed[b, q, k] = valid[q] and valid[k] and table[segment(q), segment(k)]``, and inside a causal segment also
    ``k <= q or k < prefix[b]`` (positions counted from that segment's start). The queries are the last `queries` of
    the T positions (all of them unless `last_queries` was called). A query row that may attend to nothing, such as a
    padded one, gives zeros (``masked_rows="zeros"``) or an ordinary softmax over all T positions, padding included
    (``"open"``, what the original UNIMO-2 computes).

    Renderings are made on demand and kept, so that every layer of a stack shares them: treat the tensors as constant.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    table: tuple[tuple[bool, ...], ...]
    valid: tuple[Tensor | None, ...]
    causal: tuple[str, ...]
    prefix: Tensor | None
    masked_rows: MaskedRows
    queries: int
    batch: int | None
    _memo: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        segments: Mapping[str, int],
        sees: Mapping[str, Iterable[str]],
        *,
        valid: Mapping[str, Tensor | None] | None = None,
        causal: str | Iterable[str] | None = None,
        prefix: Tensor | None = None,
        masked_rows: MaskedRows = "zeros",
    ) -> SegmentMask:
        """Check and assemble a mask; no tensor work is done here.

        Args:
            segments: name -> length in tokens, in sequence order; a length may be 0.
            sees: query segment -> the key segments it may attend to; a segment without an entry attends to nothing.
            valid: name -> [B, length] bool, True = real token; a segment without an entry (or None) is all real.
            causal: the segment, or segments, that are causal within themselves.
            prefix: [B] integer; a causal segment's first prefix[b] tokens are seen by all of its tokens.
            masked_rows: what a query row that may attend to nothing gives: "zeros" or "open".

        Raises:
            UserError: an unknown name, a wrong shape, dtype, device or batch, or a prefix without a causal segment.
        """
        names = tuple(segments)
        for name, length in segments.items():
            if not isinstance(length, int) or length < 0:
                raise UserError(f"segments[{name!r}] is {length!r}: give a length in tokens, 0 or more")
        for name, keys in sees.items():
            _check_name(f"sees has {name!r}, which", name, names)
            if isinstance(keys, str):
                raise UserError(f"sees[{name!r}] is the string {keys!r}: give a list of segment names, [{keys!r}]")
        seen = {name: frozenset(keys) for name, keys in sees.items()}
        for name, wanted in seen.items():
            for key in sorted(wanted):
                _check_name(f"sees[{name!r}] names {key!r}, which", key, names)
        causal = () if causal is None else (causal,) if isinstance(causal, str) else tuple(causal)
        for name in causal:
            _check_name(f"causal={name!r}", name, names)
        if masked_rows not in ("zeros", "open"):
            raise UserError(f"masked_rows={masked_rows!r} is unknown: choose 'zeros' or 'open'")

        tensors: dict[str, Tensor] = {}
        for name, real in (valid or {}).items():
            _check_name(f"valid has {name!r}, which", name, names)
            if real is None:
                continue
            if real.dtype != torch.bool:
                raise UserError(f"valid[{name!r}] has dtype {real.dtype}: give torch.bool, True = real token")
            if real.dim() != 2 or real.shape[1] != segments[name]:
                raise UserError(f"valid[{name!r}] has shape {list(real.shape)}: give [batch, {segments[name]}]")
            tensors[f"valid[{name!r}]"] = real
        if prefix is not None:
            if not causal:
                raise UserError("prefix is given without causal: name the causal segment, or leave prefix out")
            if prefix.dim() != 1 or prefix.is_floating_point() or prefix.dtype == torch.bool:
                raise UserError(
                    f"prefix is {prefix.dtype} of shape {list(prefix.shape)}: give integers of shape [batch]"
                )
            tensors["prefix"] = prefix
        batch: int | None = None
        for label, tensor in tensors.items():
            first_label, first = next(iter(tensors.items()))
            batch = first.shape[0]
            if tensor.shape[0] != batch:
                raise UserError(
                    f"{label} has batch {tensor.shape[0]} but {first_label} has {batch}: give both the same batch"
                )
            if tensor.device != first.device:
                raise UserError(
                    f"{label} is on {tensor.device} but {first_label} on {first.device}: move them together"
                )
        return cls(
            names=names,
            lengths=tuple(segments.values()),
            table=tuple(tuple(key in seen.get(name, ()) for key in names) for name in names),
            valid=tuple((valid or {}).get(name) for name in names),
            causal=causal,
            prefix=prefix,
            masked_rows=masked_rows,
            queries=sum(segments.values()),
            batch=batch,
        )

    @classmethod
    def single(
        cls,
        *,
        length: int,
        valid: Tensor | None = None,
        causal: bool = False,
        prefix: Tensor | None = None,
        masked_rows: MaskedRows = "zeros",
        name: str = "tokens",
    ) -> SegmentMask:
        """The mask of a tower: one segment of `length` tokens that sees itself; valid is [B, length] bool or None.

        Raises:
            UserError: a negative length, a validity or prefix that does not fit, or a prefix without `causal`.
        """
        return cls.build(
            {name: length},
            {name: (name,)},
            valid={name: valid},
            causal=name if causal else None,
            prefix=prefix,
            masked_rows=masked_rows,
        )

    @classmethod
    def packed(cls, lengths: Sequence[int], *, causal: bool = False) -> SegmentMask:
        """Examples of these lengths side by side on one axis, for a batch of 1: each sees itself, `causal` or whole.

        Raises:
            UserError: a length that is negative or not an integer.
        """
        names = [str(i) for i in range(len(lengths))]
        return cls.build(
            dict(zip(names, lengths, strict=True)),
            {name: (name,) for name in names},
            causal=names if causal else None,
        )

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name}[{length}{'' if real is None else ' padded'}{' causal' if name in self.causal else ''}]"
            f" -> {{{', '.join(key for key, seen in zip(self.names, row, strict=True) if seen)}}}"
            for name, length, real, row in zip(self.names, self.lengths, self.valid, self.table, strict=True)
        )
        return f"SegmentMask({parts}; batch={self.batch}, queries={self.queries}, masked_rows={self.masked_rows!r})"

    @property
    def total(self) -> int:
        """T, the number of key positions: the sum of the segments' lengths."""
        return sum(self.lengths)

    @property
    def device(self) -> torch.device | None:
        """Where the mask's tensors are; None when it has none and fits any device."""
        tensors = (*self.valid, self.prefix)
        return next((tensor.device for tensor in tensors if tensor is not None), None)

    def offset(self, name: str) -> int:
        """The position of the segment's first token in the whole sequence."""
        _check_name(f"segment {name!r}", name, self.names)
        return sum(self.lengths[: self.names.index(name)])

    def slice(self, name: str) -> builtins.slice:
        """The segment's positions in the whole sequence."""
        start = self.offset(name)
        return slice(start, start + self.lengths[self.names.index(name)])

    def query_slice(self, name: str) -> builtins.slice:
        """The segment's positions among the queries; empty when `last_queries` left none of them."""
        hidden = self.total - self.queries
        keys = self.slice(name)
        return slice(max(keys.start - hidden, 0), max(keys.stop - hidden, 0))

    def visible(self, name: str) -> tuple[str, ...]:
        """The segments with at least one token that `name` may attend to, in sequence order."""
        _check_name(f"segment {name!r}", name, self.names)
        row = self.table[self.names.index(name)]
        return tuple(key for key, seen, n in zip(self.names, row, self.lengths, strict=True) if seen and n)

    def causal_within(self) -> tuple[str, ...]:
        """The causal segments that see themselves at all (otherwise their order says nothing), in sequence order."""
        return tuple(
            name
            for name, row, n, i in zip(self.names, self.table, self.lengths, range(len(self.names)), strict=True)
            if name in self.causal and row[i] and n
        )

    def last_queries(self, n: int) -> SegmentMask:
        """The same keys for the last n positions as the only queries (decoding with a key-value cache)."""
        if not 0 <= n <= self.total:
            raise UserError(f"last_queries({n}) of a sequence of {self.total}: give a number from 0 to {self.total}")
        return self if n == self.queries else dataclasses.replace(self, queries=n, _memo={})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SegmentMask:
        """The mask with its tensors on `device`; itself when it has none or they are there."""
        if self.device is None or _same_device(torch.device(device), self.device):
            return self

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return dataclasses.replace(self, valid=tuple(map(move, self.valid)), prefix=move(self.prefix), _memo={})

    def memo(self, key: Any, make: Callable[[], _R]) -> _R:
        """What `make` returns, computed once per mask and key (each time anew while compiling, where it is fused)."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._memo:
            # An inference tensor kept here could not be used in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._memo[key] = make()
        return self._memo[key]

    def padding(self) -> tuple[Tensor | None, ...]:
        """Per segment [B, length] bool, True = real, or None where it is known that nothing is padded.

        On a CPU a validity tensor that is all True counts as None; elsewhere finding out would wait for the device.
        """
        return self.memo(
            "padding", lambda: tuple(None if real is None or is_settled_false(~real) else real for real in self.valid)
        )

    def valid_tokens(self) -> Tensor | None:
        """Real tokens, [B, T] bool; None when it is known that nothing is padded."""
        return self.memo("valid_tokens", lambda: self.concat_valid(self.names))

    def valid_queries(self) -> Tensor | None:
        """Real query tokens, [B, Tq] bool; None when it is known that nothing is padded."""
        valid = self.valid_tokens()
        return None if valid is None else valid[:, self.total - self.queries :]

    def concat_valid(self, names: Iterable[str]) -> Tensor | None:
        """Real tokens of these segments side by side, [B, sum of lengths] bool; None when none of them is padded."""
        padding = dict(zip(self.names, self.padding(), strict=True))
        lengths = dict(zip(self.names, self.lengths, strict=True))
        names = tuple(names)
        known = next((real for name in names if (real := padding[name]) is not None), None)
        if known is None:
            return None
        parts = [
            known.new_ones(known.shape[0], lengths[name]) if (real := padding[name]) is None else real for name in names
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def masked_queries(self, name: str) -> Tensor | None:
        """Query rows of one segment that may attend to nothing: [B or 1, rows or 1] bool, None when there are none.

        A real token of a segment that sees itself always sees its own position, so only other segments need a look
        at their keys.
        """
        return self.memo(("masked", name), lambda: self._masked_queries(name))

    def _masked_queries(self, name: str) -> Tensor | None:
        real = self.padding()[self.names.index(name)]
        rows = self.query_slice(name)
        masked = None
        if real is not None:
            masked = ~real[:, real.shape[1] - (rows.stop - rows.start) :]
        visible = self.visible(name)
        if name in visible:
            return masked
        if not visible:
            return torch.ones(1, 1, dtype=torch.bool, device=self.device)
        padding = dict(zip(self.names, self.padding(), strict=True))
        if all(padding[key] is not None for key in visible):
            keys = self.concat_valid(visible)
            assert keys is not None
            keyless = ~keys.any(dim=1, keepdim=True)
            masked = keyless if masked is None else masked | keyless
        return masked

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """[B or 1, 1, Tq, T] bool, True = may attend. With masked_rows="open" a fully masked row is all True.

        `device` is needed only for a mask without tensors (default: CPU).

        Raises:
            UserError: another device is asked for than the one that holds the mask's tensors.
        """
        device = self.resolve_device(device)
        return self.memo(("dense", device), lambda: self._dense(device))

    def _dense(self, device: torch.device) -> Tensor:
        hidden = self.total - self.queries
        segment = segment_of(self, device)
        table = table_of(self, device)
        allowed = table[segment[hidden:]][:, segment][None]
        causal = self.causal_within()
        if causal:
            position = torch.arange(self.total, device=device)
            is_ordered = on_device([name in causal for name in self.names], torch.bool, device)[segment]
            late = position > position[hidden:, None]
            late = (late & (segment == segment[hidden:, None]) & is_ordered)[None]
            if self.prefix is not None:
                begins = on_device([self.offset(name) for name in self.names], torch.long, device)[segment]
                late = late & (position - begins >= self.prefix[:, None])[:, None]
            allowed = allowed & ~late
        valid = self.valid_tokens()
        if valid is not None:
            allowed = allowed & valid[:, None, :] & valid[:, hidden:, None]
        if self.masked_rows == "open":
            allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        return allowed[:, None]

    def block_mask(self, block_size: int = 128, device: torch.device | str | None = None) -> BlockMask:
        """The mask for FlexAttention (`torch.nn.attention.flex_attention`), [B or 1, 1, Tq, T].

        Its blocks come from per-block summaries, never from a [Tq, T] tensor. FlexAttention itself handles neither
        fully masked rows nor NaN in padded values; `ops.attention(backend="flex")` does so around the call.

        Raises:
            UserError: another device is asked for than the one that holds the mask's tensors.
        """
        device = self.resolve_device(device)
        return self.memo(("block_mask", block_size, device), lambda: make_block_mask(self, block_size, device))

    def key_runs(self, device: torch.device | str | None = None) -> KeyRuns:
        """Per example and query segment the runs [start, stop) of keys it may attend to; waits for no device.

        Raises:
            UserError: another device is asked for than the one that holds the mask's tensors.
        """
        device = self.resolve_device(device)
        return self.memo(("key_runs", device), lambda: make_key_runs(self, device))

    def kernel_runs(self, device: torch.device | str | None = None) -> Runs:
        """The same with masked_rows="zeros", as the Triton kernels take it.

        Raises:
            UserError: another device is asked for than the one that holds the mask's tensors.
        """
        device = self.resolve_device(device)
        return self.memo(("kernel_runs", device), lambda: make_kernel_runs(self, device))

    def resolve_device(self, device: torch.device | str | None) -> torch.device:
        """The device renderings are made on.

        Raises:
            UserError: another device is asked for than the one that holds the mask's tensors.
        """
        if device is None:
            return self.device or torch.device("cpu")
        device = torch.device(device)
        if self.device is None or _same_device(device, self.device):
            return self.device or device
        raise UserError(f"the mask's tensors are on {self.device}, not on {device}: use mask.to({str(device)!r})")


def _same_device(asked: torch.device, held: torch.device) -> bool:
    return asked.type == held.type and (asked.index is None or held.index is None or asked.index == held.index)


def _check_name(label: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"{label} is not a segment: choose from {', '.join(names) or '(no segments)'}")
