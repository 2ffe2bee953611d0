"""A run's record: console lines and progress, TensorBoard, and a history from which curves are drawn."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from vlblocks.errors import UserError
from vlblocks.training.distributed import is_main
from vlblocks.training.files import disk_full_as_user_error, write_atomic

__all__ = ["RunLog", "read_history"]

History = dict[str, tuple[list[int], list[float]]]  # name -> steps, values


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # The line that a killed process was writing.
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield {name: math.nan if value is None else value for name, value in row.items()}


def read_history(path: str | os.PathLike[str]) -> History:
    """The curves in a run's `history.jsonl`: for each name its steps and values; empty when there is no file."""
    history: History = {}
    for row in _rows(Path(path)):
        for name, value in row.items():
            if name != "step":
                steps, values = history.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return history


class RunLog:
    """Records a run in `folder`, in the main process only; every call on other ranks returns at once.

    - `history.jsonl`: one line of numbers per step. A resume cuts it back to `start_step`, so that curves show each
      step once, whatever was lost or done twice.
    - `tensorboard/`: the same numbers, purged likewise.
    - the console: a progress bar on a terminal, and in any case, about `lines` times per run, the progress and one
      line per objective with its mean since the last time.

    Steps count from 1: `step(n, ...)` follows the n'th optimiser step. Tensors are read when lines are due, so a GPU
    is not made to wait at each step. Call `flush()` before saving a checkpoint.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        objectives: Iterable[str] = (),
        start_step: int = 0,
        lines: int = 20,
        stream: TextIO | None = None,
    ) -> None:
        self.main = is_main()
        self.folder = Path(folder)
        self.total_steps = total_steps
        self.objectives = list(objectives)
        self.stream = stream if stream is not None else sys.stdout
        self._every = max(1, total_steps // max(1, lines))
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []
        self._sums: dict[str, tuple[float, int]] = {}
        self._started, self._start_step = time.monotonic(), start_step
        if not self.main:
            return
        # Slow to import, and needed only where something is written.
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "history.jsonl"
        kept = [row for row in _rows(path) if row["step"] <= start_step]
        write_atomic(path, lambda temporary: temporary.write_text("".join(map(_line, kept)), encoding="utf-8"))
        self._history = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed by close())
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        bar = self.stream.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, disable=not bar, file=self.stream, dynamic_ncols=True)

    def step(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Record the numbers of one optimiser step."""
        if not self.main:
            return
        self._pending.append((step, {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}))
        self._bar.update(1)
        if step % self._every == 0 or step >= self.total_steps:
            self.flush()
            self._print_progress(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers that are not of each step, such as an evaluation's."""
        if not self.main:
            return
        self.flush()
        with self._disk():
            self._write(step, {name: float(value) for name, value in values.items()})

    def note(self, message: str) -> None:
        """Print one line, above the bar where there is one."""
        if not self.main:
            return
        if self._bar.disable:
            print(message, file=self.stream, flush=True)
        else:
            tqdm.write(message, file=self.stream)

    def flush(self) -> None:
        """Write down all steps so far, onto the disk.

        Raises: UserError naming the folder when the disk is full.
        """
        if not self.main:
            return
        with self._disk():
            for step, values in self._pending:
                numbers = {name: float(value) for name, value in values.items()}
                self._write(step, numbers)
                for name, number in numbers.items():
                    total, count = self._sums.get(name, (0.0, 0))
                    self._sums[name] = (total + number, count + 1)
            self._pending.clear()
            self._history.flush()
            os.fsync(self._history.fileno())
            self._board.flush()

    def history(self) -> History:
        """Every curve so far, those of earlier sittings included; empty on other ranks than the main one."""
        if not self.main:
            return {}
        self.flush()
        return read_history(self.folder / "history.jsonl")

    def close(self) -> None:
        """Write down what is left and close the files."""
        if not self.main or self._history.closed:
            return
        with self._disk():
            try:
                self.flush()
            finally:
                self._bar.close()
                self._history.close()
                self._board.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (OSError, UserError):
            # A full disk is usually why we are here: the first error says it better.
            if error is None:
                raise

    def _disk(self) -> AbstractContextManager[None]:
        return disk_full_as_user_error(self.folder, "the last checkpoint is kept")

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._history.write(_line({"step": step, **numbers}))
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)

    def _print_progress(self, step: int) -> None:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        pace = (step - self._start_step) / max(time.monotonic() - self._started, 1e-9)
        left = int((self.total_steps - step) / max(pace, 1e-9))
        done = round(24 * step / max(1, self.total_steps))
        bar = "" if not self._bar.disable else f"[{'#' * done}{'.' * (24 - done)}] "
        self.note(f"{bar}step {step}/{self.total_steps}  {pace:.2f} steps/s  {left // 60}:{left % 60:02d} left")
        width = max((len(name) for name in self.objectives), default=0)
        for name in self.objectives:
            if name in means:
                self.note(f"  {name:<{width}}  {means[name]:.4f}")


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no word for a number that is not finite.
    plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(plain) + "\n"
