"""How an operation is registered with PyTorch; needs no Triton.

An operation is one `torch.library.custom_op`, so that it passes through torch.compile, torch.export and FakeTensor. On
a GPU it launches its kernels; on a CPU it launches them when Triton's interpreter is on (TRITON_INTERPRET=1, set before
Triton is imported), and otherwise runs its PyTorch reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
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

    Args:
        fake: the same signature -> empty outputs of the right shapes and dtypes.
        reference: the same signature, in PyTorch; runs on a CPU without the interpreter. None: the launcher does.
        flops: as `torch.utils.flop_counter.register_flop_formula` wants it: shapes in, ``out_shape=`` -> FLOPs.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"vlblocks::{name}", launcher, mutates_args=(), device_types="cuda")
        op.register_kernel("cpu")(launcher if INTERPRETED or reference is None else reference)
        op.register_fake(fake)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.vlblocks, name))(flops)
        return op

    return register
