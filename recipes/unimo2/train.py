"""Pre-train UNIMO-2: python recipes/unimo2/train.py [--preset NAME] [--out DIR] [--data.root DIR] ...

Without a data set it trains on an embedded, generated corpus. The same command continues a run that was stopped.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.training import (
    NonFiniteGuard,
    RunLog,
    Schedule,
    adamw,
    average_gradients,
    barrier,
    config_to_dict,
    default_mixed_precision,
    is_main,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_weights,
    parameter_groups,
    parse_config,
    read_json,
    read_tensors,
    require_same_config,
    run_main,
    save_checkpoint,
    seed_everything,
    set_lr,
    set_rng_state,
    write_json_atomic,
    write_tensors_atomic,
)
from vlblocks_recipes.unimo2.configs import PRESETS, OptimConfig, RunConfig
from vlblocks_recipes.unimo2.corpus import Corpus
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.objectives import STREAMS, curve_names
from vlblocks_recipes.unimo2.report import report

# What may differ between the sittings of one run without changing its result.
FREE_FIELDS = ("out", "restart", "checkpoint_every", "keep_checkpoints", "data.workers")
OUTPUTS = (
    "config.json", "tokenizer.json", "model.safetensors", "metrics.json", "history.jsonl", "curves.png",
    "grounding.png", "checkpoints", "tensorboard",
)  # fmt: skip


def main() -> None:
    began = time.monotonic()
    config = settle(parse_config(PRESETS, description=__doc__))
    out = config.out
    precision = None if config.precision == "auto" else {"fp32": "no"}.get(config.precision, config.precision)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and precision == "fp16":
        raise UserError("--precision fp16: needs a GPU; choose auto, bf16 or fp32")
    # Told that it is a CPU, accelerate makes torchrun's processes one group; otherwise each would train on its own.
    accelerator = Accelerator(cpu=kind == "cpu", mixed_precision=precision or default_mixed_precision(kind))
    if accelerator.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # It only helps to find reads of memory that nothing wrote, at a tenth of the time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if prepare_folder(config, out):
        print(f"{out}: this run is finished; --restart begins it anew, another --out keeps both", flush=True)
        print(out)
        return
    seed_everything(config.seed)
    begun = (out / "config.json").exists()
    corpus = Corpus(config, resume=begun, rank=accelerator.process_index, world_size=accelerator.num_processes)
    model = Unimo2(replace(config.model, vocab=corpus.tokenizer.vocab_size))
    if config.init is not None:
        file = config.init / "model.safetensors" if config.init.is_dir() else config.init
        load_weights(model, read_tensors(file), source=file)
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


def prepare_folder(config: RunConfig, out: Path) -> bool:
    """Make `out` ready to begin or to resume; True when the run in it is finished."""
    finished = False
    if is_main():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
        if config.restart:
            for name in OUTPUTS:
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if (out / "config.json").exists():
            source = out / "config.json"
            require_same_config(read_json(source), config, source=source, ignore=FREE_FIELDS)
            finished = (out / "metrics.json").exists()
    barrier()
    return finished or (not is_main() and (out / "metrics.json").exists())


def train(
    config: RunConfig, accelerator: Accelerator, model: Unimo2, corpus: Corpus, began: float
) -> tuple[float, int]:
    """Run or continue; returns the seconds of all sittings, this one's since `began`, and the steps skipped."""
    before, start = 0.0, 0
    o, checkpoints = config.optim, config.out / "checkpoints"
    optimizer = accelerator.prepare(adamw(optimizer_groups(model, o), lr=o.lr, betas=o.betas, eps=o.eps))
    schedule = Schedule(kind=o.decay, total=config.max_steps, warmup=int(o.warmup * config.max_steps))
    guard = NonFiniteGuard()
    found = latest_checkpoint(checkpoints)
    if found is not None:
        saved = load_checkpoint(found)
        load_weights(model, saved.model, source=found / "model.safetensors")
        load_optimizer(optimizer.optimizer, saved.optimizer, source=found / "optimizer.safetensors")
        own = saved.of_rank(accelerator.process_index, accelerator.num_processes)
        corpus.streams.load_state_dict(own["streams"])
        guard.load_state_dict(saved.state["guard"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved.state["scaler"])
        set_rng_state(own["rng"])
        start, before = saved.step, saved.state["seconds"]
        accelerator.print(f"{config.out}: continues at step {start} of {config.max_steps}")

    weights = config_to_dict(config.objective)
    model.train()
    with RunLog(config.out, total_steps=config.max_steps, objectives=curve_names(config), start_step=start) as log:
        for step in range(start + 1, config.max_steps + 1):
            set_lr(optimizer.optimizer, schedule(step - 1))
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
            average_gradients(model.parameters())
            accelerator.unscale_gradients(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
            # Under fp16 the scaler lowers its scale and skips the step itself when a gradient overflows.
            watched = {"loss": total} if accelerator.scaler is not None else {"loss": total, "gradient": norm}
            if guard.check(step, **watched):
                optimizer.step()
            elif accelerator.scaler is not None:
                accelerator.scaler.update()
            optimizer.zero_grad()
            log.step(step, {**values, "loss": total, "lr": optimizer.param_groups[0]["lr"], "gradient_norm": norm})
            if step % config.checkpoint_every == 0 or step == config.max_steps:
                log.scalars(step, code_usage(model))
                log.flush()
                seconds = before + time.monotonic() - began
                state = {"guard": guard.state_dict(), "seconds": seconds}
                if accelerator.scaler is not None:
                    state["scaler"] = accelerator.scaler.state_dict()
                save_checkpoint(
                    checkpoints,
                    step,
                    model=model.state_dict(),
                    optimizer=optimizer.optimizer,
                    state=state,
                    rank_state={"streams": corpus.streams.state_dict()},
                    keep=config.keep_checkpoints,
                )
    if is_main():
        write_tensors_atomic(config.out / "model.safetensors", model.state_dict())
    return before + time.monotonic() - began, guard.skipped


def optimizer_groups(model: Unimo2, optim: OptimConfig) -> list[dict[str, Any]]:
    """Parameters with and without decay, and the temperatures apart if their learning rate is another."""
    groups = parameter_groups(model, weight_decay=optim.weight_decay)
    if optim.temperature_lr == 1:
        return groups
    plain = groups.pop()
    parts: tuple[list, list] = ([], [])
    for name, parameter in zip(plain["names"], plain["params"], strict=True):
        parts[name.endswith("temperature")].append((name, parameter))
    for part, rate in zip(parts, (optim.lr, optim.lr * optim.temperature_lr), strict=True):
        names, parameters = zip(*part, strict=True)
        groups.append({**plain, "names": list(names), "params": list(parameters), "lr": rate})
    return groups


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


def step_generator(seed: int, step: int, part: int, accelerator: Accelerator) -> torch.Generator:
    """Draws of one step depend on its number alone, so a resumed run repeats them."""
    generator = torch.Generator(device=accelerator.device)
    mixed = ((seed * 1_000_003 + step) * 1009 + part) * 1009 + accelerator.process_index
    return generator.manual_seed(mixed % (1 << 63))


if __name__ == "__main__":
    run_main(main)
