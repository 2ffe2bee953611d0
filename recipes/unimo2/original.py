"""The original UNIMO-2's settings: their names in its JSON and scripts, what weights tell of them, and ours for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vlblocks.errors import UserError

from .configs import ContrastConfig, GroundingConfig, ModelConfig, TowerConfig

# Our tower -> what its settings' names begin with, and its weights'.
TOWERS = {"image": ("vit_", "vit"), "text": ("text_", "text"), "joint": ("", "grounded")}
METHODS = {"topk": "topk", "normal": "nearest", "none": "none"}
# The original takes these from its command line, under these names; the golden files have shorter ones.
SHORT_NAMES = {
    "method": ("grounding_method",),
    "topk": ("topk_value",),
    "projection": ("with_grounding_projection", "with_cmcl_projection"),
    "share_projection": ("cmcl_share_parameters",),
    "grounding_pos": ("with_grounding_pos",),
}
FLAGS = ("with_grounding_projection", "with_cmcl_projection", "cmcl_share_parameters", "with_grounding_pos")
SIZES = (
    *("hidden_size", "num_hidden_layers", "text_num_hidden_layers", "vit_num_hidden_layers", "num_attention_heads"),
    *("text_num_attention_heads", "vit_num_attention_heads", "text_vocab_size", "text_max_position_embeddings"),
    *("resolution", "image_size", "num_codebook"),
)
RATES = ("hidden_dropout_prob", "text_hidden_dropout_prob", "vit_hidden_dropout_prob", "vit_layer_norm_eps")


class Measured(NamedTuple):
    """A size that weights tell, and the weight that tells it."""

    value: int
    weight: str


class Settings(NamedTuple):
    """The original's settings, complete.

    Attributes:
        values: by the original's names.
        origins: of each that was not given: the weight that told it, or what was assumed.
        guessed: names of those that neither the file nor the weights told.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    guessed: list[str]


def measure(weights: Mapping[str, Tensor]) -> dict[str, Measured]:
    """The settings that weights under the original's names tell, and as TOWER_hidden the feed-forward's widths.

    Raises:
        UserError: a weight has fewer dimensions than it must, or the positions are no square.
    """
    found: dict[str, Measured] = {}

    def take(setting: str, name: str, axis: int) -> None:
        if name not in weights or setting in found:
            return
        shape = weights[name].shape
        if not -len(shape) <= axis < len(shape):
            raise UserError(f"{name}: has the shape {list(shape)}; take weights of UNIMO-2")
        found[setting] = Measured(shape[axis], name)

    for name in ("text.word_embedding", "vit.cls_token_embeddings", "vq_emb", "grounded.encoder_layer_0_ffn_fc_1.b_0"):
        take("hidden_size", name, -1)
    take("text_vocab_size", "text.word_embedding", 0)
    take("text_max_position_embeddings", "text.pos_embedding", 0)
    take("num_codebook", "vq_emb", 0)
    take("resolution", "vit.patch_embeddings_projection_weight", -1)
    for tower, (setting, prefix) in TOWERS.items():
        found |= _layers(weights, re.escape(prefix) + r"\.encoder_layer_(\d+)_.*", f"{setting}num_hidden_layers")
        take(f"{tower}_hidden", f"{prefix}.encoder_layer_0_ffn_fc_0.w_0", 1)
    take("image_size", "vit.position_embeddings", 1)
    table = found.pop("image_size", None)
    if table is not None and "resolution" in found:
        found["image_size"] = square_image(*table, found["resolution"].value)
    return found


def measure_vit(weights: Mapping[str, Tensor], source: str) -> dict[str, Measured]:
    """The same of a timm vision transformer, as settings of the image tower; `source` is named in errors."""
    found = _layers(weights, r"blocks\.(\d+)\..*", "vit_num_hidden_layers", source)
    for setting, name, axis in (
        ("hidden_size", "cls_token", -1),
        ("resolution", "patch_embed.proj.weight", -1),
        ("image_hidden", "blocks.0.mlp.fc1.weight", 0),
        ("image_size", "pos_embed", 1),
    ):
        if name in weights and weights[name].ndim > max(axis, 0):
            found[setting] = Measured(weights[name].shape[axis], f"{source}: {name}")
    if "image_size" in found and "resolution" in found:
        states, weight = found["image_size"]
        plain = math.isqrt(states) ** 2 == states  # some tables leave out the class token
        found["image_size"] = square_image(states + plain, weight, found["resolution"].value)
    return found


def measure_roberta(weights: Mapping[str, Tensor], source: str, tower: str) -> dict[str, Measured]:
    """The same of a Hugging Face RoBERTa, as settings of the "text" or the "joint" tower."""
    prefix = "roberta." if any(name.startswith("roberta.") for name in weights) else ""
    layers = re.escape(prefix) + r"encoder\.layer\.(\d+)\..*"
    found = _layers(weights, layers, f"{TOWERS[tower][0]}num_hidden_layers", source)
    tables = (
        ("hidden_size", f"{prefix}embeddings.word_embeddings.weight", 1),
        ("text_vocab_size", f"{prefix}embeddings.word_embeddings.weight", 0),
        ("text_max_position_embeddings", f"{prefix}embeddings.position_embeddings.weight", 0),
        (f"{tower}_hidden", f"{prefix}encoder.layer.0.intermediate.dense.weight", 0),
    )
    for setting, name, axis in tables:
        if name in weights and weights[name].ndim == 2 and (tower == "text" or not setting.startswith("text_")):
            found[setting] = Measured(weights[name].shape[axis], f"{source}: {name}")
    return found


def merge(parts: Iterable[Mapping[str, Measured]]) -> dict[str, Measured]:
    """What several sources tell.

    Raises:
        UserError: two tell different sizes.
    """
    whole: dict[str, Measured] = {}
    for part in parts:
        for setting, told in part.items():
            before = whole.setdefault(setting, told)
            if before.value != told.value:
                raise UserError(
                    f"{setting}: {before.value} by {before.weight}, {told.value} by {told.weight}; "
                    "give weights that fit together"
                )
    return whole


def _layers(weights: Mapping[str, Tensor], pattern: str, setting: str, source: str = "") -> dict[str, Measured]:
    """The number of layers, by the highest among names of which `pattern` finds the layer's number."""
    numbers = {int(match[1]): name for name in weights if (match := re.fullmatch(pattern, name))}
    where = f"{source}: " if source else ""
    return {setting: Measured(max(numbers) + 1, f"{where}{numbers[max(numbers)]}")} if numbers else {}


def square_image(states: int, weight: str, patch: int) -> Measured:
    """Pixels of the square image that a table of 1 + patches positions was made for.

    Raises:
        UserError: it is no square.
    """
    side = math.isqrt(states - 1)
    if side * side != states - 1:
        raise UserError(f"{weight}: {states} positions are no square grid and a class token; convert another model")
    return Measured(side * patch, weight)


def long_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the original's own names."""
    return {name: value for key, value in config.items() for name in SHORT_NAMES.get(key, (key,))}


def complete(given: Mapping[str, Any], measured: Mapping[str, Measured], weights: Mapping[str, Any]) -> Settings:
    """All settings of the original: as given, else as the weights tell, else as the original has them.

    Args:
        given: some settings by the original's names.
        measured: what weights tell.
        weights: by the original's names; which there are tells of projections.

    Raises:
        UserError: what is given is malformed, contradicts the weights, or leaves a size open.
    """
    values, origins, guessed = long_names(given), {}, []
    for name in SIZES:
        if name in values and (type(values[name]) is not int or values[name] < 1):
            raise UserError(f"{name}: {values[name]!r} is no size; give a whole number of at least 1")
    picks = values.get("topk_value", 0)
    if type(picks) is not int or picks < 0:
        raise UserError(f"topk_value: {picks!r} is no number of codes; give a whole number")
    for name in FLAGS:
        if name in values and not isinstance(values[name], bool):
            raise UserError(f"{name}: {values[name]!r} is neither true nor false; give one")
    for name in RATES:
        if name in values and not (isinstance(values[name], (int, float)) and 0 <= values[name] < 1):
            raise UserError(f"{name}: {values[name]!r} is no rate; give a number in [0, 1)")
    for name, (size, weight) in measured.items():
        # The original resizes its table of positions to the image size it is given.
        if values.get(name, size) != size and name != "image_size":
            raise UserError(f"{name} is {values[name]}, but {weight} tells {size}; give the weights' own configuration")
        if name not in values:
            values[name], origins[name] = size, weight

    def assume(name: str, value: Any, origin: str) -> None:
        if name not in values:
            values[name], origins[name] = value, origin
            guessed.append(name)

    if "hidden_size" not in values:
        raise UserError("hidden_size: no weight tells it; give it with --config")
    width = values["hidden_size"]
    known = [
        values[f"{prefix}num_hidden_layers"] for prefix, _ in TOWERS.values() if f"{prefix}num_hidden_layers" in values
    ]
    for tower, (prefix, _) in TOWERS.items():
        assume(
            f"{prefix}num_hidden_layers", max(known, default=12), f"as in the deepest tower; there is no {tower} tower"
        )
        assume(f"{tower}_hidden", 4 * width, "4 x width")
        if f"{prefix}num_attention_heads" not in values and width % 64:
            raise UserError(
                f"{prefix}num_attention_heads: heads of 64 do not divide the width {width}; give it with --config"
            )
        assume(f"{prefix}num_attention_heads", width // 64, "width / 64")
        rate = 0.0 if tower == "image" else 0.1
        assume(f"{prefix}hidden_dropout_prob", rate, "the original's")
    for name, value in (
        *(("vit_layer_norm_eps", 1e-12), ("text_vocab_size", 50265), ("text_max_position_embeddings", 514)),
        *(("resolution", 16), ("image_size", 224), ("with_grounding_pos", False)),
    ):
        assume(name, value, "the original's")
    grounded = "vq_emb" in weights or "num_codebook" in given
    assume("grounding_method", "topk" if grounded else "none", "the original's" if grounded else "there is no codebook")
    if values["grounding_method"] not in METHODS:
        raise UserError(f"grounding_method: {values['grounding_method']!r}; give one of {', '.join(METHODS)}")
    assume("num_codebook", 2048, "the original's")
    assume("topk_value", min(100, values["num_codebook"]), "the original's")
    own = "grounded.cmcl_pooled_fc_image.w_0" in weights
    shared = "grounded.grounding_patch_projection.w_0" in weights
    told = "weights of that name are there" if own or shared else "weights of that name are not there"
    assume("with_grounding_projection", shared, told)
    assume("with_cmcl_projection", own or shared, told)
    assume("cmcl_share_parameters", shared and not own, told)
    return Settings(values, origins, guessed)


def model_config(config: Mapping[str, Any], measured: Mapping[str, Measured]) -> ModelConfig:
    """Our configuration of the original's model; the weights' own sizes come before the settings'.

    Raises:
        KeyError: the settings are not complete.
    """
    given = long_names(config)
    settings = {**given, **{name: size for name, (size, _) in measured.items()}}
    width, method = given["hidden_size"], METHODS[given["grounding_method"]]

    def tower(name: str, eps: float) -> TowerConfig:
        prefix, _ = TOWERS[name]
        return TowerConfig(
            layers=settings[f"{prefix}num_hidden_layers"],
            heads=settings[f"{prefix}num_attention_heads"],
            hidden=settings.get(f"{name}_hidden", 4 * width),
            dropout=settings.get(f"{prefix}hidden_dropout_prob", 0.0),
            norm_eps=eps,
        )

    grounded = method != "none"
    contrasted = bool(settings["with_cmcl_projection"])
    return ModelConfig(
        width=width,
        image=tower("image", settings["vit_layer_norm_eps"]),
        text=tower("text", 1e-5),
        joint=tower("joint", 1e-5),
        image_size=settings.get("image_size", 224),
        patch_size=settings.get("resolution", 16),
        patch_padding=(settings.get("resolution", 16) - 1) // 2,
        vocab=settings["text_vocab_size"],
        positions=settings["text_max_position_embeddings"],
        grounding=GroundingConfig(
            method=method,
            codes=settings["num_codebook"],
            picks=max(settings["topk_value"], 1),
            project=bool(settings["with_grounding_projection"]) and grounded,
            positions=bool(settings["with_grounding_pos"]),
            count_padding=True,
        ),
        contrast=ContrastConfig(
            width=width if contrasted else None,
            activation="relu" if contrasted else None,
            share_grounding=contrasted and bool(settings["cmcl_share_parameters"]) and grounded,
            normalize="image" if grounded else "none",
        ),
        masked_rows="open",
    )
