"""Cross-entropy over a vocabulary: part of the suite `losses`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import MIB
from torch import Tensor

from vlblocks.ops.linear_cross_entropy import linear_cross_entropy


class Vocabulary(NamedTuple):
    rows: int
    vocab: int
    width: int
    dtype: str
    device: str

    @property
    def op(self) -> str:
        return "linear cross-entropy"

    @property
    def shape(self) -> str:
        return f"rows {self.rows}, V {self.vocab}, D {self.width}"

    @property
    def ours(self) -> str:
        return "vlblocks" if self.device == "cpu" else "vlblocks (triton)"

    def small(self) -> Vocabulary:
        return self._replace(rows=min(self.rows, 64))

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of layer-normed length, a table, its bias, and targets that all count."""
        generator = torch.Generator(self.device).manual_seed(seed)
        make = partial(torch.randn, generator=generator, device=self.device)
        dtype = getattr(torch, self.dtype)
        x = make(self.rows, self.width).to(dtype)
        weight = (0.02 * make(self.vocab, self.width)).to(dtype)
        target = torch.randint(self.vocab, (self.rows,), generator=generator, device=self.device)
        return x, weight, torch.zeros(self.vocab, dtype=dtype, device=self.device), target

    def gradients_mib(self) -> float:
        size = getattr(torch, self.dtype).itemsize
        return size * (self.rows * self.width + self.vocab * (self.width + 1)) / MIB

    def work(self) -> tuple[float, float]:
        """FLOPs and bytes: three products; states, table and bias read, and their gradients written."""
        return 6.0 * self.rows * self.vocab * self.width, 2 * MIB * self.gradients_mib()

    def exact(self) -> Callable[..., Tensor] | None:
        """What gives the truth in float64, where it does not take too long."""
        if self.device == "cpu" and self.rows > 1152:
            return None
        return partial(linear_cross_entropy, backend="chunked")

    def eager(self) -> Callable[..., Tensor]:
        return eager

    def providers(self) -> dict[str, Callable[[], Callable[..., Tensor]]]:
        found: dict[str, Callable[[], Callable[..., Tensor]]] = {"liger-kernel": _liger}
        if self.device != "cpu":
            found["chunked"] = lambda: partial(linear_cross_entropy, backend="chunked")
        found[self.ours] = lambda: linear_cross_entropy
        return found


def eager(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, bias, target: liger_fused_linear_cross_entropy(x, weight, target, bias)


def problems(device: str, quick: bool) -> Iterator[Vocabulary]:
    """The one with an aim first, the rest by width; on a CPU the rest have the fewest rows only."""
    if quick:
        yield Vocabulary(40, 501, 32, "float32", device)
        return
    counts, dtype = ((1152,), "float32") if device == "cpu" else ((1152, 8192, 32768), "bfloat16")
    first = Vocabulary(8192, 50265, 768, dtype, device)
    yield first
    for width, vocab, count in itertools.product((768, 1024), (50265, 30522, 128256), counts):
        problem = Vocabulary(count, vocab, width, dtype, device)
        if problem != first:
            yield problem
