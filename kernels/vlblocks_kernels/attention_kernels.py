"""The Triton kernels of attention over runs of keys; attention_triton launches them.

Tiles of queries never hold rows of two segments, so that one tile walks the same few runs. Keys outside of a run are
never loaded by the forward pass and by the queries' gradient; the gradient of keys and values walks, for each tile of
keys, the segments that see it. No atomics. Softmax statistics are float32 (float64 for float64, in the interpreter).

Source: Dao, 2023 (FlashAttention-2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import GRAIN, ROUNDS

__all__ = ["forward_kernel", "kv_grad_kernel", "q_grad_kernel"]

ROUNDS_: tl.constexpr = tl.constexpr(ROUNDS)
GRAIN_: tl.constexpr = tl.constexpr(GRAIN)


@triton.jit
def _find_segment(bounds, tile, segment_count, steps, BLOCK_M: tl.constexpr):
    """Segment and first row of a tile: segment s owns the tiles from bounds[s] // BLOCK_M + s, some of them empty."""
    low = 0
    high = segment_count
    for _ in range(steps):
        middle = (low + high) // 2
        is_here = tl.load(bounds + middle) // BLOCK_M + middle <= tile
        low = tl.where(is_here, middle, low)
        high = tl.where(is_here, high, middle)
    first = tl.load(bounds + low)
    return low, first, first + (tile - first // BLOCK_M - low) * BLOCK_M


@triton.jit
def _kept(seed, rows, keys, plane, threshold):
    """What `dropout_keep` gives for these rows and keys (broadcast) of plane b H + h."""
    zero = rows * 0 + keys * 0
    word, _, _, _ = tl.philox(seed, zero + keys, zero + rows, zero + plane, zero, ROUNDS_)
    return (word >> 8).to(tl.int32) >= threshold


@triton.jit
def _load_rows(base, first, stride, rows, ok, columns, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """Rows first + rows of a matrix, zeros where not ok (ALL: it is) and past the last column."""
    at = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if ALL and columns.shape[0] == WIDTH:
        tile = tl.load(at)
    elif ALL:
        tile = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    elif columns.shape[0] == WIDTH:
        tile = tl.load(at, mask=ok[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=ok[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def _forward_block(
    acc, top, total, q, k_base, v_base, k_t, v_t, n, stop, limits, rows, seed, plane, scale, threshold,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One block of keys from n on: all of them seen by all rows, or (MASKED) those before `limits` [BLOCK_M]."""
    acc_type: tl.constexpr = acc.dtype
    near = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    ok = near < stop - n
    k = _load_rows(k_base, n, k_t, near, ok, columns, HEAD, not MASKED)
    scores = tl.dot(q, tl.trans(k), out_dtype=acc_type, input_precision="ieee") * scale
    if MASKED:
        seen = (n + near)[None, :] < limits[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
    else:
        higher = tl.maximum(top, tl.max(scores, 1))
        base = higher
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        keep = _kept(seed, rows[:, None], (n + near)[None, :], plane, threshold)
        weights = tl.where(keep, weights, 0.0)
    v = _load_rows(v_base, n, v_t, near, ok, columns, VALUE, not MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=acc_type)
    return acc, higher, total


@triton.jit
def forward_kernel(
    q, k, v, out, lse, bounds, runs, segments, valid, seed,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, runs_b, runs_s, segments_b, valid_b,
    heads, group, queries, segment_count, steps, tiles, offset, scale, keep_scale, threshold,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    acc_type: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    plane = tl.program_id(0) // tiles
    segment, _, row0 = _find_segment(bounds, tl.program_id(0) % tiles, segment_count, steps, BLOCK_M)
    last = tl.load(bounds + segment + 1)
    if row0 >= last:
        return
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    near = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    rows = row0 + near
    inside = rows < last
    real = inside
    if HAS_VALID:
        real = inside & (tl.load(valid + b * valid_b + rows, mask=inside, other=0) != 0)
    q_tile = _load_rows(q + b * q_b + h * q_h, row0, q_t, near, real, columns, HEAD, False)
    k_base = k + b * k_b + (h // group) * k_h
    v_base = v + b * v_b + (h // group) * v_h
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    facts = segments + b * segments_b + segment * 3
    count = tl.load(facts)
    if HAS_VALID:
        count = tl.where(tl.max(real.to(tl.int32), 0) > 0, count, 0)
    causal_stop = tl.load(facts + 1)
    prefix = tl.load(facts + 2)
    first_limit = tl.maximum(row0 + offset + 1, prefix)
    last_limit = tl.maximum(tl.minimum(row0 + BLOCK_M, last) + offset, prefix)
    limits = tl.maximum(rows + offset + 1, prefix)

    acc = tl.zeros((BLOCK_M, BLOCK_D), acc_type)
    top = tl.full((BLOCK_M,), float("-inf"), acc_type)
    total = tl.zeros((BLOCK_M,), acc_type)
    for r in range(count):
        run = runs + b * runs_b + segment * runs_s + r * 2
        start = tl.load(run)
        stop = tl.load(run + 1)
        is_clipped = start < causal_stop
        whole = tl.where(is_clipped, tl.minimum(stop, first_limit), stop)
        reach = tl.where(is_clipped, tl.minimum(stop, last_limit), stop)
        ends = tl.where(is_clipped, tl.minimum(limits, stop), stop)
        masked_from = start + tl.maximum(whole - start, 0) // BLOCK_N * BLOCK_N
        for n in range(start, masked_from, BLOCK_N):
            acc, top, total = _forward_block(
                acc, top, total, q_tile, k_base, v_base, k_t, v_t, n, stop, ends, rows, number, plane, scale, threshold,
                HEAD, VALUE, BLOCK_N, BLOCK_D, False, DROPOUT,
            )  # fmt: skip
        for n in range(masked_from, reach, BLOCK_N):
            acc, top, total = _forward_block(
                acc, top, total, q_tile, k_base, v_base, k_t, v_t, n, stop, ends, rows, number, plane, scale, threshold,
                HEAD, VALUE, BLOCK_N, BLOCK_D, True, DROPOUT,
            )  # fmt: skip

    blind = (total == 0.0) | (real == 0)
    factor = tl.where(blind, 0.0, keep_scale / tl.where(blind, 1.0, total))
    result = tl.where(blind[:, None], 0.0, acc * factor[:, None])
    out_at = out + b * out_b + h * out_h + row0.to(tl.int64) * out_t + near[:, None] * out_t + columns[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=inside[:, None] & (columns < VALUE)[None, :])
    lse_rows = tl.where(blind, float("inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(lse + plane.to(tl.int64) * queries + rows, lse_rows, mask=inside)


@triton.jit
def _q_block(
    acc, q, grad, lse, delta, k_base, v_base, k_t, v_t, n, stop, limits, rows, seed, plane, scale, keep_scale,
    threshold,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """As `_forward_block`, adding to the gradient of the queries."""
    acc_type: tl.constexpr = acc.dtype
    near = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    ok = near < stop - n
    k = _load_rows(k_base, n, k_t, near, ok, columns, HEAD, not MASKED)
    v = _load_rows(v_base, n, v_t, near, ok, columns, VALUE, not MASKED)
    scores = tl.dot(q, tl.trans(k), out_dtype=acc_type, input_precision="ieee") * scale
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:
        weights = tl.where((n + near)[None, :] < limits[:, None], weights, 0.0)
    weights_grad = tl.dot(grad, tl.trans(v), out_dtype=acc_type, input_precision="ieee")
    if DROPOUT:
        keep = _kept(seed, rows[:, None], (n + near)[None, :], plane, threshold)
        weights_grad = tl.where(keep, weights_grad * keep_scale, 0.0)
    scores_grad = weights * (weights_grad - delta[:, None])
    return tl.dot(scores_grad.to(k.dtype), k, acc, input_precision="ieee", out_dtype=acc_type)


@triton.jit
def q_grad_kernel(
    grad, q, k, v, out, lse, delta, q_grad, bounds, runs, segments, seed,
    grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, q_grad_b, q_grad_h,
    q_grad_t, runs_b, runs_s, segments_b,
    heads, group, queries, segment_count, steps, tiles, offset, scale, plain_scale, keep_scale, threshold,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    acc_type: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    plane = tl.program_id(0) // tiles
    segment, _, row0 = _find_segment(bounds, tl.program_id(0) % tiles, segment_count, steps, BLOCK_M)
    last = tl.load(bounds + segment + 1)
    if row0 >= last:
        return
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    near = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    rows = row0 + near
    inside = rows < last
    lse_at = plane.to(tl.int64) * queries + rows
    lse_rows = tl.load(lse + lse_at, mask=inside, other=float("inf"))
    # Rows that see nothing: whatever they hold must not meet a zero.
    real = lse_rows != float("inf")
    q_tile = _load_rows(q + b * q_b + h * q_h, row0, q_t, near, real, columns, HEAD, False)
    grad_tile = _load_rows(grad + b * grad_b + h * grad_h, row0, grad_t, near, real, columns, VALUE, False)
    out_tile = _load_rows(out + b * out_b + h * out_h, row0, out_t, near, real, columns, VALUE, False)
    delta_rows = tl.sum(grad_tile.to(acc_type) * out_tile.to(acc_type), 1)
    tl.store(delta + lse_at, delta_rows, mask=inside)
    k_base = k + b * k_b + (h // group) * k_h
    v_base = v + b * v_b + (h // group) * v_h
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    facts = segments + b * segments_b + segment * 3
    count = tl.load(facts)
    count = tl.where(tl.max(real.to(tl.int32), 0) > 0, count, 0)
    causal_stop = tl.load(facts + 1)
    prefix = tl.load(facts + 2)
    first_limit = tl.maximum(row0 + offset + 1, prefix)
    last_limit = tl.maximum(tl.minimum(row0 + BLOCK_M, last) + offset, prefix)
    limits = tl.maximum(rows + offset + 1, prefix)

    acc = tl.zeros((BLOCK_M, BLOCK_D), acc_type)
    for r in range(count):
        run = runs + b * runs_b + segment * runs_s + r * 2
        start = tl.load(run)
        stop = tl.load(run + 1)
        is_clipped = start < causal_stop
        whole = tl.where(is_clipped, tl.minimum(stop, first_limit), stop)
        reach = tl.where(is_clipped, tl.minimum(stop, last_limit), stop)
        ends = tl.where(is_clipped, tl.minimum(limits, stop), stop)
        masked_from = start + tl.maximum(whole - start, 0) // BLOCK_N * BLOCK_N
        for n in range(start, masked_from, BLOCK_N):
            acc = _q_block(
                acc, q_tile, grad_tile, lse_rows, delta_rows, k_base, v_base, k_t, v_t, n, stop, ends, rows, number,
                plane, scale, keep_scale, threshold, HEAD, VALUE, BLOCK_N, BLOCK_D, False, DROPOUT,
            )  # fmt: skip
        for n in range(masked_from, reach, BLOCK_N):
            acc = _q_block(
                acc, q_tile, grad_tile, lse_rows, delta_rows, k_base, v_base, k_t, v_t, n, stop, ends, rows, number,
                plane, scale, keep_scale, threshold, HEAD, VALUE, BLOCK_N, BLOCK_D, True, DROPOUT,
            )  # fmt: skip

    at = q_grad + b * q_grad_b + h * q_grad_h + row0.to(tl.int64) * q_grad_t + near[:, None] * q_grad_t
    result = (acc * plain_scale).to(q_grad.dtype.element_ty)
    tl.store(at + columns[None, :], result, mask=inside[:, None] & (columns < HEAD)[None, :])


@triton.jit
def _kv_block(
    k_acc, v_acc, k, v, q_base, grad_base, q_t, grad_t, lse_base, delta_base, m, last, keys, ok, clip, offset, prefix,
    seed, plane, scale, keep_scale, threshold,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Rows from m on add to the gradients of a tile of keys and of values; scores lie as [keys, rows]."""
    acc_type: tl.constexpr = k_acc.dtype
    near = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    rows = m + near
    lse = tl.load(lse_base + rows, mask=rows < last, other=float("inf"))
    delta = tl.load(delta_base + rows, mask=rows < last, other=0.0)
    real = lse != float("inf")
    q = _load_rows(q_base, m, q_t, near, real, columns, HEAD, False)
    scores = tl.dot(k, tl.trans(q), out_dtype=acc_type, input_precision="ieee") * scale
    weights = tl.exp2(scores - lse[None, :])
    if MASKED:
        limits = tl.where(clip, tl.maximum(rows + offset + 1, prefix), 2147483647)
        seen = ok[:, None] & (keys[:, None] < limits[None, :])
        weights = tl.where(seen, weights, 0.0)
    grad = _load_rows(grad_base, m, grad_t, near, real, columns, VALUE, False)
    weights_grad = tl.dot(v, tl.trans(grad), out_dtype=acc_type, input_precision="ieee")
    dropped = weights
    if DROPOUT:
        keep = _kept(seed, rows[None, :], keys[:, None], plane, threshold)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
        weights_grad = tl.where(keep, weights_grad * keep_scale, 0.0)
    v_acc = tl.dot(dropped.to(grad.dtype), grad, v_acc, input_precision="ieee", out_dtype=acc_type)
    scores_grad = weights * (weights_grad - delta[None, :])
    if MASKED:
        # A key outside of the run may hold NaN.
        scores_grad = tl.where(seen, scores_grad, 0.0)
    k_acc = tl.dot(scores_grad.to(q.dtype), q, k_acc, input_precision="ieee", out_dtype=acc_type)
    return k_acc, v_acc


@triton.jit
def kv_grad_kernel(
    grad, q, k, v, lse, delta, k_grad, v_grad, bounds, runs, segments, seen_by, seed,
    grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, k_grad_b, k_grad_h, k_grad_t, v_grad_b,
    v_grad_h, v_grad_t, runs_b, runs_s, segments_b, seen_by_b,
    heads, group, queries, key_count, segment_count, grains, tiles, offset, scale, plain_scale, keep_scale, threshold,
    HEAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    acc_type: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    kv_heads = heads // group
    kv_plane = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BLOCK_N
    b = (kv_plane // kv_heads).to(tl.int64)
    kv_h = (kv_plane % kv_heads).to(tl.int64)
    near = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    keys = n + near
    inside = keys < key_count
    k_tile = _load_rows(k + b * k_b + kv_h * k_h, n, k_t, near, inside, columns, HEAD, False)
    v_tile = _load_rows(v + b * v_b + kv_h * v_h, n, v_t, near, inside, columns, VALUE, False)
    number = 0
    if DROPOUT:
        number = tl.load(seed)

    first_segment = segment_count
    past_segment = 0
    for g in range(n // GRAIN_, tl.minimum((n + BLOCK_N - 1) // GRAIN_ + 1, grains)):
        first_segment = tl.minimum(first_segment, tl.load(seen_by + b * seen_by_b + g * 2))
        past_segment = tl.maximum(past_segment, tl.load(seen_by + b * seen_by_b + g * 2 + 1))

    k_acc = tl.zeros((BLOCK_N, BLOCK_D), acc_type)
    v_acc = tl.zeros((BLOCK_N, BLOCK_D), acc_type)
    for member in range(group):
        h = kv_h * group + member
        plane = (b * heads + h).to(tl.int32)
        q_base = q + b * q_b + h * q_h
        grad_base = grad + b * grad_b + h * grad_h
        lse_base = lse + (b * heads + h) * queries
        delta_base = delta + (b * heads + h) * queries
        for segment in range(first_segment, past_segment):
            first = tl.load(bounds + segment)
            last = tl.load(bounds + segment + 1)
            facts = segments + b * segments_b + segment * 3
            count = tl.load(facts)
            causal_stop = tl.load(facts + 1)
            prefix = tl.load(facts + 2)
            for r in range(count):
                run = runs + b * runs_b + segment * runs_s + r * 2
                start = tl.load(run)
                stop = tl.load(run + 1)
                low = tl.maximum(start, n)
                high = tl.minimum(stop, n + BLOCK_N)
                clip = start < causal_stop
                # Rows before the first that reaches a key here, and before the first that reaches all of them.
                begin = tl.where(clip & (prefix <= low), tl.maximum(first, low - offset), first)
                begin = tl.where(low < high, begin, last)
                whole = tl.where(clip & (prefix < high), tl.maximum(begin, high - 1 - offset), begin)
                whole = tl.where(high - low == BLOCK_N, whole, last)
                masked_rows = tl.maximum(tl.minimum(whole, last) - begin, 0)
                whole = begin + (masked_rows + BLOCK_M - 1) // BLOCK_M * BLOCK_M
                ok = (keys >= start) & (keys < stop)
                for m in range(begin, tl.minimum(whole, last), BLOCK_M):
                    k_acc, v_acc = _kv_block(
                        k_acc, v_acc, k_tile, v_tile, q_base, grad_base, q_t, grad_t, lse_base, delta_base, m, last,
                        keys, ok, clip, offset, prefix, number, plane, scale, keep_scale, threshold,
                        HEAD, VALUE, BLOCK_M, BLOCK_D, True, DROPOUT,
                    )  # fmt: skip
                for m in range(whole, last, BLOCK_M):
                    k_acc, v_acc = _kv_block(
                        k_acc, v_acc, k_tile, v_tile, q_base, grad_base, q_t, grad_t, lse_base, delta_base, m, last,
                        keys, ok, clip, offset, prefix, number, plane, scale, keep_scale, threshold,
                        HEAD, VALUE, BLOCK_M, BLOCK_D, False, DROPOUT,
                    )  # fmt: skip

    k_at = k_grad + b * k_grad_b + kv_h * k_grad_h + n.to(tl.int64) * k_grad_t + near[:, None] * k_grad_t
    k_result = (k_acc * plain_scale).to(k_grad.dtype.element_ty)
    tl.store(k_at + columns[None, :], k_result, mask=inside[:, None] & (columns < HEAD)[None, :])
    v_at = v_grad + b * v_grad_b + kv_h * v_grad_h + n.to(tl.int64) * v_grad_t + near[:, None] * v_grad_t
    v_result = v_acc.to(v_grad.dtype.element_ty)
    tl.store(v_at + columns[None, :], v_result, mask=inside[:, None] & (columns < VALUE)[None, :])
