"""Attention over segments, with its back ends behind one function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.ops.renderings import masked_rows_of, runs_of_all, runs_of_keys
from vlblocks.ops.segments import SegmentMask, is_settled_false
from vlblocks.ops.stretches import rows_of, take_stretches, zero_rows, zero_rows_

__all__ = ["AUTO", "BACKENDS", "Choice", "attention", "default_backend"]

LOG = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "sdpa", "triton", "flex", "xformers")


class Choice(NamedTuple):
    """A row of `AUTO`: it holds for a device type, some dtypes (None: all) and up to so many queries (None: any)."""

    device: str
    dtypes: tuple[torch.dtype, ...] | None
    queries: int | None
    backend: str
    source: str


AUTO: tuple[Choice, ...] = (
    Choice(
        "cpu",
        None,
        None,
        "sdpa",
        "benchmarks/results/attention.md, 2 cores, torch 2.14, batch 4, float32: 1.10 to 3.6 times as fast as the "
        "compiled reference in pairs, captioning, text alone and decoding. One SDPA call with a dense mask, which lets "
        "NaN of padding through, takes 0.63 to 1.09 of its time",
    ),
    Choice(
        "cuda",
        None,
        None,
        "sdpa",
        "not measured: no GPU was to be had. Gives the numbers on every GPU; triton takes its place where "
        "benchmarks/gpu_check.py --suite attention shows it to be faster",
    ),
)
"""What `backend="auto"` stands for: the first row that fits; "sdpa" on any other device."""

# (q, k, v, allowed, is_causal) -> out; allowed is bool, broadcastable to [B, H, Tq, Tk], and opens every row.
_Inner = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool], Tensor]


def default_backend(device_type: str, dtype: torch.dtype = torch.float32, queries: int = 2**31) -> str:
    """What `backend="auto"` stands for on a kind of device ("cpu", "cuda", ...), by `AUTO`."""
    for row in AUTO:
        fits = row.device == device_type and (row.dtypes is None or dtype in row.dtypes)
        if fits and (row.queries is None or queries <= row.queries):
            return row.backend
    return "sdpa"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: SegmentMask | Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention; every back end gives the same numbers.

    A query row that may attend to nothing gives exact zeros and zero gradients, or with a SegmentMask of
    ``masked_rows="open"`` an ordinary softmax over all keys. In the first case the content of padding (NaN and inf
    included) reaches neither a real row nor a gradient.

    Args:
        q: queries [B, H, Tq, Dh].
        k: keys [B, Hk, Tk, Dh]; Hk divides H, each head of keys serving H / Hk heads of queries side by side.
        v: values [B, Hk, Tk, Dv].
        mask: a SegmentMask with Tq queries and Tk keys; or (not flex) a bool tensor broadcastable to [B, H, Tq, Tk],
            True = may attend, such as [B, 1, 1, Tk] for padded keys, the only shape for triton; None: everything is
            seen.
        dropout_p: dropout probability of the attention weights, from 0 to 1; pass 0 when evaluating. Not with flex.
            What is dropped is drawn from the default generator of q's device, so that `torch.manual_seed` before a
            call repeats it; each back end draws in its own way.
        scale: factor of q k^T; default Dh ** -0.5.
        backend: "reference" (plain, dense mask, softmax in float32 or wider), "sdpa" (one call of PyTorch's SDPA per
            group of segments that see the same keys; never a [T, T] mask except inside the causal segment), "triton"
            (`vlblocks_kernels.attention_triton`: heads up to 128 wide, the mask as runs of keys; rows of
            masked_rows="open" that see nothing go through "sdpa" in a second call, which is logged once; on a CPU,
            unless interpreted, its plain reference), "flex" (FlexAttention: no gradient on a CPU), "xformers" (CUDA
            only), "auto" (by `AUTO`).

    Returns:
        [B, H, Tq, Dv] in q's dtype; in autocast's where q, k, v are cast to it.

    Raises:
        UserError: an unknown back end or one that cannot run here, a mask that does not fit, or a dropout_p outside of
            [0, 1].
    """
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is unknown: choose from {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = default_backend(q.device.type, q.dtype, q.shape[2])
    if not 0 <= dropout_p <= 1:
        raise UserError(f"dropout_p is {dropout_p}: give a probability from 0 to 1")
    _check(q, k, v, mask)
    inner: _Inner | None = None
    if backend == "xformers":
        inner = _xformers_call(_load_xformers(q), dropout_p, scale)
    elif backend == "flex":
        _check_flex(q, k, v, mask, dropout_p)
    elif backend == "triton":
        q, k, v = _met_under_autocast(q, k, v)
        _check_triton(q, k, v, mask)
    if q.shape[2] == 0 or k.shape[2] == 0:
        backend = "reference"
    if backend == "reference":
        return _reference(q, k, v, mask, dropout_p, scale)
    if backend == "triton":
        return _triton(q, k, v, mask, dropout_p, scale)
    if backend == "flex":
        return _flex(q, k, v, mask if isinstance(mask, SegmentMask) else None, scale)
    if inner is None:
        inner = _sdpa_call(dropout_p, scale)
    if mask is None:
        return inner(q, k, v, None, False)
    if isinstance(mask, SegmentMask):
        return _by_segment(q, k, v, mask, inner)
    return _explicit(q, k, v, mask, inner)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: SegmentMask | Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise UserError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} axes: give [B, H, T, Dh] each")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise UserError(f"q, k, v of shapes {shapes} do not fit: give [B, H, Tq, Dh], [B, Hk, Tk, Dh], [B, Hk, Tk, Dv]")
    if q.shape[1] != k.shape[1] and (not k.shape[1] or q.shape[1] % k.shape[1]):
        raise UserError(f"q has {q.shape[1]} heads and k {k.shape[1]}: give k and v a number that divides q's")
    if isinstance(mask, SegmentMask):
        mask.resolve_device(q.device)
        if (mask.queries, mask.total) != (q.shape[2], k.shape[2]):
            raise UserError(
                f"mask is for {mask.queries} queries and {mask.total} keys, but q has {q.shape[2]} and k {k.shape[2]}: "
                "build it with the lengths of this sequence"
            )
        if mask.batch not in (None, 1, q.shape[0]):
            raise UserError(f"mask has batch {mask.batch} but q has {q.shape[0]}: build it from this batch's validity")
    elif mask is not None:
        full = (*q.shape[:3], k.shape[2])
        if mask.dtype != torch.bool:
            raise UserError(f"mask has dtype {mask.dtype}: give torch.bool, True = may attend")
        padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        if len(padded) != 4 or any(have not in (1, want) for have, want in zip(padded, full, strict=True)):
            raise UserError(
                f"mask of shape {list(mask.shape)} does not broadcast to [B, H, Tq, Tk] = {list(full)}; "
                "for padded keys give valid[:, None, None, :]"
            )


class _Hidden(NamedTuple):
    """What masked_rows="zeros" has to zero, each as `rows_of` gives it; with "open" nothing."""

    keys: Tensor | None  # padded positions
    queries: Tensor | None  # padded queries
    blind: Tensor | None  # queries that may attend to nothing, the padded ones among them


def _hidden(mask: SegmentMask, batch: int, device: torch.device) -> _Hidden:
    def find() -> _Hidden:
        if mask.masked_rows == "open":
            return _Hidden(None, None, None)
        valid, real = mask.valid_tokens(), mask.valid_queries()
        return _Hidden(
            keys=None if valid is None else rows_of(~valid, batch),
            queries=None if real is None else rows_of(~real, batch),
            blind=rows_of(masked_rows_of(mask, mask.names, device), batch),
        )

    return mask.memo(("hidden", batch, device), find)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mask: SegmentMask | Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """Attention as it is written down: scores, softmax, weighted sum, with the whole mask in memory."""
    dtype = q.dtype
    allowed: Tensor | None = None
    if isinstance(mask, SegmentMask):
        allowed = mask.dense(q.device)
        hidden = _hidden(mask, q.shape[0], q.device)
        q, k, v = zero_rows(q, hidden.queries), zero_rows(k, hidden.keys), zero_rows(v, hidden.keys)
    elif mask is not None:
        allowed = mask
        q, k, v = _hide(q, k, v, mask)
    k, v = _for_each_head(k, q.shape[1]), _for_each_head(v, q.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if allowed is None:
            weights = scores.softmax(dim=-1)
        else:
            seen = allowed | ~allowed.any(dim=-1, keepdim=True)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).masked_fill(~allowed, 0.0)
        return (F.dropout(weights, dropout_p) @ v.to(wide)).to(dtype)


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, Hk, T, D], each head as often as it serves -> [B, heads, T, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _hide(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in the queries that see nothing and in the keys and values that nobody sees, by an explicit mask."""
    allowed = allowed[(None,) * (4 - allowed.dim())]
    blind = ~allowed.any(dim=-1, keepdim=True)
    unseen = ~allowed.any(dim=-2).unsqueeze(-1)
    if unseen.shape[1] not in (1, k.shape[1]):
        # Query heads that share a head of keys each see some of them.
        unseen = unseen.unflatten(1, (k.shape[1], -1)).all(dim=2)
    if not is_settled_false(unseen):
        k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    if not is_settled_false(blind):
        q = q.masked_fill(blind, 0.0)
    return q, k, v


def _explicit(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, inner: _Inner) -> Tensor:
    """One call with an explicit mask, guarded against rows that see nothing."""
    q, k, v = _hide(q, k, v, allowed)
    allowed = allowed[(None,) * (4 - allowed.dim())]
    blind = ~allowed.any(dim=-1, keepdim=True)
    if is_settled_false(blind):
        return inner(q, k, v, allowed, False)
    return inner(q, k, v, allowed | blind, False).masked_fill(blind, 0.0)


class _Call(NamedTuple):
    """One call of the inner attention: query rows that see the same keys."""

    rows: slice
    keys: tuple[slice, ...]
    allowed: Tensor | None  # [B or 1, 1, rows or 1, keys] bool, no row of it without True; None: everything is seen
    is_causal: bool
    opened: Tensor | None  # [B or 1, 1, rows, 1] bool: rows that attend to all keys instead; None: there are none


def _plan(mask: SegmentMask, device: torch.device) -> list[_Call]:
    """The calls that cover all query rows, in order; neighbouring segments that see the same keys share one."""
    causal = mask.causal_within()
    groups: list[tuple[tuple[str, ...], list[str]]] = []
    for name in mask.names:
        rows = mask.query_slice(name)
        if rows.start == rows.stop:
            continue
        visible = mask.visible(name)
        if groups and groups[-1][0] == visible and not {name, groups[-1][1][-1]}.intersection(causal):
            groups[-1][1].append(name)
        else:
            groups.append((visible, [name]))
    return [_plan_call(mask, visible, members, device) for visible, members in groups]


def _plan_call(mask: SegmentMask, visible: tuple[str, ...], members: list[str], device: torch.device) -> _Call:
    rows = slice(mask.query_slice(members[0]).start, mask.query_slice(members[-1]).stop)
    blind = masked_rows_of(mask, members, device)
    if blind is not None:
        blind = None if is_settled_false(blind) else blind[:, None, :, None]
    keys: list[slice] = []
    for name in visible:
        here = mask.slice(name)
        if keys and keys[-1].stop == here.start:
            keys[-1] = slice(keys[-1].start, here.stop)
        else:
            keys.append(here)
    is_open = mask.masked_rows == "open"
    if not keys:
        # Rows that see nothing: all keys, or any one of them, whose result is zeroed later.
        return _Call(rows, (slice(0, mask.total if is_open else 1),), None, False, None)
    valid = mask.concat_valid(visible)
    allowed = None if valid is None else valid[:, None, None, :]
    is_causal = False
    if members[0] in mask.causal_within():
        length, n = mask.slice(members[0]).stop - mask.slice(members[0]).start, rows.stop - rows.start
        is_causal = visible == (members[0],) and n == length and mask.prefix is None and allowed is None
        # A single row is the segment's last: no key comes later, which is every decoding step.
        if not is_causal and n > 1:
            ordered = _ordered(mask, visible, members[0], n, device)
            allowed = ordered if allowed is None else ordered & allowed
    if allowed is not None and blind is not None:
        allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
    return _Call(rows, tuple(keys), allowed, is_causal, blind if is_open else None)


def _ordered(mask: SegmentMask, visible: tuple[str, ...], causal: str, n: int, device: torch.device) -> Tensor:
    """Which keys do not come too late for the last n rows of the causal segment, [B or 1, 1, n, keys] bool."""
    here = mask.slice(causal)
    position = torch.arange(here.stop - here.start, device=device)
    early = (position <= position[-n:, None])[None, None]
    if mask.prefix is not None:
        early = early | (position < mask.prefix[:, None])[:, None, None]
    before = sum(mask.slice(name).stop - mask.slice(name).start for name in visible if mask.offset(name) < here.start)
    after = sum(mask.slice(name).stop - mask.slice(name).start for name in visible if mask.offset(name) >= here.stop)
    return F.pad(early, (before, after), value=True)


def _by_segment(q: Tensor, k: Tensor, v: Tensor, mask: SegmentMask, inner: _Inner) -> Tensor:
    """One inner call per group of query segments that see the same keys."""
    device = mask.resolve_device(q.device)
    calls: list[_Call] = mask.memo(("calls", device), lambda: _plan(mask, device))
    hidden = _hidden(mask, q.shape[0], device)
    rows: list[tuple[slice, ...]] = []
    keys: list[tuple[slice, ...]] = []
    for call in calls:
        rows.append((call.rows,))
        keys.append(call.keys)
        if call.opened is not None:
            rows.append((call.rows,))
            keys.append((slice(0, mask.total),))
    qkv = zip(
        take_stretches(q, hidden.queries, rows),
        take_stretches(k, hidden.keys, keys),
        take_stretches(v, hidden.keys, keys),
        strict=True,
    )
    parts = []
    for call in calls:
        out = inner(*next(qkv), call.allowed, call.is_causal)
        if call.opened is not None:
            out = torch.where(call.opened, inner(*next(qkv), None, False), out)
        parts.append(out)
    if len(parts) == 1:
        return zero_rows(parts[0], hidden.blind)
    # SDPA's results lie as [B, T, H, D] in memory: joining them so keeps the caller's transpose free of charge.
    joined = torch.cat([part.transpose(1, 2) for part in parts], dim=1)
    zero_rows_(joined, hidden.blind)
    return joined.transpose(1, 2)


def _sdpa_call(dropout_p: float, scale: float | None) -> _Inner:
    def call(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, is_causal: bool) -> Tensor:
        options: dict[str, Any] = dict(attn_mask=allowed, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        if q.shape[1] != k.shape[1]:
            options["enable_gqa"] = True
        if not _is_slow_in_half(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, **options)
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)

    return call


def _is_slow_in_half(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether half precision would be slower than float32: training on a CPU, where SDPA's backward pass for bf16 is.

    Measured at B 32 to 64, T 32 to 197 on avx512_bf16: forward and backward take 1.4 to 3 times as long in bf16.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v)):
        return False
    return q.dtype in (torch.bfloat16, torch.float16) or (q.dtype == torch.float32 and torch.is_autocast_enabled("cpu"))


def _check_flex(q: Tensor, k: Tensor, v: Tensor, mask: SegmentMask | Tensor | None, dropout_p: float) -> None:
    if isinstance(mask, Tensor):
        raise UserError("backend='flex' takes a SegmentMask: pass one, or use backend='sdpa' for a tensor mask")
    if dropout_p:
        raise UserError("backend='flex' has no dropout: set dropout_p=0, or use backend='sdpa'")
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UserError("backend='flex' has no gradient on a CPU: use backend='sdpa', or torch.no_grad()")


def _check_triton(q: Tensor, k: Tensor, v: Tensor, mask: SegmentMask | Tensor | None) -> None:
    try:
        from vlblocks_kernels.attention_triton import supports
    except ImportError as error:
        raise UserError(f"backend='triton' needs Triton ({error}): pip install triton, or use backend='sdpa'") from None
    reason = supports(q, k, v)
    if reason is not None:
        raise UserError(f"backend='triton' {reason}: use backend='sdpa'")
    if isinstance(mask, Tensor) and not _is_of_keys(mask):
        raise UserError(
            f"backend='triton' takes a SegmentMask or a mask of keys [B, 1, 1, Tk], not one of shape "
            f"{list(mask.shape)}: use backend='sdpa'"
        )


def _met_under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k, v of several dtypes (new tokens beside a float32 cache) in autocast's, as in SDPA."""
    kind, dtypes = q.device.type, (q.dtype, k.dtype, v.dtype)
    if q.dtype == k.dtype == v.dtype or torch.float64 in dtypes:
        return q, k, v
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _is_of_keys(mask: Tensor) -> bool:
    """Whether a mask says the same for every head and query."""
    return mask.dim() < 2 or (mask.shape[-2] == 1 and (mask.dim() < 3 or mask.shape[-3] == 1))


def _triton(
    q: Tensor, k: Tensor, v: Tensor, mask: SegmentMask | Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    from vlblocks_kernels import attention_triton

    queries, keys = q.shape[2], k.shape[2]
    if mask is None:
        runs = runs_of_all(queries, keys, q.device)
    elif isinstance(mask, Tensor):
        valid = mask.reshape(1 if mask.dim() < 4 else mask.shape[0], mask.shape[-1]).expand(-1, keys)
        runs = runs_of_keys(valid, queries)
    else:
        runs = mask.kernel_runs(q.device)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    out = attention_triton.attention(q, k, v, runs=runs, scale=factor, dropout_p=dropout_p)
    if not isinstance(mask, SegmentMask) or mask.masked_rows == "zeros":
        return out
    opened = masked_rows_of(mask, mask.names, q.device)
    if opened is None or is_settled_false(opened):
        return out
    if not torch.compiler.is_compiling():
        _say_opened()
    whole = _sdpa_call(dropout_p, scale)(q, k, v, None, False)
    return torch.where(opened[:, None, :, None], whole, out)


@cache
def _say_opened() -> None:
    LOG.warning(
        "backend='triton' gives zeros to rows that see nothing: for masked_rows='open' backend='sdpa' computes them, "
        "in a second call over all keys"
    )


@cache
def _flex_function(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    return torch.compile(function) if compiled else function


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: SegmentMask | None, scale: float | None) -> Tensor:
    """FlexAttention: compiled on an accelerator, and as an unfused forward pass on a CPU."""
    cpu = q.device.type == "cpu"
    if cpu:
        # It refuses inputs that require a gradient even under no_grad, where leaves still do.
        q, k, v = q.detach(), k.detach(), v.detach()
    function = _flex_function(not cpu and not torch.compiler.is_compiling())
    shares = q.shape[1] != k.shape[1]
    if mask is None:
        return function(q, k, v, scale=scale, enable_gqa=shares)
    hidden = _hidden(mask, q.shape[0], q.device)
    q, k, v = zero_rows(q, hidden.queries), zero_rows(k, hidden.keys), zero_rows(v, hidden.keys)
    out = function(q, k, v, block_mask=mask.block_mask(device=q.device), scale=scale, enable_gqa=shares)
    return zero_rows(out, hidden.blind)


def _load_xformers(q: Tensor) -> Any:
    try:
        import xformers.ops as xops
    except ImportError:
        raise UserError(
            "backend='xformers' needs xformers, and CUDA: pip install 'vlblocks[xformers]', or use backend='sdpa'"
        ) from None
    if q.device.type != "cuda":
        raise UserError(f"backend='xformers' has no attention on {q.device.type}: use backend='sdpa'")
    return xops


def _xformers_call(xops: Any, dropout_p: float, scale: float | None) -> _Inner:
    def call(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, is_causal: bool) -> Tensor:
        bias: Any = None
        if is_causal:
            bias = xops.LowerTriangularMask()
        elif allowed is not None:
            # Its kernels read whole groups of 8 keys: the bias must be a slice of rows that long.
            keys = k.shape[2]
            whole = q.new_zeros(*allowed.shape[:-1], keys + -keys % 8)
            whole[..., :keys].masked_fill_(~allowed, float("-inf"))
            bias = whole[..., :keys].expand(q.shape[0], q.shape[1], q.shape[2], keys)
        q, k, v = (_for_each_head(x, q.shape[1]).transpose(1, 2) for x in (q, k, v))
        return xops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale).transpose(1, 2)

    return call
