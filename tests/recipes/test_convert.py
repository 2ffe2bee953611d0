"""convert.py: the original's weights give the original's numbers, every key is told of, and nothing is half done."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vlblocks.data import train_tokenizer
from vlblocks.errors import UserError
from vlblocks_recipes.unimo2 import convert, parity, predict, train
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2.configs import RunConfig
from vlblocks_recipes.unimo2.runs import load_base_run, load_run

SHIPPED = ("image_topk", "pairs_no_grounding", "text_topk")
OTHERS = (
    *("caption_seq2seq", "pairs_image256", "pairs_nearest", "pairs_positions", "pairs_projection", "pairs_topk"),
    "pairs_topk_padded",
)


def golden(path):
    """Configuration and weights of a golden file."""
    with np.load(path) as file:
        weights = {key.removeprefix("param."): file[key] for key in file.files if key.startswith("param.")}
        return json.loads(str(file["config"])), weights


def write_folder(folder, weights):
    """A file for each parameter, as Paddle writes them (the format itself is tested in tests/models)."""
    kinds = {"float16": 4, "float32": 5, "float64": 6, "int64": 3, "uint16": 22}
    folder.mkdir()
    for name, array in weights.items():
        described = bytes([0x08, kinds[array.dtype.name]])
        for size in array.shape:
            described += b"\x10" + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7]))
        head = struct.pack("<IQIi", 0, 0, 0, len(described))
        (folder / name).write_bytes(head + described + np.ascontiguousarray(array).tobytes())
    return folder


def write_pickle(path, weights):
    path.write_bytes(pickle.dumps(dict(weights), protocol=4))
    return path


@pytest.fixture
def source(tmp_path):
    """Weights and configuration written out: source(config, weights, form) is (SRC, --config FILE)."""

    def make(config, weights, form="pickle"):
        where = tmp_path / "original"
        where.mkdir()
        (where / "config.json").write_text(json.dumps(config))
        if form == "folder":
            return write_folder(where / "weights", weights), where / "config.json"
        return write_pickle(where / "model.pdparams", weights), where / "config.json"

    return make


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def converted(call, src, config, out, *flags):
    done = call(convert, src, "--config", config, "--out", out, *flags)
    assert done.code == 0, done.err
    return done


# The original's numbers


def holds(call, file, run):
    """parity.py says that a converted run gives a golden file's outputs and gradients."""
    done = call(parity, file, "--run", run)
    assert "FAIL" not in done.out and "within tolerance" in done.out, done
    return done.code == 0


@pytest.mark.parametrize("form", ["pickle", "folder"])
@pytest.mark.parametrize("case", SHIPPED)
def test_converted_weights_give_the_originals_numbers(root, tmp_path, call, source, case, form):
    file = root / f"tests/golden/{case}.npz"
    converted(call, *source(*golden(file), form), tmp_path / "run")
    assert holds(call, file, tmp_path / "run")


@pytest.mark.parametrize("case", OTHERS)
def test_so_do_those_of_every_reference_file(reference, tmp_path, call, source, case):
    file = reference / f"golden/unimo2/{case}.npz"
    converted(call, *source(*golden(file)), tmp_path / "run")
    assert holds(call, file, tmp_path / "run")


@pytest.mark.parametrize("form", ["per_parameter", "model.pdparams"])
def test_what_paddle_wrote_gives_the_numbers_of_text_topk(reference, tmp_path, call, form):
    file = reference / "golden/unimo2/text_topk.npz"
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(golden(file)[0]))
    converted(call, reference / "golden/paddle_checkpoint" / form, settings, tmp_path / "run")
    assert holds(call, file, tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["text.transformer.layers.1.attn.qkv.weight", "joint.code_norm.bias", "grounded.codebook"]
)
def test_parity_reads_the_converted_weights_and_not_the_files(root, tmp_path, call, source, name):
    file = root / "tests/golden/text_topk.npz"
    converted(call, *source(*golden(file)), tmp_path / "run")
    weights = load_file(tmp_path / "run/model.safetensors")
    weights[name] = weights[name] + 0.01
    save_file(weights, tmp_path / "run/model.safetensors")
    done = call(parity, file, "--run", tmp_path / "run")
    assert done.code == 1 and "FAIL" in done.out
    del weights[name]
    save_file(weights, tmp_path / "run/model.safetensors")
    one_line(call(parity, file, "--run", tmp_path / "run"), file, name)


@pytest.mark.parametrize("kind", ["float16", "float64", "bfloat16"])
@pytest.mark.parametrize("form", ["pickle", "folder"])
def test_other_precisions_become_float32(root, tmp_path, call, source, kind, form):
    config, weights = golden(root / "tests/golden/text_topk.npz")
    exact = {name: torch.from_numpy(array).to(getattr(torch, kind)) for name, array in weights.items()}
    if kind == "bfloat16":
        written = {name: tensor.view(torch.int16).numpy().view(np.uint16) for name, tensor in exact.items()}
    else:
        written = {name: tensor.numpy() for name, tensor in exact.items()}
    converted(call, *source(config, written, form), tmp_path / "run")
    found = load_file(tmp_path / "run/model.safetensors")
    assert all(found[name].dtype == torch.float32 for name in found if name != "grounded.tracker.counts")
    assert torch.equal(found["text.embed.word.weight"], exact["text.word_embedding"].float())
    turned = exact["grounded.encoder_layer_1_ffn_fc_0.w_0"].float().T
    assert torch.equal(found["joint.transformer.layers.1.mlp.fc1.weight"], turned)


# The report


def test_every_key_is_accounted_for(root, tmp_path, call, source):
    config, weights = golden(root / "tests/golden/text_topk.npz")
    weights |= {
        "text.word_embedding_moment1_0": np.zeros((80, 32), np.float32),
        "@LR_DECAY_COUNTER@": np.zeros(1, "i8"),
    }
    done = converted(call, *source(config, weights), tmp_path / "run")
    lines = done.out.splitlines()
    keys = {line.split()[1]: line for line in lines if line.startswith(("loaded ", "unused "))}
    assert keys.keys() == weights.keys()
    assert keys["text.word_embedding"] == "loaded  text.word_embedding [80, 32] -> text.embed.word.weight"
    for part in ("query", "key", "value"):
        key = f"grounded.encoder_layer_1_multi_head_att_{part}_fc.w_0"
        assert keys[key] == f"loaded  {key} [32, 32] -> joint.transformer.layers.1.attn.qkv.weight"
    unused = [key for key, line in keys.items() if line.startswith("unused")]
    assert sorted(unused) == ["@LR_DECAY_COUNTER@", "text.word_embedding_moment1_0"]
    missing = {line.split()[1] for line in lines if line.startswith("missing ")}
    assert missing == {f"{part}.*," for part in ("image", "image_pool", "text_pool", "matching", "masked_code")}
    assert "78 of 80 keys loaded, 2 unused" in lines[-2] and lines[-1] == str(tmp_path / "run")
    assert "no weights for image, image_pool, text_pool, matching, masked_code" in done.err
    # The loaded names are the file's, to the last one.
    named = {line.split(" -> ")[1] for line in lines if line.startswith("loaded ")}
    filled = {line.split()[1] for line in lines if line.startswith("filled ")}
    assert named | filled == load_file(tmp_path / "run/model.safetensors").keys()


def test_a_model_without_codes_is_known_by_its_weights(root, tmp_path, call, source):
    config, weights = golden(root / "tests/golden/pairs_no_grounding.npz")
    # The released JSON holds none of what the original takes from its command line.
    released = {key: config[key] for key in config if key not in ("method", "topk", "projection", "share_projection")}
    converted(
        call, *source({key: released[key] for key in released if key != "num_codebook"}, weights), tmp_path / "run"
    )
    assert holds(call, root / "tests/golden/pairs_no_grounding.npz", tmp_path / "run")


# A whole model, of sizes that a tokenizer can have


def normal(rng, *shape):
    return (0.2 * rng.standard_normal(shape)).astype(np.float32)


def original(width=64, vocab=300, codes=24, patch=16, patches=16, towers=("vit", "text", "grounded")):
    """Random weights of one layer per tower under the original's names."""
    rng, weights = np.random.default_rng(1), {}

    def dense(name, inner, out):
        weights[f"{name}.w_0"], weights[f"{name}.b_0"] = normal(rng, inner, out), normal(rng, out)

    def norm(name, size=width):
        weights[f"{name}_scale"], weights[f"{name}_bias"] = 1 + normal(rng, size), normal(rng, size)

    for tower in towers:
        layer, kind = f"{tower}.encoder_layer_0_", "pre" if tower == "vit" else "post"
        for part in ("query", "key", "value", "output"):
            dense(f"{layer}multi_head_att_{part}_fc", width, width)
        dense(f"{layer}ffn_fc_0", width, 3 * width)
        dense(f"{layer}ffn_fc_1", 3 * width, width)
        norm(f"{layer}{kind}_att_layer_norm")
        norm(f"{layer}{kind}_ffn_layer_norm")
    if "vit" in towers:
        weights["vit.patch_embeddings_projection_weight"] = normal(rng, width, 3, patch, patch)
        weights["vit.patch_embeddings_projection_bias"] = normal(rng, width)
        weights["vit.cls_token_embeddings"] = normal(rng, 1, 1, width)
        weights["vit.position_embeddings"] = normal(rng, 1, 1 + patches, width)
        norm("vit.post_encoder_layer_norm")
    if "text" in towers:
        weights["text.word_embedding"], weights["text.pos_embedding"] = (
            normal(rng, vocab, width),
            normal(rng, 40, width),
        )
        norm("text.pre_encoder_layer_norm")
    norm("grounded.pre_encoder_layer_norm")
    weights["vq_emb"], weights["topk_temperature"] = normal(rng, codes, width), np.full(1, 12.0, np.float32)
    weights["cmcl_temperature"] = np.full(1, 0.1, np.float32)
    for name, out in (("pooled_fc_text", width), ("pooled_fc_image", width), ("img_text_matching_fc", 2)):
        dense(f"grounded.{name}", width, out)
    return weights


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [
        f"a {a} square on {b} near the {c}, number {n}"
        for a in ("red", "green", "blue", "white")
        for b in ("red", "green", "blue", "white")
        for c in ("top", "bottom")
        for n in range(3)
    ]
    train_tokenizer(texts, 300, lowercase=True).save(path)
    return path


def test_without_a_configuration_sizes_are_read_off_the_weights(tmp_path, call):
    src = write_pickle(tmp_path / "model.pdparams", original())
    done = call(convert, src, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "run/config.json").read_text())
    model = config["model"]
    for tower in ("image", "text", "joint"):
        assert {**model[tower], "dropout": 0, "norm_eps": 0} == {
            **{"layers": 1, "heads": 1, "hidden": 192, "dropout": 0, "norm_eps": 0}
        }
    assert (model["width"], model["vocab"], model["positions"]) == (64, 300, 40)
    assert (model["image_size"], model["patch_size"], model["patch_padding"]) == (64, 16, 7)
    assert model["grounding"]["codes"] == 24 and model["grounding"]["picks"] == 24
    assert model["grounding"]["count_padding"] and model["masked_rows"] == "open"
    assert config["data"]["max_text"] == 38 and config["task"] == "pretrain"
    # Heads are nowhere in the weights.
    warnings = [line for line in done.err.splitlines() if "heads" in line]
    assert len(warnings) == 3 and all("taken as 1 (width / 64)" in line and "--config" in line for line in warnings)


def test_given_settings_are_taken_and_the_released_names_are_known(tmp_path, call, source):
    given = {"num_attention_heads": 2, "text_num_attention_heads": 4, "vit_num_attention_heads": 8}
    given |= {"grounding_method": "normal", "topk_value": 3, "with_grounding_pos": True, "vit_layer_norm_eps": 1e-6}
    given |= {"hidden_dropout_prob": 0.3, "image_size": 96}
    done = converted(call, *source(given, original()), tmp_path / "run")
    model = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert [model[tower]["heads"] for tower in ("joint", "text", "image")] == [2, 4, 8]
    assert [model[tower]["dropout"] for tower in ("joint", "text", "image")] == [0.3, 0.1, 0.0]
    assert model["grounding"]["method"] == "nearest" and model["grounding"]["positions"]
    assert model["image"]["norm_eps"] == 1e-6 and "heads" not in done.err
    # The original resizes its 4 x 4 grid for 96 pixels, as we do once and for all.
    assert model["image_size"] == 96
    assert load_file(tmp_path / "run/model.safetensors")["image.positions"].shape == (1, 37, 64)


def test_projections_are_known_by_their_weights(tmp_path, call):
    rng = np.random.default_rng(2)
    weights = original()
    for name in ("cmcl_pooled_fc_image", "cmcl_pooled_fc_text"):
        weights[f"grounded.{name}.w_0"], weights[f"grounded.{name}.b_0"] = normal(rng, 64, 64), normal(rng, 64)
    assert call(convert, write_pickle(tmp_path / "own.pdparams", weights), "--out", tmp_path / "own").code == 0
    model = json.loads((tmp_path / "own/config.json").read_text())["model"]
    assert model["contrast"] == {**model["contrast"], "width": 64, "activation": "relu", "share_grounding": False}
    assert not model["grounding"]["project"]
    for name in ("grounding_patch_projection", "grounding_token_projection"):
        weights[f"grounded.{name}.w_0"], weights[f"grounded.{name}.b_0"] = normal(rng, 64, 64), normal(rng, 64)
    assert call(convert, write_pickle(tmp_path / "both.pdparams", weights), "--out", tmp_path / "both").code == 0
    model = json.loads((tmp_path / "both/config.json").read_text())["model"]
    assert model["grounding"]["project"] and not model["contrast"]["share_grounding"]


@pytest.fixture
def whole(tmp_path, call, source, tokenizer):
    """A converted model with a tokenizer."""
    heads = {f"{tower}num_attention_heads": 2 for tower in ("", "text_", "vit_")}
    converted(call, *source(heads, original()), tmp_path / "run", "--tokenizer", tokenizer)
    return tmp_path / "run"


def test_a_converted_model_evaluates_predicts_and_trains_on(whole, squares, tmp_path, call):
    flags = ("--pairs", squares / "dataset_squares.json", "--images", squares / "images", "--rerank", "2")
    done = call(evaluation, "--run", whole, *flags)
    assert done.code == 0, done.err
    assert json.loads(done.out)["gallery_size"] == 12
    picture = squares / "images/val_00.png"
    done = call(predict, "score", "--run", whole, "--image", picture, "--caption", "a red square")
    assert done.code == 0, done.err

    small = ("--batch.pairs", "4", "--batch.images", "2", "--batch.texts", "2", "--data.max-text", "32")
    done = call(
        train, "--preset", "base", "--data.root", squares, "--init", whole, "--max-steps", "1", "--optim.lr", "0",
        *small, "--out", tmp_path / "on",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "no weights for masked_code" in done.out
    ours, theirs = load_file(tmp_path / "on/model.safetensors"), load_file(whole / "model.safetensors")
    learnt = [name for name in theirs if name != "grounded.tracker.counts"]
    assert all(torch.equal(ours[name], theirs[name]) for name in learnt)
    # The model is the checkpoint's, with what is odd about it, and not the preset's.
    assert load_run(tmp_path / "on")[1].config == load_run(whole)[1].config


def test_the_whole_forward_pass_survives_saving(whole):
    """What load_run gives is what the recipe's configuration class reads back, with nothing lost."""
    config, model, tokenizer = load_run(whole)
    assert isinstance(config, RunConfig) and tokenizer.vocab_size == 300 == model.config.vocab
    assert model.config.patch_padding == 7 and model.config.grounding.count_padding
    tensors = load_file(whole / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())


def test_absent_towers_are_allowed_where_nothing_needs_them(tmp_path, call, source, tokenizer):
    heads = {"num_attention_heads": 2, "text_num_attention_heads": 2}
    weights = {name: array for name, array in original(towers=("text", "grounded")).items() if "image" not in name}
    done = converted(
        call, *source({**heads, "vit_num_attention_heads": 2}, weights), tmp_path / "run", "--tokenizer", tokenizer
    )
    assert "missing image.*" in done.out and "no weights for" in done.err
    run = load_base_run(tmp_path / "run", needed=("text", "joint", "grounded"))
    assert run.max_text == 38
    with pytest.raises(UserError, match="has no weights for image, image_pool"):
        load_run(tmp_path / "run")
    outcome = call(predict, "score", "--run", tmp_path / "run", "--image", "x.png", "--caption", "a")
    one_line(outcome, tmp_path / "run/model.safetensors", "no weights for image")
    (tmp_path / "t.txt").write_text("red\nblue square\n")
    done = call(predict, "embed", "--run", tmp_path / "run", "--texts", tmp_path / "t.txt", "--out", tmp_path / "t.npy")
    assert done.code == 0 and np.load(tmp_path / "t.npy").shape == (2, 64)


# Towers from timm and Hugging Face


def vit(tmp_path, width=64, **options):
    sizes = {"embed_dim": width, "num_heads": width // 64 or 1, "depth": 2, "img_size": 64}
    model = timm.create_model("vit_tiny_patch16_224", **sizes | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return model, tmp_path / "vit.safetensors"


def roberta(tmp_path, width=64, vocab=300, layers=2):
    def t(*shape):
        return 0.1 * torch.randn(shape)

    state = {"roberta.embeddings.word_embeddings.weight": t(vocab, width)}
    state |= {"roberta.embeddings.position_embeddings.weight": t(40, width)}
    state |= {"roberta.embeddings.token_type_embeddings.weight": t(1, width)}
    shapes = {"attention.self.query": (width, width), "attention.self.key": (width, width)}
    shapes |= {"attention.self.value": (width, width), "attention.output.dense": (width, width)}
    shapes |= {"intermediate.dense": (128, width), "output.dense": (width, 128)}
    names = {f"roberta.encoder.layer.{n}.{name}": shape for n in range(layers) for name, shape in shapes.items()}
    for name, shape in {**names, "lm_head.dense": (width, width)}.items():
        state |= {f"{name}.weight": t(*shape), f"{name}.bias": t(shape[0])}
    norms = [f"roberta.encoder.layer.{n}.{where}" for n in range(layers) for where in ("attention.output", "output")]
    for name in [*(f"{norm}.LayerNorm" for norm in norms), "roberta.embeddings.LayerNorm", "lm_head.layer_norm"]:
        state |= {f"{name}.weight": 1 + t(width), f"{name}.bias": t(width)}
    state["lm_head.bias"] = t(vocab)
    state["lm_head.decoder.weight"] = state["roberta.embeddings.word_embeddings.weight"].clone()
    save_file(state, tmp_path / "roberta.safetensors")
    return state, tmp_path / "roberta.safetensors"


def test_towers_alone_begin_a_model_of_the_recipes(tmp_path, call, tokenizer):
    theirs, image = vit(tmp_path)
    state, text = roberta(tmp_path)
    towers = ("--image-tower", image, "--text-tower", text, "--joint-tower", text)
    done = call(convert, *towers, "--tokenizer", tokenizer, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    run = load_base_run(tmp_path / "run", needed=("image", "text", "joint", "masked_token"))
    model = run.model
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.image(pictures), theirs.forward_features(pictures), atol=2e-5, rtol=1e-5)
    word = "roberta.embeddings.word_embeddings.weight"
    assert torch.equal(model.text.embed.word.weight, state[word])
    tensors = load_file(tmp_path / "run/model.safetensors")
    layers = [name for name in tensors if name.startswith("text.transformer")]
    assert len(layers) == 2 * 12
    assert all(torch.equal(tensors[name], tensors[name.replace("text", "joint", 1)]) for name in layers)
    assert torch.equal(tensors["masked_token.dense.weight"], state["lm_head.dense.weight"])
    # All else is the recipe's own, and the report says what there is none of.
    assert model.config.patch_padding == 0 and model.config.masked_rows == "zeros"
    assert not model.config.grounding.count_padding and "missing grounded.*" in done.out
    assert "loaded  lm_head.decoder.weight [300, 64] -> text.embed.word.weight" in done.out
    assert "unused  head.weight [1000, 64]" in done.out


def test_a_tower_that_the_original_lacks_can_come_from_elsewhere(tmp_path, call):
    theirs, image = vit(tmp_path)
    weights = {name: array for name, array in original().items() if not name.startswith("vit.")}
    src = write_pickle(tmp_path / "model.pdparams", weights)
    done = call(convert, src, "--image-tower", image, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    model = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert model["patch_padding"] == 0 and model["image"]["norm_eps"] == 1e-6 and model["image"]["layers"] == 2
    assert model["text"]["layers"] == 1 and model["grounding"]["count_padding"]
    tensors = load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(tensors["image.transformer.layers.1.mlp.fc2.weight"], theirs.blocks[1].mlp.fc2.weight)
    src = write_pickle(tmp_path / "both.pdparams", original())
    one_line(call(convert, src, "--image-tower", image, "--out", tmp_path / "no"), image)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda path: vit(path, init_values=0.1)[1], ["blocks.0.ls1.gamma", "tower has not"]),
        (lambda path: vit(path, global_pool="avg")[1], ["norm.weight"]),
        (lambda path: vit(path, reg_tokens=2)[1], ["reg_token", "register"]),
        (lambda path: roberta(path)[1], ["--image-tower", "patch_embed.proj.weight"]),
        (lambda path: write_pickle(path / "x.bin", {}), ["pickle"]),
        (lambda path: path / "none.safetensors", ["no such file"]),
    ],
)
def test_towers_that_do_not_fit_are_named(tmp_path, call, made, words):
    file = made(tmp_path)
    one_line(call(convert, "--image-tower", file, "--out", tmp_path / "run"), file, *words)
    assert not (tmp_path / "run").exists()


def test_towers_of_two_widths_are_named(tmp_path, call):
    flags = ("--image-tower", vit(tmp_path)[1], "--text-tower", roberta(tmp_path, width=128)[1])
    one_line(call(convert, *flags, "--out", tmp_path / "run"), "hidden_size", "64", "128", "vit.safetensors")


# Bad input


def spoil_shape(config, weights):
    weights["grounded.encoder_layer_0_ffn_fc_1.w_0"] = weights["grounded.encoder_layer_0_ffn_fc_1.w_0"][:-1]


def spoil_pair(config, weights):
    weights["text.encoder_layer_0_multi_head_att_key_fc.w_0"] = np.zeros((32, 5), np.float32)


def drop_weight(config, weights):
    del weights["text.encoder_layer_1_post_ffn_layer_norm_bias"]


def drop_layer(config, weights):
    for name in [name for name in weights if name.startswith("text.encoder_layer_0_")]:
        del weights[name]


def whole_numbers(config, weights):
    weights["vq_emb"] = np.zeros((64, 32), np.int64)


def flat(config, weights):
    weights["vq_emb"] = np.zeros((), np.float32)


def foreign(config, weights):
    weights.clear()
    weights["linear_0.w_0"] = np.zeros((3, 3), np.float32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_shape, ["grounded.encoder_layer_0_ffn_fc_1.w_0", "[127, 32]", "[32, 128]"]),
        (spoil_pair, ["text.encoder_layer_0_multi_head_att_key_fc.w_0 [32, 5]"]),
        (drop_weight, ["text.encoder_layer_1_post_ffn_layer_norm_bias", "lacks"]),
        (drop_layer, ["text.encoder_layer_0_", "more", "lacks"]),
        (whole_numbers, ["vq_emb", "int64"]),
        (flat, ["vq_emb", "[]"]),
        (foreign, ["no weights under original UNIMO-2 names"]),
        (lambda c, w: c.update(hidden_size=64), ["config.json", "hidden_size is 64", "text.word_embedding", "32"]),
        (lambda c, w: c.update(text_num_hidden_layers=3), ["config.json", "text_num_hidden_layers is 3", "2"]),
        (lambda c, w: c.update(text_vocab_size=81), ["text_vocab_size is 81", "80"]),
        (lambda c, w: c.update(num_codebook=65), ["num_codebook is 65", "64"]),
        (lambda c, w: c.update(num_attention_heads=5), ["config.json", "heads", "divisor of 32"]),
        (lambda c, w: c.update(num_attention_heads=0), ["num_attention_heads", "at least 1"]),
        (lambda c, w: c.update(num_attention_heads="4"), ["num_attention_heads", "'4'"]),
        (lambda c, w: c.update(hidden_dropout_prob=2), ["hidden_dropout_prob", "[0, 1)"]),
        (lambda c, w: c.update(method="best"), ["grounding_method", "topk"]),
        (lambda c, w: c.update(topk=65), ["model.grounding.picks", "65 of 64"]),
        (lambda c, w: c.update(topk="many"), ["topk_value", "many"]),
        (lambda c, w: c.update(projection="False"), ["with_grounding_projection", "'False'"]),
        (lambda c, w: c.update(projection=True, share_projection=False), []),
        (lambda c, w: c.pop("num_attention_heads"), ["num_attention_heads", "width 32", "--config"]),
        (lambda c, w: c.clear(), ["config.json", "UNIMO-2"]),
    ],
)
def test_what_does_not_fit_is_one_line(root, tmp_path, call, source, spoil, words):
    config, weights = golden(root / "tests/golden/text_topk.npz")
    spoil(config, weights)
    src, settings = source(config, weights)
    done = call(convert, src, "--config", settings, "--out", tmp_path / "run")
    if words:
        one_line(done, *words)
        assert str(src) in done.err or str(settings) in done.err
        assert not (tmp_path / "run").exists()
    else:  # projections that the source has not are absent parts
        assert "missing ground_image.*" in done.out and "missing contrast_text.*" in done.out


class Runs:
    """Pickles as a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_commands_cuts_and_strangers_are_one_line(root, tmp_path, call, source):
    config, weights = golden(root / "tests/golden/text_topk.npz")
    src, settings = source(config, weights)
    flags = ("--config", settings, "--out", tmp_path / "run")
    whole_file = src.read_bytes()

    src.write_bytes(pickle.dumps({**weights, "vq_emb": Runs(f"touch {tmp_path / 'ran'}")}))
    one_line(call(convert, src, *flags), src, "system", "was not run")
    assert not (tmp_path / "ran").exists()
    src.write_bytes(whole_file[:-1000])
    one_line(call(convert, src, *flags), src, "cut short")

    folder = write_folder(tmp_path / "folder", weights)
    name = folder / "text.pos_embedding"
    name.write_bytes(name.read_bytes()[:-7])
    one_line(call(convert, folder, *flags), name, "cut short")
    (folder / "readme.txt").write_text("Weights of UNIMO-2, one file for each.")
    name.unlink()
    one_line(call(convert, folder, *flags), folder / "readme.txt", "not a Paddle parameter")

    one_line(call(convert, root / "tests/golden/text_topk.npz", *flags), "text_topk.npz", ".pdparams")
    one_line(call(convert, tmp_path / "none", *flags), tmp_path / "none", "no such file")
    one_line(call(convert, src, "--config", tmp_path / "none.json", "--out", tmp_path / "run"), "none.json")
    one_line(call(convert, "--out", tmp_path / "run"), "SRC", "nothing to convert")
    one_line(call(convert, src), "--out")
    one_line(call(convert, src, *flags, "--widht", "3"), "--widht")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_size_is_refused(root, tmp_path, call, source, tokenizer):
    src, settings = source(*golden(root / "tests/golden/text_topk.npz"))
    done = call(convert, src, "--config", settings, "--out", tmp_path / "run", "--tokenizer", tokenizer)
    one_line(done, tokenizer, "300", "80")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_filled(root, tmp_path, call, source):
    src, settings = source(*golden(root / "tests/golden/text_topk.npz"))
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes").write_text("mine")
    one_line(call(convert, src, "--config", settings, "--out", out), f"--out {out}", "not empty")
    assert os.listdir(out) == ["notes"]
    (out / "notes").unlink()
    converted(call, src, settings, out)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_conversion_that_is_stopped_leaves_nothing(root, tmp_path, call, source, monkeypatch, error):
    src, settings = source(*golden(root / "tests/golden/text_topk.npz"))

    def stopped(*_):
        raise error

    monkeypatch.setattr(convert, "write_json_atomic", stopped)
    done = call(convert, src, "--config", settings, "--out", tmp_path / "deep/run")
    assert done.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert list((tmp_path / "deep").iterdir()) == []
