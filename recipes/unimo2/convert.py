"""Convert weights: python recipes/unimo2/convert.py SRC --out DIR [--config FILE.json] [--tokenizer PATH]

SRC is the original UNIMO-2's folder (a file for each parameter) or a .pdparams file. Paddle is not needed, and pickled
code is not run. Towers that SRC lacks can come from timm or Hugging Face, as can all of them:

  convert.py --out DIR --image-tower vit.safetensors --text-tower roberta.safetensors --joint-tower roberta.safetensors

DIR then holds model.safetensors and config.json, as train.py --init, eval.py --run and predict.py --run take them.
Every key is listed with the name it was loaded under; what no source has is named and left out of the file.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from vlblocks.data import Tokenizer
from vlblocks.errors import UserError
from vlblocks.models import Imported, import_hf_roberta, import_timm_vit, import_unimo2, read_paddle
from vlblocks.nn import PatchEmbed, interpolate_positions
from vlblocks.training import (
    config_to_dict,
    parse,
    read_json,
    read_tensors,
    run_main,
    write_json_atomic,
    write_tensors_atomic,
)
from vlblocks_recipes.unimo2.configs import PRESETS, ModelConfig
from vlblocks_recipes.unimo2.corpus import load_tokenizer
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.original import (
    SHORT_NAMES,
    SIZES,
    Measured,
    Settings,
    complete,
    measure,
    measure_roberta,
    measure_vit,
    merge,
    model_config,
)


@dataclass(frozen=True)
class Options:
    """Convert weights of UNIMO-2, timm or Hugging Face into a run's folder."""

    src: tyro.conf.Positional[Path | None] = None
    """UNIMO-2's folder with a file for each parameter, or a .pdparams file."""
    out: Path | None = None
    """Folder to make; it must not hold anything yet."""
    config: Path | None = None
    """The original's JSON of settings; what it leaves open is read off the weights."""
    image_tower: Path | None = None
    """safetensors file of a timm vision transformer."""
    text_tower: Path | None = None
    """safetensors file of a Hugging Face RoBERTa, with or without its masked-token head."""
    joint_tower: Path | None = None
    """The same, whose layers begin the joint tower, as UNIMO-2 was begun."""
    tokenizer: Path | None = None
    """The weights' tokenizer: tokenizer.json, or a folder with GPT-2 / RoBERTa BPE files."""


class Source(NamedTuple):
    """A file or folder of weights: which flag named it, and what it holds."""

    flag: str
    path: Path
    weights: dict[str, Tensor]


class Fitted(NamedTuple):
    """What a conversion makes, before it is written.

    Attributes:
        model: the configuration.
        state: our names to tensors, float32.
        lines: what became of every key, setting and part.
        warnings: what the user should know before training.
    """

    model: ModelConfig
    state: dict[str, Tensor]
    lines: list[str]
    warnings: list[str]


def main() -> None:
    options = parse(Options(), description=__doc__)
    check(options)
    found = convert(options)
    tokenizer = _tokenizer(options.tokenizer, found.model)
    write(options.out, found, tokenizer)
    for line in found.lines:
        print(line)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if tokenizer is None:
        print(
            f"warning: {options.out}: no tokenizer.json, which eval.py and predict.py need; "
            "convert with --tokenizer, or save the weights' own there",
            file=sys.stderr,
        )
    print(options.out)


def check(options: Options) -> None:
    """Raises UserError for flags that do not fit together."""
    if options.out is None:
        raise UserError("--out: names no folder; give the one to make")
    if not any((options.src, options.image_tower, options.text_tower, options.joint_tower)):
        raise UserError("SRC: there is nothing to convert; give UNIMO-2's folder, a .pdparams file, or a tower's file")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"--out {options.out}: is there and not empty; choose another folder")


def convert(options: Options) -> Fitted:
    """Read every source and fit all to one model.

    Raises:
        UserError: naming the file, key or setting that is wrong.
    """
    given = _read_settings(options.config)
    named = {"SRC": options.src, **{f"--{t}-tower": getattr(options, f"{t}_tower") for t in ("image", "text", "joint")}}
    sources = {
        flag: Source(flag, path, read_paddle(path) if flag == "SRC" else read_tensors(path))
        for flag, path in named.items()
        if path is not None
    }
    imported = {flag: _import(source, alone="SRC" not in sources) for flag, source in sources.items()}
    measured = merge(_measure(source) for source in sources.values())
    try:
        settings = complete(given, measured, sources["SRC"].weights if "SRC" in sources else {})
        model = _resized(_model(settings, measured, sources), given, imported)
    except UserError as error:
        raise UserError(f"{options.config or next(iter(sources.values())).path}: {error}") from None
    state, absent, filled = fit(model, sources, imported)
    fates = [fate for flag, source in sources.items() for fate in _fates(source, imported[flag], state)]
    lines = [f"loaded  {key} -> {', '.join(targets)}" if targets else f"unused  {key}" for key, targets in fates]
    lines += [f"filled  {name} {list(state[name].shape)}" for name in filled]
    lines += [f"missing {part}.*, {count} tensors" for part, count in absent.items()]
    # Of towers alone the other settings are the recipe's, not the original's.
    shown = [name for name in settings.origins if "SRC" in sources or name in SIZES]
    lines += [f"setting {name} = {settings.values[name]} ({settings.origins[name]})" for name in shown]
    loaded = sum(bool(targets) for _, targets in fates)
    lines.append(
        f"{loaded} of {len(fates)} keys loaded, {len(fates) - loaded} unused; {len(state)} tensors written, "
        f"{sum(absent.values())} missing"
    )
    warnings = [
        f"{name}: taken as {settings.values[name]} (width / 64); --config says it for certain"
        for name in settings.guessed
        if name.endswith("num_attention_heads")
    ]
    if absent:
        warnings.append(
            f"no weights for {', '.join(absent)}: training begins them at random, nothing else can use them"
        )
    return Fitted(model, state, lines, warnings)


def fit(
    model: ModelConfig, sources: Mapping[str, Source], imported: Mapping[str, Imported]
) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """Tensors by the model's names; the number of tensors of each part that has none; and the names that were filled.

    Raises:
        UserError: a weight has a shape or type that does not fit, is there twice, or a part is there by half.
    """
    with torch.device("meta"):
        own = Unimo2(model)
    shapes, state, owner = own.state_dict(), {}, {}
    for flag, found in imported.items():
        path = sources[flag].path
        if found.missing:
            raise UserError(
                f"{path}: lacks {_some(found.missing)}, though others of that part are there; copy it again"
            )
        for name, tensor in found.state.items():
            keys = _some(found.sources.get(name, [name]))
            if name not in shapes:
                if flag == "SRC":  # such as the temperature of a codebook that needs none
                    continue
                raise UserError(f"{path}: {keys} is a part that the recipe's tower has not; take a plain model")
            if name in state:
                raise UserError(f"{flag} {path}: {owner[name]} has {name}, too; leave one of them out")
            if tensor.shape != shapes[name].shape:
                made = [f"{key} {list(sources[flag].weights[key].shape)}" for key in found.sources[name]]
                raise UserError(
                    f"{path}: {', '.join(made)} must make {name} {list(shapes[name].shape)}; take whole weights, and "
                    "the --config that belongs to them"
                )
            if not tensor.is_floating_point():
                raise UserError(
                    f"{path}: {keys} holds {str(tensor.dtype).removeprefix('torch.')}; weights are floating"
                )
            state[name], owner[name] = tensor.detach().float(), flag
    filled = []
    parts = {name.partition(".")[0] for name in state}
    for name in shapes:
        if name in state or name.partition(".")[0] not in parts:
            continue
        if name in dict(own.named_buffers()):
            state[name] = torch.zeros(shapes[name].shape, dtype=shapes[name].dtype)  # counters, of nothing yet
        elif name.startswith("joint.code_norm."):
            # A model without codes, or layers of RoBERTa, have none; this one changes nothing but the scale.
            state[name] = torch.full(shapes[name].shape, float(name.endswith("weight")))
        else:
            raise UserError(f"{name}: has no source, though others of that part have; is the --config the weights'?")
        filled.append(name)
    absent: dict[str, int] = {}
    for name in shapes:
        if name not in state:
            part = name.partition(".")[0]
            absent[part] = absent.get(part, 0) + 1
    return {name: state[name] for name in shapes if name in state}, absent, filled


def write(out: Path, found: Fitted, tokenizer: Tokenizer | None) -> None:
    """Make the folder, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    preset = PRESETS["large" if found.model.width >= 1024 else "base"]
    data = replace(preset.data, max_text=min(preset.data.max_text, found.model.positions - 2))
    grounding = found.model.grounding.method != "none"
    config = replace(preset, out=out, model=found.model, data=data, grounding=grounding)
    place = out.resolve()
    temporary = place.parent / f".{place.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        write_tensors_atomic(temporary / "model.safetensors", found.state)
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer.json")
        write_json_atomic(temporary / "config.json", config_to_dict(config))
        os.replace(temporary, place)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    given = read_json(path)
    if not isinstance(given, dict) or not {*SIZES, *SHORT_NAMES} & given.keys():
        raise UserError(f"{path}: holds none of UNIMO-2's settings (hidden_size, ...); give the original's JSON")
    return given


def _measure(source: Source) -> dict[str, Measured]:
    if source.flag == "SRC":
        try:
            return measure(source.weights)
        except UserError as error:
            raise UserError(f"{source.path}: {error}") from None
    if source.flag == "--image-tower":
        return measure_vit(source.weights, str(source.path))
    return measure_roberta(source.weights, str(source.path), source.flag.strip("-").partition("-")[0])


def _import(source: Source, *, alone: bool) -> Imported:
    """Weights under our names; `alone`: towers without the original, so that RoBERTa's head has a use."""
    try:
        if source.flag == "SRC":
            return import_unimo2(source.weights)
        if source.flag == "--image-tower":
            return import_timm_vit(source.weights, into="image.")
        if source.flag == "--text-tower":
            head = "masked_token." if alone and "lm_head.dense.weight" in source.weights else None
            return import_hf_roberta(source.weights, into="text.", head_into=head)
        found = import_hf_roberta(source.weights, into="joint.")
    except UserError as error:
        raise UserError(f"{source.flag} {source.path}: {error}") from None
    kept = {name: tensor for name, tensor in found.state.items() if name.startswith("joint.transformer.")}
    return found._replace(state=kept)


def _model(settings: Settings, measured: Mapping[str, Measured], sources: Mapping[str, Source]) -> ModelConfig:
    """The original's model; with towers alone, the recipe's own around them."""
    model = model_config(settings.values, measured)
    if "SRC" not in sources:
        fresh = PRESETS["base"].model
        model = replace(model, grounding=fresh.grounding, contrast=fresh.contrast, masked_rows=fresh.masked_rows)
    if "--image-tower" in sources:
        model = replace(model, image=replace(model.image, norm_eps=1e-6))  # timm's
    if "SRC" not in sources or "--image-tower" in sources:
        model = replace(model, patch_padding=0)
    model.check()
    return model


def _resized(model: ModelConfig, given: Mapping[str, Any], imported: Mapping[str, Imported]) -> ModelConfig:
    """The model of the image size that is given; the table of positions is resized to it, as the original does."""
    size = given.get("image_size", model.image_size)
    if size == model.image_size:
        return model
    larger = replace(model, image_size=size)
    larger.check()
    grids = [
        PatchEmbed(patch_size=model.patch_size, width=1, padding=model.patch_padding, device="meta").grid(side, side)
        for side in (model.image_size, size)
    ]
    for found in imported.values():
        if "image.positions" in found.state:
            table = found.state["image.positions"].float()
            found.state["image.positions"] = interpolate_positions(table, old_grid=grids[0], new_grid=grids[1])
    return larger


def _fates(source: Source, imported: Imported, state: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
    """Every key with its shape, and the names under which it was loaded."""
    targets: dict[str, list[str]] = {}
    for name, keys in imported.sources.items():
        for key in keys if name in state else ():
            targets.setdefault(key, []).append(name)
    return [(f"{key} {list(tensor.shape)}", targets.get(key, [])) for key, tensor in source.weights.items()]


def _tokenizer(path: Path | None, model: ModelConfig) -> Tokenizer | None:
    if path is None:
        return None
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size != model.vocab:
        raise UserError(
            f"--tokenizer {path}: has {tokenizer.vocab_size} tokens, the model embeds {model.vocab}; "
            "give the one that belongs to the weights"
        )
    return tokenizer


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    run_main(main)
