"""What tests of operations watch: sizes of tensors, and memory that nobody has written."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operation puts out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.itemsize)
        return out


@pytest.fixture
def largest_tensor():
    """A mode that sees what a function allocates; what a registered operation does inside of it is hidden from it."""
    return LargestTensor


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
