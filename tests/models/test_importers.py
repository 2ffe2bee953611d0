"""Imported weights compute what they computed at home, and every key is accounted for."""

import logging

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vlblocks.errors import UserError
from vlblocks.models import ImageTower, TextTower
from vlblocks.models.importers import (
    import_hf_roberta,
    import_state,
    import_timm_vit,
    import_unimo2,
    load_imported,
)
from vlblocks.models.key_maps import Rule
from vlblocks.nn import MaskedTokenHead, PatchEmbed, TextEmbed, Transformer, uniform_layers

WIDTH, HEADS, LAYERS = 24, 3, 2


def random_weights(module):
    """Away from the start's ones and zeros, which would hide a norm or a bias that is not copied."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def timm_vit(**options):
    size = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": LAYERS, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **size | options)
    return random_weights(model).eval()


def image_tower(image_size=32, layer_scale=None, patch_size=16, qk_norm=False):
    layers = uniform_layers(
        width=WIDTH, heads=HEADS, hidden=4 * WIDTH, norm="pre", norm_eps=1e-6, layer_scale=layer_scale
    )
    return ImageTower(
        patch_embed=PatchEmbed(patch_size=patch_size, width=WIDTH),
        transformer=Transformer(layers=LAYERS, make_layer=layers, norm=nn.LayerNorm(WIDTH, eps=1e-6)),
        width=WIDTH,
        image_size=image_size,
    ).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.1}, {"qkv_bias": False}, {"no_embed_class": True}],
    ids=["plain", "layer scale", "no qkv bias", "no class position"],
)
def test_timm_vit_computes_the_same(options):
    theirs, images = timm_vit(**options), torch.randn(2, 3, 32, 32)
    ours = image_tower(layer_scale=options.get("init_values"))
    imported = import_timm_vit(theirs.state_dict())
    report = load_imported(ours, imported)
    assert report.missing == imported.missing == []
    assert report.unused == ["head.weight", "head.bias"]
    assert report.loaded and set(report.loaded) == set(ours.state_dict())
    assert len(report.filled) == (LAYERS if options.get("qkv_bias") is False else 0)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=2e-5, rtol=1e-5)


def test_timm_vit_on_rectangles_and_other_grids():
    theirs = timm_vit(img_size=(32, 64))
    with pytest.raises(UserError, match="source_grid: 8 positions are no square grid"):
        import_timm_vit({**theirs.state_dict(), "pos_embed": torch.zeros(1, 8, WIDTH)})
    imported = import_timm_vit(theirs.state_dict(), source_grid=(2, 4))
    ours = image_tower((32, 64))
    load_imported(ours, imported)
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=2e-5, rtol=1e-5)

    square = timm_vit()
    larger = image_tower(64)
    load_imported(larger, import_timm_vit(square.state_dict(), grid=(4, 4)))
    resized = image_tower(32)
    load_imported(resized, import_timm_vit(square.state_dict()))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(larger(images), resized(images), atol=1e-5, rtol=1e-5)


def test_timm_vit_with_prefixes_and_pooled_norm():
    theirs = timm_vit(global_pool="avg")
    state = {f"visual.trunk.{key}": value for key, value in theirs.state_dict().items()} | {
        "logit_scale": torch.ones(1)
    }
    imported = import_timm_vit(state, prefix="visual.trunk.", into="image.")
    assert imported.missing == ["visual.trunk.norm.weight", "visual.trunk.norm.bias"]
    heads = ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert sorted(imported.unused) == sorted([f"visual.trunk.{key}" for key in heads] + ["logit_scale"])
    assert all(key.startswith("image.") for key in imported.state)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "class token"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "register token"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "norm before the layers"),
        ("deit_tiny_distilled_patch16_224", {}, "distillation token"),
        ("beit_base_patch16_224", {}, "BEiT"),
    ],
)
def test_timm_variants_that_the_tower_cannot_compute_are_named(name, options, named):
    size = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": 1, "img_size": 32}
    model = timm.create_model(name, pretrained=False, **size | options)
    with pytest.raises(UserError, match=named):
        import_timm_vit(model.state_dict())


def test_a_state_dict_of_something_else_is_named():
    other = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight: not in the state dict.*conv1\.weight"):
        import_timm_vit(other)
    with pytest.raises(UserError, match=r"word_embeddings\.weight: not in the state dict"):
        import_hf_roberta(other)
    with pytest.raises(UserError, match="UNIMO-2"):
        import_unimo2(other)


VOCAB, POSITIONS = 30, 14


def roberta_state(prefix="roberta.", head=True):
    """A RoBERTa state dict as Hugging Face names it, with random weights."""
    state = {}

    def dense(name, out, inner):
        state[f"{name}.weight"], state[f"{name}.bias"] = 0.3 * torch.randn(out, inner), 0.3 * torch.randn(out)

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(WIDTH), torch.randn(WIDTH)

    embeddings = f"{prefix}embeddings."
    state[f"{embeddings}word_embeddings.weight"] = torch.randn(VOCAB, WIDTH)
    state[f"{embeddings}position_embeddings.weight"] = torch.randn(POSITIONS, WIDTH)
    state[f"{embeddings}token_type_embeddings.weight"] = torch.randn(1, WIDTH)
    norm(f"{embeddings}LayerNorm")
    for n in range(LAYERS):
        layer = f"{prefix}encoder.layer.{n}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            dense(layer + name, WIDTH, WIDTH)
        norm(f"{layer}attention.output.LayerNorm")
        dense(f"{layer}intermediate.dense", 4 * WIDTH, WIDTH)
        dense(f"{layer}output.dense", WIDTH, 4 * WIDTH)
        norm(f"{layer}output.LayerNorm")
    if head:
        dense("lm_head.dense", WIDTH, WIDTH)
        norm("lm_head.layer_norm")
        state["lm_head.bias"] = torch.randn(VOCAB)
        state["lm_head.decoder.weight"] = state[f"{embeddings}word_embeddings.weight"]
        state["lm_head.decoder.bias"] = state["lm_head.bias"]
    return state


def roberta_forward(state, tokens, prefix="roberta."):
    """RoBERTa written out: states [B, T, D] and, with a head, logits [B, T, vocab]."""

    def dense(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def table(name):
        return state[f"{prefix}embeddings.{name}.weight"]

    real = tokens != 1
    places = torch.where(real, real.cumsum(1) + 1, 1)
    x = table("word_embeddings")[tokens] + table("position_embeddings")[places] + table("token_type_embeddings")[0]
    x = norm(f"{prefix}embeddings.LayerNorm", x)
    for n in range(LAYERS):
        layer = f"{prefix}encoder.layer.{n}."
        q, k, v = (
            dense(f"{layer}attention.self.{name}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        logits = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        weights = logits.masked_fill(~real[:, None, None], float("-inf")).softmax(-1)
        attended = dense(f"{layer}attention.output.dense", (weights @ v).transpose(1, 2).flatten(2))
        x = norm(f"{layer}attention.output.LayerNorm", x + attended)
        hidden = F.gelu(dense(f"{layer}intermediate.dense", x))
        x = norm(f"{layer}output.LayerNorm", x + dense(f"{layer}output.dense", hidden))
    if "lm_head.bias" not in state:
        return x, None
    logits = norm("lm_head.layer_norm", F.gelu(dense("lm_head.dense", x))) @ table("word_embeddings").T
    return x, logits + state["lm_head.bias"]


class TextModel(nn.Module):
    def __init__(self):
        super().__init__()
        layers = uniform_layers(width=WIDTH, heads=HEADS, hidden=4 * WIDTH, norm="post", norm_eps=1e-5)
        self.text = TextTower(
            embed=TextEmbed(vocab=VOCAB, width=WIDTH, positions=POSITIONS),
            transformer=Transformer(layers=LAYERS, make_layer=layers),
        )
        self.masked_token = MaskedTokenHead(width=WIDTH, vocab=VOCAB, norm_eps=1e-5)


TOKENS = torch.tensor([[0, 5, 9, 7, 2, 1, 1], [0, 4, 4, 8, 11, 29, 2]])


def test_roberta_with_its_head_computes_the_same():
    state, model = roberta_state(), TextModel().eval()
    report = load_imported(model, import_hf_roberta(state, into="text.", head_into="masked_token."))
    assert report.missing == report.unused == []
    real = TOKENS != 1
    with torch.no_grad():
        states, logits = roberta_forward(state, TOKENS)
        ours = model.text(TOKENS, real)
        torch.testing.assert_close(ours[real], states[real], atol=2e-5, rtol=1e-5)
        ours = model.masked_token(ours[real], model.text.embed.word.weight)
        torch.testing.assert_close(ours, logits[real], atol=1e-4, rtol=1e-5)


def test_roberta_without_prefix_or_head_reports_what_is_over():
    state, tower = roberta_state(prefix="", head=False), TextModel().eval().text
    state["embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    state["pooler.dense.weight"] = torch.zeros(WIDTH, WIDTH)
    report = load_imported(tower, import_hf_roberta(state))
    assert report.missing == []
    assert report.unused == ["embeddings.position_ids", "pooler.dense.weight"]
    with torch.no_grad():
        states, _ = roberta_forward(state, TOKENS[1:], prefix="")
        torch.testing.assert_close(tower(TOKENS[1:]), states, atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="lm_head"):
        import_hf_roberta(state, head_into="masked_token.")


def test_roberta_output_weights_of_their_own_are_not_dropped_silently():
    state = roberta_state()
    state["lm_head.decoder.weight"] = torch.randn(VOCAB, WIDTH)
    assert import_hf_roberta(state, head_into="").unused == ["lm_head.decoder.weight"]
    heads = {key for key in state if key.startswith("lm_head.")}
    assert set(import_hf_roberta(state).unused) == heads


def test_roberta_positions_can_be_cut():
    state = roberta_state()
    table = import_hf_roberta(state, positions=6).state["embed.position.weight"]
    expected = state["roberta.embeddings.position_embeddings.weight"][:6]
    assert torch.equal(table, expected + state["roberta.embeddings.token_type_embeddings.weight"])
    with pytest.raises(UserError, match=f"positions: 99 asked for, the source has {POSITIONS}"):
        import_hf_roberta(state, positions=99)


def test_missing_and_misshapen_keys_are_named(caplog):
    state = roberta_state(head=False)
    gone = ["roberta.encoder.layer.1.attention.self.key.bias", "roberta.encoder.layer.0.output.dense.weight"]
    imported = import_hf_roberta({key: value for key, value in state.items() if key not in gone} | {"x": torch.ones(1)})
    assert sorted(imported.missing) == sorted(gone)
    # The query and value that lost their key are not used either.
    assert "roberta.encoder.layer.1.attention.self.query.bias" in imported.unused and "x" in imported.unused
    tower = TextModel().text
    with caplog.at_level(logging.WARNING):
        report = load_imported(tower, imported)
    assert set(report.missing) == {"transformer.layers.1.attn.qkv.bias", "transformer.layers.0.mlp.fc2.weight"}
    for name in [*report.missing, *report.unused]:
        assert name in caplog.text

    imported.state["embed.norm.weight"] = torch.ones(WIDTH + 1)
    with pytest.raises(UserError, match=r"embed.norm.weight: the imported tensor is \[25\], the model's \[24\]"):
        load_imported(tower, imported)
    state["roberta.encoder.layer.0.attention.self.key.weight"] = torch.zeros(WIDTH, WIDTH + 2)
    with pytest.raises(UserError, match=r"self\.key\.weight.*is the state dict whole"):
        import_hf_roberta(state)


def test_a_hole_among_the_layers_is_missing():
    rules = (Rule("layers.{n}.w", ("h.{n}.w",), torch.clone), Rule("head", ("head",), torch.clone, "head"))
    source = {"h.0.w": torch.zeros(1), "h.2.w": torch.ones(1)}
    imported = import_state(source, rules)
    assert list(imported.state) == ["layers.0.w", "layers.2.w"]
    assert imported.missing == ["h.1.w"]  # and not the head, which is absent as a whole


def golden_params(path):
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key.startswith("param.")}


def test_unimo2_names_every_parameter_of_the_original(reference):
    for path in sorted((reference / "golden" / "unimo2").glob("*.npz")):
        params = golden_params(path)
        imported = import_unimo2(params, prefix="param.")
        assert imported.unused == imported.missing == [], path.name
        # Nothing is dropped or doubled on the way: the same numbers, in other places.
        assert sum(t.numel() for t in imported.state.values()) == sum(t.numel() for t in params.values())


def unimo2_state():
    """Original names and layouts, by hand, for a model of one layer per tower."""
    state = {"vit.position_embeddings": torch.randn(1, 197, WIDTH), "vq_emb": torch.randn(7, WIDTH)}
    for tower, norms in (("vit", "pre"), ("text", "post"), ("grounded", "post")):
        layer = f"{tower}.encoder_layer_0_"
        for name in ("query", "key", "value", "output"):
            state[f"{layer}multi_head_att_{name}_fc.w_0"] = torch.randn(WIDTH, WIDTH)
            state[f"{layer}multi_head_att_{name}_fc.b_0"] = torch.randn(WIDTH)
        for i, (inner, out) in enumerate(((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))):
            state[f"{layer}ffn_fc_{i}.w_0"], state[f"{layer}ffn_fc_{i}.b_0"] = torch.randn(inner, out), torch.randn(out)
        for part in ("att", "ffn"):
            for kind in ("scale", "bias"):
                state[f"{layer}{norms}_{part}_layer_norm_{kind}"] = torch.randn(WIDTH)
    state["grounded.cmcl_pooled_fc_image.w_0"] = torch.randn(WIDTH, WIDTH)
    state["grounded.cmcl_pooled_fc_image.b_0"] = torch.randn(WIDTH)
    return state


def test_unimo2_dense_weights_are_turned_and_attention_is_fused():
    source = unimo2_state()
    imported = import_unimo2(source)
    state = imported.state
    x = torch.randn(5, WIDTH)
    for theirs, ours in (("vit", "image"), ("text", "text"), ("grounded", "joint")):
        layer, target = f"{theirs}.encoder_layer_0_", f"{ours}.transformer.layers.0."
        fused = F.linear(x, state[f"{target}attn.qkv.weight"], state[f"{target}attn.qkv.bias"]).split(WIDTH, dim=-1)
        for name, part in zip(("query", "key", "value"), fused, strict=True):
            weight, bias = (source[f"{layer}multi_head_att_{name}_fc.{kind}"] for kind in ("w_0", "b_0"))
            torch.testing.assert_close(part, x @ weight + bias)
        up = F.linear(x, state[f"{target}mlp.fc1.weight"], state[f"{target}mlp.fc1.bias"])
        torch.testing.assert_close(up, x @ source[f"{layer}ffn_fc_0.w_0"] + source[f"{layer}ffn_fc_0.b_0"])
        kind = "pre" if theirs == "vit" else "post"
        assert torch.equal(state[f"{target}norm1.weight"], source[f"{layer}{kind}_att_layer_norm_scale"])
        assert torch.equal(state[f"{target}norm2.bias"], source[f"{layer}{kind}_ffn_layer_norm_bias"])
    assert torch.equal(state["contrast_image.dense.weight"], source["grounded.cmcl_pooled_fc_image.w_0"].T)
    # Towers are there in part, so what they lack is named; heads that are absent as a whole are not.
    assert {"vit.cls_token_embeddings", "text.word_embedding"} <= set(imported.missing)
    assert not any(key.startswith("grounded.mask_lm") for key in imported.missing)


def test_unimo2_keeps_gradients_and_resizes_positions():
    source = {key: value.requires_grad_() for key, value in unimo2_state().items()}
    imported = import_unimo2(source, grid=(16, 16))
    assert imported.state["image.positions"].shape == (1, 257, WIDTH)
    torch.stack([tensor.sum() for tensor in imported.state.values()]).sum().backward()
    assert all(tensor.grad is not None for tensor in source.values())
