"""Makes Triton's interpreter right for bf16, which it holds as bit patterns and otherwise computes with as integers.

Dot products, arithmetic, fused multiply-adds and casts (round to nearest even). Sums of bf16 and bf16 atomics stay
wrong: kernels go to float32 first, which they should anyhow.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_ORIGINAL = {name: getattr(_Builder, name) for name in ("create_dot", "cast_impl", "binary_op", "unary_op")}


def install() -> None:
    """Before any kernel runs, with the interpreter on."""
    for function in (create_dot, cast_impl, binary_op, unary_op, create_fma):
        setattr(_Builder, function.__name__, function)


def is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def widened(handle):
    """The float32 values of bf16 bit patterns; anything else as it is."""
    if not is_bf16(handle):
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << 16
    return _Handle(bits.view(np.float32), tl.float32)


def narrowed(values):
    """float32 values as a handle of bf16 bit patterns."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return _Handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape), tl.bfloat16)


def create_dot(self, a, b, acc, *rest):
    return _ORIGINAL["create_dot"](self, widened(a), widened(b), acc, *rest)


def cast_impl(self, source, target):
    if is_bf16(source) and target.scalar != tl.bfloat16:
        wide = widened(source)
        return wide if target.scalar == tl.float32 else _ORIGINAL["cast_impl"](self, wide, target)
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return narrowed(source.data)
    return _ORIGINAL["cast_impl"](self, source, target)


def binary_op(self, left, right, op):
    out = _ORIGINAL["binary_op"](self, widened(left), widened(right), op)
    bf16 = is_bf16(left) or is_bf16(right)
    return narrowed(out.data) if bf16 and out.data.dtype == np.float32 else out


def unary_op(self, argument, op):
    out = _ORIGINAL["unary_op"](self, widened(argument), op)
    return narrowed(out.data) if is_bf16(argument) else out


def create_fma(self, x, y, z):
    value = widened(x).data * widened(y).data + widened(z).data
    return narrowed(value) if is_bf16(z) else _Handle(value, z.dtype.scalar)
