"""Checks this model against the original's numbers: python recipes/unimo2/parity.py FILE.npz ...

Each file holds one run of the original implementation: configuration, weights, inputs, outputs and gradients. The model
is rebuilt from the configuration and the weights; the largest error of every output and gradient is printed beside its
tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vlblocks.errors import UserError
from vlblocks.losses import masked_token_loss, matching_loss
from vlblocks.models import import_unimo2
from vlblocks.nn import fusion
from vlblocks.ops import SegmentMask
from vlblocks.training import run_main
from vlblocks_recipes.unimo2.configs import ContrastConfig, GroundingConfig, ModelConfig, TowerConfig
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.objectives import lookup

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


def model_config(config: Mapping, params: Mapping[str, Tensor]) -> ModelConfig:
    """Our configuration of the original's model; sizes that the configuration leaves out are read off the weights."""
    width = config["hidden_size"]

    def tower(prefix: str, weights: str, eps: float) -> TowerConfig:
        up = params.get(f"{weights}.encoder_layer_0_ffn_fc_0.w_0")
        layers = config[f"{prefix}num_hidden_layers"] if up is not None else 0
        hidden = up.shape[1] if up is not None else 4 * width
        return TowerConfig(layers, config[f"{prefix}num_attention_heads"], hidden, dropout=0.0, norm_eps=eps)

    def rows(name: str, default: int) -> int:
        return params[name].shape[0] if name in params else default

    patch, method, project = config["resolution"], config["method"], bool(config["projection"])
    states = params["vit.position_embeddings"].shape[1] if "vit.position_embeddings" in params else 197
    side = round((states - 1) ** 0.5)
    return ModelConfig(
        width=width,
        image=tower("vit_", "vit", config.get("vit_layer_norm_eps", 1e-12)),
        text=tower("text_", "text", 1e-5),
        joint=tower("", "grounded", 1e-5),
        image_size=side * patch,
        patch_size=patch,
        patch_padding=(patch - 1) // 2,
        vocab=rows("text.word_embedding", config["text_vocab_size"]),
        positions=rows("text.pos_embedding", config["text_max_position_embeddings"]),
        grounding=GroundingConfig(
            method={"topk": "topk", "normal": "nearest", "none": "none"}[method],
            codes=rows("vq_emb", config["num_codebook"]),
            picks=max(config["topk"], 1),
            project=project and method != "none",
            positions=bool(config["grounding_pos"]),
            count_padding=True,
        ),
        contrast=ContrastConfig(
            width=width if project else None,
            activation="relu" if project else None,
            share_grounding=project and bool(config["share_projection"]) and method != "none",
            normalize="none" if method == "none" else "image",
        ),
        masked_rows="open",
    )


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
            logits = model.token_logits(F.embedding(positions, joint.text.flatten(0, 1)))
            losses["mlm_loss"] = masked_token_loss(logits, inputs["mask_label"].flatten(), weight=weight)
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


def compare(golden: Golden, dtype: torch.dtype = torch.float64) -> Iterable[Row]:
    """Every output and gradient of the file against ours, with the tolerances for float32.

    In float64 what is left is the original's own rounding; float32 adds ours, which at extreme temperatures matters.
    """
    try:
        config = model_config(golden.config, golden.params)
    except KeyError as error:
        raise UserError(f"its configuration lacks {error}; is the file whole?") from None
    run = Original(Unimo2(config).eval().to(dtype), golden.config)
    params = {name: value.to(dtype, copy=True).requires_grad_() for name, value in golden.params.items()}
    imported = import_unimo2(params)
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
    for name, theirs in golden.grads.items():
        mine = params[name].grad
        error = (theirs if mine is None else mine.reshape(theirs.shape) - theirs).abs().max()
        yield Row(
            f"grad.{name}", float(error / theirs.abs().max().clamp_min(TINY)), 1e-4 if "temperature" in name else 5e-5
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64", help="what ours computes in")
    arguments, failed = parser.parse_args(), 0
    for path in arguments.files:
        try:
            rows = list(compare(read_golden(path), getattr(torch, arguments.dtype)))
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
