"""The few collective calls a training loop needs for plain Python objects: no-ops in a single process."""

from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "barrier",
    "broadcast_object",
    "gather_objects",
    "is_distributed",
    "is_main",
    "true_on_all",
]


def is_distributed() -> bool:
    """True when a process group of more than one process is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """Where the process group's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def is_main() -> bool:
    """True in the one process that writes files and prints: rank 0, or the only process."""
    return not is_distributed() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on rank 0; an empty list on the others."""
    if not is_distributed():
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(value, gathered, dst=0)
    return gathered or []


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def true_on_all(flag: bool) -> bool:
    """True when `flag` is true on every rank, so that all ranks take the same branch."""
    if not is_distributed():
        return flag
    agreed = torch.tensor(int(flag), device=_device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed.item())
