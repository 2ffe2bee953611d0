"""Weights of other projects under this library's names.

A key map is data, a tuple of :class:`vlblocks.models.key_maps.Rule`. :func:`import_state` applies it to a state dict
and accounts for every key; :func:`load_imported` puts the result into a module and says what found no place and what
got nothing. Nothing is downloaded: whoever has a state dict can import it. Tensors keep their gradients, so a map can
be tested through them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.models.key_maps import LAYER, TIMM_UNSUPPORTED, Rule, roberta_rules, timm_vit_rules, unimo2_rules
from vlblocks.nn.embed import interpolate_positions

__all__ = [
    "ImportReport",
    "Imported",
    "import_hf_roberta",
    "import_state",
    "import_timm_vit",
    "import_unimo2",
    "load_imported",
]

LOG = logging.getLogger(__name__)


class Imported(NamedTuple):
    """A translated state dict, and what did not go through.

    Attributes:
        state: under this library's names.
        unused: source keys that no rule reads.
        missing: source keys that the rules need and the source lacks.
        filled: target names without a source, set to the value that means the same.
        sources: which source keys each other target name was made from.
    """

    state: dict[str, Tensor]
    unused: list[str]
    missing: list[str]
    filled: list[str]
    sources: dict[str, list[str]]


class ImportReport(NamedTuple):
    """What became of a module's parameters and of a source's keys.

    Attributes:
        loaded: names in the module that got a tensor.
        unused: source keys that no rule reads, and translated names that the module lacks.
        missing: names in the module that keep what they had.
        filled: among the loaded: without a source, set to the value that means the same.
    """

    loaded: list[str]
    unused: list[str]
    missing: list[str]
    filled: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("unused", self.unused), ("missing", self.missing), ("filled", self.filled)):
            if names:
                parts.append(f"{len(names)} {what}: {', '.join(names)}")
        return "; ".join(parts)


def import_state(source: Mapping[str, Tensor], rules: Iterable[Rule], *, prefix: str = "") -> Imported:
    """Translate a state dict by rules.

    Args:
        source: name -> tensor.
        rules: the key map.
        prefix: stands before every key of the source that the rules name ("model.", say); keys without it are unused.

    Raises:
        UserError: tensors that belong together have shapes that do not.
    """
    rules = list(rules)
    layers: dict[str, int] = {}  # section -> number of layers
    present = {""}
    for rule in rules:
        for pattern in rule.sources:
            for number in _layer_numbers(prefix + pattern, source):
                present.add(rule.section)
                layers[rule.section] = max(layers.get(rule.section, 0), number + 1)
    state: dict[str, Tensor] = {}
    sources: dict[str, list[str]] = {}
    missing: list[str] = []
    for rule in rules:
        if rule.section not in present:
            continue
        repeated = LAYER in rule.target
        for number in range(max(1, layers.get(rule.section, 0)) if repeated else 1):
            keys = [prefix + pattern.replace(LAYER, str(number)) for pattern in rule.sources]
            absent = [key for key in keys if key not in source]
            if not absent:
                target = rule.target.replace(LAYER, str(number))
                state[target] = _make(rule, keys, source)
                sources[target] = keys
            elif not rule.optional or len(absent) < len(keys):
                missing.extend(absent)
    used = {key for keys in sources.values() for key in keys}
    return Imported(state, [key for key in source if key not in used], list(dict.fromkeys(missing)), [], sources)


def load_imported(module: nn.Module, imported: Imported) -> ImportReport:
    """Copy imported tensors into a module; logs a warning that names every unused and every missing key.

    Raises:
        UserError: a tensor has another shape than the module's, or nothing fits.
    """
    own = module.state_dict()
    fits = {name: tensor for name, tensor in imported.state.items() if name in own}
    for name, tensor in fits.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{name}: the imported tensor is {list(tensor.shape)}, the model's {list(own[name].shape)}; "
                "make the model with the source's sizes"
            )
    if not fits:
        raise UserError(f"no imported tensor is named as the model's are (first: {next(iter(imported.state), 'none')})")
    module.load_state_dict(fits, strict=False)
    report = ImportReport(
        loaded=list(fits),
        unused=imported.unused + [name for name in imported.state if name not in own],
        missing=[name for name in own if name not in fits],
        filled=[name for name in imported.filled if name in fits],
    )
    if report.unused or report.missing:
        LOG.warning("import: %s", report)
    return report


def import_timm_vit(
    source: Mapping[str, Tensor],
    *,
    into: str = "",
    prefix: str = "",
    source_grid: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> Imported:
    """The state dict of a timm vision transformer (``timm.models.vision_transformer``) for an image tower.

    ``tower.load_state_dict(result.state)`` loads it, and :func:`vlblocks.models.importers.load_imported` into part of a
    larger model.

    timm's layer norms have eps 1e-6: give the tower the same. A model without biases in qkv gets zeros; one whose
    position table leaves out the class token gets a zero row there. Classifier, ``fc_norm`` and attention pooling
    have no place in a tower and are reported as unused.

    Args:
        source: ``model.state_dict()``.
        into: stands before every target name ("image." for a model that has the tower there).
        prefix: stands before every source key ("visual.trunk." in an open_clip model).
        source_grid: patch rows and columns of the source, which must be given where the grid is not square.
        grid: rows and columns wanted; the position grid is resized to them.
        interpolation: how, "bicubic" or "bilinear".

    Raises:
        UserError: a variant that the image tower cannot compute (register tokens, no class token, norm before the
            layers, gated feed-forward, ...), or no vision transformer at all.
    """
    for pattern, what in TIMM_UNSUPPORTED.items():
        found = next((key for key in source if re.fullmatch(re.escape(prefix) + pattern, key)), None)
        if found is not None:
            raise UserError(f"{found}: {what} is not supported by the image tower; take a plain timm vit_* or deit_*")
    _require(source, prefix + "patch_embed.proj.weight", "timm vision transformer")
    if prefix + "cls_token" not in source:
        raise UserError(
            f"{prefix}cls_token: not in the state dict; a timm model without a class token is not supported by the "
            "image tower; take one with class_token=True"
        )
    imported = import_state(source, timm_vit_rules(into), prefix=prefix)
    state, filled = imported.state, imported.filled
    for name, weight in list(state.items()):
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("attn.qkv.weight") and bias not in state:
            state[bias] = weight.new_zeros(len(weight))
            filled.append(bias)
    table = state.get(f"{into}positions")
    if table is not None:
        old = source_grid or _square(table.shape[1])
        if table.shape[1] == old[0] * old[1]:
            # Nothing is added to the class token there, which a row of zeros says as well.
            table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        elif table.shape[1] != old[0] * old[1] + 1:
            raise UserError(
                f"source_grid: {old[0]} x {old[1]} does not fit {table.shape[1]} positions; give the real one"
            )
        if grid is not None and tuple(grid) != tuple(old):
            table = interpolate_positions(table, old_grid=old, new_grid=grid, prefix=1, mode=interpolation)
        state[f"{into}positions"] = table
    return imported


def import_hf_roberta(
    source: Mapping[str, Tensor],
    *,
    into: str = "",
    head_into: str | None = None,
    positions: int | None = None,
) -> Imported:
    """A RoBERTa state dict in the Hugging Face layout for a text tower, with or without its ``roberta.`` prefix.

    Row 0 of the token-type table, which RoBERTa adds to every token, goes into the position table.

    Args:
        source: the state dict of ``RobertaModel`` or of a model that holds one as ``roberta``.
        into: stands before every target name of the tower ("text." in a model that has it there).
        head_into: where the masked-token head goes ("masked_token."); without it ``lm_head.*`` is unused.
        positions: rows to keep of the position table, offset included; by default all.

    Raises:
        UserError: no RoBERTa weights, no head though one is asked for, or fewer positions than asked for.
    """
    prefix = "roberta." if any(key.startswith("roberta.") for key in source) else ""
    words = f"{prefix}embeddings.word_embeddings.weight"
    _require(source, words, "RoBERTa in the Hugging Face layout")
    if head_into is not None:
        _require(source, "lm_head.dense.weight", "RoBERTa with a masked-token head")
    imported = import_state(source, roberta_rules(into, head_into, prefix=prefix))
    if head_into is not None:
        # Copies of what is read anyway: the head's output weights are the word embeddings.
        for copy, twin, target in (
            ("lm_head.decoder.weight", words, f"{into}embed.word.weight"),
            ("lm_head.decoder.bias", "lm_head.bias", f"{head_into}bias"),
        ):
            if copy in imported.unused and twin in source and torch.equal(source[copy], source[twin]):
                imported.unused.remove(copy)
                imported.sources[target].append(copy)
    name = f"{into}embed.position.weight"
    if positions is not None and name in imported.state:
        table = imported.state[name]
        if positions > len(table):
            raise UserError(f"positions: {positions} asked for, the source has {len(table)}; ask for at most those")
        imported.state[name] = table[:positions]
    return imported


def import_unimo2(
    source: Mapping[str, Tensor],
    *,
    prefix: str = "",
    grid: tuple[int, int] | None = None,
) -> Imported:
    """Weights under the original UNIMO-2's parameter names for the UNIMO-2 recipe's model.

    The original stores dense weights as [in, out]. Parts that the source lacks as a whole (a tower, a head) are left
    out without being called missing; :func:`load_imported` reports them against the model.

    Args:
        source: original name -> tensor.
        prefix: stands before every source key ("param." in a golden file).
        grid: patch rows and columns wanted; the position grid is resized to them. By default it stays as it is.

    Raises:
        UserError: nothing in the source is named as in UNIMO-2.
    """
    imported = import_state(source, unimo2_rules(), prefix=prefix)
    if not imported.state:
        raise UserError(
            f"no weights under original UNIMO-2 names among {len(source)} keys (first: {next(iter(source), '')})"
        )
    table = imported.state.get("image.positions")
    if grid is not None and table is not None:
        old = _square(table.shape[1])
        imported.state["image.positions"] = interpolate_positions(table, old_grid=old, new_grid=grid, prefix=1)
    return imported


def _make(rule: Rule, keys: Sequence[str], source: Mapping[str, Tensor]) -> Tensor:
    try:
        return rule.make(*(source[key] for key in keys))
    except RuntimeError:
        shapes = ", ".join(f"{key} {list(source[key].shape)}" for key in keys)
        raise UserError(f"{rule.target}: cannot be made from {shapes}; is the state dict whole?") from None


def _layer_numbers(pattern: str, source: Mapping[str, Tensor]) -> list[int]:
    """Layers that have a key of this pattern; [-1] when the pattern has no layer and the key is there."""
    if LAYER not in pattern:
        return [-1] if pattern in source else []
    expression = re.compile(re.escape(pattern).replace(re.escape(LAYER), r"(\d+)"))
    return [int(match[1]) for key in source if (match := expression.fullmatch(key))]


def _square(states: int) -> tuple[int, int]:
    """The square grid behind a table of that many positions, with or without one for the class token."""
    side = math.isqrt(states)
    if side * side not in (states, states - 1):
        raise UserError(f"source_grid: {states} positions are no square grid; give its rows and columns")
    return side, side


def _require(source: Mapping[str, Tensor], key: str, what: str) -> None:
    if key not in source:
        first = next(iter(source), "none")
        raise UserError(f"{key}: not in the state dict, so it is no {what}; its first key is {first}")
