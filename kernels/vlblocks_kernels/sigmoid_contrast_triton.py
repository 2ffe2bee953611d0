"""Sigmoid losses over all pairs in Triton: one program per tile of logits, which it makes, sums and forgets.

Where gradients are wanted, the same pass writes the logits' gradient for a chunk of rows, in the features' type, and
two matrix products of PyTorch's turn a chunk into the features' gradients. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive import CHUNK_BYTES, Pairing, Products
from .contrastive_triton import (
    ALIGN,
    Pairs,
    config_of,
    has_others,
    has_partner,
    pair_case,
    store_tile,
    tile_logits,
    tile_others,
    tile_place,
)
from .launch import CompileCase, Config

_IEEE = Config({"BM": 64, "BN": 64, "BD": 16}, warps=8, stages=3, registers=168)
_AMPERE = Config({"BM": 128, "BN": 64, "BD": 32}, warps=8, stages=4, registers=128)
_ADA = _AMPERE._replace(stages=3)
_HOPPER = Config({"BM": 128, "BN": 128, "BD": 64}, warps=4, stages=3)
TILES = {
    80: {"half": _AMPERE, "fp32": _IEEE},
    89: {"half": _ADA, "fp32": _IEEE},
    90: {"half": _HOPPER, "half, ids": _HOPPER._replace(warps=8), "fp32": _IEEE},
    100: {"half": Config({"BM": 128, "BN": 64, "BD": 64}, warps=8, stages=4, registers=128), "fp32": _IEEE},
    120: {"half": _ADA, "fp32": _IEEE},
}
"""Tiles by chip and type: BM rows, BN columns, BD of the width."""

GRADIENT = {**TILES, 100: {**TILES[100], "half": Config({"BM": 128, "BN": 32, "BD": 64}, 8, 4, registers=128)}}
"""The same where gradients are wanted."""


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1] to 4e-7 of it, by a polynomial: the hardware's logarithm is coarse near 1."""
    p = 0.0440892386 - 0.00853909647 * e
    p = -0.107681171 + p * e
    p = 0.177452044 + p * e
    p = -0.244954498 + p * e
    p = 0.332754776 + p * e
    p = -0.499974053 + p * e
    return e * (0.999999806 + p * e)


@triton.jit(do_not_specialize=["rows", "columns"])
def _sigmoid(
    left,  # [rows, width], pointer or descriptor
    right,  # [columns, width], pointer or descriptor
    scale,
    bias,
    partner,  # [rows]
    row_ids,  # [rows]
    column_ids,  # [columns]
    row_weight,  # [rows]
    losses,  # [column tiles, rows]
    biases,  # [column tiles, rows], the gradient to bias, unweighted
    out,  # [rows, pitch], pointer or descriptor
    rows,
    columns,
    width,
    pitch,
    IDS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PANEL: tl.constexpr,
    TMA: tl.constexpr,
):
    row, column = tile_place(rows, columns, BM, BN, PANEL)
    r = row + tl.arange(0, BM)
    c = column + tl.arange(0, BN)
    at = (column // BN).to(tl.int64) * rows + r
    place = tl.load(partner + r, mask=r < rows, other=-1)
    near = tl.max(has_partner(place, column, columns, BN).to(tl.int32), 0) > 0
    some = False
    if IDS:
        some = has_others(partner, row_ids, column_ids, row, column, rows, columns, BM, BN)
    z = tile_logits(left, right, row, column, rows, columns, width, BM, BN, BD, TMA) * tl.load(scale) + tl.load(bias)
    if (row + BM > rows) | (column + BN > columns):
        # So far below 0 that they have no loss and no gradient.
        z = tl.where((r < rows)[:, None] & (c < columns)[None, :], z, -1e30)
    matched = tl.zeros((BM,), tl.float32)
    if near:
        matched += tl.sum(tl.where(place[:, None] == c[None, :], z, 0.0), 1)
    if IDS:  # noqa: SIM102
        if some:
            equal = tile_others(partner, row_ids, column_ids, row, column, rows, columns, BM, BN)
            matched += tl.sum(tl.where(equal, z, 0.0), 1)
    matched -= tl.sum(tl.maximum(z, 0.0), 1)
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    if GRADIENT:
        z = tl.where(z >= 0, 1.0, e) / (1.0 + e)
    tl.store(losses + at, tl.sum(log1p(e), 1) - matched, mask=r < rows)
    if GRADIENT:
        if near:
            z -= tl.where(place[:, None] == c[None, :], 1.0, 0.0)
        if IDS:  # noqa: SIM102
            if some:
                equal = tile_others(partner, row_ids, column_ids, row, column, rows, columns, BM, BN)
                z -= tl.where(equal, 1.0, 0.0)
        tl.store(biases + at, tl.sum(z, 1), mask=r < rows)
        z *= tl.load(row_weight + r, mask=r < rows, other=0.0)[:, None]
        store_tile(out, z, row, column, rows, columns, pitch, BM, BN, TMA)


def sigmoid_triton(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairing: Pairing,
    row_weight: Tensor | None,
    needed: tuple[bool, bool],
    chunk_bytes: int | None,
) -> tuple[Tensor, Products, Tensor]:
    """`sigmoid_chunked` by a kernel, of features that `Pairs` takes."""
    pairs = Pairs(left, right, pairing)
    m, n, gradient = len(left), len(right), row_weight is not None
    config = config_of(GRADIENT if gradient else TILES, pairs.sm, left.dtype, pairs.ids)
    made, wide = Products(left, right, needed), {"dtype": torch.float32}
    losses, bias_grad = left.new_empty(m, **wide), left.new_zeros(1, **wide)
    weight, unit = losses, None
    if row_weight is not None:
        weight = row_weight.to(torch.float32).contiguous()
        if left.dtype == torch.float16:
            # Its smallest number would swallow gradients of a mean over many rows.
            largest = weight.abs().amax()
            unit = torch.where(largest > 0, largest / 256, torch.ones_like(largest))
            weight = weight / unit
    across = triton.cdiv(n, config.blocks["BN"])
    pitch = -(-n // ALIGN) * ALIGN
    row_bytes = pitch * left.element_size() if gradient else 4 * across
    fits = max(1, (chunk_bytes or CHUNK_BYTES) // row_bytes)
    buffer = left.new_empty(min(fits, m) if gradient else 1, pitch)
    everything = slice(0, n)
    for r in pairs.chunks(fits):
        parts = left.new_empty(2 if gradient else 1, across, r.stop - r.start, **wide)
        dz = buffer[: r.stop - r.start, :n]
        features, ids = pairs.inputs(r, config)
        _sigmoid[pairs.grid(r, config)](
            *features,
            scale,
            bias,
            *ids,
            weight[r],
            parts[0],
            parts[-1],
            pairs.output(dz, config),
            *pairs.sizes(r),
            pitch,
            IDS=pairs.ids,
            GRADIENT=gradient,
            **pairs.options(config),
        )
        losses[r] = parts[0].sum(0)
        if gradient:
            bias_grad += (parts[1].sum(0) * weight[r]).sum()
            made.add(dz, r, everything)
    if unit is not None:
        made.left_grad *= unit
        made.right_grad *= unit
        bias_grad *= unit
    return losses, made, bias_grad


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration that a launch can pick on a chip."""
    numbers = ("bias", "row_weight", "losses", "biases")
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for ids in (False, True):
            for gradient in (False, True):
                config = config_of(GRADIENT if gradient else TILES, sm, dtype, ids)
                case = pair_case(_sigmoid, sm, dtype, config, numbers, (), {"IDS": ids, "GRADIENT": gradient})
                cases.append(case._replace(label=case.label + (", gradient" if gradient else "")))
    return cases
