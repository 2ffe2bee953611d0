"""Which mixed precision a machine gains from."""

from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["cpu_has_fast_bf16", "default_mixed_precision"]

_FLAGS = {"avx512_bf16", "amx_bf16"}


def cpu_has_fast_bf16(cpuinfo: str | Path = "/proc/cpuinfo") -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (avx512_bf16 or AMX), several times as fast as float32."""
    try:
        # Private in torch, so asked with care: another version may name or answer differently.
        cpu: Any = torch.cpu
        if cpu._is_avx512_bf16_supported():
            return True
    except (AttributeError, RuntimeError):
        pass
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(_FLAGS & set(line.split()) for line in lines if line.startswith("flags"))


def default_mixed_precision(device: str | torch.device) -> Literal["no", "bf16"]:
    """bf16 where the hardware has it, else none, in the words of accelerate's `mixed_precision`."""
    kind = torch.device(device).type
    if kind == "cuda":
        # Emulated bf16 (Volta, Turing) is slower than float32.
        fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    else:
        fast = kind == "cpu" and cpu_has_fast_bf16()
    return "bf16" if fast else "no"
