"""Nearest code and sums by code in Triton.

The nearest code is a matrix product whose tiles are compared and forgotten: one program takes a tile of tokens through
its share of the codes with the best so far in registers. Sums by code walk through sorted rows; a code that took many
is cut into pieces of equal length, so that no program is left behind with it. Neither needs atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grounding import accumulation_dtype
from .grounding_triton import aligned, kind_of, load_tile, multiprocessors, runs_on, takes_descriptors
from .launch import SMS, TMA_SM, TYPE_NAMES, CompileCase, Config, describe, operation, sm_of, sm_row
from .nearest import nearest_code_reference, segment_sum_reference

_IEEE = Config({"BM": 64, "BC": 64, "BD": 16}, warps=8, stages=3, registers=160)
NEAREST = {
    80: {"half": Config({"BM": 128, "BC": 64, "BD": 32}, warps=8, stages=4, registers=128), "fp32": _IEEE},
    89: {"half": Config({"BM": 128, "BC": 64, "BD": 32}, warps=8, stages=3, registers=128), "fp32": _IEEE},
    90: {"half": Config({"BM": 128, "BC": 128, "BD": 64}, warps=4, stages=3), "fp32": _IEEE},
    100: {"half": Config({"BM": 128, "BC": 64, "BD": 64}, warps=8, stages=4, registers=128), "fp32": _IEEE},
    120: {"half": Config({"BM": 128, "BC": 64, "BD": 64}, warps=8, stages=2, registers=128), "fp32": _IEEE},
}
"""Tiles by chip and type: BM tokens, BC codes, BD of the width."""

SUMS = Config({"BR": 16, "BD": 256}, warps=4, stages=2)
"""Tiles of the sums, on every chip: BR rows, BD of the width. They wait for memory alone."""

LONGEST = 256
"""Rows that one program adds up."""


@triton.jit(do_not_specialize=["rows", "total", "share"])
def _nearest(
    x,  # [rows, width], pointer or descriptor
    codes,  # [total, width], pointer or descriptor
    offset,  # [total], added to the products
    factor,  # [total], of the sums
    values,  # [splits, rows], best of each share of the codes
    indices,  # [splits, rows]
    rows,
    total,
    width,
    share,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    tiles = tl.cdiv(rows, BM)
    row = tl.program_id(0) % tiles * BM
    split = tl.program_id(0) // tiles
    begin = split * share
    end = tl.minimum(begin + share, total)
    best = tl.full((BM,), float("-inf"), tl.float32)
    index = tl.full((BM,), 0, tl.int32) + begin
    for first in range(begin, end, BC):
        code = first + tl.arange(0, BC)
        # Where the sum begins: at the end it would need registers of its own.
        shift = tl.load(offset + code, mask=code < end, other=float("-inf"))
        nearness = tl.zeros((BM, BC), tl.float32) + shift[None, :]
        for d in range(0, width, BD):
            token_tile = load_tile(x, row, d, rows, width, BM, BD, TMA)
            code_tile = load_tile(codes, first, d, total, width, BC, BD, TMA)
            nearness = tl.dot(token_tile, code_tile.T, nearness, input_precision="ieee")
        scale = tl.load(factor + code, mask=code < end, other=1.0)
        nearness *= scale[None, :]
        top, at = tl.max(nearness, 1, return_indices=True, return_indices_tie_break_left=True)
        # Strictly: of equals the earlier tile keeps the token.
        closer = top > best
        best = tl.where(closer, top, best)
        index = tl.where(closer, first + at, index)
    r = row + tl.arange(0, BM)
    place = split.to(tl.int64) * rows + r
    tl.store(values + place, best, mask=r < rows)
    tl.store(indices + place, index, mask=r < rows)


@triton.jit
def _add_rows(x, order, begin, end, column, width, BR: tl.constexpr, BD: tl.constexpr, ORDERED: tl.constexpr):
    """Sum of the rows of x from begin to end, or of those that `order` names there, over BD columns."""
    c = column + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for start in range(begin, end, BR):
        r = start + tl.arange(0, BR)
        known = r < end
        if ORDERED:
            row = tl.load(order + r, mask=known, other=0)
        else:
            row = r.to(tl.int64)
        at = x + row[:, None] * width + c[None, :]
        total += tl.sum(tl.load(at, mask=known[:, None] & (c < width)[None, :], other=0.0).to(tl.float32), 0)
    return total


@triton.jit(do_not_specialize=["segments"])
def _sum_pieces(
    x,  # [M, width]
    order,  # [M], rows in the order of their segments
    bounds,  # [segments + 1], where each begins in that order
    owner,  # [pieces], the segment of each piece; `segments` if it has none
    first_piece,  # [segments]
    parts,  # [pieces, width]
    segments,
    width,
    BR: tl.constexpr,
    BD: tl.constexpr,
    LONGEST: tl.constexpr,
):
    """The pieces of the segments with more than LONGEST rows."""
    piece = tl.program_id(0)
    column = tl.program_id(1) * BD
    segment = tl.load(owner + piece)
    known = segment < segments
    within = piece - tl.load(first_piece + segment, mask=known, other=0).to(tl.int32)
    begin = tl.load(bounds + segment, mask=known, other=0).to(tl.int32)
    end = tl.load(bounds + segment + 1, mask=known, other=0).to(tl.int32)
    begin += within * LONGEST
    total = _add_rows(x, order, begin, tl.minimum(end, begin + LONGEST), column, width, BR, BD, True)
    c = column + tl.arange(0, BD)
    tl.store(parts + piece.to(tl.int64) * width + c, total, mask=c < tl.where(known, width, 0))


@triton.jit
def _sum_segments(
    x,
    order,
    bounds,
    first_piece,
    parts,
    scale,  # one number
    sums,  # [segments, width]
    width,
    BR: tl.constexpr,
    BD: tl.constexpr,
    LONGEST: tl.constexpr,
):
    segment = tl.program_id(0)
    column = tl.program_id(1) * BD
    begin = tl.load(bounds + segment).to(tl.int32)
    end = tl.load(bounds + segment + 1).to(tl.int32)
    if end - begin > LONGEST:
        first = tl.load(first_piece + segment).to(tl.int32)
        last = first + tl.cdiv(end - begin, LONGEST)
        total = _add_rows(parts, order, first, last, column, width, BR, BD, False)
    else:
        total = _add_rows(x, order, begin, end, column, width, BR, BD, True)
    c = column + tl.arange(0, BD)
    out = (total * tl.load(scale)).to(sums.dtype.element_ty)
    tl.store(sums + segment.to(tl.int64) * width + c, out, mask=c < width)


def sum_segments(
    x: Tensor, indices: Tensor, segments: int, *, scale: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Sums [segments, D] of the rows of x [M, D] by index, times a scale [1], and each one's number of rows.

    Rows whose index is `segments` reach nothing. D must be a multiple of 16 (`aligned`).
    """
    rows, width = x.shape
    ordered, order = torch.sort(indices, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(segments + 1, device=x.device))
    counts = bounds.diff()
    pieces = torch.where(counts > LONGEST, (counts + (LONGEST - 1)) // LONGEST, 0)
    last = pieces.cumsum(0)
    first_piece = last - pieces
    # A segment of more than LONGEST rows has less than twice as many pieces as it has LONGESTs.
    most = 2 * rows // LONGEST if rows > LONGEST else 0
    columns = triton.cdiv(width, SUMS.blocks["BD"])
    parts = x.new_empty((most, width), dtype=torch.float32)
    if most:
        owner = torch.searchsorted(last, torch.arange(most, device=x.device), right=True)
        _sum_pieces[(most, columns)](
            x, order, bounds, owner, first_piece, parts, segments, width,
            **SUMS.blocks, LONGEST=LONGEST, **SUMS.options(),
        )  # fmt: skip
    sums = x.new_empty((segments, width), dtype=dtype)
    scale = x.new_ones(1, dtype=torch.float32) if scale is None else scale
    _sum_segments[(segments, columns)](
        x, order, bounds, first_piece, parts, scale, sums, width,
        **SUMS.blocks, LONGEST=LONGEST, **SUMS.options(),
    )  # fmt: skip
    return sums, counts


def _nearest_reference(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    return nearest_code_reference(x, codes, metric)


def _fake_nearest(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.long)


def _nearest_flops(x: list[int], codes: list[int], *_args: object, **_kwargs: object) -> int:
    return 2 * x[0] * x[1] * codes[0]


@operation("nearest_code", fake=_fake_nearest, reference=_nearest_reference, flops=_nearest_flops)
def nearest_code(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """`nearest_code_reference` of x [M, D] and codes [C, D] of one dtype."""
    if not runs_on(x) or x.numel() == 0:
        return nearest_code_reference(x, codes, metric)
    sm = sm_row(sm_of(x))
    config = NEAREST[sm][kind_of(x.dtype)]
    rows, total = x.shape[0], codes.shape[0]
    norms = torch.linalg.vector_norm(codes, dim=1, dtype=torch.float32)
    if metric == "l2":
        factor, offset = torch.ones_like(norms), norms.square().mul_(-0.5)
    else:
        # Not the codes but their products: a code rounded to unit length in 8 bits is another one.
        factor, offset = norms.clamp_min(1e-12).reciprocal(), torch.zeros_like(norms)
    x, codes = aligned(x), aligned(codes)
    blocks = config.blocks
    tma = takes_descriptors(sm, x, codes)
    row_tiles, code_tiles = triton.cdiv(rows, blocks["BM"]), triton.cdiv(total, blocks["BC"])
    per_split = triton.cdiv(code_tiles, max(1, 2 * multiprocessors(x) // row_tiles))
    splits = triton.cdiv(code_tiles, per_split)
    values = x.new_empty((splits, rows), dtype=torch.float32)
    indices = x.new_empty((splits, rows), dtype=torch.int32)
    _nearest[(row_tiles * splits,)](
        describe(x, [blocks["BM"], blocks["BD"]]) if tma else x,
        describe(codes, [blocks["BC"], blocks["BD"]]) if tma else codes,
        offset,
        factor,
        values,
        indices,
        rows,
        total,
        x.shape[1],
        per_split * blocks["BC"],
        **blocks,
        TMA=tma,
        **config.options(),
    )
    if splits == 1:
        return indices[0].long()
    # Of equals the first: that of the lowest codes.
    return indices.gather(0, values.max(0, keepdim=True).indices)[0].long()


def _segment_sum_reference(x: Tensor, indices: Tensor, segments: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    sums, counts = segment_sum_reference(x, indices, segments, valid)
    return sums, counts


def _fake_segment_sum(x: Tensor, indices: Tensor, segments: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((segments, x.shape[1]), dtype=accumulation_dtype(x))
    return sums, indices.new_empty((segments,), dtype=torch.long)


def _segment_sum_flops(x: list[int], *_args: object, **_kwargs: object) -> int:
    return x[0] * x[1]


@operation("segment_sum", fake=_fake_segment_sum, reference=_segment_sum_reference, flops=_segment_sum_flops)
def segment_sum(x: Tensor, indices: Tensor, segments: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`segment_sum_reference` of x [M, D]."""
    if not runs_on(x) or x.numel() == 0 or segments == 0:
        return _segment_sum_reference(x, indices, segments, valid)
    if valid is not None:
        indices = indices.masked_fill(~valid, segments)
    sums, counts = sum_segments(aligned(x), indices, segments)
    return (sums if sums.shape[1] == x.shape[1] else sums[:, : x.shape[1]].contiguous()), counts


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration that a launch can pick on a chip."""
    cases = []
    tma = sm >= TMA_SM
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        kind, name = kind_of(dtype), TYPE_NAMES[dtype]
        config = NEAREST[sm][kind]
        bm, bc, bd = (config.blocks[key] for key in ("BM", "BC", "BD"))
        signature = {
            "x": f"tensordesc<{name}[{bm},{bd}]>" if tma else f"*{name}",
            "codes": f"tensordesc<{name}[{bc},{bd}]>" if tma else f"*{name}",
            **dict.fromkeys(("offset", "factor", "values"), "*fp32"),
            "indices": "*i32",
            **dict.fromkeys(("rows", "total", "width", "share"), "i32"),
        }
        cases.append(
            CompileCase(
                kernel=_nearest,
                label=name,
                signature=signature,
                constants={**config.blocks, "TMA": tma},
                warps=config.warps,
                stages=config.stages,
                registers=config.registers,
                divisible=("width",),
                tensor_cores=kind == "half",
                tma=tma,
            )
        )
        whole = {
            "x": f"*{name}",
            **dict.fromkeys(("order", "bounds", "owner", "first_piece"), "*i64"),
            **dict.fromkeys(("parts", "scale"), "*fp32"),
            **dict.fromkeys(("segments", "width"), "i32"),
        }
        # Sums of tokens are float32, gradients of codes have the codes' type.
        kernels = [(_sum_pieces, name, "fp32"), (_sum_segments, name, "fp32")]
        if kind == "half":
            kernels.append((_sum_segments, f"{name} to {name}", name))
        for kernel, label, out in kernels:
            known = {**whole, "sums": f"*{out}"}
            cases.append(
                CompileCase(
                    kernel=kernel,
                    label=label,
                    signature={key: known[key] for key in kernel.arg_names if key in known},
                    constants={**SUMS.blocks, "LONGEST": LONGEST},
                    warps=SUMS.warps,
                    stages=SUMS.stages,
                    divisible=("width",),
                )
            )
    assert sm in SMS
    return cases
