"""Checks this model against the original's numbers: python recipes/unimo2/parity.py FILE.npz ...

Each file holds one run of the original implementation: configuration, weights, inputs, outputs and gradients. The model
is rebuilt from the configuration and the weights; the largest error of every output and gradient is printed beside its
tolerance. With --run DIR the model and the weights are those that convert.py made of the same original.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vlblocks.errors import UserError
from vlblocks.losses import matching_loss
from vlblocks.models import import_unimo2
from vlblocks.nn import fusion
from vlblocks.ops import SegmentMask
from vlblocks.ops.attention import BACKENDS
from vlblocks.training import config_from_dict, read_json, read_tensors, run_main
from vlblocks_recipes.unimo2.configs import ModelConfig
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.objectives import lookup
from vlblocks_recipes.unimo2.original import measure, model_config

# What a relative error is taken of where the original's number is zero, so that 0 against 0 is no error.
TINY = 1e-12


class Row(NamedTuple):
    """One compared tensor."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Golden(NamedTuple):
    """One file of the original's numbers, as tensors."""

    config: dict
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def read_golden(path: Path) -> Golden:
    """Raises UserError for a file that is missing or not of the format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        config = json.loads(str(arrays.pop("config")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the .npz of a golden run") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a golden .npz file ({error})") from None
    groups: dict[str, dict[str, Tensor]] = {"param": {}, "in": {}, "out": {}, "grad": {}}
    for key, array in arrays.items():
        group, _, name = key.partition(".")
        if group not in groups:
            raise UserError(f"{path}: unknown entry {key!r}; expected param.*, in.*, out.* or grad.*")
        groups[group][name] = torch.from_numpy(array)
    return Golden(config, groups["param"], groups["in"], groups["out"], groups["grad"])


def text_visibility(given: Tensor) -> tuple[SegmentMask | Tensor, Tensor | None, Tensor]:
    """[B, T, T] visibility -> (mask, prefix [B] or None, validity [B, T]); the matrix itself if no prefix mask."""
    allowed = given > 0
    valid = allowed.diagonal(dim1=1, dim2=2)
    prefix = allowed[:, 0].sum(1)
    mask = SegmentMask.single(length=allowed.shape[1], valid=valid, causal=True, prefix=prefix, masked_rows="open")
    opened = allowed | ~allowed.any(-1, keepdim=True)
    if torch.equal(mask.dense().expand(len(allowed), 1, -1, -1)[:, 0], opened):
        return mask, prefix, valid
    return opened[:, None], None, valid


class Original(nn.Module):
    """The original's forward pass: one padded batch, every loss."""

    def __init__(self, model: Unimo2, config: Mapping) -> None:
        super().__init__()
        self.model, self.golden = model, config

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model, out = self.model, {}
        image = text = image_valid = text_valid = text_mask = prefix = None
        if "image_u8" in inputs:
            pixels = inputs["image_u8"].permute(0, 3, 1, 2).to(model.image.cls.dtype) / 127.5 - 1
            image_valid = inputs["image_mask"][:, 0] > 0
            image = out["vit_out"] = model.image(pixels, image_valid)
        caption = "text_mask" in inputs and inputs["text_mask"].shape[1] > 1
        if "src_ids" in inputs:
            tokens, positions = inputs["src_ids"][..., 0], inputs["pos_ids"][..., 0]
            if caption:
                text_mask, prefix, text_valid = text_visibility(inputs["text_mask"])
                text = model.text(tokens, mask=text_mask, position_ids=positions)
            else:
                text_valid = inputs["text_mask"][:, 0] > 0
                text = model.text(tokens, text_valid, position_ids=positions)
            out["text_out"] = text

        found = lookup(model, image, None if caption else text, image_valid, None if caption else text_valid)
        mask = None
        if caption:
            mask = self.caption_mask(image, found.codes, text, image_valid, text_valid, text_mask, prefix)
        joint = model.fuse(
            image=image, codes=found.codes, text=text, image_valid=image_valid, text_valid=text_valid, mask=mask
        )
        out |= {"grounded": found.codes, "indices": found.indices}
        out |= {"enc_v": joint.image, "enc_g": joint.codes, "enc_l": joint.text}
        losses = {}
        if found.loss is not None and not caption:
            losses["vq_loss"] = found.loss
        if image is not None and text is not None and not caption:
            losses |= self.pair_losses(inputs, image, text, joint, out)
        if "mask_pos" in inputs:
            positions, flags = inputs["mask_pos"], inputs["lm_flag"].flatten()
            weight = flags * inputs["with_text"].flatten()[positions // joint.text.shape[1]]
            states = F.embedding(positions, joint.text.flatten(0, 1))
            # The flags are 0 or 1: what they leave out is ignored, so that the loss is the one that training takes.
            losses["mlm_loss"] = model.token_loss(states, inputs["mask_label"].flatten().masked_fill(weight == 0, -100))
        if losses:
            losses["total_loss"] = torch.stack(list(losses.values())).sum()
        return {name: value for name, value in (out | losses).items() if value is not None}

    def pair_losses(self, inputs, image, text, joint, out) -> dict[str, Tensor]:
        model, multimodal = self.model, inputs["is_multimodal"].flatten()
        labels = inputs["labels"].flatten()
        out["pooled_text"], out["pooled_image"] = model.text_pool(joint.text[:, 0]), model.image_pool(joint.image[:, 0])
        image_features, text_features = model.features("image", image), model.features("text", text)
        scored = F.normalize(image_features, dim=-1)
        out["cmcl_scores"] = (scored * text_features).sum(-1, keepdim=True)
        return {
            "itm_loss": matching_loss(model.match_logits(joint), labels, weight=multimodal),
            "cmcl_loss": model.contrastive(image_features, text_features, weight=labels * multimodal),
        }

    @staticmethod
    def caption_mask(image, codes, text, image_valid, text_valid, text_mask, prefix) -> SegmentMask | Tensor:
        lengths = {"image": image.shape[1], "codes": 0 if codes is None else codes.shape[1], "text": text.shape[1]}
        mask = fusion.prefix_lm(
            **lengths,
            image_valid=image_valid,
            text_valid=text_valid,
            prefix=prefix,
            masked_rows="open",
        )
        if isinstance(text_mask, SegmentMask):
            return mask
        dense = mask.dense().clone()
        dense[..., -text.shape[1] :, -text.shape[1] :] = text_mask
        return dense


class Converted(NamedTuple):
    """A converted run's own model and weights."""

    config: ModelConfig
    weights: dict[str, Tensor]


def read_converted(folder: Path) -> Converted:
    """Raises UserError for a folder that convert.py (or train.py) did not write."""
    saved = read_json(folder / "config.json")
    if not isinstance(saved, dict) or "model" not in saved:
        raise UserError(f"{folder / 'config.json'}: is no run's configuration; give what convert.py wrote")
    config = config_from_dict(ModelConfig, saved["model"], source=folder / "config.json")
    return Converted(config, read_tensors(folder / "model.safetensors"))


def compare(
    golden: Golden, dtype: torch.dtype = torch.float64, converted: Converted | None = None, backend: str | None = None
) -> Iterable[Row]:
    """Every output and gradient of the file against ours, with the tolerances for float32.

    In float64 what is left is the original's own rounding; float32 adds ours, which at extreme temperatures matters.

    Args:
        converted: a model and weights to take instead of those in the file.
        backend: what computes the attention, if not the configuration's own choice.
    """
    try:
        config = model_config(golden.config, measure(golden.params))
    except KeyError as error:
        raise UserError(f"its configuration lacks {error}; is the file whole?") from None
    if converted is not None:
        config = converted.config
    if backend is not None:
        config = replace(config, backend=backend)
    run = Original(Unimo2(config).eval().to(dtype), golden.config)
    params = {name: value.to(dtype, copy=True).requires_grad_() for name, value in golden.params.items()}
    imported = import_unimo2(params, grid=run.model.image.grid)
    if imported.unused:
        raise UserError(f"weights that nothing uses: {', '.join(imported.unused)}; is the configuration right?")
    if imported.missing:
        raise UserError(f"weights that are missing: {', '.join(imported.missing)}; is the file whole?")
    # The original creates these two whatever its method, and then uses them or not.
    idle = {"topk": (), "normal": ("grounded.temperature",), "none": ("grounded.temperature", "grounded.codebook")}
    weights = {name: value for name, value in imported.state.items() if name not in idle[golden.config["method"]]}
    state = {f"model.{name}": value for name, value in weights.items()}
    unknown = state.keys() - run.state_dict().keys()
    if unknown:
        raise UserError(f"weights that the model lacks: {', '.join(sorted(unknown))}; is the configuration right?")
    if converted is not None:
        state = _stand_ins(state, converted.weights, {name for name, _ in run.named_parameters()}, dtype)
    ours = functional_call(run, state, (golden.inputs,))

    real = {"text": None, "image": None}
    if "text_mask" in golden.inputs:
        mask = golden.inputs["text_mask"] > 0
        real["text"] = mask[:, 0] if mask.shape[1] == 1 else mask.any(-1)
    if "image_mask" in golden.inputs:
        real["image"] = golden.inputs["image_mask"][:, 0] > 0
    rows_of = {"text_out": "text", "enc_l": "text", "vit_out": "image", "enc_v": "image"}
    for name, theirs in golden.outputs.items():
        if name not in ours:
            yield Row(f"out.{name}", float("nan"), 0.0)
            continue
        error = (ours[name].detach().reshape(theirs.shape).double() - theirs.double()).abs()
        valid = real[rows_of[name]] if name in rows_of else None
        if name == "indices":
            yield Row(f"out.{name}", float(error.max()), 0.0)
        elif name.endswith("_loss"):
            yield Row(f"out.{name}", float(error / theirs.double().abs().clamp_min(TINY)), 1e-5)
        elif valid is not None and not valid.all():
            yield Row(f"out.{name}", float(error[valid].max()), 2e-5)
            yield Row(f"out.{name} (masked)", float(error[~valid].max()), 2e-3)
        else:
            yield Row(f"out.{name}", float(error.max()), 2e-5)
    if golden.grads:
        ours["total_loss"].backward()
        if converted is not None:
            # Each original weight is one of ours in another layout, so our gradients are the original's in it.
            touched = {name: weights[name] for name in weights if state[f"model.{name}"].grad is not None}
            torch.autograd.backward(list(touched.values()), [state[f"model.{name}"].grad for name in touched])
    for name, theirs in golden.grads.items():
        mine = params[name].grad
        error = (theirs if mine is None else mine.reshape(theirs.shape) - theirs).abs().max()
        yield Row(
            f"grad.{name}", float(error / theirs.abs().max().clamp_min(TINY)), 1e-4 if "temperature" in name else 5e-5
        )


def _stand_ins(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], trained: Iterable[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    lacking = sorted(name for name in state if name.removeprefix("model.") not in weights)
    if lacking:
        raise UserError(f"--run: lacks {', '.join(lacking[:3])}; convert the weights that belong to the file")
    named = {f"model.{name}": tensor.to(dtype, copy=True) for name, tensor in weights.items()}
    return {name: tensor.requires_grad_(name in trained) for name, tensor in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument("--run", type=Path, metavar="DIR", help="take model and weights that convert.py wrote")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64", help="what ours computes in")
    parser.add_argument("--backend", choices=BACKENDS, help="what computes the attention")
    arguments, failed = parser.parse_args(), 0
    converted = None if arguments.run is None else read_converted(arguments.run)
    for path in arguments.files:
        try:
            rows = list(compare(read_golden(path), getattr(torch, arguments.dtype), converted, arguments.backend))
        except UserError as error:
            raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
        bad = [row for row in rows if not row.ok]
        failed += bool(bad)
        print(f"{path.name}: {len(rows) - len(bad)} of {len(rows)} within tolerance")
        for row in rows:
            print(f"  {'ok  ' if row.ok else 'FAIL'} {row.name:<72} {row.error:9.2e}  (at most {row.tolerance:.0e})")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)
