"""Fine-tuning for a downstream task: what `train.py --task NAME` does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from vlblocks.data import BadData, EpochBatches, SceneCorpus, Tokenizer, train_tokenizer
from vlblocks.errors import UserError
from vlblocks.evaluation import plot_curves
from vlblocks.training import (
    Plan,
    Schedule,
    Steps,
    adamw,
    barrier,
    finetune,
    freeze,
    is_main,
    layer_scales,
    make_accelerator,
    parameter_groups,
    parse,
    prepare_folder,
    read_history,
    read_json,
    scale_rates,
    seed_everything,
    write_json_atomic,
)

from .configs import PRESETS
from .model import Unimo2
from .runs import load_parts, over_runs, run_settings, start_from
from .tasks import TASKS
from .tasks.base import CODES, Task, TaskConfig, TaskModel

FREE_FIELDS = ("out", "restart", "keep_checkpoints", "data.workers", "model")
OUTPUTS = (
    "config.json", "task.json", "tokenizer.json", "model.safetensors", "metrics.json", "history.jsonl", "curves.png",
    "checkpoints", "tensorboard", "predictions",
)  # fmt: skip
# From bottom to top, for layer-wise decay; the last takes the poolers and what else is left of the base model.
STAGES = (("base.image", "base.text"), tuple(f"base.{name}" for name in CODES), ("base.joint",), ("base",))


def finetune_main(name: str) -> None:
    """Parse the flags of a task, train, and print the run's folder last."""
    config = settle(parse(replace(TASKS[name].Config(), task=name), description=TASKS[name].__doc__), name)
    accelerator = make_accelerator(config.precision)
    if not config.seeds:
        finetune_run(config, accelerator)
    else:
        for seed in config.seeds:
            finetune_run(replace(config, seed=seed, seeds=(), out=config.out / f"seed-{seed}"), accelerator)
        if is_main():
            write_json_atomic(config.out / "metrics.json", over_seeds(config))
    if is_main():
        print(config.out, flush=True)
    barrier()


def settle(config: TaskConfig, name: str) -> TaskConfig:
    """Fill in what follows from other fields, and check the whole.

    Raises:
        UserError: naming the field that makes no sense.
    """
    for field, least in (("batch", 1), ("accumulate", 1), ("seed", 0), ("keep_checkpoints", 1)):
        if getattr(config, field) < least:
            raise UserError(f"--{field.replace('_', '-')}: {getattr(config, field)} is less than {least}")
    for field in ("max_steps", "evaluate_every", "patience", "image_size"):
        if getattr(config, field) is not None and getattr(config, field) < 1:
            raise UserError(f"--{field.replace('_', '-')}: {getattr(config, field)} is less than 1")
    if config.max_steps is None and not config.epochs > 0:
        raise UserError(f"--epochs: {config.epochs} is not positive; give a number above 0, or --max-steps")
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise UserError(f"--dropout: {config.dropout} is no share; give a number from 0 to below 1")
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"--layer-decay: {config.layer_decay} must lie above 0, up to 1; 1 is no decay")
    if len(set(config.seeds)) != len(config.seeds) or min(config.seeds, default=0) < 0:
        raise UserError(f"--seeds: {config.seeds} are not different numbers from 0 on")
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset}: there is none of that name; choose one of {', '.join(PRESETS)}")
    return replace(config, task=name, out=config.out or Path("runs") / f"unimo2-{name}")


def finetune_run(config: TaskConfig, accelerator: Accelerator) -> None:
    """One run in config.out: begin it, continue it, or say that it is finished."""
    began, out = time.monotonic(), config.out
    if prepare_folder(out, config, restart=config.restart, outputs=OUTPUTS, free=FREE_FIELDS):
        if is_main():
            print(f"{out}: this run is finished; --restart begins it anew, another --out keeps both", flush=True)
        return
    seed_everything(config.seed)
    begun = (out / "config.json").exists()
    preset = PRESETS[config.preset]

    def own_tokenizer() -> Tokenizer:
        return Tokenizer.load(out / "tokenizer.json") if begun else scene_tokenizer(config, preset.data.vocab)

    start = start_from(config, scratch=preset, own_tokenizer=own_tokenizer)
    bad = BadData(share=config.data.max_bad_share)
    task = TASKS[config.task](config, start.tokenizer, start.model.image_size, bad)
    if begun:
        task.adopt(read_json(out / "task.json"), out / "task.json")
    facts, examples = task.facts(), task.dataset("train")
    # Read now, so that a mistake in it is not found after the first epoch.
    task.dataset("val")
    keys = EpochBatches(
        len(examples),
        config.batch,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        name=f"{config.task} training data",
        lengths=task.lengths(),
    )
    base = Unimo2(start.model)
    absent = () if start.tensors is None else load_parts(base, start.tensors, start.file, needed=())
    net = TaskModel(base, task.make_head(base))
    if is_main():
        if config.init is None:
            print(f"{out}: no --init, so the model of preset {config.preset} is trained from scratch", flush=True)
        for part in absent:
            print(f"{start.file}: has no weights of {part}, which starts at random", flush=True)
        if config.data.embedded and start.scenes not in (None, config.data.scenes):
            print(
                f"--data.scenes {config.data.scenes}: {start.file} was pre-trained on {start.scenes}, and may here be "
                f"evaluated on some of them; --data.scenes {start.scenes} tells them apart",
                flush=True,
            )
    if is_main() and not begun:
        # Only now: a run that finds no data has not begun, and the corrected command shall not need --restart.
        start.tokenizer.save(out / "tokenizer.json")
        write_json_atomic(out / "task.json", {"task": config.task, **facts})
        write_json_atomic(out / "config.json", run_settings(config, start.model))
    barrier()
    net.to(accelerator.device)
    seed_everything(config.seed, rank=accelerator.process_index)
    metrics = train_task(config, accelerator, net, task, examples, keys, began)
    if is_main():
        history = read_history(out / "history.jsonl")
        curves = {name: list(zip(*history[name], strict=True)) for name in history if name != "lr"}
        plot_curves(curves, out / "curves.png", title=f"{out.name}: {config.task}")
        write_json_atomic(out / "metrics.json", metrics)
    barrier()


def train_task(
    config: TaskConfig,
    accelerator: Accelerator,
    net: TaskModel,
    task: Task,
    examples: Any,
    keys: EpochBatches,
    began: float,
) -> dict[str, float | str]:
    """Train or continue; returns what metrics.json holds."""
    epoch = len(examples) / (config.batch * config.accumulate * accelerator.num_processes)
    total = config.max_steps or max(1, round(config.epochs * epoch))
    frozen = freeze(task.frozen(net))
    o = config.optim
    rates = layer_scales(net, stages=STAGES, decay=config.layer_decay)
    groups = scale_rates(
        parameter_groups(net, weight_decay=o.weight_decay),
        o.lr,
        lambda name: rates(name) * (o.temperature_lr if name.endswith("temperature") else 1.0),
    )
    if not groups:
        raise UserError("--freeze: leaves nothing to train; freeze less")
    steps = Steps(
        net,
        adamw(groups, lr=o.lr, betas=o.betas, eps=o.eps),
        accelerator=accelerator,
        schedule=Schedule(
            kind=o.decay,
            total=total,
            warmup=int(o.warmup * total),
            milestones=tuple(round(milestone * epoch) for milestone in o.milestones),
            gamma=o.gamma,
        ),
        clip=o.clip,
        folder=config.out / "checkpoints",
        keep=config.keep_checkpoints,
    )

    def batches(position: int) -> Iterator[dict[str, Tensor]]:
        keys.start = position
        loader = DataLoader(
            examples,
            batch_sampler=keys,
            collate_fn=task.batch,
            num_workers=config.data.workers,
            # Its own, or else every start of the loader would draw from torch's global state and resuming would show.
            generator=Generator(),
        )
        for batch in loader:
            for skipped in batch.pop("skipped"):
                task.bad.record(skipped)
            yield batch

    done = finetune(
        net,
        steps,
        plan=Plan(
            steps=total,
            accumulate=config.accumulate,
            evaluate_every=config.evaluate_every or max(1, round(epoch)),
            watch=config.watch or task.watch,
            patience=config.patience,
            seed=config.seed,
        ),
        out=config.out,
        batches=batches,
        loss=lambda batch, generator: task.loss(net, batch, generator),
        evaluate=lambda: task.evaluate(net, "val", autocast=accelerator.autocast, out=None),
        frozen=frozen,
        stateful={"bad": task.bad},
        check_first=config.watch is not None,
        began=began,
    )
    return {
        **{f"val/{name}": value for name, value in done.metrics.items()},
        "train/steps": done.steps,
        "train/best_step": done.best_step,
        "train/skipped_steps": done.skipped,
        "data/skipped": task.bad.total,
        "time/total_s": done.seconds,
    }


def scene_tokenizer(config: TaskConfig, vocab: int) -> Tokenizer:
    """A tokenizer trained on the generated corpus's captions, for a run from scratch.

    Raises:
        UserError: the data is not the generated corpus, and no tokenizer is named.
    """
    if not config.data.embedded:
        raise UserError("--tokenizer: a run without --init on files needs one; name a tokenizer.json or BPE folder")
    corpus = SceneCorpus(pairs=config.data.scenes)
    captions = [caption for written in corpus.pairs.captions for caption in written]
    return train_tokenizer(captions + corpus.texts, vocab, lowercase=True)


def over_seeds(config: TaskConfig) -> dict[str, Any]:
    """Mean and deviation of what the seeds' runs came to."""
    runs = [read_json(config.out / f"seed-{seed}" / "metrics.json") for seed in config.seeds]
    return {"seeds": list(config.seeds), **over_runs(runs)}
