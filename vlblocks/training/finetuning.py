"""Fine-tuning: evaluation on the way, the best weights kept, early stopping, layer-wise rates, frozen parts."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.training.distributed import barrier, broadcast_object, is_main
from vlblocks.training.files import read_tensors, write_tensors_atomic
from vlblocks.training.logging import RunLog
from vlblocks.training.loop import Stateful, Steps, step_generator

__all__ = ["Finetuned", "Plan", "Watch", "finetune", "freeze", "layer_scales"]

Batch = dict[str, Tensor]
Metrics = dict[str, "float | str"]

_LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<number>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a fine-tuning runs, and what it looks at on the way.

    Attributes:
        steps: optimiser steps.
        accumulate: batches whose gradients are summed before the optimiser moves.
        evaluate_every: steps from one evaluation and checkpoint to the next; the last step has one too.
        watch: metric by which the best weights are chosen: higher is better, or lower for one written "-NAME".
        patience: evaluations without a better one after which the run stops; None: it never does.
        seed: of each step's generator.
    """

    steps: int
    accumulate: int = 1
    evaluate_every: int
    watch: str
    patience: int | None = None
    seed: int = 1


class Finetuned(NamedTuple):
    """What a fine-tuning came to.

    Attributes:
        metrics: of the best weights.
        best_step: after which they were had.
        steps: optimiser steps taken, fewer than planned when it stopped early.
        seconds: of all sittings.
        skipped: steps whose loss or gradient was not finite.
    """

    metrics: Metrics
    best_step: int
    steps: int
    seconds: float
    skipped: int


class Watch:
    """The best evaluation so far; its state goes into checkpoints."""

    def __init__(self, metric: str) -> None:
        self.name, self.sign = metric.removeprefix("-"), -1.0 if metric.startswith("-") else 1.0
        self.step = 0
        self.since = 0
        self.metrics: Metrics = {}

    def see(self, step: int, metrics: Metrics) -> bool:
        """Take an evaluation; True when it is the best so far. The first counts as better than none, NaN as worst.

        Raises: UserError when it has no such number.
        """
        value = metrics.get(self.name)
        if not isinstance(value, (int, float)):
            numbers = ", ".join(name for name, number in metrics.items() if not isinstance(number, str))
            raise UserError(f"--watch {self.name}: the evaluation has no such number; choose one of {numbers}")
        best = self.metrics.get(self.name, math.nan)
        better = not self.metrics or (
            not math.isnan(value) and (math.isnan(float(best)) or self.sign * (value - float(best)) > 0)
        )
        self.since = 0 if better else self.since + 1
        if better:
            self.step, self.metrics = step, dict(metrics)
        return better

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "since": self.since, "metrics": dict(self.metrics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.since, self.metrics = int(state["step"]), int(state["since"]), dict(state["metrics"])


def finetune(
    model: nn.Module,
    steps: Steps,
    *,
    plan: Plan,
    out: Path,
    batches: Callable[[int], Iterator[Batch]],
    loss: Callable[[Batch, torch.Generator], Tensor],
    evaluate: Callable[[], Metrics],
    frozen: Sequence[nn.Module] = (),
    stateful: Mapping[str, Stateful] | None = None,
    check_first: bool = False,
    began: float | None = None,
) -> Finetuned:
    """Train or continue a run; leaves the best weights in `out`/model.safetensors and in `model`.

    Call it on every process. Evaluations run in the main one, and the others wait. Killed at any time, the same call
    continues from the last checkpoint, and on a CPU ends with the same bits.

    Args:
        model: in the device's memory, as is the optimiser in `steps`.
        batches: gives the training batches from a position on, without end.
        loss: of a batch; draws from the generator only, or from torch's own states.
        evaluate: metrics of the model as it is, in evaluation mode and without gradients.
        frozen: parts that stay in evaluation mode.
        stateful: what else each process puts into checkpoints.
        check_first: evaluate before the first step too, so that a wrong `plan.watch` is found at once.
        began: `time.monotonic()` at the start of this sitting, its preparations included.
    """
    began = time.monotonic() if began is None else began
    accelerator, watch, start, before = steps.accelerator, Watch(plan.watch), 0, 0.0
    stateful = dict(stateful or {})
    saved = steps.resume(stateful)
    if saved is not None:
        start, before = saved.step, saved.state["seconds"]
        watch.load_state_dict(saved.state["watch"])
        accelerator.print(f"{out}: continues at step {start} of {plan.steps}")

    def seconds() -> float:
        return before + time.monotonic() - began

    def look() -> Metrics:
        model.eval()
        with torch.no_grad():
            metrics = broadcast_object(evaluate() if is_main() else None)
        _train_mode(model, frozen)
        return metrics

    _train_mode(model, frozen)
    step = start
    with RunLog(out, total_steps=plan.steps, objectives=["loss"], start_step=start) as log:
        if check_first and not start:
            Watch(plan.watch).see(0, look())
        stream = batches(start * plan.accumulate)
        while step < plan.steps and not _patience_spent(watch, plan):
            step += 1
            steps.begin(step)
            total: Tensor | float = 0.0
            for part in range(plan.accumulate):
                batch = {key: value.to(accelerator.device) for key, value in next(stream).items()}
                with accelerator.autocast():
                    value = loss(batch, step_generator(plan.seed, step, part, accelerator))
                accelerator.backward(value / plan.accumulate)
                total = total + value.detach() / plan.accumulate
            norm = steps.take(step, total)
            log.step(step, {"loss": total, "lr": steps.lr, "gradient_norm": norm})
            if step % plan.evaluate_every == 0 or step == plan.steps:
                metrics = look()
                better = watch.see(step, metrics)
                numbers = {f"val/{name}": float(n) for name, n in metrics.items() if not isinstance(n, str)}
                log.scalars(step, numbers)
                log.note(f"  step {step}: {watch.name} {metrics[watch.name]:.4f}{' (best so far)' if better else ''}")
                if better and is_main():
                    write_tensors_atomic(_best(steps.folder, step), model.state_dict())
                steps.save(step, {"seconds": seconds(), "watch": watch.state_dict()}, stateful)
                if is_main():
                    _prune(steps.folder, watch.step)
    if is_main():
        best = read_tensors(_best(steps.folder, watch.step))
        model.load_state_dict(best)
        write_tensors_atomic(out / "model.safetensors", best)
    barrier()
    return Finetuned(watch.metrics, watch.step, step, seconds(), steps.guard.skipped)


def freeze(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Take the gradients off all parameters of some modules; returns the modules, for `finetune`."""
    modules = list(modules)
    for module in modules:
        module.requires_grad_(False)
    return modules


def layer_scales(model: nn.Module, *, stages: Sequence[Sequence[str]], decay: float) -> Callable[[str], float]:
    """Layer-wise learning-rate decay (Clark et al., 2020): the factor of a parameter, by its name.

    A parameter n layers below the top has `decay` to the n. Counted from the bottom: embeddings, and whatever a stage
    has outside its layers, are the lowest of their stage; then its layers in order; a norm after the layers goes with
    the last. A stage without layers counts as one.

    Args:
        stages: from bottom to top, the prefixes of modules side by side (("image", "text"), ("joint",)); a name
            belongs to the first stage that it fits. Towers of one stage with fewer layers end with the others.
            Parameters of no stage, such as a new head's, have 1.

    Raises: UserError for a decay outside (0, 1].
    """
    if not 0.0 < decay <= 1.0:
        raise UserError(f"layer decay {decay}: give a number above 0, up to 1")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    layers: dict[str, int] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers[match["stack"]] = max(layers.get(match["stack"], 0), int(match["number"]) + 1)

    def inside(name: str, prefixes: Sequence[str]) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)

    depths: dict[str, int] = {}
    top, left = 0, names
    for prefixes in stages:
        here, left = [n for n in left if inside(n, prefixes)], [n for n in left if not inside(n, prefixes)]
        stacks = {match["stack"] for name in here if (match := _LAYER.match(name))}
        height = max((layers[stack] for stack in stacks), default=0)
        for name in here:
            if match := _LAYER.match(name):
                depths[name] = top + 1 + height - layers[match["stack"]] + int(match["number"])
            else:
                after = any(name.startswith(f"{stack.removesuffix('layers')}norm.") for stack in stacks)
                depths[name] = top + height if after else top
        top += 1 + height
    return lambda name: decay ** (top - depths.get(name, top))


def _train_mode(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    model.train()
    for module in frozen:
        module.eval()


def _patience_spent(watch: Watch, plan: Plan) -> bool:
    return plan.patience is not None and watch.since >= plan.patience


def _best(folder: Path, step: int) -> Path:
    # Named by its step: a run killed before the checkpoint that speaks of it still has the one before.
    return folder / f"best-{step:08d}.safetensors"


def _prune(folder: Path, step: int) -> None:
    for path in folder.glob("best-*.safetensors"):
        if path != _best(folder, step):
            path.unlink()
