"""Key maps: which tensor of another project becomes which of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LAYER", "TIMM_UNSUPPORTED", "Rule", "roberta_rules", "timm_vit_rules", "unimo2_rules"]

LAYER = "{n}"


class Rule(NamedTuple):
    """One target tensor and where it comes from; ``{n}`` stands for a layer's number in both."""

    target: str
    sources: tuple[str, ...]
    make: Callable[..., Tensor]  # takes the sources' tensors in order
    section: str = ""  # rules of a section are needed together, or absent together; "" is always needed
    optional: bool = False


# Keys, as regular expressions, of variants that compute something else than the image tower does.
TIMM_UNSUPPORTED = {
    r"reg_token": "a register token",
    r"dist_token": "a distillation token",
    r"norm_pre\..*": "a norm before the layers",
    r"patch_embed\.norm\..*": "a norm after the patch embedding",
    r"patch_embed\.backbone\..*": "a convolutional stem",
    r"blocks\.\d+\.attn\.(q_bias|v_bias|relative_position_.*)": "attention in the style of BEiT",
    r"blocks\.\d+\.attn\.norm\..*": "a norm inside attention",
    r"blocks\.\d+\.mlp\.(norm|fc1_g|fc1_x|w1|w2|w3|w12)\..*": "a gated or normed feed-forward",
    r"blocks\.\d+\.gamma_\d": "layer scale in the style of BEiT",
    r"blocks\.\d+\.(attns|ffns)\..*": "parallel blocks",
    r"rel_pos_bias\..*|rope\..*": "relative positions",
}


def timm_vit_rules(into: str = "") -> tuple[Rule, ...]:
    """timm's vision transformer -> image tower."""
    copied = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.weight", "attn.proj.weight"]
    copied += ["attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    optional = ["attn.qkv.bias", "ls1.gamma", "ls2.gamma", "attn.q_norm.weight", "attn.q_norm.bias"]
    optional += ["attn.k_norm.weight", "attn.k_norm.bias"]
    rules = [_copy(f"{into}patch_embed.proj.{part}", f"patch_embed.proj.{part}") for part in ("weight", "bias")]
    rules += [_copy(f"{into}cls", "cls_token"), _copy(f"{into}positions", "pos_embed")]
    rules += [_copy(f"{into}transformer.layers.{{n}}.{part}", f"blocks.{{n}}.{part}") for part in copied]
    rules += [
        _copy(f"{into}transformer.layers.{{n}}.{part}", f"blocks.{{n}}.{part}", optional=True) for part in optional
    ]
    rules += [_copy(f"{into}transformer.norm.{part}", f"norm.{part}") for part in ("weight", "bias")]
    return tuple(rules)


def roberta_rules(into: str = "", head_into: str | None = None, *, prefix: str = "") -> tuple[Rule, ...]:
    """Hugging Face's RoBERTa -> text tower and, where ``head_into`` says, masked-token head."""
    layer, target = f"{prefix}encoder.layer.{{n}}.", f"{into}transformer.layers.{{n}}."
    rules = [
        _copy(f"{into}embed.word.weight", f"{prefix}embeddings.word_embeddings.weight"),
        Rule(
            f"{into}embed.position.weight",
            (f"{prefix}embeddings.position_embeddings.weight", f"{prefix}embeddings.token_type_embeddings.weight"),
            _add_first_row,
        ),
    ]
    for part in ("weight", "bias"):
        rules.append(_copy(f"{into}embed.norm.{part}", f"{prefix}embeddings.LayerNorm.{part}"))
        qkv = tuple(f"{layer}attention.self.{name}.{part}" for name in ("query", "key", "value"))
        rules.append(Rule(f"{target}attn.qkv.{part}", qkv, _stack))
        for theirs, ours in (
            ("attention.output.dense", "attn.proj"),
            ("attention.output.LayerNorm", "norm1"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("output.LayerNorm", "norm2"),
        ):
            rules.append(_copy(f"{target}{ours}.{part}", f"{layer}{theirs}.{part}"))
        if head_into is not None:
            rules.append(_copy(f"{head_into}dense.{part}", f"lm_head.dense.{part}"))
            rules.append(_copy(f"{head_into}norm.{part}", f"lm_head.layer_norm.{part}"))
    if head_into is not None:
        rules.append(_copy(f"{head_into}bias", "lm_head.bias"))
    return tuple(rules)


def unimo2_rules() -> tuple[Rule, ...]:
    """The original UNIMO-2's parameter names -> the recipe's model."""
    rules: list[Rule] = []
    for theirs, ours, first, second in (
        ("vit", "image", "pre_att", "pre_ffn"),
        ("text", "text", "post_att", "post_ffn"),
        ("grounded", "joint", "post_att", "post_ffn"),
    ):
        layer, target = f"{theirs}.encoder_layer_{{n}}_", f"{ours}.transformer.layers.{{n}}."
        rules += _unimo2_norm(f"{target}norm1", f"{layer}{first}_layer_norm", ours)
        rules += _unimo2_norm(f"{target}norm2", f"{layer}{second}_layer_norm", ours)
        for part, suffix, make in (("weight", "w_0", _stack_transposed), ("bias", "b_0", _stack)):
            qkv = tuple(f"{layer}multi_head_att_{name}_fc.{suffix}" for name in ("query", "key", "value"))
            rules.append(Rule(f"{target}attn.qkv.{part}", qkv, make, ours))
        for name, place in (
            ("multi_head_att_output_fc", "attn.proj"),
            ("ffn_fc_0", "mlp.fc1"),
            ("ffn_fc_1", "mlp.fc2"),
        ):
            rules += _unimo2_dense(f"{target}{place}", f"{layer}{name}", ours)
    rules += [
        _copy("image.patch_embed.proj.weight", "vit.patch_embeddings_projection_weight", section="image"),
        _copy("image.patch_embed.proj.bias", "vit.patch_embeddings_projection_bias", section="image"),
        _copy("image.cls", "vit.cls_token_embeddings", section="image"),
        _copy("image.positions", "vit.position_embeddings", section="image"),
        *_unimo2_norm("image.transformer.norm", "vit.post_encoder_layer_norm", "image"),
        _copy("text.embed.word.weight", "text.word_embedding", section="text"),
        _copy("text.embed.position.weight", "text.pos_embedding", section="text"),
        *_unimo2_norm("text.embed.norm", "text.pre_encoder_layer_norm", "text"),
        *_unimo2_norm("joint.code_norm", "grounded.pre_encoder_layer_norm", "code_norm"),
        _copy("grounded.codebook", "vq_emb", section="codebook"),
        _copy("grounded.temperature", "topk_temperature", section="codebook temperature"),
        _copy("contrastive.temperature", "cmcl_temperature", section="contrastive temperature"),
    ]
    for theirs, ours in (
        ("grounding_patch_projection", "ground_image.dense"),
        ("grounding_token_projection", "ground_text.dense"),
        ("cmcl_pooled_fc_image", "contrast_image.dense"),
        ("cmcl_pooled_fc_text", "contrast_text.dense"),
        ("pooled_fc_image", "image_pool.dense"),
        ("pooled_fc_text", "text_pool.dense"),
        ("img_text_matching_fc", "matching.dense"),
    ):
        rules += _unimo2_dense(ours, f"grounded.{theirs}", ours)
    rules += _unimo2_dense("masked_token.dense", "grounded.mask_lm_trans_fc", "masked_token")
    rules += _unimo2_norm("masked_token.norm", "grounded.mask_lm_trans_layer_norm", "masked_token")
    rules.append(_copy("masked_token.bias", "grounded.mask_lm_out_fc.b_0", section="masked_token"))
    return tuple(rules)


def _unimo2_norm(target: str, source: str, section: str) -> list[Rule]:
    parts = (("weight", "scale"), ("bias", "bias"))
    return [_copy(f"{target}.{ours}", f"{source}_{theirs}", section=section) for ours, theirs in parts]


def _unimo2_dense(target: str, source: str, section: str) -> list[Rule]:
    return [
        Rule(f"{target}.weight", (f"{source}.w_0",), torch.t, section),
        _copy(f"{target}.bias", f"{source}.b_0", section=section),
    ]


def _copy(target: str, source: str, *, section: str = "", optional: bool = False) -> Rule:
    return Rule(target, (source,), _same, section, optional)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _stack_transposed(*parts: Tensor) -> Tensor:
    return torch.cat([part.T for part in parts])


def _add_first_row(table: Tensor, types: Tensor) -> Tensor:
    return table + types[0]
