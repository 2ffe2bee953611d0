"""What every training loop does alike: start the machine, ready the folder, take a step, save and resume."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
)
from vlblocks.training.config import require_same_config
from vlblocks.training.distributed import barrier, is_main
from vlblocks.training.files import read_json
from vlblocks.training.gradients import average_gradients
from vlblocks.training.guard import NonFiniteGuard
from vlblocks.training.precision import default_mixed_precision
from vlblocks.training.random_state import set_rng_state
from vlblocks.training.schedule import Schedule, set_lr

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Stateful", "Steps", "make_accelerator", "prepare_folder", "step_generator"]


# The main process evaluates while the others wait in a collective call, for longer than NCCL's 10 minutes on COCO. One
# that died does not keep them waiting, since torchrun ends them all.
_PATIENCE = timedelta(days=1)


class Stateful(Protocol):
    """What goes into a checkpoint and comes back."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> None: ...


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's Accelerator for "auto", "fp32", "bf16" or "fp16"; on a CPU, torch is made deterministic.

    Raises: UserError for fp16 on a CPU.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    mixed = None if precision == "auto" else {"fp32": "no"}.get(precision, precision)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and mixed == "fp16":
        raise UserError("--precision fp16: needs a GPU; choose auto, bf16 or fp32")
    # Told that it is a CPU, accelerate makes torchrun's processes one group; otherwise each would train on its own.
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision=mixed or default_mixed_precision(kind),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if accelerator.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # It only helps to find reads of memory that nothing wrote, at a tenth of the time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return accelerator


def prepare_folder(
    out: Path, config: Any, *, restart: bool, outputs: Collection[str], free: Collection[str] = ()
) -> bool:
    """Make `out` ready to begin a run or to resume it; True when the run in it is finished (it has metrics.json).

    Call it on every process. A run has begun when config.json is there.

    Args:
        config: the run's configuration, or what `config_to_dict` made of it.
        restart: delete `outputs`, the names that a run leaves, first.
        free: fields that may differ between the sittings of one run.

    Raises: UserError when it cannot be made, or holds a run of another configuration.
    """
    finished = False
    if is_main():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
        if restart:
            for name in outputs:
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if (out / "config.json").exists():
            source = out / "config.json"
            require_same_config(read_json(source), config, source=source, ignore=free)
            finished = (out / "metrics.json").exists()
    barrier()
    return finished or (not is_main() and (out / "metrics.json").exists())


def step_generator(seed: int, step: int, part: int, accelerator: Accelerator) -> torch.Generator:
    """Draws of one step depend on its number alone, so a resumed run repeats them."""
    generator = torch.Generator(device=accelerator.device)
    mixed = ((seed * 1_000_003 + step) * 1009 + part) * 1009 + accelerator.process_index
    return generator.manual_seed(mixed % (1 << 63))


class Steps:
    """The optimiser's steps of one run, and its checkpoints.

    Args:
        model: whose weights are saved.
        groups: an optimiser over its parameters.
        clip: largest gradient norm.
        folder: of the checkpoints.
        keep: how many of them stay.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accelerator: Accelerator,
        schedule: Schedule,
        clip: float,
        folder: Path,
        keep: int,
    ) -> None:
        self.model, self.accelerator, self.schedule = model, accelerator, schedule
        self.optimizer = accelerator.prepare(optimizer)
        self.clip, self.folder, self.keep = clip, folder, keep
        self.guard = NonFiniteGuard()

    def resume(self, stateful: Mapping[str, Stateful]) -> Checkpoint | None:
        """Go back to the last checkpoint, if there is one; `stateful` are this process's other states by name."""
        found = latest_checkpoint(self.folder)
        if found is None:
            return None
        saved = load_checkpoint(found)
        load_weights(self.model, saved.model, source=found / "model.safetensors")
        load_optimizer(self.optimizer.optimizer, saved.optimizer or {}, source=found / "optimizer.safetensors")
        own = saved.of_rank(self.accelerator.process_index, self.accelerator.num_processes)
        for name, value in stateful.items():
            value.load_state_dict(own[name])
        self.guard.load_state_dict(saved.state["guard"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        set_rng_state(own["rng"])
        return saved

    def begin(self, step: int) -> None:
        """Set the learning rates of a step, which count from 1."""
        set_lr(self.optimizer.optimizer, self.schedule(step - 1))

    def take(self, step: int, loss: Tensor | float) -> Tensor:
        """Average, clip and apply the gradients, unless they or the loss are not finite; returns their norm."""
        average_gradients(self.model.parameters())
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        # Under fp16 the scaler lowers its scale and skips the step itself when a gradient overflows.
        watched = {"loss": loss} if self.accelerator.scaler is not None else {"loss": loss, "gradient": norm}
        if self.guard.check(step, **watched):
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()
        return norm

    @property
    def lr(self) -> float:
        """Of the first group."""
        return self.optimizer.param_groups[0]["lr"]

    def save(self, step: int, state: Mapping[str, Any], stateful: Mapping[str, Stateful]) -> None:
        """Write a checkpoint; call it on every process."""
        own: dict[str, Any] = {"guard": self.guard.state_dict()}
        if self.accelerator.scaler is not None:
            own["scaler"] = self.accelerator.scaler.state_dict()
        save_checkpoint(
            self.folder,
            step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.optimizer,
            state={**own, **state},
            rank_state={name: value.state_dict() for name, value in stateful.items()},
            keep=self.keep,
        )
