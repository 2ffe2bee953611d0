"""How an operation is registered with PyTorch; needs no Triton.

An operation is one `torch.library.custom_op`, so that it passes through torch.compile, torch.export and FakeTensor. On
a GPU it launches its kernels; on a CPU it launches them when Triton's interpreter is on (TRITON_INTERPRET=1, set before
Triton is imported), and otherwise runs its PyTorch reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton's interpreter runs the kernels, on tensors of any device."""


def operation(
    name: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: registers a launcher as the operation ``vlblocks::name``.

    It runs without autocast, on the device of its first tensor, wherever it is called from.

    Args:
        fake: the same signature -> empty outputs of the right shapes and dtypes.
        reference: the same signature, in PyTorch; runs on a CPU without the interpreter. None: the launcher does.
        flops: as `torch.utils.flop_counter.register_flop_formula` wants it: shapes in, ``out_shape=`` -> FLOPs.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(launcher, mutates_args=())
        op = torch.library.custom_op(
            f"vlblocks::{name}", _guarded(launcher), mutates_args=(), device_types="cuda", schema=schema
        )
        op.register_kernel("cpu")(_guarded(launcher if INTERPRETED or reference is None else reference))
        op.register_fake(fake)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.vlblocks, name))(flops)
        return op

    return register


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        # A backward runs under whatever autocast its caller is in, and Triton launches on the current device.
        with torch.cuda.device_of(first), torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return call
