"""What every Triton kernel shares: where it runs, tensor descriptors, configurations, cases to compile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .registration import INTERPRETED, operation

__all__ = [
    "INTERPRETED",
    "SMS",
    "TL_DTYPES",
    "TMA_SM",
    "TYPE_NAMES",
    "CompileCase",
    "Config",
    "can_describe",
    "describe",
    "launches",
    "operation",
    "sm_of",
    "sm_row",
]

TMA_SM = 90
"""Compute capability, times ten, from which the chip copies tiles by descriptor (TMA)."""

SMS = (80, 89, 90, 100, 120)
"""Chips that every configuration is compiled for."""

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""Triton's names of types, as they stand in a kernel's signature."""


class Config(NamedTuple):
    """One row of a table of configurations: tile sizes by the kernel's own names, and how to compile it."""

    blocks: dict[str, int]
    warps: int = 4
    stages: int = 3
    registers: int | None = None  # per thread, at most; None: the compiler decides

    def options(self) -> dict[str, int]:
        """What a launch is told besides its tile sizes."""
        cap = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **cap}


class CompileCase(NamedTuple):
    """A kernel with everything that fixes its machine code, for benchmarks/aot.py."""

    kernel: Any
    label: str  # dtype, and which of the tables' rows
    signature: dict[str, str]  # argument -> type: "*bf16", "i32", "fp32", "tensordesc<bf16[128,64]>"
    constants: dict[str, Any]
    warps: int
    stages: int
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are
    tensor_cores: bool = False  # must use them
    tma: bool = False  # must load by descriptor, from sm_90 on
    registers: int | None = None  # per thread, at most


def launches(x: Tensor) -> bool:
    """Whether an operation on x launches Triton kernels: on a GPU, or anywhere under the interpreter."""
    return x.is_cuda or INTERPRETED


def sm_of(x: Tensor) -> int:
    """Compute capability of x's device times ten (90 on an H100 or H200); 90 under the interpreter."""
    return _sm_of_device(x.device.index) if x.is_cuda else TMA_SM


@cache
def _sm_of_device(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def sm_row(sm: int) -> int:
    """The chip of `SMS` whose configurations a chip takes: itself, else the next older one, else the oldest."""
    return max((known for known in SMS if known <= sm), default=SMS[0])


def can_describe(x: Tensor) -> bool:
    """Whether a chip with TMA can read x by descriptor: last axis dense, base and other strides multiples of 16 B."""
    size = x.element_size()
    return (
        x.dtype != torch.float64
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * size % 16 == 0 for stride in x.stride()[:-1])
    )


def describe(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """Descriptor of x whose loads give tiles of shape `block`, with zeros outside of x."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))
