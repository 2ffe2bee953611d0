"""Flash attention over runs of keys in Triton, forward and backward, with equal bits in every run.

The kernels are in attention_kernels; here are their launches, tables of tiles and registration with PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .attention import (
    LOG2_E,
    Runs,
    attention_backward_reference,
    attention_reference,
    keep_scale_of,
    memory_order,
    threshold_of,
)
from .attention_kernels import forward_kernel, kv_grad_kernel, q_grad_kernel
from .launch import SMS, TYPE_NAMES, CompileCase, Config, operation, sm_of, sm_row

__all__ = ["MAX_HEAD", "attention", "compile_cases", "supports"]

MAX_HEAD = 128
"""Widest head."""

_SMALL = 16
"""Query rows up to which a tile has that many: decoding with a cache."""


_KERNELS = {"forward": forward_kernel, "q_grad": q_grad_kernel, "kv_grad": kv_grad_kernel}


def _tiles(rows: int, keys: int, warps: int, stages: int, registers: int | None = None) -> Config:
    return Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages, registers)


# (kernel, float32 or wider, padded head over 64, dropout) -> tiles. The largest that spill no registers, by
# benchmarks/aot.py; not timed on a GPU. A limit of 255 keeps the compiler from spilling for more blocks at once.
_TILES: dict[tuple[str, bool, bool, bool], Config] = {
    ("forward", False, False, False): _tiles(128, 64, 8, 3),
    ("forward", False, False, True): _tiles(128, 64, 8, 3),
    ("forward", False, True, False): _tiles(128, 64, 8, 2),
    ("forward", False, True, True): _tiles(128, 32, 8, 2),
    ("q_grad", False, False, False): _tiles(128, 64, 8, 2),
    ("q_grad", False, False, True): _tiles(128, 64, 8, 2),
    ("q_grad", False, True, False): _tiles(128, 32, 8, 2),
    ("q_grad", False, True, True): _tiles(128, 32, 8, 2),
    ("kv_grad", False, False, False): _tiles(32, 128, 8, 2),
    ("kv_grad", False, False, True): _tiles(32, 128, 8, 2),
    ("kv_grad", False, True, False): _tiles(32, 64, 8, 2),
    ("kv_grad", False, True, True): _tiles(32, 64, 8, 2),
    **{
        (kernel, True, wide, drop): _tiles(16, 32 if wide else 64, 8, 2, 255)
        for kernel, wide, drop in product(("forward", "q_grad"), *[(False, True)] * 2)
    },
    ("forward", True, True, False): _tiles(16, 32, 8, 1, 255),
    **{("kv_grad", True, wide, drop): _tiles(16, 64, 8, 2) for wide, drop in product(*[(False, True)] * 2)},
}

# Where a chip differs. These three have the same tensor-core instructions.
_OLD = {
    ("forward", False, True, False): _tiles(64, 32, 8, 2, 255),
    ("forward", False, True, True): _tiles(64, 64, 8, 2),
    ("q_grad", False, False, False): _tiles(128, 32, 8, 2),
    ("q_grad", False, False, True): _tiles(128, 32, 8, 2),
    ("q_grad", False, True, False): _tiles(64, 64, 8, 2),
    ("q_grad", False, True, True): _tiles(64, 32, 8, 2),
    ("kv_grad", False, False, True): _tiles(32, 64, 8, 2),
    ("kv_grad", False, True, True): _tiles(16, 64, 8, 2),
}
_CHIP_TILES: dict[int, dict[tuple[str, bool, bool, bool], Config]] = {
    80: _OLD,
    89: _OLD | {("kv_grad", True, False, True): _tiles(16, 64, 8, 2, 168)},
    100: {
        ("forward", False, False, True): _tiles(128, 32, 8, 2),
        ("forward", False, True, False): _tiles(128, 32, 8, 2),
        ("q_grad", False, False, True): _tiles(64, 32, 4, 2),
        ("kv_grad", False, False, False): _tiles(64, 128, 8, 2),
        ("kv_grad", False, False, True): _tiles(32, 64, 8, 2),
        ("kv_grad", False, True, False): _tiles(32, 128, 8, 1),
        ("kv_grad", False, True, True): _tiles(32, 32, 4, 2),
    },
    120: _OLD
    | {
        ("forward", False, False, True): _tiles(128, 32, 8, 3),
        ("forward", False, True, True): _tiles(64, 32, 8, 2),
    },
}


def config_of(kernel: str, sm: int, is_full: bool, width: int, dropout: bool, queries: int) -> Config:
    """Tiles of a kernel ("forward", "q_grad", "kv_grad") by chip, precision, padded head, dropout and queries."""
    row = (kernel, is_full, width > 64, dropout)
    config = _CHIP_TILES.get(sm_row(sm), {}).get(row, _TILES[row])
    if kernel == "forward" and queries <= _SMALL < config.blocks["BLOCK_M"]:
        return config._replace(blocks=config.blocks | {"BLOCK_M": _SMALL}, warps=min(config.warps, 4))
    return config


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these, in a few words; None if they can."""
    if max(q.shape[3], v.shape[3]) > MAX_HEAD:
        return f"has heads up to {MAX_HEAD} wide, not {max(q.shape[3], v.shape[3])}"
    if not q.dtype == k.dtype == v.dtype:
        return f"takes q, k, v of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    if q.dtype not in TYPE_NAMES or (q.is_cuda and q.dtype == torch.float64):
        return f"has no {q.dtype}"
    # A trace with torch.compile cannot ask for the chip.
    if not torch.compiler.is_compiling() and sm_of(q) < SMS[0]:
        return f"needs a chip of compute capability {SMS[0] / 10} or more, not {sm_of(q) / 10}"
    return None


class _Launch(NamedTuple):
    """What the three kernels are launched with alike."""

    config: Config
    constants: dict[str, Any]  # HEAD to BLOCK_D and DROPOUT
    dropout: tuple[float, int]  # keep_scale, threshold
    tiles: int


def _launch(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, valid: Tensor | None, dropout_p: float
) -> _Launch:
    width = max(16, triton.next_power_of_2(max(q.shape[3], v.shape[3])))
    is_full = q.dtype in (torch.float32, torch.float64)
    config = config_of(kernel, sm_of(q), is_full, width, dropout_p > 0, q.shape[2])
    constants = dict(HEAD=q.shape[3], VALUE=v.shape[3], BLOCK_D=width, DROPOUT=dropout_p > 0)
    if kernel == "kv_grad":
        tiles = triton.cdiv(k.shape[2], config.blocks["BLOCK_N"])
    else:
        tiles = q.shape[2] // config.blocks["BLOCK_M"] + segments.shape[1]
    if kernel == "forward":
        constants["HAS_VALID"] = valid is not None
    return _Launch(config, constants, (keep_scale_of(dropout_p), threshold_of(dropout_p)), tiles)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _batch_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else 0


def _search_steps(segments: Tensor) -> int:
    return (segments.shape[1] - 1).bit_length()


def _fake_forward(q, k, v, bounds, runs, segments, seen_by, valid, seed, scale, dropout_p, offset, pairs):
    out = memory_order(q, q.shape[1], q.shape[2], v.shape[3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[:3], dtype=wide)


def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    b, h, _, d = q_shape
    return 2 * b * h * args[-1] * (d + v_shape[-1])


@operation("attention", fake=_fake_forward, reference=attention_reference, flops=_forward_flops)
def attention_forward(
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
    """As `attention_reference`."""
    q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
    bounds, runs, segments = bounds.contiguous(), runs.contiguous(), segments.contiguous()
    valid = None if valid is None else _dense_last(valid)
    b, h, queries, _ = q.shape
    out, lse = _fake_forward(q, k, v, bounds, runs, segments, seen_by, valid, seed, scale, dropout_p, offset, pairs)
    go = _launch("forward", q, k, v, segments, valid, dropout_p)
    forward_kernel[(go.tiles * b * h,)](
        q, k, v, out, lse, bounds, runs, segments, valid, seed,
        *_row_strides(q, k, v, out), _batch_stride(runs), runs.stride(1), _batch_stride(segments),
        0 if valid is None else _batch_stride(valid),
        h, h // k.shape[1], queries, segments.shape[1], _search_steps(segments), go.tiles, offset,
        scale * LOG2_E, *go.dropout,
        **go.constants, **go.config.blocks, **go.config.options(),
    )  # fmt: skip
    return out, lse


def _fake_backward(
    grad, q, k, v, out, lse, bounds, runs, segments, seen_by, valid, seed, scale, dropout_p, offset, pairs
):
    return tuple(memory_order(x, *x.shape[1:]) for x in (q, k, v))


def _backward_flops(grad_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Four products; the scores that are computed once more do not count."""
    return 2 * _forward_flops(q_shape, k_shape, v_shape, *args)


@operation("attention_backward", fake=_fake_backward, reference=attention_backward_reference, flops=_backward_flops)
def attention_backward(
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
    """As `attention_backward_reference`."""
    grad, q, k, v = _dense_last(grad), _dense_last(q), _dense_last(k), _dense_last(v)
    bounds, runs, segments, seen_by = (x.contiguous() for x in (bounds, runs, segments, seen_by))
    b, h, queries, _ = q.shape
    q_grad, k_grad, v_grad = (memory_order(x, *x.shape[1:]) for x in (q, k, v))
    delta = torch.empty_like(lse)
    by_example = (_batch_stride(runs), runs.stride(1), _batch_stride(segments))
    scales = (scale * LOG2_E, scale)
    go = _launch("q_grad", q, k, v, segments, valid, dropout_p)
    q_grad_kernel[(go.tiles * b * h,)](
        grad, q, k, v, out, lse, delta, q_grad, bounds, runs, segments, seed,
        *_row_strides(grad, q, k, v, out, q_grad), *by_example,
        h, h // k.shape[1], queries, segments.shape[1], _search_steps(segments), go.tiles, offset,
        *scales, *go.dropout,
        **go.constants, **go.config.blocks, **go.config.options(),
    )  # fmt: skip
    # It reads delta, which the kernel above left.
    go = _launch("kv_grad", q, k, v, segments, valid, dropout_p)
    kv_grad_kernel[(go.tiles * b * k.shape[1],)](
        grad, q, k, v, lse, delta, k_grad, v_grad, bounds, runs, segments, seen_by, seed,
        *_row_strides(grad, q, k, v, k_grad, v_grad), *by_example, _batch_stride(seen_by),
        h, h // k.shape[1], queries, k.shape[2], segments.shape[1], seen_by.shape[1], go.tiles, offset,
        *scales, *go.dropout,
        **go.constants, **go.config.blocks, **go.config.options(),
    )  # fmt: skip
    return q_grad, k_grad, v_grad


def _keep(ctx, inputs, output) -> None:
    q, k, v, bounds, runs, segments, seen_by, valid, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, runs, segments, seen_by, valid, seed)


def _backward(ctx, grad, lse_grad):
    grads = attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None,) * 10)


attention_forward.register_autograd(_backward, setup_context=_keep)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    runs: Runs,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention over runs of keys; a row that sees nothing gives zeros and zero gradients.

    What keys outside of every run and rows that see nothing hold, NaN and inf included, reaches neither another row nor
    a gradient.

    Args:
        q: [B, H, Tq, D], any strides.
        k: [B, Hk, Tk, D]; Hk divides H.
        v: [B, Hk, Tk, Dv].
        runs: which keys each row sees.
        scale: factor of q k^T.
        dropout_p: share of the weights dropped.
        seed: [1] long on q's device, for `dropout_keep`; None: drawn from that device's default generator.

    Returns:
        [B, H, Tq, Dv], in memory [B, Tq, H, Dv].
    """
    if dropout_p and seed is None:
        seed = torch.randint(2**62, (1,), device=q.device)
    return attention_forward(
        q, k, v, runs.bounds, runs.runs, runs.segments, runs.seen_by, runs.valid, seed if dropout_p else None,
        scale, dropout_p, runs.offset, runs.pairs,
    )[0]  # fmt: skip


_POINTERS = {
    "forward": ("q", "k", "v", "out"),
    "q_grad": ("grad", "q", "k", "v", "out", "q_grad"),
    "kv_grad": ("grad", "q", "k", "v", "k_grad", "v_grad"),
}
_FLOATS = ("scale", "plain_scale", "keep_scale", "lse", "delta")


def compile_cases(sm: int, every: bool = False) -> list[CompileCase]:
    """Configurations that a launch can pick on a chip; with `every` not only the ones that need most of it.

    These are all rows of the tables. Left out otherwise: what is the same code in the same tiles with less in it, such
    as narrower heads or one head of keys for each of queries.
    """
    return list(_every_case(sm)) if every else [_case(sm, *choice) for choice in _CHOICES]


# (kernel, dtype, head, padding among the rows, dropout, grouped heads, small)
_CHOICES = [
    *((kernel, dtype, *rest) for kernel in _KERNELS for dtype, *rest in (
        (torch.bfloat16, 64, False, False, False, False),
        (torch.bfloat16, 128, True, False, False, False),
        (torch.float16, 64, True, True, True, False),
        (torch.bfloat16, 80, True, True, True, False),
        (torch.bfloat16, 64, True, True, False, False),
        (torch.bfloat16, 32, True, True, False, False),
        (torch.float32, 64, True, False, False, False),
        (torch.float32, 64, True, True, False, False),
        (torch.float32, 128, True, False, False, False),
        (torch.float32, 128, True, True, True, False),
    )),
    ("forward", torch.bfloat16, 128, False, False, False, True),
    ("forward", torch.float32, 128, False, False, False, True),
]  # fmt: skip


def _every_case(sm: int) -> Iterator[CompileCase]:
    dtypes, heads, flags = (torch.float16, torch.bfloat16, torch.float32), (16, 20, 32, 64, 80, 128), (False, True)
    for kernel, dtype, head, valid, dropout, grouped, small in product(_KERNELS, dtypes, heads, *[flags] * 4):
        if kernel == "forward" or not (small or valid):
            yield _case(sm, kernel, dtype, head, valid, dropout, grouped, small)


def _case(
    sm: int, kernel: str, dtype: torch.dtype, head: int, valid: bool, dropout: bool, grouped: bool, small: bool
) -> CompileCase:
    width = max(16, triton.next_power_of_2(head))
    config = config_of(kernel, sm, dtype == torch.float32, width, dropout, _SMALL if small else _SMALL + 1)
    constants = dict(HEAD=head, VALUE=head, BLOCK_D=width, DROPOUT=dropout, **config.blocks)
    if kernel == "forward":
        constants["HAS_VALID"] = valid
        if not valid:
            constants["valid"] = None
    if not dropout:
        constants["seed"] = None
    if not grouped:
        constants["group"] = 1
    types = dict.fromkeys(_POINTERS[kernel], "*" + TYPE_NAMES[dtype]) | dict.fromkeys(_FLOATS, "fp32")
    types |= dict.fromkeys(("bounds", "runs", "segments", "seen_by"), "*i32") | {"valid": "*i1", "seed": "*i64"}
    types |= {"lse": "*fp32", "delta": "*fp32"}
    function = _KERNELS[kernel]
    names = [name for name in function.arg_names if name not in constants]
    used = [
        name for name, yes in (("padded", valid), ("dropout", dropout), ("grouped", grouped), ("few", small)) if yes
    ]
    strides = tuple(
        name
        for name in names
        if name.endswith(("_b", "_h", "_t")) and name not in ("runs_b", "segments_b", "seen_by_b")
    )
    return CompileCase(
        kernel=function,
        label=" ".join((TYPE_NAMES[dtype], str(head), *used)),
        signature={name: types.get(name, "i32") for name in names},
        constants=constants,
        warps=config.warps,
        stages=config.stages,
        registers=config.registers,
        divisible=strides if head % 16 == 0 else (),
        tensor_cores=dtype != torch.float32,
    )
