"""The grounded space: scores of all codes, the whole lookup with its losses, and nearest codes.

Providers write the same numbers in other ways: as the original does (the similarity of all tokens with all codes kept
for the backward, codes and weights by a one-hot product), in place, compiled, in chunks, by the usual quantizer
library; beside them the bare matrix product, which has no result of its own. Peak memory is above inputs, outputs and
gradients. Inputs rotate. On a CPU codebooks of 65536 run at the shortest sequence only, and ours is the chunked
reference.
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
    provider_colours,
    relative_error,
    rotating,
    saved_mib,
    time_alternating,
)
from memory import Memory, measure, peak_memory
from torch import Tensor

from vlblocks.ops.grounding import grounding_losses, grounding_scores, nearest_code, segment_sum

PICKS = 100
CODE_WEIGHT = 0.25
BARE = "bare matrix product"


class Problem(NamedTuple):
    batch: int
    tokens: int
    codes: int
    width: int
    dtype: str
    device: str

    @property
    def shape(self) -> str:
        return f"B {self.batch}, N {self.tokens}, C {self.codes}, D {self.width}"

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of layer-normed length, a codebook, and a temperature that decides without saturating."""
        generator = torch.Generator(self.device).manual_seed(seed)
        make = partial(torch.randn, generator=generator, device=self.device)
        dtype = getattr(torch, self.dtype)
        x = make(self.batch, self.tokens, self.width).to(dtype)
        codes = (0.02 * make(self.codes, self.width)).to(dtype)
        return x, codes, torch.full((1,), 5.0, device=self.device)


# Scores, without gradient.


def eager_scores(x: Tensor, codes: Tensor, t: Tensor) -> Tensor:
    return torch.sigmoid(t * (x @ codes.T)).sum(1, dtype=torch.float32)


def in_place_scores(x: Tensor, codes: Tensor, t: Tensor) -> Tensor:
    similarity = x @ codes.T
    return similarity.mul_(t).sigmoid_().sum(1, dtype=torch.float32)


def bare_product(x: Tensor, codes: Tensor, t: Tensor) -> Tensor:
    return x @ codes.T


# The whole lookup: scores, picks, losses; forward and backward.


def original_lookup(x: Tensor, codes: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """As the original writes it: [B, N, C] with gradient, one-hot products."""
    similarity = torch.sigmoid(t.to(x.dtype) * (x @ codes.T))
    scores = similarity.sum(1)
    one_hot = F.one_hot(scores.topk(PICKS, dim=1).indices, codes.shape[0]).to(x.dtype)
    weight = similarity @ one_hot.mT
    return _losses(x, one_hot @ codes, weight)


def in_place_lookup(x: Tensor, codes: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Scores without gradient, in place; then only the picked codes."""
    with torch.no_grad():
        indices = in_place_scores(x, codes, t).topk(PICKS, dim=1).indices
    picked = F.embedding(indices, codes)
    return _losses(x, picked, torch.sigmoid(t.to(x.dtype) * (x @ picked.mT)))


def _losses(x: Tensor, picked: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    of_tokens = (weight.mT @ x) / (weight.sum(1)[..., None] + 1e-18)
    of_codes = (weight @ picked) / (weight.sum(2, keepdim=True) + 1e-18)
    return F.mse_loss(of_codes.float(), x.detach().float()), F.mse_loss(of_tokens.float(), picked.detach().float())


def our_lookup(x: Tensor, codes: Tensor, t: Tensor, backend: Any = "auto") -> tuple[Tensor, Tensor]:
    indices = grounding_scores(x, codes, t, backend=backend).topk(PICKS, dim=1).indices
    return tuple(grounding_losses(x, codes, indices, t, backend=backend))


def with_backward(lookup: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients to tokens, codes and temperature of the weighted sum of both losses."""

    def step(x: Tensor, codes: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(tensor.detach().requires_grad_() for tensor in (x, codes, t))
        token_loss, code_loss = lookup(*leaves)
        return torch.autograd.grad(token_loss + CODE_WEIGHT * code_loss, leaves)

    return step


# Nearest code, and the moving average of the codebook.


def eager_nearest(x: Tensor, codes: Tensor, t: Tensor) -> Tensor:
    flat = x.flatten(0, 1).float()
    distance = flat.square().sum(1, keepdim=True) - 2 * flat @ codes.float().T + codes.float().square().sum(1)
    return distance.argmin(1)


class Peer:
    """vector-quantize-pytorch, with the problem's codebook."""

    def __init__(self, problem: Problem, *, train: bool) -> None:
        from vector_quantize_pytorch import VectorQuantize

        self.module = VectorQuantize(dim=problem.width, codebook_size=problem.codes, decay=0.99).to(problem.device)
        self.module.train(train)

    @torch.no_grad()
    def __call__(self, x: Tensor, codes: Tensor, t: Tensor) -> Tensor:
        return self.module(x)[1]


def our_update(x: Tensor, codes: Tensor, t: Tensor, backend: Any = "auto") -> Tensor:
    """Nearest codes and the sums by code that move an EMA codebook."""
    indices = nearest_code(x, codes, backend=backend)
    sums, counts = segment_sum(x.flatten(0, 1), indices.flatten(), codes.shape[0], backend=backend)
    return codes.lerp((sums / counts.clamp_min(1)[:, None]).to(codes.dtype), 0.01)


def ours(device: str) -> str:
    return "vlblocks" if device == "cpu" else "vlblocks (triton)"


def providers(op: str, problem: Problem) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Name -> maker of the callable; the makers import and compile, and may fail alone."""
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    device, mine = problem.device, ours(problem.device)
    chunked = {} if device == "cpu" else {"chunked": "reference"}
    if op == "scores":
        found = {
            "eager": lambda: eager_scores,
            "eager in place": lambda: in_place_scores,
            "torch.compile": lambda: compiled(eager_scores),
            BARE: lambda: bare_product,
            **{name: lambda: partial(grounding_scores, backend="reference") for name in chunked},
            mine: lambda: grounding_scores,
        }
    elif op == "lookup and losses":
        found = {
            "eager, as the original": lambda: with_backward(original_lookup),
            "eager in place": lambda: with_backward(in_place_lookup),
            "torch.compile": lambda: with_backward(compiled(in_place_lookup)),
            **{name: lambda: with_backward(partial(our_lookup, backend="reference")) for name in chunked},
            mine: lambda: with_backward(our_lookup),
        }
    elif op == "nearest code":
        found = {
            "eager": lambda: eager_nearest,
            "torch.compile": lambda: compiled(eager_nearest),
            "vector-quantize-pytorch": lambda: Peer(problem, train=False),
            BARE: lambda: bare_product,
            **{name: lambda: lambda x, codes, t: nearest_code(x, codes, backend="reference") for name in chunked},
            mine: lambda: lambda x, codes, t: nearest_code(x, codes),
        }
    else:
        found = {
            "vector-quantize-pytorch": lambda: Peer(problem, train=True),
            mine: lambda: our_update,
        }
    return found


OPS = ("scores", "lookup and losses", "nearest code", "nearest code and moving average")


def outputs_mib(op: str, problem: Problem) -> float:
    """What a provider must leave: scores, gradients, indices or a codebook."""
    size = getattr(torch, problem.dtype).itemsize
    b, n, c, d = problem[:4]
    if op == "scores":
        return 4 * b * c / MIB
    if op == "lookup and losses":
        return size * (b * n * d + c * d) / MIB
    return (8 * b * n if op == "nearest code" else size * c * d) / MIB


def work(op: str, problem: Problem) -> tuple[float, float]:
    """FLOPs and bytes, each operand once and nothing twice."""
    size = getattr(torch, problem.dtype).itemsize
    b, n, c, d = problem[:4]
    product, read = 2.0 * b * n * c * d, float(size * (b * n * d + c * d))
    if op == "scores":
        return product, read + 4 * b * c
    if op == "lookup and losses":
        # Three products with the picked codes forward (weights and both means), six backward.
        return product + 9 * 2.0 * b * n * PICKS * d, 2 * read + 4 * b * c
    return product, read + 8 * b * n


def build(op: str, provider: str, problem: Sequence[Any]) -> Callable[[], object]:
    """One provider's step, for a fresh process in which its memory is read."""
    made = Problem(*problem)
    call, inputs = providers(op, made)[provider](), made.inputs()
    return lambda: call(*inputs)


def problems(device: str, quick: bool) -> Iterator[Problem]:
    if quick:
        yield Problem(2, 19, 256, 64, "float32", device)
        return
    batch, dtype = (8, "float32") if device == "cpu" else (256, "bfloat16")
    for codes, width, tokens in itertools.product((2048, 8192, 16384, 65536), (768, 1024), (197, 324, 900)):
        if device == "cpu" and codes == 65536 and tokens > 197:
            continue
        yield Problem(batch, tokens, codes, width, dtype, device)


def rows(device: str, quick: bool) -> Iterator[Row]:
    """Rows problem by problem, the smallest codebooks first."""
    ceilings = Ceilings(device, 256 if quick else None)
    for problem in problems(device, quick):
        ceiling = ceilings[problem.dtype]
        for op in OPS:
            yield from _rows_of(op, problem, ceiling, quick)


def _rows_of(op: str, problem: Problem, ceiling: Ceiling, quick: bool) -> Iterator[Row]:
    # Else dynamo would give up on a function after so many shapes, and run it eagerly or not at all.
    torch.compiler.reset()
    device = problem.device
    inputs = [problem.inputs(seed) for seed in range(2 if device == "cpu" else 3)]
    calls: dict[str, Callable[[], object]] = {}
    raw: dict[str, Callable[..., Any]] = {}
    notes: dict[str, str] = {}
    for name, make in providers(op, problem).items():
        try:
            raw[name] = make()
            calls[name] = rotating(raw[name], inputs)
        except ImportError as error:
            notes[name] = f"not installed: {error.name}"
    slow = device == "cpu" and not quick
    timings = time_alternating(calls, min_seconds=0.1, min_runs=3 if slow else 5, warmup=1, device=device)
    exact = _exact(op, problem, inputs[0]) if problem.codes <= 2048 and problem.tokens < 300 else None
    flops, size = work(op, problem)
    floor = max(flops / ceiling.flops, size / ceiling.bandwidth) * 1e3
    with_memory = device != "cpu" or quick or (problem.width == 768 and problem.tokens in (197, 324))
    for name in providers(op, problem):
        timing = timings.get(name, Timing(note=notes.get(name, "")))
        memory = Memory()
        if with_memory and not timing.note:
            memory = _memory(op, name, problem, calls[name])
        error = saved = None
        if exact is not None and name in raw and not timing.note and name not in (BARE, "vector-quantize-pytorch"):
            error = _error(op, raw[name](*inputs[0]), exact)
        if op == "lookup and losses" and name in raw and not timing.note and problem.codes <= 2048:
            saved = _saved(name, inputs[0])
        yield Row(
            op=op,
            shape=problem.shape,
            dtype=problem.dtype,
            mode="forward + backward" if op == "lookup and losses" else "forward",
            provider=name,
            ours=name == ours(device),
            baseline=name != BARE,
            p50_ms=timing.p50_ms,
            p20_ms=timing.p20_ms,
            p80_ms=timing.p80_ms,
            flops=flops,
            bytes=size,
            floor_ms=floor,
            bound="compute" if flops / ceiling.flops >= size / ceiling.bandwidth else "memory",
            peak_mib=memory.peak_mib,
            saved_mib=saved,
            error=error,
            note=timing.note or memory.note,
        )


def _memory(op: str, name: str, problem: Problem, call: Callable[[], object]) -> Memory:
    if problem.device == "cpu":
        options = {"op": op, "provider": name, "problem": list(problem)}
        found = peak_memory("suites/grounding.py:build", options, warmup=1)
    else:
        found = Memory(measure(call, device=problem.device))
    if found.peak_mib is None:
        return found
    beyond = 0.0 if name == BARE else outputs_mib(op, problem)
    return found._replace(peak_mib=max(0.0, found.peak_mib - beyond))


def _saved(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> float | None:
    lookups = {"eager, as the original": original_lookup, "eager in place": in_place_lookup}
    lookup = lookups.get(name, our_lookup if name.startswith("vlblocks") else None)
    if lookup is None:
        return None
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return saved_mib(lambda: lookup(*leaves), leaves)


def _exact(op: str, problem: Problem, inputs: tuple[Tensor, Tensor, Tensor]) -> Any:
    """The same in float64, on a CPU."""
    x, codes, t = (tensor.double().cpu() for tensor in inputs)
    if op == "scores":
        return eager_scores(x, codes, t)
    if op == "nearest code":
        return x.flatten(0, 1), codes
    return with_backward(partial(our_lookup, backend="reference"))(x, codes, t) if op == "lookup and losses" else None


def _error(op: str, found: Any, exact: Any) -> float | None:
    if exact is None:
        return None
    if op == "scores":
        return relative_error([found.cpu()], [exact])
    if op == "lookup and losses":
        return relative_error([part.cpu() for part in found], exact)
    # Indices may differ where two codes are equally near: what counts is how much farther the chosen one is.
    tokens, codes = exact
    distance = torch.cdist(tokens, codes)
    chosen = distance.gather(1, found.cpu().reshape(-1, 1))[:, 0]
    return float((chosen / distance.amin(1) - 1).max())


def plots(rows: Sequence[Row], out: Path) -> list[Path]:
    """Time over floor, and peak memory over the size of the codebook."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    charts = (
        ("time", "time over floor", lambda row: row.p50_ms / row.floor_ms if row.p50_ms and row.floor_ms else None),
        ("memory", "peak MiB beyond inputs, outputs and gradients", lambda row: row.peak_mib),
    )
    colours = provider_colours(rows)
    for file, label, value in charts:
        figure = Figure(figsize=(11, 3.4 * ((len(OPS) + 1) // 2)), layout="constrained")
        FigureCanvasAgg(figure)
        for panel, op in zip(figure.subplots(2, 2).flat, OPS, strict=True):
            own = [row for row in rows if row.op == op and value(row)]
            # One curve per provider, at the sequence and width that every codebook was run with.
            tokens = next((row.shape.split(", ")[1] for row in own if "N 197" in row.shape), None)
            own = [row for row in own if tokens is None or (f"{tokens}," in row.shape and row.shape.endswith("D 768"))]
            for name in dict.fromkeys(row.provider for row in own):
                points = [
                    (int(row.shape.split("C ")[1].split(",")[0]), value(row)) for row in own if row.provider == name
                ]
                style = {"color": colours[name], "linewidth": 2.4 if name.startswith("vlblocks") else 1.2}
                panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name, **style)
            panel.set_title(f"{op}{', ' + tokens + ', D 768' if tokens else ''}", loc="left", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel("codes", fontsize=9)
            panel.set_ylabel(label, fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(fontsize=7.5, frameon=False)
        path = out / f"grounding-{file}.png"
        figure.savefig(path, dpi=130)
        written.append(path)
    return written
