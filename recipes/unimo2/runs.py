"""What lies in a run's folder, pre-trained, fine-tuned or converted: its configuration, tokenizer, weights and task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from vlblocks.data import BadData, Tokenizer
from vlblocks.errors import UserError
from vlblocks.nn import PatchEmbed, interpolate_positions
from vlblocks.training import (
    config_from_dict,
    config_to_dict,
    latest_checkpoint,
    load_weights,
    read_json,
    read_tensors,
)

from .configs import ModelConfig, RunConfig
from .corpus import load_tokenizer
from .model import Unimo2
from .tasks import TASKS
from .tasks.base import Task, TaskConfig, TaskModel

Weights = Literal["best", "last"]

# Heads that only pre-training reads.
PRETRAINING_HEADS = ("masked_token", "masked_code")


class Start(NamedTuple):
    """What a fine-tuning starts from.

    Attributes:
        model: the configuration, of the image size and dropout asked for.
        tokenizer: the checkpoint's.
        tensors: weights of the base model by name; None: none, it starts at random.
        file: that they are from.
        scenes: how many of the generated corpus they were pre-trained on; None: that is not known.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor] | None
    file: Path | None = None
    scenes: int | None = None


class TaskRun(NamedTuple):
    """A run to evaluate or to use: its task, ready, and the model in evaluation mode."""

    config: TaskConfig
    task: Task
    net: TaskModel
    tokenizer: Tokenizer


class BaseRun(NamedTuple):
    """A run's model without its task."""

    model: Unimo2
    tokenizer: Tokenizer
    max_text: int


def load_run(folder: Path, weights: Weights = "best") -> tuple[RunConfig, Unimo2, Tokenizer]:
    """Configuration, model in evaluation mode and tokenizer of a pre-training run.

    Args:
        weights: as in `weights_file`.

    Raises:
        UserError: naming the file that is missing or does not fit.
    """
    settings = read_settings(folder)
    if settings.get("task", "pretrain") != "pretrain":
        raise UserError(f"--run {folder}: was fine-tuned for {settings['task']}; add --task {settings['task']}")
    config = config_from_dict(RunConfig, settings, source=folder / "config.json")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = Unimo2(replace(config.model, vocab=tokenizer.vocab_size)).eval()
    file = weights_file(folder, weights)
    load_parts(model, read_tensors(file), file)
    return config, model, tokenizer


def weights_file(run: Path, weights: Weights) -> Path:
    """A run's weights: "best", those that it ended with, or "last", those of its last checkpoint.

    Raises:
        UserError: it has no checkpoint.
    """
    if weights == "best":
        return run / "model.safetensors"
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"--weights last: {run / 'checkpoints'} holds no whole checkpoint; choose best")
    return checkpoint / "model.safetensors"


def seed_folders(run: Path) -> list[Path]:
    """The runs in a folder of several seeds, in the seeds' order; none in a run's own."""
    if (run / "config.json").exists():
        return []
    found = [path for path in run.glob("seed-*") if path.name.removeprefix("seed-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("seed-")))


def over_runs(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of every number of several runs' metrics, and the words that all share."""
    found: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run.get(name) for run in runs]
        if all(isinstance(value, (int, float)) for value in values):
            found[name] = statistics.fmean(values)
            found[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
        elif all(value == first for value in values):
            found[name] = first
    return found


def load_base_run(folder: Path, needed: Collection[str] | None = None) -> BaseRun:
    """The model of any run, pre-trained, fine-tuned or converted, without a task's head; in evaluation mode.

    Args:
        needed: as in `load_parts`.

    Raises:
        UserError: naming the file that is missing or does not fit.
    """
    settings = read_settings(folder)
    config = config_from_dict(ModelConfig, settings["model"], source=folder / "config.json")
    max_text = (settings.get("data") or {}).get("max_text", config.positions - 2)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = Unimo2(replace(config, vocab=tokenizer.vocab_size)).eval()
    file = folder / "model.safetensors"
    load_parts(model, base_tensors(read_tensors(file)), file, needed)
    return BaseRun(model, tokenizer, max_text)


def load_parts(
    model: Unimo2, tensors: dict[str, Tensor], source: Path, needed: Collection[str] | None = None
) -> tuple[str, ...]:
    """Copy a file's weights into a model. Parts that it has no weight of, as after a conversion, stay as they are.

    Args:
        needed: parts that must not be absent; None: all but the heads that only pre-training reads.

    Returns:
        The absent parts.

    Raises:
        UserError: a needed part is absent, or a name or shape does not fit.
    """
    own = model.state_dict()
    parts = {name.partition(".")[0] for name in own}
    absent = tuple(sorted(parts - {name.partition(".")[0] for name in tensors}))
    needed = parts.difference(PRETRAINING_HEADS) if needed is None else needed
    if lacking := [part for part in absent if part in needed]:
        raise UserError(f"{source}: has no weights for {', '.join(lacking)}; take a run that has them, or train these")
    kept = {name: own[name] for name in own if name.partition(".")[0] in absent}
    load_weights(model, {**kept, **tensors}, source=source)
    return absent


def read_settings(folder: Path, flag: str = "--run") -> dict[str, Any]:
    """A run's config.json.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give the --out of a finished training")
    if seeds := seed_folders(folder):
        raise UserError(f"{flag} {folder}: holds a run for each seed; give one of them, such as {seeds[0]}")
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise UserError(f"{folder / 'config.json'}: is no run's configuration; use the file that a run wrote")
    return settings


def load_task(run: Path, name: str, config: TaskConfig | None = None, weights: Weights = "best") -> TaskRun:
    """A run's task and model, to evaluate or to predict with.

    Args:
        run: a folder fine-tuned for the task, or any run's for a task that needs no training (`Task.zero_shot`).
        config: settings in place of the run's own.
        weights: as in `weights_file`.

    Raises:
        UserError: the run was fine-tuned for another task, or a file is missing or does not fit.
    """
    kind = TASKS[name]
    settings = read_settings(run)
    trained_for = settings.get("task", "pretrain")
    if trained_for != name and not kind.zero_shot:
        remedy = f"train.py --task {name} --init {run} fine-tunes it"
        raise UserError(f"--run {run}: was trained for {trained_for}, not for {name}; {remedy}")
    model_config = config_from_dict(ModelConfig, settings["model"], source=run / "config.json")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    model_config = replace(model_config, vocab=tokenizer.vocab_size)
    config = config or task_config(run, name)
    task = kind(config, tokenizer, model_config.image_size, BadData(share=config.data.max_bad_share))
    base = Unimo2(model_config)
    file = weights_file(run, weights)
    tensors = read_tensors(file)
    if trained_for == name:
        task.adopt(read_json(run / "task.json"), run / "task.json")
        net = TaskModel(base, task.make_head(base))
        load_weights(net, tensors, source=file)
    else:
        load_parts(base, base_tensors(tensors), file)
        net = TaskModel(base, task.make_head(base))
    return TaskRun(config, task, net.eval(), tokenizer)


def task_config(run: Path, name: str) -> TaskConfig:
    """The settings that a run was fine-tuned with; the task's defaults for a run of another task."""
    settings, kind, source = read_settings(run), TASKS[name], run / "config.json"
    trained_for = settings.get("task", "pretrain")
    if trained_for == name:
        own = {key: value for key, value in settings.items() if key != "model"}
        return config_from_dict(kind.Config, own, source=source)
    if trained_for != "pretrain":
        return kind.Config()
    return kind.untrained(config_from_dict(RunConfig, settings, source=source))


def start_from(config: TaskConfig, *, scratch: RunConfig, own_tokenizer: Callable[[], Tokenizer]) -> Start:
    """What --init (or, without it, the preset) says to start from.

    Args:
        scratch: the preset whose model is made where there is no --init.
        own_tokenizer: called where neither --init nor --tokenizer has one.

    Raises:
        UserError: naming the file that is missing or does not fit.
    """
    if config.init is None:
        tokenizer = own_tokenizer() if config.tokenizer is None else load_tokenizer(config.tokenizer)
        return Start(_adjusted(scratch.model, config, tokenizer), tokenizer, None)
    folder = config.init if config.init.is_dir() else config.init.parent
    file = folder / "model.safetensors" if config.init.is_dir() else config.init
    if not config.init.exists():
        raise UserError(f"--init {config.init}: there is no such folder or file; give a finished run's folder")
    own = _run_of(file)
    settings = read_settings(own, "--init")
    given = config_from_dict(ModelConfig, settings["model"], source=own / "config.json")
    if (own / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(own / "tokenizer.json")
    elif config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        raise UserError(f"--init {folder}: holds no tokenizer.json; name the checkpoint's own with --tokenizer")
    tensors = base_tensors(read_tensors(file))
    model = _adjusted(given, config, tokenizer)
    if model.image_size != given.image_size and "image.positions" in tensors:
        patches = PatchEmbed(patch_size=given.patch_size, width=1, padding=given.patch_padding, device="meta")
        grids = [patches.grid(size, size) for size in (given.image_size, model.image_size)]
        positions = interpolate_positions(tensors["image.positions"], old_grid=grids[0], new_grid=grids[1])
        tensors = {**tensors, "image.positions": positions}
    return Start(model, tokenizer, tensors, file, _scenes_seen(own, settings))


def _run_of(file: Path) -> Path:
    """The folder with the configuration of some weights: theirs, or for a checkpoint's the run's, two above it."""
    near = file.parent.absolute().parents[:2] if file.exists() else ()
    return next((place for place in (file.parent, *near) if (place / "config.json").is_file()), file.parent)


def _scenes_seen(run: Path, settings: dict[str, Any]) -> int | None:
    data = settings.get("data")
    # A converted checkpoint has a preset's settings, but was not trained here.
    if settings.get("task", "pretrain") != "pretrain" or not (run / "history.jsonl").is_file():
        return None
    return data.get("scenes") if isinstance(data, dict) and data.get("root") is None else None


def base_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base model's weights of a file, pre-trained or fine-tuned."""
    if any(name.startswith("base.") for name in tensors):
        return {name.removeprefix("base."): tensor for name, tensor in tensors.items() if name.startswith("base.")}
    return tensors


def run_settings(config: TaskConfig, model: ModelConfig) -> dict[str, Any]:
    """What a fine-tuning's config.json holds: the task's settings and the model's."""
    return {**config_to_dict(config), "model": config_to_dict(model)}


def _adjusted(model: ModelConfig, config: TaskConfig, tokenizer: Tokenizer) -> ModelConfig:
    if config.dropout is not None:
        towers = {name: replace(getattr(model, name), dropout=config.dropout) for name in ("image", "text", "joint")}
        model = replace(model, **towers)
    model = replace(model, vocab=tokenizer.vocab_size, image_size=config.image_size or model.image_size)
    model.check()
    if config.data.max_text > model.positions - 2:
        raise UserError(
            f"--data.max-text: {config.data.max_text} tokens, but the checkpoint has positions for "
            f"{model.positions - 2}; give at most that"
        )
    return model
