"""Cross-entropy over a vocabulary, forward and backward: part of the suite `losses`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import MIB, Ceiling, Row, Timing, measure_ceiling, relative_error, rotating, saved_mib, time_alternating
from memory import Memory, measure, peak_memory
from torch import Tensor

from vlblocks.ops.linear_cross_entropy import linear_cross_entropy

OP = "linear cross-entropy"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Problem(NamedTuple):
    rows: int
    vocab: int
    width: int
    dtype: str
    device: str

    @property
    def shape(self) -> str:
        return f"rows {self.rows}, V {self.vocab}, D {self.width}"

    def inputs(self, seed: int = 0) -> Inputs:
        """States of layer-normed length, a table, its bias, and targets that all count."""
        generator = torch.Generator(self.device).manual_seed(seed)
        make = partial(torch.randn, generator=generator, device=self.device)
        dtype = getattr(torch, self.dtype)
        x = make(self.rows, self.width).to(dtype)
        weight = (0.02 * make(self.vocab, self.width)).to(dtype)
        target = torch.randint(self.vocab, (self.rows,), generator=generator, device=self.device)
        return x, weight, torch.zeros(self.vocab, dtype=dtype, device=self.device), target


def eager(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


def liger(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target, bias)


def ours(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, bias, target)


def with_backward(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def step(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(tensor.detach().requires_grad_() for tensor in (x, weight, bias))
        value = loss(*leaves, target)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return step


def providers() -> dict[str, Callable[[], Callable[..., Any]]]:
    return {
        "eager": lambda: eager,
        "torch.compile": lambda: torch.compile(eager, dynamic=False),
        "liger-kernel": _liger,
        "vlblocks": lambda: ours,
    }


def _liger() -> Callable[..., Tensor]:
    import liger_kernel  # noqa: F401

    return liger


def build(provider: str, problem: Sequence[Any]) -> Callable[[], object]:
    """One provider's step, for a fresh process in which its memory is read."""
    made = Problem(*problem)
    step, inputs = with_backward(providers()[provider]()), made.inputs()
    return lambda: step(*inputs)


def problems(device: str, quick: bool) -> Iterator[Problem]:
    if quick:
        yield Problem(40, 501, 32, "float32", device)
        return
    dtype = "float32" if device == "cpu" else "bfloat16"
    rows = (1152, 8192) if device == "cpu" else (1152, 8192, 32768)
    vocabs = (30522, 50265) if device == "cpu" else (30522, 50265, 128256)
    widths = (768,) if device == "cpu" else (768, 1024)
    for width, vocab, count in itertools.product(widths, vocabs, rows):
        yield Problem(count, vocab, width, dtype, device)


def rows(device: str, quick: bool) -> Iterator[Row]:
    """Rows problem by problem."""
    ceiling: Ceiling | None = None
    for problem in problems(device, quick):
        if ceiling is None:
            ceiling = measure_ceiling(device, getattr(torch, problem.dtype), 256 if quick else None)
        yield from _rows_of(problem, ceiling, quick)


def _rows_of(problem: Problem, ceiling: Ceiling, quick: bool) -> Iterator[Row]:
    device = problem.device
    inputs = [problem.inputs(seed) for seed in range(2)]
    steps: dict[str, Callable[..., Any]] = {}
    notes: dict[str, str] = {}
    losses = {}
    for name, make in providers().items():
        try:
            losses[name] = make()
            steps[name] = with_backward(losses[name])
        except ImportError as error:
            notes[name] = f"not installed: {error.name}"
    calls = {name: rotating(step, inputs) for name, step in steps.items()}
    slow = device == "cpu" and not quick
    timings = time_alternating(calls, min_runs=3 if slow else 5, warmup=1, device=device)
    exact = None
    if problem.rows <= 1152 and problem.vocab <= 50265:
        exact = with_backward(partial(linear_cross_entropy, backend="chunked"))(
            *(tensor.cpu().double() for tensor in inputs[0][:3]), inputs[0][3].cpu()
        )
    product = 2.0 * problem.rows * problem.vocab * problem.width
    size = getattr(torch, problem.dtype).itemsize
    table = problem.vocab * problem.width + problem.rows * problem.width
    floor = max(3 * product / ceiling.flops, 2 * size * table / ceiling.bandwidth) * 1e3
    for name in providers():
        timing = timings.get(name, Timing(note=notes.get(name, "")))
        memory, error, saved = Memory(), None, None
        if not timing.note:
            if device == "cpu":
                options = {"provider": name, "problem": list(problem)}
                memory = peak_memory("suites/_vocabulary.py:build", options, warmup=1)
            else:
                memory = Memory(measure(calls[name], device=device))
            if memory.peak_mib is not None:
                memory = memory._replace(peak_mib=max(0.0, memory.peak_mib - size * table / MIB))
            if exact is not None:
                error = relative_error([part.cpu() for part in steps[name](*inputs[0])], exact)
            if name != "torch.compile":
                leaves = [tensor.detach().requires_grad_() for tensor in inputs[0][:3]]
                saved = saved_mib(partial(losses[name], *leaves, inputs[0][3]), leaves)
        yield Row(
            op=OP,
            shape=problem.shape,
            dtype=problem.dtype,
            mode="forward + backward",
            provider=name,
            ours=name == "vlblocks",
            p50_ms=timing.p50_ms,
            p20_ms=timing.p20_ms,
            p80_ms=timing.p80_ms,
            flops=3 * product,
            bytes=2 * size * table,
            floor_ms=floor,
            bound="compute" if floor == 3e3 * product / ceiling.flops else "memory",
            peak_mib=memory.peak_mib,
            saved_mib=saved,
            error=error,
            note=timing.note or memory.note,
        )
