"""Contrastive sums and gradients in Triton: one program per tile of logits, which it makes and forgets.

The sums' tiles give rows and columns their part each, from one exponential per pair wherever that does not underflow;
the parts are put together by PyTorch: no atomics. The gradient's tiles are written for a chunk of rows, in the
features' type, and two matrix products of PyTorch's turn a chunk into the features' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive import CHUNK_BYTES, Pairing, Products, Side, Sums, Weights
from .grounding_triton import aligned, kind_of, load_tile, takes_descriptors
from .launch import SMS, TMA_SM, TYPE_NAMES, CompileCase, Config, describe, sm_of, sm_row

PANEL = 8
"""Row tiles that neighbouring programs go through before they move on to the next columns: they stay in the L2."""

ALIGN = 64
"""Rows of the logits' gradient start at multiples of this, for any number of columns."""

_IEEE = Config({"BM": 64, "BN": 64, "BD": 16}, warps=8, stages=3, registers=168)
_AMPERE = Config({"BM": 128, "BN": 64, "BD": 32}, warps=8, stages=4, registers=128)
_ADA = _AMPERE._replace(stages=3)
_HOPPER = Config({"BM": 128, "BN": 128, "BD": 64}, warps=4, stages=3)
_BLACKWELL = Config({"BM": 128, "BN": 64, "BD": 64}, warps=8, stages=4, registers=128)
TILES = {
    80: {"half": _AMPERE, "fp32": _IEEE},
    89: {"half": _ADA, "fp32": _IEEE},
    90: {"half": _HOPPER, "fp32": _IEEE},
    100: {"half": _BLACKWELL, "fp32": _IEEE},
    120: {"half": _ADA, "fp32": _IEEE},
}
"""Tiles by chip and type: BM rows, BN columns, BD of the width. Two blocks fit on a multiprocessor (8 warps at 128
registers each, 4 at 255): one has its epilogue while the other multiplies matrices."""

REST = {"half": Config({"BM": 64, "BN": 64, "BD": 32}, warps=8, stages=3), "fp32": _IEEE._replace(registers=255)}
"""The same for the tiles that both leave out, on every chip."""


def config_of(table: dict[int, dict[str, Config]], sm: int, dtype: torch.dtype, ids: bool) -> Config:
    """A table's entry."""
    kind = kind_of(dtype)
    return table[sm].get(f"{kind}, ids", table[sm][kind]) if ids else table[sm][kind]


@triton.jit
def tile_place(rows, columns, BM: tl.constexpr, BN: tl.constexpr, PANEL: tl.constexpr):
    """First row and first column of this program's tile: panels of row tiles, whose columns go by tile after tile."""
    tiles = tl.cdiv(columns, BN)
    program = tl.program_id(0)
    first = program // (PANEL * tiles) * PANEL
    here = tl.minimum(tl.cdiv(rows, BM) - first, PANEL)
    rest = program % (PANEL * tiles)
    return (first + rest % here) * BM, rest // here * BN


@triton.jit
def tile_logits(
    left,
    right,
    row,
    column,
    rows,
    columns,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    """Products [BM, BN] of rows and columns; 0 outside."""
    z = tl.zeros((BM, BN), tl.float32)
    for d in range(0, width, BD):
        x = load_tile(left, row, d, rows, width, BM, BD, TMA)
        y = load_tile(right, column, d, columns, width, BN, BD, TMA)
        z = tl.dot(x, y.T, z, input_precision="ieee")
    return z


@triton.jit
def real_logits(
    left,
    right,
    scale,
    row,
    column,
    rows,
    columns,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    """Logits [BM, BN]; -inf outside."""
    z = tile_logits(left, right, row, column, rows, columns, width, BM, BN, BD, TMA) * tl.load(scale)
    if (row + BM > rows) | (column + BN > columns):
        inside = (row + tl.arange(0, BM) < rows)[:, None] & (column + tl.arange(0, BN) < columns)[None, :]
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def tile_others(partner, row_ids, ids, row, column, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Where [BM, BN] a row and a column have one id and are not partners."""
    r = row + tl.arange(0, BM)
    c = column + tl.arange(0, BN)
    place = tl.load(partner + r, mask=r < rows, other=-1)
    of_row = tl.load(row_ids + r, mask=r < rows, other=-2)
    of_column = tl.load(ids + c, mask=c < columns, other=-3)
    return (of_row[:, None] == of_column[None, :]) & (place[:, None] != c[None, :])


@triton.jit
def has_others(partner, row_ids, column_ids, row, column, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile has others; rows see those that columns see, or fewer."""
    found = tile_others(partner, row_ids, column_ids, row, column, rows, columns, BM, BN)
    return tl.max(tl.max(found.to(tl.int32), 1), 0) > 0


@triton.jit
def has_partner(place, column, columns, BN: tl.constexpr):
    """Which rows [BM] have their partner in a tile."""
    return (place >= column) & (place < tl.minimum(column + BN, columns))


@triton.jit
def log_sum(z, axis: tl.constexpr):
    """log2 of the sum of 2^z along an axis, from the largest there; -inf without a candidate."""
    top = tl.max(z, axis)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.sum(tl.exp2(z - tl.expand_dims(top, axis)), axis))


@triton.jit
def add_logs(a, b):
    """log2 of 2^a + 2^b."""
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


@triton.jit(do_not_specialize=["rows", "columns", "both"])
def _sums(
    left,  # [rows, width], pointer or descriptor
    right,  # [columns, width], pointer or descriptor
    scale,
    partner,  # [rows]
    row_ids,  # [rows]
    column_ids,  # [columns]
    row_lse,  # [column tiles, rows]
    column_lse,  # [row tiles, columns]
    own,  # [rows], zeros
    rows,
    columns,
    width,
    both,
    IDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PANEL: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tiles without others."""
    row, column = tile_place(rows, columns, BM, BN, PANEL)
    if IDS:  # noqa: SIM102
        if has_others(partner, row_ids, column_ids, row, column, rows, columns, BM, BN):
            return
    z = real_logits(left, right, scale, row, column, rows, columns, width, BM, BN, BD, TMA)
    r = row + tl.arange(0, BM)
    c = column + tl.arange(0, BN)
    to_row = row_lse + (column // BN).to(tl.int64) * rows + r
    to_column = column_lse + (row // BM).to(tl.int64) * columns + c
    place = tl.load(partner + r, mask=r < rows, other=-1)
    here = has_partner(place, column, columns, BN)
    if tl.max(here.to(tl.int32), 0) > 0:
        tl.store(own + r, tl.sum(tl.where(place[:, None] == c[None, :], z, 0.0), 1), mask=here)
    # One exponential serves both sums unless a row, or a column, lies so far below the tile's largest that it vanishes.
    top = tl.max(tl.max(z, 1), 0)
    z = tl.exp2(z - top)
    row_sum = tl.sum(z, 1)
    column_sum = tl.sum(z, 0)
    least = tl.minimum(tl.min(tl.where(r < rows, row_sum, 1.0), 0), tl.min(tl.where(c < columns, column_sum, 1.0), 0))
    if least < 1e-30:
        # Made again: kept, the logits would cost every tile their registers.
        z = real_logits(left, right, scale, row, column, rows, columns, width, BM, BN, BD, TMA)
        tl.store(to_row, log_sum(z, 1), mask=r < rows)
        if both != 0:
            tl.store(to_column, log_sum(z, 0), mask=c < columns)
    else:
        tl.store(to_row, top + tl.log2(row_sum), mask=r < rows)
        if both != 0:
            tl.store(to_column, top + tl.log2(column_sum), mask=c < columns)


@triton.jit(do_not_specialize=["rows", "columns", "exclude"])
def _sums_with_others(
    left,  # [rows, width], pointer or descriptor
    right,  # [columns, width], pointer or descriptor
    scale,
    partner,  # [rows]
    row_ids,  # [rows]
    column_ids,  # [columns]
    captions,  # [columns]
    row_lse,  # [column tiles, rows]
    column_lse,  # [row tiles, columns]
    row_others,  # [column tiles, rows], zeros
    column_others,  # [row tiles, columns], zeros
    own,  # [rows], zeros
    rows,
    columns,
    width,
    exclude,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PANEL: tl.constexpr,
    TMA: tl.constexpr,
):
    """What `_sums` left out, with its tiles [TILE_M, TILE_N], in smaller ones: first along rows, then along columns."""
    row, column = tile_place(rows, columns, TILE_M, TILE_N, PANEL)
    if not has_others(partner, row_ids, column_ids, row, column, rows, columns, TILE_M, TILE_N):
        return
    end_row = tl.minimum(row + TILE_M, rows)
    end_column = tl.minimum(column + TILE_N, columns)
    for i in range(row, end_row, BM):
        r = i + tl.arange(0, BM)
        place = tl.load(partner + r, mask=r < rows, other=-1)
        lse = tl.full((BM,), float("-inf"), tl.float32)
        others = tl.zeros((BM,), tl.float32)
        for j in range(column, end_column, BN):
            z = real_logits(left, right, scale, i, j, rows, columns, width, BM, BN, BD, TMA)
            c = j + tl.arange(0, BN)
            own_z = tl.sum(tl.where(place[:, None] == c[None, :], z, 0.0), 1)
            tl.store(own + r, own_z, mask=has_partner(place, j, columns, BN))
            equal = tile_others(partner, row_ids, captions, i, j, rows, columns, BM, BN)
            others += tl.sum(tl.where(equal, z, 0.0), 1)
            lse = add_logs(lse, log_sum(tl.where(equal & (exclude != 0), float("-inf"), z), 1))
        at = (column // TILE_N).to(tl.int64) * rows + r
        tl.store(row_lse + at, lse, mask=r < rows)
        tl.store(row_others + at, others, mask=r < rows)
    for j in range(column, end_column, BN):
        c = j + tl.arange(0, BN)
        lse = tl.full((BN,), float("-inf"), tl.float32)
        others = tl.zeros((BN,), tl.float32)
        for i in range(row, end_row, BM):
            z = real_logits(left, right, scale, i, j, rows, columns, width, BM, BN, BD, TMA)
            equal = tile_others(partner, row_ids, column_ids, i, j, rows, columns, BM, BN)
            others += tl.sum(tl.where(equal, z, 0.0), 0)
            lse = add_logs(lse, log_sum(tl.where(equal & (exclude != 0), float("-inf"), z), 0))
        at = (row // TILE_M).to(tl.int64) * columns + c
        tl.store(column_lse + at, lse, mask=c < columns)
        tl.store(column_others + at, others, mask=c < columns)


@triton.jit
def value(values, start, size, number: tl.constexpr, BLOCK: tl.constexpr):
    """Values [number, start to start + BLOCK] of [4, size]; 0 outside."""
    at = start + tl.arange(0, BLOCK)
    return tl.load(values + number * size + at, mask=at < size, other=0.0)


@triton.jit
def span(of_rows, of_columns, row, column, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Smallest and largest log-sum-exp of a tile's rows and columns."""
    r = row + tl.arange(0, BM)
    c = column + tl.arange(0, BN)
    of_row = value(of_rows, row, rows, 0, BM)
    of_column = value(of_columns, column, columns, 0, BN)
    lowest = tl.minimum(
        tl.min(tl.where(r < rows, of_row, float("inf")), 0), tl.min(tl.where(c < columns, of_column, float("inf")), 0)
    )
    highest = tl.maximum(
        tl.max(tl.where(r < rows, of_row, float("-inf")), 0), tl.max(tl.where(c < columns, of_column, float("-inf")), 0)
    )
    return lowest, highest


@triton.jit
def add_own(dz, partner, of_rows, of_columns, row, column, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Adds what partners get."""
    r = row + tl.arange(0, BM)
    place = tl.load(partner + r, mask=r < rows, other=-1)
    if tl.max(has_partner(place, column, columns, BN).to(tl.int32), 0) > 0:
        own = value(of_rows, row, rows, 2, BM)[:, None] + value(of_columns, column, columns, 2, BN)[None, :]
        dz += tl.where(place[:, None] == (column + tl.arange(0, BN))[None, :], own, 0.0)
    return dz


@triton.jit
def store_tile(out, dz, row, column, rows, columns, pitch, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Writes a tile of [rows, pitch], given by pointer or descriptor."""
    if TMA:
        out.store([row, column], dz.to(out.dtype))
    else:
        r = tl.arange(0, BM)
        c = column + tl.arange(0, BN)
        # Offsets within the tile need no 64 bits, which would cost registers.
        at = out + tl.cast(row, tl.int64) * pitch + (r[:, None] * pitch + c[None, :])
        tl.store(at, dz.to(out.dtype.element_ty), mask=(row + r < rows)[:, None] & (c < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "columns"])
def _gradient(
    left,  # [rows, width], pointer or descriptor
    right,  # [columns, width], pointer or descriptor
    scale,
    partner,  # [rows]
    row_ids,
    column_ids,
    of_rows,  # [4, rows]: lse, lse_grad, own, others
    of_columns,  # [4, columns]
    out,  # [rows, pitch], pointer or descriptor
    rows,
    columns,
    width,
    pitch,
    IDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PANEL: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tiles without others, whose log-sum-exps lie so near each other that one exponential serves row and column."""
    row, column = tile_place(rows, columns, BM, BN, PANEL)
    lowest, highest = span(of_rows, of_columns, row, column, rows, columns, BM, BN)
    if highest - lowest >= 100:
        return
    if IDS:  # noqa: SIM102
        if has_others(partner, row_ids, column_ids, row, column, rows, columns, BM, BN):
            return
    z = tile_logits(left, right, row, column, rows, columns, width, BM, BN, BD, TMA) * tl.load(scale)
    # No candidate is above its sums, and so none far above their middle.
    middle = 0.5 * (lowest + highest)
    z = tl.exp2(z - middle)
    row_factor = value(of_rows, row, rows, 1, BM) * tl.exp2(middle - value(of_rows, row, rows, 0, BM))
    column_factor = value(of_columns, column, columns, 1, BN) * tl.exp2(
        middle - value(of_columns, column, columns, 0, BN)
    )
    z *= row_factor[:, None] + column_factor[None, :]
    z = add_own(z, partner, of_rows, of_columns, row, column, rows, columns, BM, BN)
    store_tile(out, z, row, column, rows, columns, pitch, BM, BN, TMA)


@triton.jit(do_not_specialize=["rows", "columns", "exclude"])
def _gradient_of_the_rest(
    left,  # [rows, width], pointer or descriptor
    right,  # [columns, width], pointer or descriptor
    scale,
    partner,  # [rows]
    row_ids,
    column_ids,
    captions,
    of_rows,  # [4, rows]: lse, lse_grad, own, others
    of_columns,  # [4, columns]
    out,  # [rows, pitch], pointer or descriptor
    rows,
    columns,
    width,
    pitch,
    exclude,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PANEL: tl.constexpr,
    TMA: tl.constexpr,
):
    """What `_gradient` left out, with its tiles [TILE_M, TILE_N], in smaller ones."""
    row, column = tile_place(rows, columns, TILE_M, TILE_N, PANEL)
    lowest, highest = span(of_rows, of_columns, row, column, rows, columns, TILE_M, TILE_N)
    others = has_others(partner, row_ids, column_ids, row, column, rows, columns, TILE_M, TILE_N)
    if not (others | (highest - lowest >= 100)):
        return
    for i in range(row, tl.minimum(row + TILE_M, rows), BM):
        for j in range(column, tl.minimum(column + TILE_N, columns), BN):
            z = tile_logits(left, right, i, j, rows, columns, width, BM, BN, BD, TMA) * tl.load(scale)
            # What is excluded may be far above the sums.
            dz = z - value(of_rows, i, rows, 0, BM)[:, None]
            dz = tl.exp2(tl.where(dz > 1.0, 1.0, dz)) * value(of_rows, i, rows, 1, BM)[:, None]
            z -= value(of_columns, j, columns, 0, BN)[None, :]
            z = tl.exp2(tl.where(z > 1.0, 1.0, z)) * value(of_columns, j, columns, 1, BN)[None, :]
            equal = tile_others(partner, row_ids, captions, i, j, rows, columns, BM, BN)
            dz = tl.where(equal & (exclude != 0), 0.0, dz)
            dz += tl.where(equal, value(of_rows, i, rows, 3, BM)[:, None], 0.0)
            equal = tile_others(partner, row_ids, column_ids, i, j, rows, columns, BM, BN)
            z = tl.where(equal & (exclude != 0), 0.0, z)
            z += tl.where(equal, value(of_columns, j, columns, 3, BN)[None, :], 0.0)
            dz = add_own(dz + z, partner, of_rows, of_columns, i, j, rows, columns, BM, BN)
            store_tile(out, dz, i, j, rows, columns, pitch, BM, BN, TMA)


class Pairs:
    """What all launches over the pairs of two sets of features have in common.

    `left` and `right` are of one type, float32 or a half one, of the same width, and not empty.
    """

    def __init__(self, left: Tensor, right: Tensor, pairing: Pairing) -> None:
        self.sm = sm_row(sm_of(left))
        self.left, self.right = aligned(left), aligned(right)
        self.tma = takes_descriptors(self.sm, self.left, self.right)
        self.ids = pairing.row_ids is not None

        def none(size: int, number: int) -> Tensor:
            return torch.full((size,), number, dtype=torch.int32, device=left.device)

        self.partner = none(len(left), -1) if pairing.partner is None else pairing.partner.to(torch.int32)
        # Without ids, unlike ones.
        self.row_ids = none(len(left), -2) if pairing.row_ids is None else pairing.row_ids
        self.column_ids = none(len(right), -3) if pairing.column_ids is None else pairing.column_ids.contiguous()
        self.captions = self.column_ids if pairing.captions is None else pairing.captions.contiguous()
        self.exclude = int(pairing.exclude)

    def chunks(self, rows: int) -> Iterator[slice]:
        """All rows, so many at a time."""
        for start in range(0, len(self.left), rows):
            yield slice(start, min(start + rows, len(self.left)))

    def grid(self, r: slice, config: Config) -> tuple[int]:
        """Programs for a chunk of rows, one per tile."""
        rows = triton.cdiv(r.stop - r.start, config.blocks["BM"])
        return (rows * triton.cdiv(len(self.right), config.blocks["BN"]),)

    def inputs(self, r: slice, config: Config, *, captions: bool = False) -> tuple:
        """The chunk's rows, the columns, and what relates them, as a kernel's arguments before and after the scale."""
        left, right = self.left[r], self.right
        if self.tma:
            bm, bn, bd = (config.blocks[name] for name in ("BM", "BN", "BD"))
            left, right = describe(left, [bm, bd]), describe(right, [bn, bd])
        ids = (self.partner[r], self.row_ids[r], self.column_ids, *([self.captions] if captions else []))
        return (left, right), ids

    def output(self, dz: Tensor, config: Config) -> Any:
        """Where a kernel writes tiles [rows, columns]."""
        return describe(dz, [config.blocks["BM"], config.blocks["BN"]]) if self.tma else dz

    def sizes(self, r: slice) -> tuple[int, int, int]:
        """Rows of the chunk, columns, and the width."""
        return r.stop - r.start, len(self.right), self.left.shape[1]

    def options(self, config: Config) -> dict:
        """Constants that all kernels have, and how to compile them."""
        return {**config.blocks, "PANEL": PANEL, "TMA": self.tma, **config.options()}


def tile_of(config: Config) -> dict[str, int]:
    """A kernel's tile, for the one that does what it leaves out."""
    return {"TILE_M": config.blocks["BM"], "TILE_N": config.blocks["BN"]}


def sums_triton(
    left: Tensor, right: Tensor, scale: Tensor, pairing: Pairing, columns: bool, chunk_bytes: int | None
) -> Sums:
    """`sums_chunked` by kernels, without a teacher, of features that `Pairs` takes."""
    pairs = Pairs(left, right, pairing)
    config, rest = config_of(TILES, pairs.sm, left.dtype, pairs.ids), REST[kind_of(left.dtype)]
    m, n = len(left), len(right)
    wide = {"dtype": torch.float32}
    lse, own = left.new_empty(m, **wide), left.new_zeros(m, **wide)
    column_lse = left.new_full((n,), float("-inf"), **wide)
    others, column_others = (left.new_zeros(size if pairs.ids else 0, **wide) for size in (m, n))
    bm, bn = config.blocks["BM"], config.blocks["BN"]
    across = triton.cdiv(n, bn)
    # Of a tile its rows' and its columns' parts are held.
    fits = (chunk_bytes or CHUNK_BYTES) // (4 * (1 + pairs.ids) * (bm + bn) * across)
    for r in pairs.chunks(bm * max(1, fits)):
        down = triton.cdiv(r.stop - r.start, bm)
        parts = [left.new_empty(across, r.stop - r.start, **wide), left.new_empty(down, n, **wide)]
        features, ids = pairs.inputs(r, config)
        _sums[pairs.grid(r, config)](
            *features,
            scale,
            *ids,
            *parts,
            own[r],
            *pairs.sizes(r),
            int(columns or pairs.ids),
            IDS=pairs.ids,
            **pairs.options(config),
        )
        if pairs.ids:
            more = [torch.zeros_like(part) for part in parts]
            features, ids = pairs.inputs(r, rest, captions=True)
            _sums_with_others[pairs.grid(r, config)](
                *features,
                scale,
                *ids,
                *parts,
                *more,
                own[r],
                *pairs.sizes(r),
                pairs.exclude,
                **tile_of(config),
                **pairs.options(rest),
            )
            others[r] = more[0].sum(0)
            column_others += more[1].sum(0)
        lse[r] = _log_sum(parts[0])
        if columns:
            column_lse = torch.logaddexp2(column_lse, _log_sum(parts[1]))
    return Sums(
        Side(lse, others if pairs.ids else None, None),
        Side(column_lse, column_others if pairs.ids else None, None) if columns else None,
        None if pairing.partner is None else own,
    )


def _log_sum(parts: Tensor) -> Tensor:
    """log2 of the sum of 2^parts over the first axis."""
    top = parts.amax(0)
    top = top.masked_fill(top == float("-inf"), 0)
    return (parts - top).exp2_().sum(0).log2_().add_(top)


def gradients_triton(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    pairing: Pairing,
    rows: Weights,
    columns: Weights | None,
    needed: tuple[bool, bool],
    chunk_bytes: int | None,
) -> Products:
    """`gradients_chunked` by kernels, without a teacher, of features that `Pairs` takes."""
    pairs = Pairs(left, right, pairing)
    config, rest = config_of(TILES, pairs.sm, left.dtype, pairs.ids), REST[kind_of(left.dtype)]
    of_rows = torch.stack(rows[:4])
    if columns is None:
        of_columns = left.new_zeros(4, len(right), dtype=torch.float32)
        # There are no columns' sums: one of the rows' is near the others.
        of_columns[0] = rows.lse[0]
    else:
        of_columns = torch.stack(columns[:4])
    unit = None
    if left.dtype == torch.float16:
        # Its smallest number would swallow gradients of a mean over many rows.
        largest = torch.maximum(of_rows[1:].abs().amax(), of_columns[1:].abs().amax())
        unit = torch.where(largest > 0, largest / 256, torch.ones_like(largest))
        of_rows[1:] /= unit
        of_columns[1:] /= unit
    made = Products(left, right, needed)
    pitch = -(-len(right) // ALIGN) * ALIGN
    fits = max(1, (chunk_bytes or CHUNK_BYTES) // (pitch * left.element_size()))
    buffer = left.new_empty(min(fits, len(left)), pitch)
    everything = slice(0, len(right))
    for r in pairs.chunks(fits):
        dz = buffer[: r.stop - r.start, : len(right)]
        weights = (of_rows[:, r].contiguous(), of_columns)
        features, ids = pairs.inputs(r, config)
        _gradient[pairs.grid(r, config)](
            *features,
            scale,
            *ids,
            *weights,
            pairs.output(dz, config),
            *pairs.sizes(r),
            pitch,
            IDS=pairs.ids,
            **pairs.options(config),
        )
        features, ids = pairs.inputs(r, rest, captions=True)
        _gradient_of_the_rest[pairs.grid(r, config)](
            *features,
            scale,
            *ids,
            *weights,
            pairs.output(dz, rest),
            *pairs.sizes(r),
            pitch,
            pairs.exclude,
            **tile_of(config),
            **pairs.options(rest),
        )
        made.add(dz, r, everything)
    if unit is not None:
        made.left_grad *= unit
        made.right_grad *= unit
    return made


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration that a launch can pick on a chip."""
    sums, gradient = ("row_lse", "column_lse", "own"), ("of_rows", "of_columns")
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rest = REST[kind_of(dtype)]
        for ids in (False, True):
            config = config_of(TILES, sm, dtype, ids)
            known = {"IDS": ids}
            cases += [
                pair_case(_sums, sm, dtype, config, sums, (), known),
                pair_case(_gradient, sm, dtype, config, gradient, (), known),
            ]
            if ids:
                others = (*sums, "row_others", "column_others")
                cases += [
                    pair_case(_sums_with_others, sm, dtype, rest, others, ("captions",), tile_of(config)),
                    pair_case(_gradient_of_the_rest, sm, dtype, rest, gradient, ("captions",), tile_of(config)),
                ]
    return cases


def pair_case(
    kernel,
    sm: int,
    dtype: torch.dtype,
    config: Config,
    numbers: tuple[str, ...],
    integers: tuple[str, ...],
    constants: dict[str, int | bool],
) -> CompileCase:
    """A kernel over pairs of features; what is not named are sizes, and `out` is of the features' type."""
    assert sm in SMS
    name, tma = TYPE_NAMES[dtype], sm >= TMA_SM
    bm, bn, bd = (config.blocks[key] for key in ("BM", "BN", "BD"))
    constants = {**constants, **config.blocks, "PANEL": PANEL, "TMA": tma}
    types = {
        "left": f"tensordesc<{name}[{bm},{bd}]>" if tma else f"*{name}",
        "right": f"tensordesc<{name}[{bn},{bd}]>" if tma else f"*{name}",
        "out": f"tensordesc<{name}[{bm},{bn}]>" if tma else f"*{name}",
        "scale": "*fp32",
        **dict.fromkeys(("partner", "row_ids", "column_ids", *integers), "*i32"),
        **dict.fromkeys(numbers, "*fp32"),
    }
    return CompileCase(
        kernel=kernel,
        label=f"{name}{', ids' if constants.get('IDS') else ''}",
        signature={key: types.get(key, "i32") for key in kernel.arg_names if key not in constants},
        constants=constants,
        warps=config.warps,
        stages=config.stages,
        registers=config.registers,
        divisible=("width", "pitch"),
        tensor_cores=kind_of(dtype) == "half",
        tma=tma,
    )
