"""parity.py on sizes, masks, flags and temperatures that the original's files do not have.

What it is held against is a second implementation, of the specification's text alone, in plain masks, one padded batch
and float64. It gives the numbers of the original's files, and then makes files of other kinds.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlblocks_recipes.unimo2 import parity


def spec_dense(p, name, x):
    return x @ p[f"{name}.w_0"] + p[f"{name}.b_0"]


def spec_norm(p, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}_scale"], p[f"{name}_bias"], eps)


def spec_attention(p, name, x, allowed, heads):
    q, k, v = (
        spec_dense(p, f"{name}_multi_head_att_{part}_fc", x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + (allowed[:, None] - 1) * 1e4
    return spec_dense(p, f"{name}_multi_head_att_output_fc", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def spec_tower(p, name, x, allowed, config):
    prefix = {"vit": "vit_", "text": "text_", "grounded": ""}[name]
    heads = config[f"{prefix}num_attention_heads"]
    for number in range(config[f"{prefix}num_hidden_layers"]):
        layer = f"{name}.encoder_layer_{number}"

        def feed_forward(x, layer=layer):
            return spec_dense(p, f"{layer}_ffn_fc_1", F.gelu(spec_dense(p, f"{layer}_ffn_fc_0", x)))

        if name == "vit":
            normed = spec_norm(p, f"{layer}_pre_att_layer_norm", x, 1e-12)
            x = x + spec_attention(p, layer, normed, allowed, heads)
            x = x + feed_forward(spec_norm(p, f"{layer}_pre_ffn_layer_norm", x, 1e-12))
        else:
            x = spec_norm(p, f"{layer}_post_att_layer_norm", x + spec_attention(p, layer, x, allowed, heads))
            x = spec_norm(p, f"{layer}_post_ffn_layer_norm", x + feed_forward(x))
    return spec_norm(p, "vit.post_encoder_layer_norm", x, 1e-12) if name == "vit" else x


def spec_image(p, given, patch):
    x = (given.permute(0, 3, 1, 2).to(p["vit.position_embeddings"].dtype)) / 127.5 - 1
    weight, bias = p["vit.patch_embeddings_projection_weight"], p["vit.patch_embeddings_projection_bias"]
    x = F.conv2d(x, weight, bias, stride=patch, padding=(patch - 1) // 2)
    table, grid = p["vit.position_embeddings"], x.shape[2:]
    side = math.isqrt(table.shape[1] - 1)
    if grid[0] * grid[1] > side * side:
        square = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        square = F.interpolate(square, tuple(grid), mode="bicubic", align_corners=False)
        table = torch.cat([table[:, :1], square.flatten(2).transpose(1, 2)], dim=1)
    cls = p["vit.cls_token_embeddings"].expand(len(x), -1, -1)
    return torch.cat([cls, x.flatten(2).transpose(1, 2)], dim=1) + table


def spec_codes(p, x, config):
    """Codes, indices and loss of tokens x [B, N, D]."""
    table = p["vq_emb"]
    if config["method"] == "normal":
        distance = (x**2).sum(-1, keepdim=True) + (table**2).sum(-1) - 2 * x @ table.T
        indices = distance.argmin(-1)
        codes = table[indices]
        return codes, indices, F.mse_loss(codes, x.detach()) + 0.25 * F.mse_loss(x, codes.detach())
    match = torch.sigmoid(p["topk_temperature"].clip(1, 10000) * x @ table.T)
    total = match.sum(1)
    indices = total.topk(config["topk"], dim=1).indices
    codes = table[indices]
    picked = match.gather(2, indices[:, None].expand(-1, x.shape[1], -1))
    v = picked.transpose(1, 2) @ x / (total.gather(1, indices)[..., None] + 1e-18)
    u = picked @ codes / (picked.sum(-1, keepdim=True) + 1e-18)
    return codes, indices, F.mse_loss(u, x.detach()) + 0.25 * F.mse_loss(v, codes.detach())


def spec_losses(p, config, inputs, image, text, joint, out):
    labels, multimodal = inputs["labels"].flatten(), inputs["is_multimodal"].flatten().to(image.dtype)
    features = [image[:, 0], text[:, 0]]
    if config["projection"]:
        names = ("cmcl_pooled_fc_image", "cmcl_pooled_fc_text")
        if config["share_projection"]:
            names = ("grounding_patch_projection", "grounding_token_projection")
        features = [F.relu(spec_dense(p, f"grounded.{n}", f)) for n, f in zip(names, features, strict=True)]
        features = [F.normalize(f, dim=-1) for f in features]
    elif config["method"] != "none":
        features[0] = F.normalize(features[0], dim=-1)
    out["cmcl_scores"] = (F.normalize(features[0], dim=-1) * features[1]).sum(-1, keepdim=True)
    out["pooled_text"] = F.relu(spec_dense(p, "grounded.pooled_fc_text", joint["text"][:, 0]))
    out["pooled_image"] = F.relu(spec_dense(p, "grounded.pooled_fc_image", joint["image"][:, 0]))
    logits = spec_dense(p, "grounded.img_text_matching_fc", out["pooled_text"] * out["pooled_image"])
    out["itm_loss"] = (F.cross_entropy(logits, labels, reduction="none") * multimodal).sum() / multimodal.sum()
    scores = features[0] @ features[1].T / p["cmcl_temperature"].clip(0.001, 0.5)
    own = torch.arange(len(scores))
    both = (F.cross_entropy(scores, own, reduction="none") + F.cross_entropy(scores.T, own, reduction="none")) / 2
    out["cmcl_loss"] = (both * labels * multimodal).mean()


def spec_masked_words(p, inputs, states):
    place = inputs["mask_pos"]
    x = F.gelu(spec_dense(p, "grounded.mask_lm_trans_fc", states.flatten(0, 1)[place]))
    x = spec_norm(p, "grounded.mask_lm_trans_layer_norm", x)
    logits = x @ p["text.word_embedding"].T + p["grounded.mask_lm_out_fc.b_0"]
    weight = (inputs["lm_flag"] * inputs["with_text"][place // states.shape[1]]).flatten().to(states.dtype)
    return (F.cross_entropy(logits, inputs["mask_label"].flatten(), reduction="none") * weight).sum() / weight.sum()


SEES = {
    "pairs": {"image": "image codes", "codes": "image codes text", "text": "codes text"},
    "none": {"image": "image text", "text": "image text"},
    "caption": {"image": "image codes", "codes": "image codes", "text": "image codes text"},
}


def spec_forward(config, p, inputs):
    """Every output of the original for parameters under its names, any dtype."""
    out, states, real = {}, {}, {}
    dtype = p["text.word_embedding" if "src_ids" in inputs else "vit.position_embeddings"].dtype
    caption = "text_mask" in inputs and inputs["text_mask"].shape[1] > 1
    if "image_u8" in inputs:
        real["image"] = inputs["image_mask"][:, 0].to(dtype)
        allowed = real["image"][:, :, None] * real["image"][:, None]
        states["image"] = spec_tower(p, "vit", spec_image(p, inputs["image_u8"], config["resolution"]), allowed, config)
        out["vit_out"] = states["image"]
    if "src_ids" in inputs:
        x = p["text.word_embedding"][inputs["src_ids"][..., 0]] + p["text.pos_embedding"][inputs["pos_ids"][..., 0]]
        given = inputs["text_mask"].to(dtype)
        real["text"] = given.amax(2) if caption else given[:, 0]
        text_allowed = given if caption else given.transpose(1, 2) * given
        states["text"] = spec_tower(p, "text", spec_norm(p, "text.pre_encoder_layer_norm", x), text_allowed, config)
        out["text_out"] = states["text"]
    entering = dict(states)
    if config["method"] != "none":
        tokens = []
        for name, kind in (("image", "patch"), ("text", "token")):
            if name in states and not (caption and name == "text"):
                x = states[name][:, 1:]
                if config["projection"]:
                    x = F.normalize(F.relu(spec_dense(p, f"grounded.grounding_{kind}_projection", x)), dim=-1)
                tokens.append(x)
        out["grounded"], out["indices"], loss = spec_codes(p, torch.cat(tokens, dim=1), config)
        if not caption:
            out["vq_loss"] = loss
        codes = out["grounded"]
        if config["grounding_pos"]:
            codes = codes + p["text.pos_embedding"][2 : 2 + codes.shape[1]]
        entering["codes"] = spec_norm(p, "grounded.pre_encoder_layer_norm", codes)
        real["codes"] = torch.ones(codes.shape[:2], dtype=dtype)

    order = [name for name in ("image", "codes", "text") if name in entering]
    table = SEES["caption" if caption else "none" if config["method"] == "none" else "pairs"]
    rows = [
        torch.cat(
            [
                text_allowed
                if caption and query == key == "text"
                else real[query][:, :, None] * real[key][:, None] * (key in table[query].split())
                for key in order
            ],
            dim=2,
        )
        for query in order
    ]
    x = spec_tower(p, "grounded", torch.cat([entering[n] for n in order], dim=1), torch.cat(rows, dim=1), config)
    joint = dict(zip(order, x.split([entering[name].shape[1] for name in order], dim=1), strict=True))
    for name, short in (("image", "v"), ("codes", "g"), ("text", "l")):
        if name in joint:
            out[f"enc_{short}"] = joint[name]
    if "image" in joint and "text" in joint and not caption:
        spec_losses(p, config, inputs, states["image"], states["text"], joint, out)
    if "mask_pos" in inputs:
        out["mlm_loss"] = spec_masked_words(p, inputs, joint["text"])
    losses = [value for name, value in out.items() if name.endswith("_loss")]
    return out | ({"total_loss": sum(losses)} if losses else {})


def check_against(path):
    golden = parity.read_golden(path)
    out = spec_forward(golden.config, {name: value.double() for name, value in golden.params.items()}, golden.inputs)
    assert torch.equal(out["indices"], golden.outputs["indices"]) if "indices" in out else "indices" not in out
    assert out.keys() == golden.outputs.keys()
    for name, theirs in golden.outputs.items():
        tolerance = {"atol": 0.0, "rtol": 1e-5} if name.endswith("_loss") else {"atol": 2e-3, "rtol": 0.0}
        torch.testing.assert_close(out[name].reshape(theirs.shape), theirs, check_dtype=False, **tolerance)


@pytest.mark.parametrize("case", ["image_topk", "pairs_no_grounding", "text_topk"])
def test_the_second_implementation_gives_the_shipped_numbers(root, case):
    check_against(root / f"tests/golden/{case}.npz")


def test_the_second_implementation_gives_all_the_originals_numbers(reference):
    paths = sorted((reference / "golden/unimo2").glob("*.npz"))
    assert len(paths) >= 10
    for path in paths:
        check_against(path)


def draw_weights(config, sizes, generator):
    """Random parameters [in, out] under the original's names."""
    width, p = config["hidden_size"], {}

    def normal(name, *shape, scale=0.1, mean=0.0):
        p[name] = mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def dense(name, *shape):
        normal(f"{name}.w_0", *shape, scale=1.2 * shape[0] ** -0.5)
        normal(f"{name}.b_0", shape[1])

    def norm(name):
        normal(f"{name}_scale", width, mean=sizes["norm"])
        normal(f"{name}_bias", width)

    towers = {"vit": ("vit_", "pre"), "text": ("text_", "post"), "grounded": ("", "post")}
    for tower in sizes["towers"]:
        prefix, place = towers[tower]
        for number in range(config[f"{prefix}num_hidden_layers"]):
            layer = f"{tower}.encoder_layer_{number}"
            for part in ("query", "key", "value", "output"):
                dense(f"{layer}_multi_head_att_{part}_fc", width, width)
            dense(f"{layer}_ffn_fc_0", width, sizes["hidden"])
            dense(f"{layer}_ffn_fc_1", sizes["hidden"], width)
            norm(f"{layer}_{place}_att_layer_norm")
            norm(f"{layer}_{place}_ffn_layer_norm")
    if "vit" in sizes["towers"]:
        normal("vit.patch_embeddings_projection_weight", width, 3, config["resolution"], config["resolution"])
        normal("vit.patch_embeddings_projection_bias", width)
        normal("vit.cls_token_embeddings", 1, 1, width, scale=1.0)
        normal("vit.position_embeddings", 1, 1 + sizes["side"] ** 2, width, scale=0.5)
        norm("vit.post_encoder_layer_norm")
    if "text" in sizes["towers"]:
        normal("text.word_embedding", config["text_vocab_size"], width, scale=1.0)
        normal("text.pos_embedding", config["text_max_position_embeddings"], width, scale=1.0)
        norm("text.pre_encoder_layer_norm")
        dense("grounded.mask_lm_trans_fc", width, width)
        norm("grounded.mask_lm_trans_layer_norm")
        normal("grounded.mask_lm_out_fc.b_0", config["text_vocab_size"])
    if config["projection"]:
        heads = ["grounding_patch_projection", "grounding_token_projection"]
        if not config["share_projection"]:
            heads += ["cmcl_pooled_fc_image", "cmcl_pooled_fc_text"]
        for name in heads:
            dense(f"grounded.{name}", width, width)
    norm("grounded.pre_encoder_layer_norm")
    dense("grounded.pooled_fc_text", width, width)
    dense("grounded.pooled_fc_image", width, width)
    dense("grounded.img_text_matching_fc", width, 2)
    normal("vq_emb", config["num_codebook"], width, scale=sizes["code"] * width**-0.5)
    p["topk_temperature"] = torch.tensor([sizes["topk_temperature"]], dtype=torch.float64)
    p["cmcl_temperature"] = torch.tensor([sizes["cmcl_temperature"]], dtype=torch.float64)
    # What a file holds is float32; both sides start from those numbers.
    return {name: value.float().double() for name, value in p.items()}


def draw_inputs(config, sizes, generator, *, lens, hidden_patches=0, flags=False, visibility=None):
    """One batch, flags and masks included; `lens` [B] are the texts' lengths, empty without texts."""
    rows, inputs = sizes["rows"], {}
    if "vit" in sizes["towers"]:
        side = sizes["image_size"]
        grid = (side + 2 * ((config["resolution"] - 1) // 2) - config["resolution"]) // config["resolution"] + 1
        inputs["image_u8"] = torch.randint(256, (rows, side, side, 3), generator=generator, dtype=torch.uint8)
        inputs["image_mask"] = torch.ones(rows, 1, 1 + grid * grid)
        if hidden_patches:
            inputs["image_mask"][0, 0, -hidden_patches:] = 0
            inputs["image_mask"][-1, 0, 2:4] = 0
    if lens:
        length = max(lens)
        real = torch.arange(length) < torch.tensor(lens)[:, None]
        words = torch.randint(4, config["text_vocab_size"], (rows, length), generator=generator)
        inputs["src_ids"] = torch.where(real, words, 1)[..., None]
        inputs["pos_ids"] = torch.where(real, torch.arange(length) + 2, 1)[..., None]
        inputs["text_mask"] = real[:, None].float() if visibility is None else visibility(real).float()
        if visibility is None:
            place = torch.tensor([row * length + column for row in range(rows) for column in (1, 3)])
            inputs["mask_pos"] = place
            inputs["mask_label"] = torch.randint(config["text_vocab_size"], (len(place), 1), generator=generator)
            inputs["lm_flag"] = torch.ones(len(place), 1)
            inputs["with_text"] = torch.ones(rows, 1)
            inputs["labels"] = (torch.arange(rows)[:, None] % 3 != 2).long()
            inputs["is_multimodal"] = torch.ones(rows, 1)
            if flags:
                inputs["lm_flag"][::3], inputs["with_text"][1], inputs["is_multimodal"][0] = 0, 0, 0
    return inputs


def prefix_masks(real):
    """Causal text whose first tokens, another number in each row, see one another; padded rows see nothing."""
    rows, length = real.shape
    place = torch.arange(length)
    prefix = (torch.arange(rows) * 2 + 1)[:, None, None]
    return real[:, :, None] & real[:, None] & ((place[None, :] <= place[:, None]) | (place < prefix))


def odd_masks(real):
    """Visibility that is no prefix mask: every token sees itself and the even ones, later ones too."""
    place = torch.arange(real.shape[1])
    return real[:, :, None] & real[:, None] & ((place[None, :] % 2 == 0) | (place[None, :] == place[:, None]))


TEXT, IMAGE = {"towers": ("text", "grounded")}, {"towers": ("vit", "grounded")}
VARIATIONS = {
    "heads and layers per tower": {"lens": [9, 6, 4]},
    "masked patches and flags": {"lens": [7, 7, 5], "hidden_patches": 6, "flags": True},
    "projections of their own": {"config": {"projection": True, "share_projection": False}, "lens": [8, 5, 8]},
    "shared projections, positions": {
        "config": {"projection": True, "share_projection": True, "grounding_pos": True},
        "lens": [8, 5, 8],
        "hidden_patches": 3,
    },
    "temperatures above their ranges": {
        # With larger codes every sigmoid would be 0 or 1, and the counts of ones would tie.
        "sizes": {"topk_temperature": 12000.0, "cmcl_temperature": 0.9, "code": 3e-4},
        "lens": [6, 6, 4],
    },
    "temperatures below their ranges": {
        "sizes": {"topk_temperature": 0.2, "cmcl_temperature": -0.3},
        "lens": [6, 6, 4],
    },
    "all codes picked": {"config": {"topk": 24}, "lens": [6, 6, 4]},
    "one code": {"config": {"topk": 1}, "lens": [6, 3, 4]},
    "nearest, padded, flags": {
        "config": {"method": "normal", "topk": 1},
        "lens": [6, 3, 5],
        "hidden_patches": 2,
        "flags": True,
    },
    "nearest, projected": {"config": {"method": "normal", "topk": 1, "projection": True}, "lens": [6, 3, 5]},
    "no codes, padded, flags": {
        "config": {"method": "none", "topk": 0},
        # The contrast of states that nothing normalises: with larger ones its loss would be 1e-13.
        "sizes": {"cmcl_temperature": 0.4, "norm": 0.3},
        "lens": [6, 3, 5],
        "hidden_patches": 2,
        "flags": True,
    },
    "text alone, padded": {"sizes": TEXT, "lens": [9, 2, 5], "flags": True},
    "text alone, projected": {"sizes": TEXT, "config": {"projection": True, "grounding_pos": True}, "lens": [5, 7, 5]},
    "larger image alone, odd patch": {
        "sizes": {"towers": ("vit", "grounded"), "image_size": 35},
        "config": {"resolution": 5},
        "lens": [],
        "hidden_patches": 7,
    },
    "image alone, nearest": {"sizes": IMAGE, "config": {"method": "normal"}, "lens": [], "hidden_patches": 7},
    "captioning with prefixes": {"lens": [9, 6, 7], "visibility": prefix_masks},
    "captioning, masked patches": {"lens": [9, 6, 7], "visibility": prefix_masks, "hidden_patches": 4},
    "captioning, other visibility": {"lens": [8, 5, 6], "visibility": odd_masks},
    "captioning, nearest": {"config": {"method": "normal"}, "lens": [8, 5, 6], "visibility": prefix_masks},
}


def write_variation(path, seed, *, config=None, sizes=None, **inputs):
    heads = {"vit_num_attention_heads": 2, "text_num_attention_heads": 4, "num_attention_heads": 8}
    layers = {"vit_num_hidden_layers": 1, "text_num_hidden_layers": 3, "num_hidden_layers": 2}
    fixed = {"hidden_size": 24 if seed % 2 else 40, "text_vocab_size": 37, "text_max_position_embeddings": 44}
    fixed |= {"resolution": 8, "num_codebook": 24, "method": "topk", "topk": 5, "vit_layer_norm_eps": 1e-12}
    fixed |= {"projection": False, "share_projection": False, "grounding_pos": False}
    config = fixed | heads | layers | (config or {})
    usual = {"rows": 3, "image_size": 32, "side": 4, "hidden": 56, "towers": ("vit", "text", "grounded")}
    usual |= {"topk_temperature": 3.0, "cmcl_temperature": 0.07, "norm": 1.0, "code": 1.0}
    sizes = usual | (sizes or {})
    generator = torch.Generator().manual_seed(seed)
    params = {name: value.requires_grad_() for name, value in draw_weights(config, sizes, generator).items()}
    given = draw_inputs(config, sizes, generator, **inputs)
    out = spec_forward(config, params, given)
    grads = {}
    if "total_loss" in out:
        out["total_loss"].backward()
        # The softmax takes no notice of a key's bias: that gradient is rounding alone. In the other, terms cancel.
        noise = ("key_fc.b_0", "img_text_matching_fc.b_0")
        grads = {n: p.grad for n, p in params.items() if p.grad is not None and not n.endswith(noise)}
    arrays = {"config": np.array(json.dumps(config))}
    for group, tensors in (("param", params), ("in", given), ("out", out), ("grad", grads)):
        for name, value in tensors.items():
            value = value.detach()
            arrays[f"{group}.{name}"] = (value.float() if value.is_floating_point() else value).numpy()
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_hold(tmp_path, name, seed):
    path = write_variation(tmp_path / "variation.npz", seed, **VARIATIONS[name])
    rows = list(parity.compare(parity.read_golden(path)))
    with np.load(path) as file:
        compared = sum(key.startswith(("out.", "grad.")) for key in file.files)
    assert len(rows) >= compared > 0
    assert [row for row in rows if not row.ok] == []
