"""Evaluate a finished run: python recipes/unimo2/eval.py --run DIR [--task NAME] [--split test] [--out DIR] ...

Prints one JSON; of a folder with a run for each seed, means and deviations. --task names what the run was fine-tuned
for, or one that a pre-trained run can do as it is (retrieval, image); `--run DIR --task NAME --help` lists that task's
flags. Without --task it is the run's own, retrieval for a pre-trained one.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from vlblocks.data import BadData, read_karpathy
from vlblocks.errors import UserError
from vlblocks.training import (
    compare_configs,
    default_mixed_precision,
    flag_value,
    json_text,
    parse,
    run_main,
    write_json_atomic,
)
from vlblocks_recipes.unimo2.corpus import EvalPairs, heldout_pairs, heldout_split
from vlblocks_recipes.unimo2.retrieval import Depth, evaluate_pairs
from vlblocks_recipes.unimo2.runs import (
    Weights,
    load_run,
    load_task,
    over_runs,
    read_settings,
    seed_folders,
    task_config,
)
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
    weights: Weights = "best"
    """best: those that the run ended with; last: those of its last checkpoint, also of a run that has not ended."""


@dataclass(frozen=True)
class RetrievalOptions:
    """Evaluate retrieval; the JSON holds R@1/5/10 and median rank in both directions."""

    run: Path = Path("runs/unimo2-tiny")
    """Folder of a finished run, pre-trained or fine-tuned."""
    task: Literal["retrieval"] = "retrieval"
    pairs: Path | None = None
    """Karpathy JSON; None: the pairs that the run held out."""
    images: Path | None = None
    """Folder of the JSON's images."""
    split: str | None = None
    """None: test, or what a pre-trained run without --pairs held out (its JSON's val, the generated corpus's test)."""
    weights: Weights = "best"
    """best: those that the run ended with; last: those of its last checkpoint, also of a run that has not ended."""
    rerank: Depth = 0
    """Candidates per query that the joint tower scores; "all": every pair, the original protocol; 0: none."""
    folds: int = 1
    """Parts of the gallery that are evaluated apart and averaged; 5 gives COCO's 1K figures on its 5K test images."""
    out: Path | None = None
    """Folder for retrieval.json and the scores of pairs, by which the same command continues when it was stopped."""

    def check(self) -> None:
        """Raises UserError for options that make no sense, naming the flag."""
        if (self.pairs is None) != (self.images is None):
            raise UserError("--pairs, --images: give both, or neither for the pairs that the run held out")
        if self.rerank != "all" and self.rerank < 0:
            raise UserError(f"--rerank: {self.rerank} is no number of candidates; give 0 or more, or all")
        if self.folds < 1:
            raise UserError(f"--folds: {self.folds} is no number of parts; give 1 or more")


def main() -> None:
    run = Path(flag_value("run", default="runs/unimo2-tiny"))
    helping = bool({"-h", "--help"} & set(sys.argv[1:]))
    seeds = seed_folders(run)
    first = seeds[0] if seeds else run
    trained_for = "pretrain" if helping and not run.exists() else read_settings(first).get("task", "pretrain")
    name = flag_value("task", default="retrieval" if trained_for == "pretrain" else trained_for, choices=TASKS)
    if name not in TASKS:
        raise UserError(f"--task {name}: there is no such task; choose one of {', '.join(TASKS)}")
    if helping and trained_for != name and name != "retrieval":
        options_of(name, run, replace(TASKS[name].Config(), task=name))
    found = [evaluated(name, folder, apart=bool(seeds)) for folder in seeds or [run]]
    if seeds:
        numbers = [int(folder.name.removeprefix("seed-")) for folder in seeds]
        print(json_text({"seeds": numbers, **over_runs(found)}))
    else:
        print(json_text(found[0]))


def evaluated(name: str, run: Path, *, apart: bool) -> dict[str, Any]:
    """One run's metrics; where there are several, each writes into a folder of its own under --out."""

    def place(out: Path | None) -> Path | None:
        return out / run.name if apart and out is not None else out

    if name == "retrieval":
        # Its protocol has settings of its own, and a pre-trained run's held-out pairs.
        chosen = parse(RetrievalOptions(), description=__doc__)
        return evaluate_retrieval(replace(chosen, run=run, out=place(chosen.out)))
    options, config = options_of(name, run, replace(task_config(run, name), task=name, out=None))
    config = replace(config, out=place(config.out))
    loaded = load_task(run, name, config, options.weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = loaded.net.to(device)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        metrics = loaded.task.evaluate(
            net, options.split, autocast=autocast_of(config.precision, device), out=config.out
        )
    return {"task": name, "split": options.split, **metrics, "skipped": loaded.task.bad.total}


def evaluate_retrieval(options: RetrievalOptions) -> dict[str, float | str]:
    """What `eval.py --task retrieval` prints, for a run that was pre-trained or fine-tuned.

    Raises:
        UserError: naming the flag or the file that is wrong.
    """
    options.check()
    trained_for = read_settings(options.run).get("task", "pretrain")
    own = options.pairs is None
    if own and trained_for not in ("pretrain", "retrieval"):
        raise UserError(
            f"--pairs, --images: not given, and --run {options.run} was trained for {trained_for}, without pairs of "
            "its own; name a Karpathy JSON and the folder of its images"
        )
    split = options.split or "test"
    if trained_for == "pretrain":
        config, model, tokenizer = load_run(options.run, options.weights)
        bad = BadData(share=config.data.max_bad_share)
        if own:
            split = options.split or heldout_split(config)
            gallery = heldout_pairs(config, bad, split)
        prepared = partial(
            EvalPairs, tokenizer=tokenizer, image_size=model.config.image_size, max_text=config.data.max_text
        )
    else:
        config, task, net, tokenizer = load_task(options.run, "retrieval", weights=options.weights)
        # Not plain pairs: a run that was trained blind must not see in an evaluation.
        model, bad, prepared = net.base, task.bad, task.pairs
        if own:
            gallery = task.gallery(split)
    if not own:
        gallery = read_karpathy(options.pairs, options.images, split=split, bad=bad).gallery(bad=bad)
    pairs = prepared(gallery)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = evaluate_pairs(
        model.to(device),
        pairs,
        depth=options.rerank,
        folds=options.folds,
        out=options.out,
        autocast=autocast_of(config.precision, device),
        precision=f"{device} {dtype_of(config.precision, device)}",
    )
    found = {"task": "retrieval", "split": split, **found, "skipped": bad.total}
    if options.out is not None:
        write_json_atomic(options.out / "retrieval.json", found)
    return found


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
    return Evaluation(found.run, found.split, found.weights), config


def autocast_of(precision: str, device: str) -> Autocast:
    """Mixed precision as a run's settings name it."""
    dtype = dtype_of(precision, device)
    return lambda: nullcontext() if dtype is None else torch.autocast(device, dtype)


def dtype_of(precision: str, device: str) -> torch.dtype | None:
    """What autocast computes in; None: there is none."""
    wanted = default_mixed_precision(device) if precision == "auto" else precision
    return {"bf16": torch.bfloat16, "fp16": torch.float16 if device == "cuda" else None}.get(wanted)


if __name__ == "__main__":
    run_main(main)
