"""Evaluate a finished run: python recipes/unimo2/eval.py --run DIR [--task NAME] [--split test] [--out DIR] ...

Prints one JSON. --task names what the run was fine-tuned for, or one that a pre-trained run can do as it is (retrieval,
image); `--run DIR --task NAME --help` lists that task's flags. Without --task it is the run's own, retrieval for a
pre-trained one.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlblocks.errors import UserError
from vlblocks.training import compare_configs, default_mixed_precision, flag_value, parse, run_main
from vlblocks_recipes.unimo2.retrieval import RetrievalOptions, evaluate_retrieval
from vlblocks_recipes.unimo2.runs import load_task, read_settings, task_config
from vlblocks_recipes.unimo2.tasks import TASKS
from vlblocks_recipes.unimo2.tasks.base import Autocast, TaskConfig

# Of the settings of every task, those that matter once it is trained.
USED = ("run", "split", "task", "out", "precision", "blind", "data")


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate."""

    run: Path = Path("runs/unimo2-tiny")
    """Folder of a finished run."""
    split: Literal["train", "val", "test"] = "test"


def main() -> None:
    run = Path(flag_value("run", default="runs/unimo2-tiny"))
    helping = bool({"-h", "--help"} & set(sys.argv[1:]))
    trained_for = "pretrain" if helping and not run.exists() else read_settings(run).get("task", "pretrain")
    name = flag_value("task", default="retrieval" if trained_for == "pretrain" else trained_for, choices=TASKS)
    if name not in TASKS:
        raise UserError(f"--task {name}: there is no such task; choose one of {', '.join(TASKS)}")
    if name == "retrieval":
        # Its protocol has settings of its own, and a pre-trained run's held-out pairs.
        print(json.dumps(evaluate_retrieval(parse(RetrievalOptions(), description=__doc__)), indent=2))
        return
    own = TASKS[name].Config() if helping and trained_for != name else task_config(run, name)
    options, config = options_of(name, run, replace(own, task=name, out=None))
    loaded = load_task(run, name, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = loaded.net.to(device)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        metrics = loaded.task.evaluate(
            net, options.split, autocast=autocast_of(config.precision, device), out=config.out
        )
    print(json.dumps({"task": name, "split": options.split, **metrics, "skipped": loaded.task.bad.total}, indent=2))


def options_of(name: str, run: Path, own: TaskConfig) -> tuple[Evaluation, TaskConfig]:
    """What the command line sets: what to evaluate, and the task's settings changed from the run's own.

    Raises:
        UserError: a flag that only a training heeds.
    """
    kind = type(own)
    both = make_dataclass(f"Evaluate{kind.__name__}", [], bases=(Evaluation, kind), frozen=True)
    values = {field.name: getattr(own, field.name) for field in fields(kind)}
    found: Any = parse(both(run=run, **values), description=__doc__)
    config = kind(**{name: getattr(found, name) for name in values})
    ours = {field.name for field in fields(kind)} - {field.name for field in fields(TaskConfig)}
    idle = compare_configs(own, config, ignore=(*USED, *ours))
    if idle:
        flag = idle[0].replace("_", "-")
        raise UserError(f"--{flag}: changes nothing in an evaluation of {name}; leave it out")
    return Evaluation(found.run, found.split), config


def autocast_of(precision: str, device: str) -> Autocast:
    """Mixed precision as a run's settings name it."""
    wanted = default_mixed_precision(device) if precision == "auto" else precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16 if device == "cuda" else None}.get(wanted)
    return lambda: nullcontext() if dtype is None else torch.autocast(device, dtype)


if __name__ == "__main__":
    run_main(main)
