"""Losses with many candidates, forward and backward: over a vocabulary, and over all pairs of a batch.

The halves `_vocabulary` and `_contrastive` say what is computed and by whom; here it is measured. Gradients go to all
that a step trains: states or features, table, bias, scale. The floor is that of three products (logits, and gradients
of both their factors), each factor read and its gradient written once. Peak memory is above inputs and gradients.
Inputs rotate. The error is the largest of loss and gradients. What has an aim runs first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    Ceilings,
    Row,
    Timing,
    finish_rows,
    make_all,
    provider_colours,
    relative_error,
    rotating,
    saved_mib,
    time_alternating,
    write_figure,
)
from memory import Memory, measure, peak_memory
from suites import _contrastive, _vocabulary
from torch import Tensor

Problem = _contrastive.Contrast | _vocabulary.Vocabulary
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (_contrastive.Contrast, _vocabulary.Vocabulary)}
COMPILED = "torch.compile"
BARE = "bare matrix products"
LONG = 1e12  # FLOPs that take a CPU many seconds


def bare(left: Tensor, right: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    logits = left @ right.T
    return logits @ right, logits.T @ left


def with_backward(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Loss, and its gradients to all inputs that are no indices."""

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        value = loss(*leaves)
        return (value.detach(), *torch.autograd.grad(value, [x for x in leaves if x.requires_grad]))

    return step


def makers(problem: Problem) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Name -> maker of a loss; the makers import and compile, and may fail alone."""
    eager, others = problem.eager(), problem.providers()
    found = {"eager": lambda: eager, COMPILED: lambda: torch.compile(eager, dynamic=False), **others}
    if problem.device != "cpu" or problem.work()[0] < LONG:
        found[BARE] = lambda: bare
    return found


def step_of(name: str, loss: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return loss if name == BARE else with_backward(loss)


def warm(name: str, step: Callable[..., object], problem: Problem) -> None:
    """One run; a small problem is enough for what is not made for one shape."""
    step(*(problem if name == COMPILED or problem.device != "cpu" else problem.small()).inputs())


def build(kind: str, provider: str, problem: Sequence[Any]) -> Callable[[], object]:
    """One provider's step, for a fresh process in which its memory is read."""
    made = KINDS[kind](*problem)
    step = step_of(provider, makers(made)[provider]())
    warm(provider, step, made)
    inputs = made.inputs()
    return lambda: step(*inputs)


def problems(device: str, quick: bool) -> list[Problem]:
    contrastive = list(_contrastive.problems(device, quick))
    vocabulary = list(_vocabulary.problems(device, quick))
    # Each half begins with what it has an aim for: InfoNCE and SigLIP, and one vocabulary.
    return [*contrastive[:2], *vocabulary[:1], *contrastive[2:], *vocabulary[1:]]


def rows(device: str, quick: bool) -> Iterator[list[Row]]:
    """Rows problem by problem."""
    ceilings = Ceilings(device, 256 if quick else None)
    for problem in problems(device, quick):
        yield finish_rows(_rows_of(problem, quick), ceilings[problem.dtype])


def _rows_of(problem: Problem, quick: bool) -> Iterator[Row]:
    device, inputs = problem.device, [problem.inputs(seed) for seed in range(2)]
    # Else dynamo would give up on a function after so many shapes, and run it eagerly.
    torch.compiler.reset()
    losses, notes = make_all(makers(problem))
    steps = {name: step_of(name, loss) for name, loss in losses.items()}
    warmed, failed = make_all({name: partial(warm, name, step, problem) for name, step in steps.items()})
    notes |= failed
    calls = {name: rotating(steps[name], inputs) for name in warmed}
    slow = device == "cpu" and not quick
    timings = time_alternating(calls, min_runs=3 if slow else 5, warmup=0, device=device)
    truth, exact = problem.exact(), None
    if truth is not None:
        exact = with_backward(truth)(*(x.double() if x.is_floating_point() else x for x in inputs[0]))
    flops, size = problem.work()
    for name in makers(problem):
        timing = timings.get(name, Timing(note=notes.get(name, "")))
        ours = name == problem.ours
        memory, error, saved = Memory(), None, None
        if not timing.note:
            memory = _memory(name, problem, calls[name], child=not quick or ours)
            if exact is not None and name != BARE:
                error = relative_error(steps[name](*inputs[0]), exact)
            if name not in (COMPILED, BARE):
                leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs[0]]
                saved = saved_mib(partial(losses[name], *leaves), leaves)
        yield Row(
            op=problem.op,
            shape=problem.shape,
            dtype=problem.dtype,
            mode="forward + backward",
            provider=name,
            ours=ours,
            baseline=name != BARE,
            p50_ms=timing.p50_ms,
            p20_ms=timing.p20_ms,
            p80_ms=timing.p80_ms,
            flops=flops,
            bytes=size,
            peak_mib=memory.peak_mib,
            saved_mib=saved,
            error=error,
            note=timing.note or memory.note,
        )


def _memory(name: str, problem: Problem, call: Callable[[], object], *, child: bool) -> Memory:
    """Without a child none on a CPU, for it takes seconds to start."""
    if problem.device != "cpu":
        found = Memory(measure(call, device=problem.device))
    elif child:
        options = {"kind": type(problem).__name__, "provider": name, "problem": list(problem)}
        found = peak_memory("suites/losses.py:build", options)
    else:
        return Memory()
    if found.peak_mib is None:
        return found
    return found._replace(peak_mib=max(0.0, found.peak_mib - problem.gradients_mib()))


def plots(rows: Sequence[Row], out: Path) -> list[Path]:
    """Time over floor, and peak memory, over the number of rows, at the sizes that have an aim."""
    from matplotlib.figure import Figure

    written = []
    charts: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("time", "time over floor", lambda row: row.x_floor),
        ("memory", "peak MiB beyond inputs and gradients", lambda row: row.peak_mib),
    )
    ops = list(dict.fromkeys(row.op for row in rows))
    colours = provider_colours(rows)
    for what, label, value in charts:
        figure = Figure(figsize=(4.2 * len(ops), 3.6), layout="constrained")
        for panel, op in zip(figure.subplots(1, len(ops), squeeze=False).flat, ops, strict=True):
            _panel(panel, [row for row in rows if row.op == op and value(row)], value, colours)
            panel.set_ylabel(label, fontsize=9)
        path = out / f"losses-{what}.png"
        write_figure(figure, path)
        written.append(path)
    return written


def _panel(panel: Any, rows: list[Row], value: Callable[[Row], float | None], colours: dict[str, str]) -> None:
    if not rows:
        return
    # What has an aim came first.
    sizes = rows[0].shape.partition(", ")[2]
    rows = [row for row in rows if row.shape.partition(", ")[2] == sizes]
    for name in dict.fromkeys(row.provider for row in rows):
        own = [row for row in rows if row.provider == name]
        points = sorted((int(row.shape.partition(", ")[0].split()[1]), value(row)) for row in own)
        style = {"color": colours[name], "linewidth": 2.4 if own[0].ours else 1.2}
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
    panel.set_title(f"{rows[0].op}, {sizes}, {rows[0].dtype}", loc="left", fontsize=9.5)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("rows", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=7.5, frameon=False)
