"""Scores of all codes in Triton: a matrix product whose tiles become sigmoids and sums over tokens, and are forgotten.

One program takes a tile of codes and a group of examples, whose tokens it walks through as one long list: a tile of
tokens may span examples, so that few are wasted at an example's end. It stores each score once: no atomics, and no
tensor over both tokens and codes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grounding import accumulation_dtype, grounding_scores_reference
from .launch import (
    SMS,
    TMA_SM,
    TYPE_NAMES,
    CompileCase,
    Config,
    can_describe,
    describe,
    launches,
    operation,
    sm_of,
    sm_row,
)

PANEL = 16
"""Code tiles that neighbouring programs go through before they move on to the next examples: they stay in the L2."""

LONGEST_GROUP = 16
"""Examples per program at most."""

# At 128 registers two blocks fit on a multiprocessor: one computes sigmoids while the other multiplies matrices.
_IEEE = Config({"BC": 64, "BN": 64, "BD": 16}, warps=8, stages=3, registers=128)
SCORES = {
    80: {"half": Config({"BC": 128, "BN": 64, "BD": 32}, warps=8, stages=4, registers=128), "fp32": _IEEE},
    89: {"half": Config({"BC": 128, "BN": 64, "BD": 32}, warps=8, stages=3, registers=128), "fp32": _IEEE},
    90: {"half": Config({"BC": 128, "BN": 128, "BD": 64}, warps=8, stages=3, registers=128), "fp32": _IEEE},
    100: {"half": Config({"BC": 128, "BN": 64, "BD": 64}, warps=8, stages=4, registers=128), "fp32": _IEEE},
    120: {"half": Config({"BC": 128, "BN": 64, "BD": 64}, warps=8, stages=2, registers=128), "fp32": _IEEE},
}
"""Tiles by chip and type: BC codes, BN tokens, BD of the width."""


def kind_of(dtype: torch.dtype) -> str:
    """The tables' name for a type."""
    return "fp32" if dtype == torch.float32 else "half"


@triton.jit
def load_tile(source, row, column, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, COLUMNS] of a dense matrix [rows, width] from (row, column) on; 0 outside of it."""
    if TMA:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = source + r[:, None].to(tl.int64) * width + c[None, :]
        tile = tl.load(at, mask=(r < rows)[:, None] & (c < width)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["batch", "tokens", "total", "group", "valid_step"])
def _scores(
    x,  # [batch * tokens, width], pointer or descriptor
    codes,  # [total, width], pointer or descriptor
    temperature,
    valid,  # [batch * tokens], or one element with a step of 0
    scores,  # [batch, total]
    batch,
    tokens,
    total,
    width,
    group,
    valid_step,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PANEL: tl.constexpr,
    TMA: tl.constexpr,
):
    # Programs in order: the code tiles of a panel, the groups of examples, the panels.
    groups = tl.cdiv(batch, group)
    program = tl.program_id(0)
    first_tile = program // (PANEL * groups) * PANEL
    here = tl.minimum(tl.cdiv(total, BC) - first_tile, PANEL)
    rest = program % (PANEL * groups)
    first_code = (first_tile + rest % here) * BC
    example = rest // here * group
    begin = example * tokens
    end = tl.minimum(example + group, batch) * tokens

    own = first_code + tl.arange(0, BC)
    out = scores + example.to(tl.int64) * total + own
    scale = tl.load(temperature) * -1.4426950408889634  # of base 2
    sums = tl.zeros((BC,), tl.float32)
    for start in range(begin, end, BN):
        similarity = tl.zeros((BC, BN), tl.float32)
        for d in range(0, width, BD):
            code_tile = load_tile(codes, first_code, d, total, width, BC, BD, TMA)
            token_tile = load_tile(x, start, d, end, width, BN, BD, TMA)
            similarity = tl.dot(code_tile, token_tile.T, similarity, input_precision="ieee")
        weights = 1.0 / (1.0 + tl.exp2(similarity * scale))
        rows = start + tl.arange(0, BN)
        # What an invalid token holds stays in its own column, which no example takes, NaN included.
        real = tl.load(valid + rows * valid_step, mask=rows < end, other=0) != 0
        rows = tl.where(real, rows, -1)
        stop = tl.minimum(start + BN, end)
        more = True
        while more:
            inside = (rows >= begin) & (rows < begin + tokens)
            sums += tl.sum(tl.where(inside[None, :], weights, 0.0), 1)
            more = begin + tokens < stop
            if begin + tokens <= stop:
                tl.store(out, sums, mask=own < total)
                sums = tl.zeros((BC,), tl.float32)
                out += total
                begin += tokens


def _fake_scores(x: Tensor, codes: Tensor, temperature: Tensor, valid: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=accumulation_dtype(x, codes))


def _scores_reference(x: Tensor, codes: Tensor, temperature: Tensor, valid: Tensor | None) -> Tensor:
    return grounding_scores_reference(x, codes, temperature, valid)


def _scores_flops(x: list[int], codes: list[int], *_args: object, **_kwargs: object) -> int:
    return 2 * x[0] * x[1] * x[2] * codes[0]


@operation("grounding_scores", fake=_fake_scores, reference=_scores_reference, flops=_scores_flops)
def grounding_scores(x: Tensor, codes: Tensor, temperature: Tensor, valid: Tensor | None) -> Tensor:
    """`grounding_scores_reference` of x [B, N, D] and codes [C, D] of one dtype, temperature [1] in float32."""
    if not runs_on(x) or x.numel() == 0 or codes.numel() == 0:
        return grounding_scores_reference(x, codes, temperature, valid)
    sm = sm_row(sm_of(x))
    config = SCORES[sm][kind_of(x.dtype)]
    batch, tokens, total = x.shape[0], x.shape[1], codes.shape[0]
    x, codes = aligned(x.flatten(0, 1)), aligned(codes)
    blocks = config.blocks
    tma = takes_descriptors(sm, x, codes)
    tiles = triton.cdiv(total, blocks["BC"])
    group = group_size(batch, tokens, tiles, blocks["BN"], 2 * multiprocessors(x))
    scores = x.new_empty((batch, total), dtype=torch.float32)
    known = x.new_ones(1, dtype=torch.bool) if valid is None else valid.contiguous()
    _scores[(tiles * triton.cdiv(batch, group),)](
        describe(x, [blocks["BN"], blocks["BD"]]) if tma else x,
        describe(codes, [blocks["BC"], blocks["BD"]]) if tma else codes,
        temperature,
        known,
        scores,
        batch,
        tokens,
        total,
        x.shape[1],
        group,
        int(valid is not None),
        **blocks,
        PANEL=PANEL,
        TMA=tma,
        **config.options(),
    )
    return scores


def runs_on(x: Tensor) -> bool:
    """Whether the kernels take x: a type they compute in, on a chip they are compiled for."""
    return launches(x) and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and sm_of(x) >= SMS[0]


def takes_descriptors(sm: int, *matrices: Tensor) -> bool:
    """Whether a chip loads these by descriptor."""
    return sm >= TMA_SM and all(can_describe(matrix) for matrix in matrices)


def aligned(x: Tensor) -> Tensor:
    """Matrix [M, D] as the kernels want it: dense, at a multiple of 16 bytes, its width filled up with zeros to one
    of 16. A copy only of what is not so already."""
    short = -x.shape[1] % 16
    if short:
        return torch.nn.functional.pad(x, (0, short))
    # Through one axis: a single row counts as dense whatever its stride, which a descriptor does not take.
    x = x.contiguous().flatten().view(x.shape)
    return x.clone() if x.data_ptr() % 16 else x


def multiprocessors(x: Tensor) -> int:
    """Of x's device; 1 under the interpreter."""
    return _multiprocessors_of(x.device.index) if x.is_cuda else 1


@cache
def _multiprocessors_of(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def group_size(batch: int, tokens: int, tiles: int, tile_tokens: int, slots: int) -> int:
    """Examples per program that end soonest, if `slots` programs run at a time: long groups waste fewer tokens of a
    tile at their end, short ones fewer slots in the last round."""

    def steps(group: int) -> int:
        rounds = triton.cdiv(tiles * triton.cdiv(batch, group), slots)
        return rounds * triton.cdiv(group * tokens, tile_tokens)

    return min(range(1, min(batch, LONGEST_GROUP) + 1), key=steps)


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration that a launch can pick on a chip."""
    cases = []
    tma = sm >= TMA_SM
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        kind, name = kind_of(dtype), TYPE_NAMES[dtype]
        config = SCORES[sm][kind]
        bc, bn, bd = (config.blocks[key] for key in ("BC", "BN", "BD"))
        signature = {
            "x": f"tensordesc<{name}[{bn},{bd}]>" if tma else f"*{name}",
            "codes": f"tensordesc<{name}[{bc},{bd}]>" if tma else f"*{name}",
            "temperature": "*fp32",
            "valid": "*i1",
            "scores": "*fp32",
            **dict.fromkeys(("batch", "tokens", "total", "width", "group", "valid_step"), "i32"),
        }
        cases.append(
            CompileCase(
                kernel=_scores,
                label=name,
                signature=signature,
                constants={**config.blocks, "PANEL": PANEL, "TMA": tma},
                warps=config.warps,
                stages=config.stages,
                registers=config.registers,
                divisible=("width",),
                tensor_cores=kind == "half",
                tma=tma,
            )
        )
    return cases
