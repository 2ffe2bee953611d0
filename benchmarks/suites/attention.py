"""Attention over [image | codes | text]: one call under a mask, in the modes that the joint tower has.

Providers: PyTorch's SDPA with the dense [B, 1, T, T] mask, built anew in each call as a step builds it, on each of its
back ends; SDPA segment by segment; FlexAttention; xformers; torch.compile of the plain reference; ours. Texts are a
half to the whole of their length. FLOPs are those of the pairs of a query and a key that see each other, the backward
twice the forward: the scores that it computes once more do not count. Peak memory is above inputs, outputs and
gradients. Errors are those of rows that see a key, and of gradients that come from such rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import (
    MIB,
    Ceiling,
    Ceilings,
    Row,
    Timing,
    failure,
    provider_colours,
    relative_error,
    saved_mib,
    time_alternating,
    write_figure,
)
from memory import Memory, measure, peak_memory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlblocks.ops import SegmentMask, attention

WIDTH = 64
CODES = 100
TABLES = {
    "pairs": {
        "image": ("image", "codes"), "codes": ("image", "codes", "text"), "text": ("codes", "text"),
    },
    "captioning": {
        "image": ("image", "codes"), "codes": ("image", "codes"), "text": ("image", "codes", "text"),
    },
    "text only": {"codes": ("codes", "text"), "text": ("codes", "text")},
}  # fmt: skip


class Problem(NamedTuple):
    mode: str  # of TABLES, or "decoding": one new token of a caption, with a cache of all before it
    batch: int
    heads: int
    image: int
    text: int
    dtype: str
    device: str

    @property
    def shape(self) -> str:
        image = "" if self.mode == "text only" else f"v {self.image}, "
        return f"{self.mode}, B {self.batch}, H {self.heads}, {image}g {CODES}, l {self.text}"

    @property
    def decoding(self) -> bool:
        return self.mode == "decoding"

    def mask(self) -> SegmentMask:
        """Made from lengths on the device, as a step makes it: nothing is kept from one call to the next."""
        table = TABLES["captioning" if self.decoding else self.mode]
        lengths = {"image": self.image, "codes": CODES, "text": self.text}
        segments = {name: lengths[name] for name in table}
        causal = "text" if self.mode in ("captioning", "decoding") else None
        mask = SegmentMask.build(segments, table, valid={"text": self.valid()}, causal=causal)
        return mask.last_queries(1) if self.decoding else mask

    def valid(self) -> Tensor:
        position = torch.arange(self.text, device=self.device)
        spread = torch.arange(self.batch, device=self.device) % (self.text // 2 + 1)
        # The last token is real for all where it alone asks.
        shortest = self.text if self.decoding else self.text - self.text // 2
        return position < torch.clamp(shortest + spread, max=self.text)[:, None]

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        total = self.mask().total
        make = partial(torch.randn, generator=generator, device=self.device)
        dtype = getattr(torch, self.dtype)
        queries = 1 if self.decoding else total
        return tuple(make(self.batch, self.heads, n, WIDTH).to(dtype) for n in (queries, total, total))

    def pairs(self) -> float:
        """Pairs of a query and a key that see each other, of all examples and heads."""
        return float(self.mask().dense().expand(self.batch, -1, -1, -1).sum()) * self.heads


def dense(backend: SDPBackend | None, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call with the whole mask; rows that see nothing are opened, as SDPA would give NaN."""
    allowed = problem.mask().dense(q.device)
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def through(backend: str, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, mask=problem.mask(), backend=backend)


def compiled_reference(problem: Problem) -> Callable[..., Tensor]:
    plain = torch.compile(partial(attention, backend="reference"), dynamic=False)
    return lambda problem, q, k, v: plain(q, k, v, mask=problem.mask().dense(q.device))


def ours(device: str) -> str:
    return "vlblocks (sdpa, segment by segment)" if device == "cpu" else "vlblocks (triton)"


def providers(problem: Problem, backward: bool) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Name -> maker of a callable (problem, q, k, v) -> output."""
    found: dict[str, Callable[[], Callable[..., Tensor]]] = {}
    if problem.device == "cpu":
        found["SDPA, dense mask"] = lambda: partial(dense, None)
    else:
        for name in ("MATH", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            label = f"SDPA, dense mask, {name.lower().removesuffix('_attention')}"
            found[label] = partial(partial, dense, getattr(SDPBackend, name))
        found["SDPA, segment by segment"] = lambda: partial(through, "sdpa")
    found["reference, torch.compile"] = lambda: compiled_reference(problem)
    if not (problem.device == "cpu" and backward):
        found["FlexAttention"] = lambda: partial(through, "flex")
    found["xformers"] = _xformers
    backend = "sdpa" if problem.device == "cpu" else "triton"
    found[ours(problem.device)] = lambda: partial(through, backend)
    return found


def _xformers() -> Callable[..., Tensor]:
    import xformers.ops  # noqa: F401

    return partial(through, "xformers")


def with_backward(call: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def step(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        out = call(problem, *leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def compared(call: Callable[..., Tensor], backward: bool, problem: Problem, qkv: Sequence[Tensor]) -> list[Tensor]:
    """What errors are taken from: the output, or the gradients, without the rows that see no key.

    A dense mask opens those for SDPA, while ours are zeros.
    """
    sees = problem.mask().dense(qkv[0].device).any(-1)[..., None]
    leaves = [x.detach().requires_grad_(backward) for x in qkv]
    # As when it was timed: a compiled call would compile anew.
    with torch.set_grad_enabled(backward):
        out = call(problem, *leaves)
    if not backward:
        return [out.masked_fill(~sees, 0.0)]
    return list(torch.autograd.grad(out, leaves, sees.expand_as(out).to(out.dtype)))


def flops_of(problem: Problem, backward: bool) -> float:
    """Two products in the forward and four in the backward."""
    return 4 * problem.pairs() * WIDTH * (3.0 if backward else 1.0)


def build(provider: str, backward: bool, problem: Sequence[Any]) -> Callable[[], object]:
    """One provider's step, for a fresh process in which its memory is read."""
    made = Problem(*problem)
    call = providers(made, backward)[provider]()
    step, inputs = with_backward(call) if backward else torch.no_grad()(call), made.inputs()
    return lambda: step(made, *inputs)


def problems(device: str, quick: bool) -> Iterator[Problem]:
    if quick:
        for mode in (*TABLES, "decoding"):
            yield Problem(mode, 2, 2, 9, 12, "float32", device)
        return
    dtype = "float32" if device == "cpu" else "bfloat16"
    batches = (4,) if device == "cpu" else (64, 256)
    for batch, heads, image, text in itertools.product(batches, (12, 16), (197, 577), (30, 128)):
        for mode in (*TABLES, "decoding"):
            if mode == "text only" and image != 197:
                continue  # It has no image.
            yield Problem(mode, batch, heads, image, text, dtype, device)


def rows(device: str, quick: bool) -> Iterator[Row]:
    """Rows problem by problem."""
    ceilings = Ceilings(device, 256 if quick else None)
    for problem in problems(device, quick):
        ceiling = ceilings[problem.dtype]
        for backward in (False,) if problem.decoding else (False, True):
            yield from _rows_of(problem, backward, ceiling, quick)


def _rows_of(problem: Problem, backward: bool, ceiling: Ceiling, quick: bool) -> Iterator[Row]:
    # Else dynamo would give up on a function after so many shapes, and run it eagerly or not at all.
    torch.compiler.reset()
    device, inputs = problem.device, [problem.inputs(seed) for seed in range(2)]
    notes: dict[str, str] = {}
    calls: dict[str, Callable[..., Tensor]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, make in providers(problem, backward).items():
        try:
            call = make()
        except ImportError as error:
            notes[name] = failure(error)
            continue
        calls[name] = call
        step = with_backward(call) if backward else torch.no_grad()(call)
        turn = itertools.cycle(inputs)
        steps[name] = lambda step=step, turn=turn: step(problem, *next(turn))
    slow = device == "cpu" and not quick
    timings = time_alternating(steps, min_runs=4 if slow else 5, warmup=2, device=device)
    exact = None
    if problem.batch * problem.heads <= 1024 and problem.image <= 197:
        exact = compared(partial(through, "reference"), backward, problem, [x.double() for x in inputs[0]])
    size = getattr(torch, problem.dtype).itemsize
    elements = sum(x.numel() for x in inputs[0])
    flops = flops_of(problem, backward)
    moved = size * (elements + inputs[0][0].numel()) * (2.0 if backward else 1.0)
    floor = max(flops / ceiling.flops, moved / ceiling.bandwidth) * 1e3
    outputs = size * (inputs[0][0].numel() + (elements if backward else 0)) / MIB
    for name in providers(problem, backward):
        timing = timings.get(name, Timing(note=notes.get(name, "")))
        memory, error, saved = Memory(), None, None
        if not timing.note:
            if device != "cpu":
                memory = Memory(measure(steps[name], device=device))
            elif problem.heads == 12 and not name.startswith("reference"):
                options = {"provider": name, "backward": backward, "problem": list(problem)}
                memory = peak_memory("suites/attention.py:build", options, warmup=1)
            if memory.peak_mib is not None:
                memory = memory._replace(peak_mib=max(0.0, memory.peak_mib - outputs))
            if exact is not None:
                error = relative_error(compared(calls[name], backward, problem, inputs[0]), exact)
            if backward and not name.startswith("reference"):
                leaves = [x.detach().requires_grad_() for x in inputs[0]]
                saved = saved_mib(partial(providers(problem, backward)[name](), problem, *leaves), leaves)
        yield Row(
            op="attention",
            shape=problem.shape,
            dtype=problem.dtype,
            mode="forward + backward" if backward else "forward",
            provider=name,
            ours=name == ours(device),
            p50_ms=timing.p50_ms,
            p20_ms=timing.p20_ms,
            p80_ms=timing.p80_ms,
            flops=flops,
            bytes=moved,
            floor_ms=floor,
            bound="compute" if flops / ceiling.flops >= moved / ceiling.bandwidth else "memory",
            peak_mib=memory.peak_mib,
            saved_mib=saved,
            error=error,
            note=timing.note or memory.note,
        )


def plots(rows: Sequence[Row], out: Path) -> list[Path]:
    """Time over floor, and peak memory: a dot per provider, a line per problem, forward beside forward + backward."""
    from matplotlib.figure import Figure

    written = []
    charts: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("time", "time over floor", lambda row: row.x_floor),
        ("memory", "peak MiB beyond inputs, outputs and gradients", lambda row: row.peak_mib),
    )
    colours = provider_colours(rows)
    for what, label, value in charts:
        known = [row for row in rows if value(row)]
        if not known:
            continue
        shapes = list(dict.fromkeys(row.shape for row in known))
        modes = list(dict.fromkeys(row.mode for row in known))
        figure = Figure(figsize=(11, 1.4 + 0.24 * len(shapes)), layout="constrained")
        panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
        for panel, mode in zip(panels, modes, strict=True):
            for name in colours:
                own = [row for row in known if row.mode == mode and row.provider == name]
                if own:
                    places = [shapes.index(row.shape) for row in own]
                    panel.scatter([value(row) for row in own], places, s=22, color=colours[name], label=name, zorder=2)
            panel.set_title(mode, loc="left", fontsize=10)
            panel.set_xscale("log")
            panel.set_xlabel(label, fontsize=9)
            panel.set_yticks(range(len(shapes)), shapes, fontsize=8)
            panel.grid(axis="y", color="#EEEEEE", zorder=0)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        path = out / f"attention-{what}.png"
        write_figure(figure, path)
        written.append(path)
    return written
