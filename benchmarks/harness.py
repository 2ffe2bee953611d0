"""What every benchmark shares: rows, timing side by side, the machine's description, tables and charts.

A suite is a module ``benchmarks/suites/NAME.py`` with ``rows(device, quick) -> Iterable[Row]`` and, if it wants other
charts than the usual ones, ``plots(rows, out)``, which writes ``NAME-*.png`` into the folder ``out``. A suite that
yields its rows problem by problem can be stopped when its time is up; one that yields a problem's rows together, as a
list, is stopped between problems only.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider's numbers on one problem; None is unknown, and a blank in the table."""

    op: str
    shape: str
    provider: str
    dtype: str = "float32"
    mode: str = ""  # "forward", "forward + backward", "training step", ...
    ours: bool = False  # compared with the best baseline of the same op, shape, dtype and mode
    baseline: bool = True  # False: shown for comparison only, since it does not compute the whole operation
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    flops: float | None = None  # unmasked ones only, no recomputation
    bytes: float | None = None  # each byte once
    tflops: float | None = None  # per second; this and what follows is derived by finish_rows where it can be
    gbps: float | None = None
    floor_ms: float | None = None
    bound: str = ""  # "compute" or "memory": which of the two makes the floor
    x_floor: float | None = None
    speedup: float | None = None  # best baseline's p50 over this one's
    peak_mib: float | None = None  # above the level with inputs and model in place
    saved_mib: float | None = None  # held from forward to backward
    error: float | None = None  # relative norm against float64
    baseline_error: float | None = None
    note: str = ""  # why numbers are missing, or what to know of them


class Ceiling(NamedTuple):
    """What a device can do at most."""

    flops: float  # per second, in the dtype measured
    bandwidth: float  # bytes per second


class Ceilings:
    """The most that a device has been seen to do, by dtype: measured at every look, since one moment may be slow."""

    def __init__(self, device: str, size: int | None = None) -> None:
        self.device, self.size = device, size
        self._seen: dict[str, Ceiling] = {}

    def __getitem__(self, dtype: str) -> Ceiling:
        now = measure_ceiling(self.device, getattr(torch, dtype), self.size)
        before = self._seen.get(dtype, now)
        self._seen[dtype] = found = Ceiling(*map(max, now, before))
        return found


class Timing(NamedTuple):
    """Milliseconds of one provider, or why there are none."""

    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    runs: int = 0
    note: str = ""


def time_alternating(
    providers: Mapping[str, Callable[[], object]],
    *,
    min_seconds: float = 0.1,
    min_runs: int = 5,
    warmup: int = 3,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time providers in turn, one run each per round, so that a machine that slows down slows all of them.

    Who goes first changes with every round. It ends when each has run for ``min_seconds`` and ``min_runs`` times. A
    provider that raises is left out from then on, and its note says why. On a GPU events are read on the device, after
    its cache has been flushed; a provider that rotates through several inputs does not find them there.
    """
    on_gpu = torch.device(device).type == "cuda"
    clock = _gpu_clock() if on_gpu else _cpu_clock
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    failed: dict[str, str] = {}

    def run(name: str) -> float | None:
        try:
            return clock(providers[name])
        except Exception as error:
            failed[name] = failure(error)
            seconds[name].clear()
            if on_gpu:
                torch.cuda.empty_cache()
            return None

    for _, name in itertools.product(range(warmup), providers):
        if name not in failed:
            run(name)
    order = list(providers)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while any(
            name not in failed and (len(seconds[name]) < min_runs or sum(seconds[name]) < min_seconds) for name in order
        ):
            for name in order:
                if name not in failed and (took := run(name)) is not None:
                    seconds[name].append(took)
            order = order[1:] + order[:1]
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(note=failed[name]) if name in failed else _timing(seconds[name]) for name in providers}


def _cpu_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_clock() -> Callable[[Callable[[], object]], float]:
    # Larger than any chip's cache; filling it also lets the CPU run ahead, so that launches cost nothing.
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def clock(call: Callable[[], object]) -> float:
        other.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def measure_ceiling(device: str, dtype: torch.dtype = torch.float32, size: int | None = None) -> Ceiling:
    """What the device does here and now: a large square matrix product in `dtype`, and a copy."""
    on_gpu = torch.device(device).type == "cuda"
    size = size or (8192 if on_gpu else 2048)
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.ones(2**28 if on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    timed = time_alternating({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, device=device)
    product, copy = timed["product"].p50_ms, timed["copy"].p50_ms
    assert product is not None and copy is not None, timed
    return Ceiling(2e3 * size**3 / product, 2e3 * source.numel() * source.element_size() / copy)


def saved_mib(forward: Callable[[], object], inputs: Iterable[torch.Tensor] = ()) -> float:
    """MiB that autograd holds from `forward` to the backward, beside the `inputs`."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    found: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(found.values()) / MIB


def relative_error(found: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    """Largest relative norm of the difference, over tensors and their exact values in float64."""
    return max(
        float((f.double() - e.to(f.device)).norm() / e.norm().clamp_min(1e-300))
        for f, e in zip(found, exact, strict=True)
    )


def rotating(call: Callable[..., object], inputs: Sequence[Sequence[Any]]) -> Callable[[], object]:
    """A provider that gives `call` the next of several sets of arguments each time."""
    turn = itertools.cycle(inputs)
    return lambda: call(*next(turn))


def make_all(makers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What could be made, and why the rest could not."""
    made, notes = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:
            notes[name] = failure(error)
    return made, notes


def collect(rows: Iterable[Row | Sequence[Row]], minutes: float | None = None) -> tuple[list[Row], bool]:
    """The rows of a suite, and whether it was stopped because its time was up."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    found: list[Row] = []
    for part in rows:
        found.extend([part] if isinstance(part, Row) else part)
        if end is not None and time.monotonic() > end:
            return found, True
    return found, False


def failure(error: BaseException) -> str:
    """Why a provider gave no number, in a few words."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed: {error.name}" if error.name else f"not installed: {text}"
    return f"{type(error).__name__}: {text[:120]}"


def finish_rows(rows: Iterable[Row], ceiling: Ceiling | None = None) -> list[Row]:
    """Derive rates, floor and speed-up where their ingredients are known; what a row already states is kept."""
    rows = list(rows)
    finished = []
    for row in rows:
        new: dict[str, Any] = {}
        if row.p50_ms:
            if row.tflops is None and row.flops is not None:
                new["tflops"] = row.flops / row.p50_ms / 1e9
            if row.gbps is None and row.bytes is not None:
                new["gbps"] = row.bytes / row.p50_ms / 1e6
        floor = row.floor_ms
        if floor is None and ceiling is not None and (row.flops is not None or row.bytes is not None):
            compute = (row.flops or 0) / ceiling.flops * 1e3
            memory = (row.bytes or 0) / ceiling.bandwidth * 1e3
            floor = new["floor_ms"] = max(compute, memory)
            new["bound"] = "compute" if compute >= memory else "memory"
        if row.x_floor is None and floor and row.p50_ms:
            new["x_floor"] = row.p50_ms / floor
        if row.speedup is None and row.ours and row.p50_ms:
            others = [r.p50_ms for r in rows if _problem(r) == _problem(row) and r.baseline and not r.ours and r.p50_ms]
            if others:
                new["speedup"] = min(others) / row.p50_ms
        finished.append(replace(row, **new))
    return finished


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Machine, versions, commit and date: what a number means nothing without."""
    header = {
        "device": _cpu_name() if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.device(device).type == "cuda":
        header["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        header["cuda"] = torch.version.cuda or "none"
    return header


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("op", lambda r: r.op),
    ("shape", lambda r: r.shape),
    ("dtype", lambda r: r.dtype),
    ("mode", lambda r: r.mode),
    ("provider", lambda r: f"**{r.provider}**" if r.ours else r.provider),
    ("p50 [p20, p80] ms", lambda r: _time_cell(r)),
    ("TFLOP/s", lambda r: _number(r.tflops)),
    ("GB/s", lambda r: _number(r.gbps)),
    ("floor ms (bound)", lambda r: _number(r.floor_ms) + (f" ({r.bound})" if r.bound else "")),
    ("x floor", lambda r: _number(r.x_floor)),
    ("speed-up over the best baseline", lambda r: _number(r.speedup)),
    ("peak MiB", lambda r: _number(r.peak_mib)),
    ("saved MiB", lambda r: _number(r.saved_mib)),
    ("error, ours / baseline's", lambda r: _errors_cell(r)),
    ("note", lambda r: r.note),
)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; what is unknown stays blank."""
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row).replace("|", "\\|") for _, cell in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def write_suite(name: str, out: Path, rows: Sequence[Row], header: Mapping[str, str], *, command: str = "") -> None:
    """Write ``NAME.json`` and ``NAME.md`` into ``out``, each whole or not at all."""
    content = {"suite": name, "command": command, "header": dict(header), "rows": [asdict(row) for row in rows]}
    write_atomic(out / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    facts = "\n".join(f"- {key}: {value}" for key, value in header.items())
    made = f"Made by `{command}`.\n\n" if command else ""
    write_atomic(out / f"{name}.md", f"# {name}\n\n{made}{facts}\n\n{table(rows)}".encode())


def plot_rows(name: str, rows: Sequence[Row], out: Path) -> list[Path]:
    """Bars of time and of peak memory, a panel per problem: ``NAME-time.png`` and ``NAME-memory.png``."""
    written = []
    for what, unit, value in (("time", "ms", lambda r: r.p50_ms), ("memory", "MiB peak", lambda r: r.peak_mib)):
        known = [row for row in rows if value(row) is not None]
        if known:
            path = out / f"{name}-{what}.png"
            _plot_bars(known, [value(row) for row in known], unit, path, spread=what == "time")
            written.append(path)
    return written


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a picture, without a display."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomic(path, picture.getvalue())


def provider_colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each provider, the same in all panels; orange is ours."""
    others = itertools.cycle(("#4C78A8", "#72B7B2", "#54A24B", "#9D755D", "#B279A2", "#7F7F7F", "#BAB0AC", "#EECA3B"))
    mine = {row.provider for row in rows if row.ours}
    return {name: "#D55E00" if name in mine else next(others) for name in dict.fromkeys(row.provider for row in rows)}


def _plot_bars(rows: Sequence[Row], values: Sequence[float], unit: str, path: Path, *, spread: bool) -> None:
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(_problem(row) for row in rows))
    groups = [[(row, value) for row, value in zip(rows, values, strict=True) if _problem(row) == p] for p in problems]
    figure = Figure(figsize=(7.5, sum(0.34 * len(g) + 0.75 for g in groups) + 0.1), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(g) + 1.0 for g in groups])[:, 0]
    for panel, group, problem in zip(panels, groups, problems, strict=True):
        places = range(len(group))
        colours = ["#D55E00" if row.ours else "#8DA9C4" for row, _ in group]
        panel.barh(places, [value for _, value in group], color=colours, height=0.7)
        longest = max(row.p80_ms or value if spread else value for row, value in group)
        for place, (row, value) in enumerate(group):
            end = value
            if spread and row.p20_ms is not None and row.p80_ms is not None:
                panel.plot([row.p20_ms, row.p80_ms], [place, place], color="#222222", linewidth=1)
                end = max(value, row.p80_ms)
            gain = f"   {row.speedup:.2f}x" if spread and row.speedup else ""
            panel.text(
                end + 0.012 * longest, place, f"{_number(value)}{gain}", va="center", fontsize=8, color="#222222"
            )
        panel.set_yticks(places, [row.provider for row, _ in group], fontsize=8.5)
        panel.set_ylim(len(group) - 0.4, -0.6)
        panel.set_xlim(0, 1.22 * longest)
        panel.set_title(" · ".join(part for part in problem if part), loc="left", fontsize=9.5)
        panel.tick_params(axis="x", labelsize=7.5, colors="#666666")
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color("#BBBBBB")
    panels[-1].set_xlabel(unit, fontsize=8.5, color="#666666")
    write_figure(figure, path)


def _problem(row: Row) -> tuple[str, str, str, str]:
    return row.op, row.shape, row.dtype, row.mode


def _timing(seconds: list[float]) -> Timing:
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    p50, p20, p80 = (1e3 * torch.tensor(seconds, dtype=torch.float64).quantile(levels)).tolist()
    return Timing(p50, p20, p80, len(seconds))


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent where a reader would not expect one."""
    if value is None:
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.1e}"


def _time_cell(row: Row) -> str:
    if row.p50_ms is None:
        return ""
    spread = "" if row.p20_ms is None else f" [{_number(row.p20_ms)}, {_number(row.p80_ms)}]"
    return _number(row.p50_ms) + spread


def _errors_cell(row: Row) -> str:
    errors = [f"{value:.1e}" if value is not None else "" for value in (row.error, row.baseline_error)]
    return " / ".join(errors) if errors[1] else errors[0]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    folder = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return (commit + (" with changes" if changed else "")) if commit else "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
