"""Pre-train UNIMO-2, or fine-tune it: python recipes/unimo2/train.py [--preset NAME] [--out DIR] [--data.root DIR] ...

Without a data set it trains on an embedded, generated corpus. The same command continues a run that was stopped.
With --task NAME --init DIR it fine-tunes for a downstream task: `--task NAME --help` lists that task's flags.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.training import (
    RunLog,
    Schedule,
    Steps,
    adamw,
    barrier,
    config_from_dict,
    config_to_dict,
    flag_value,
    is_main,
    make_accelerator,
    parameter_groups,
    parse_config,
    prepare_folder,
    read_tensors,
    run_main,
    scale_rates,
    seed_everything,
    step_generator,
    write_json_atomic,
    write_tensors_atomic,
)
from vlblocks_recipes.unimo2.configs import PRESETS, ModelConfig, RunConfig
from vlblocks_recipes.unimo2.corpus import Corpus
from vlblocks_recipes.unimo2.finetune import finetune_main
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.objectives import STREAMS, curve_names
from vlblocks_recipes.unimo2.report import report
from vlblocks_recipes.unimo2.runs import base_tensors, load_parts, read_settings
from vlblocks_recipes.unimo2.tasks import TASKS

# What may differ between the sittings of one run without changing its result.
FREE_FIELDS = ("out", "restart", "checkpoint_every", "keep_checkpoints", "data.workers")
OUTPUTS = (
    "config.json", "tokenizer.json", "model.safetensors", "metrics.json", "history.jsonl", "curves.png",
    "grounding.png", "checkpoints", "tensorboard",
)  # fmt: skip


def main() -> None:
    task = flag_value("task", default="pretrain", choices=("pretrain", *TASKS))
    if task == "pretrain":
        pretrain()
    elif task in TASKS:
        finetune_main(task)
    else:
        raise UserError(f"--task {task}: there is no such task; choose one of pretrain, {', '.join(TASKS)}")


def pretrain() -> None:
    began = time.monotonic()
    config = settle(parse_config(starting_points(flag_value("init", default="")), description=__doc__))
    out = config.out
    accelerator = make_accelerator(config.precision)
    if prepare_folder(out, config, restart=config.restart, outputs=OUTPUTS, free=FREE_FIELDS):
        print(f"{out}: this run is finished; --restart begins it anew, another --out keeps both", flush=True)
        print(out)
        return
    seed_everything(config.seed)
    begun = (out / "config.json").exists()
    corpus = Corpus(config, resume=begun, rank=accelerator.process_index, world_size=accelerator.num_processes)
    model = Unimo2(replace(config.model, vocab=corpus.tokenizer.vocab_size))
    if config.init is not None:
        file = config.init / "model.safetensors" if config.init.is_dir() else config.init
        absent = load_parts(model, base_tensors(read_tensors(file)), file, needed=())
        if absent:
            accelerator.print(f"{file}: no weights for {', '.join(absent)}, which begin at random", flush=True)
    if is_main() and not begun:
        # Only now: a run that finds no data has not begun, and the corrected command shall not need --restart.
        write_json_atomic(out / "config.json", config_to_dict(config))
    model.to(accelerator.device)
    seed_everything(config.seed, rank=accelerator.process_index)
    seconds, skipped = train(config, accelerator, model, corpus, began)
    if is_main():
        gallery = corpus.gallery()
        extra = {"train/steps": config.max_steps, "train/skipped_steps": skipped, "data/skipped": corpus.bad.total}
        report(model, gallery, out, seconds, extra=extra, autocast=accelerator.autocast)
        print(out, flush=True)
    barrier()


def starting_points(init: str) -> dict[str, RunConfig]:
    """The presets, whose model is the one that the run of --init describes, if it names one."""
    folder = Path(init) if Path(init).is_dir() else Path(init).parent
    if not init or not (folder / "config.json").is_file():
        return PRESETS
    model = config_from_dict(ModelConfig, read_settings(folder, "--init")["model"], source=folder / "config.json")
    return {name: replace(preset, model=model) for name, preset in PRESETS.items()}


def settle(config: RunConfig) -> RunConfig:
    """Fill in what follows from other fields, and check the whole."""
    config = replace(config, out=config.out or Path("runs") / f"unimo2-{config.preset}")
    if not config.grounding:
        model = replace(config.model, grounding=replace(config.model.grounding, method="none"))
        config = replace(config, model=model)
    learning = {name.partition("/")[0] for name in curve_names(config)}
    if not learning:
        raise UserError(
            "--objective, --batch: there is nothing to learn; give an objective a weight and its stream a share"
        )
    # A stream without an objective would only cost time.
    idle = {name: 0 for name in STREAMS if name not in learning}
    config = replace(config, batch=replace(config.batch, **idle))
    config.check()
    return config


def train(
    config: RunConfig, accelerator: Accelerator, model: Unimo2, corpus: Corpus, began: float
) -> tuple[float, int]:
    """Run or continue; returns the seconds of all sittings, this one's since `began`, and the steps skipped."""
    before, start = 0.0, 0
    o, stateful = config.optim, {"streams": corpus.streams}
    groups = parameter_groups(model, weight_decay=o.weight_decay)
    groups = scale_rates(groups, o.lr, lambda name: o.temperature_lr if name.endswith("temperature") else 1.0)
    steps = Steps(
        model,
        adamw(groups, lr=o.lr, betas=o.betas, eps=o.eps),
        accelerator=accelerator,
        schedule=Schedule(kind=o.decay, total=config.max_steps, warmup=int(o.warmup * config.max_steps)),
        clip=o.clip,
        folder=config.out / "checkpoints",
        keep=config.keep_checkpoints,
    )
    saved = steps.resume(stateful)
    if saved is not None:
        start, before = saved.step, saved.state["seconds"]
        accelerator.print(f"{config.out}: continues at step {start} of {config.max_steps}")

    weights = config_to_dict(config.objective)
    model.train()
    with RunLog(config.out, total_steps=config.max_steps, objectives=curve_names(config), start_step=start) as log:
        for step in range(start + 1, config.max_steps + 1):
            steps.begin(step)
            values: dict[str, Tensor] = {}
            total: Tensor | float = 0.0
            for part in range(config.batch.accumulate):
                for stream, batch in next(corpus.streams).items():
                    generator = step_generator(config.seed, step, part, accelerator)
                    batch = {key: value.to(accelerator.device) for key, value in batch.items()}
                    with accelerator.autocast():
                        result = STREAMS[stream](model, batch, config.objective, generator)
                        loss = sum(weights[name] * value for name, value in result.losses.items())
                    accelerator.backward(loss / config.batch.accumulate)
                    total = total + loss.detach() / config.batch.accumulate
                    for side, picks in (("image", result.image_picks), ("text", result.text_picks)):
                        if picks is not None:
                            model.grounded.update(picks, side)
                    for name, value in result.losses.items():
                        key = f"{stream}/{name}"
                        values[key] = values.get(key, 0.0) + value.detach() / config.batch.accumulate
            norm = steps.take(step, total)
            log.step(step, {**values, "loss": total, "lr": steps.lr, "gradient_norm": norm})
            if step % config.checkpoint_every == 0 or step == config.max_steps:
                log.scalars(step, code_usage(model))
                log.flush()
                steps.save(step, {"seconds": before + time.monotonic() - began}, stateful)
    if is_main():
        write_tensors_atomic(config.out / "model.safetensors", model.state_dict())
    return before + time.monotonic() - began, steps.guard.skipped


def code_usage(model: Unimo2) -> dict[str, float]:
    """Codes in use and their perplexity by modality since the last call."""
    if model.config.grounding.method != "topk":
        return {}
    numbers = {}
    for side in ("image", "text"):
        usage = model.grounded.usage(side)
        numbers |= {f"codes/used_{side}": usage.used, f"codes/perplexity_{side}": usage.perplexity}
    model.grounded.reset_usage()
    return numbers


if __name__ == "__main__":
    run_main(main)
