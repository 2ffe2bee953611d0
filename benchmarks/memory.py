"""Peak memory of a step, each measured in a fresh process above its level once model and inputs are built.

In the parent: ``peak_memory("suites/train_step.py:build", {"width": 384})``. The function named builds everything and
returns a step to call without arguments. In the child, which is this file run as a script, the level is read, the
kernel's high-water mark is reset to it (``/proc/self/clear_refs``), the step runs, and the mark is read: exact, not
sampled. Where that is not to be had, a thread samples the level. On a GPU PyTorch's own counters serve.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20
MARK = "peak-memory:"
HERE = Path(__file__).resolve().parent


class Memory(NamedTuple):
    """Peak of a step above the level before it, or why there is none."""

    peak_mib: float | None = None
    note: str = ""


def peak_memory(
    builder: str,
    options: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
    steps: int = 1,
    warmup: int = 0,
    timeout: float = 900.0,
) -> Memory:
    """Peak memory of the step that ``builder`` builds.

    Args:
        builder: "FILE.py:function", FILE relative to benchmarks/.
        options: keyword arguments of the function, as JSON has them.
        device: where the step allocates, "cpu" or "cuda".
        steps: runs that are measured; the highest counts.
        warmup: runs before the level is read. What they leave behind (gradients, optimiser state) then counts as there.
        timeout: seconds until the child is ended.
    """
    task = {"builder": builder, "options": dict(options or {}), "device": device, "steps": steps, "warmup": warmup}
    command = [sys.executable, str(HERE / "memory.py"), json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Memory(note=f"not done after {timeout:g} s")
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Memory(**json.loads(line.removeprefix(MARK)))
    if done.returncode in (-9, 137):
        return Memory(note="out of memory")
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Memory(note=f"process ended with {done.returncode}: {last[:120]}")


def measure(step: Callable[[], object], *, device: str = "cpu", steps: int = 1) -> float:
    """Highest level in MiB that ``step`` reaches above the present one, in this process."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - level) / MIB
    # Memory that was freed but not given back would take in a part of the step unseen.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with _HighWater() as mark:
        for _ in range(steps):
            step()
    return mark.above / MIB


class _HighWater:
    """Bytes by which the process's resident memory rose above its level at the start."""

    above = 0

    def __enter__(self) -> _HighWater:
        self._exact = _reset_mark()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._level = self._highest = _resident()
        if not self._exact:
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._exact:
            self._highest = _status("VmHWM")
        else:
            self._done.set()
            self._sampler.join()
        self.above = max(0, self._highest - self._level)

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._highest = max(self._highest, _resident())


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        # Some sandboxes take the write and do nothing.
        return _status("VmHWM") - _status("VmRSS") < 4 * MIB
    except (OSError, LookupError):
        return False


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(name)


def _resident() -> int:
    try:
        return _status("VmRSS")
    except (OSError, LookupError):
        import resource

        # The whole process's highest so far is all that is known here; a rise above it is still seen.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child(task: dict[str, Any]) -> None:
    try:
        file, _, name = task["builder"].partition(":")
        spec = importlib.util.spec_from_file_location(Path(file).stem, HERE / file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        step = getattr(module, name)(**task["options"])
        for _ in range(task["warmup"]):
            step()
        found = Memory(measure(step, device=task["device"], steps=task["steps"]))
    except Exception as error:
        # Brings PyTorch with it, which a step need not have.
        from harness import failure

        found = Memory(note=failure(error))
    print(MARK + json.dumps(found._asdict()), flush=True)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
