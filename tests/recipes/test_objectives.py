"""What each objective's weight and each stream's share switch on and off, and which parameters they train."""

from dataclasses import replace

import pytest
import torch

from vlblocks.training import read_history
from vlblocks_recipes.unimo2 import train
from vlblocks_recipes.unimo2.configs import PRESETS
from vlblocks_recipes.unimo2.corpus import Corpus
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.objectives import STREAMS, curve_names

DEFAULT_CURVES = {
    *("pairs/contrast", "pairs/matching", "pairs/masked_tokens", "pairs/grounding"),
    *("images/two_views", "images/grounding", "texts/masked_tokens", "texts/grounding"),
}


def curves_of(folder):
    return {name for name in read_history(folder / "history.jsonl") if name.split("/")[0] in STREAMS}


@pytest.mark.parametrize(
    ("flags", "curves"),
    [
        (("--objective.matching", "0", "--objective.masked-codes", "0.5"), {"-pairs/matching", "+images/masked_codes"}),
        (("--objective.contrast", "0", "--objective.two-views", "0"), {"-pairs/contrast", "-images/two_views"}),
        (("--objective.masked-tokens", "0"), {"-pairs/masked_tokens", "-texts/masked_tokens"}),
        (
            ("--objective.grounding", "0", "--objective.two-views", "0"),
            {"-pairs/grounding", "-texts/grounding", "-images/grounding", "-images/two_views"},
        ),
        (("--batch.images", "0"), {"-images/two_views", "-images/grounding"}),
        (("--batch.texts", "0"), {"-texts/masked_tokens", "-texts/grounding"}),
        (("--batch.pairs", "0"), {name.replace("pairs", "-pairs") for name in DEFAULT_CURVES if "pairs" in name}),
        (("--data.no-unaligned",), {f"-{name}" for name in DEFAULT_CURVES if "pairs" not in name}),
    ],
)
def test_a_weight_or_share_of_0_switches_off(on_squares, tmp_path, call, no_report, flags, curves):
    done = call(train, *on_squares, *flags, "--max-steps", "1", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    expected = DEFAULT_CURVES - {name[1:] for name in curves if name[0] == "-"}
    if "+images/masked_codes" in curves:
        expected |= {"images/masked_codes", "texts/masked_codes"}
    assert curves_of(tmp_path / "run") == expected


def test_a_weight_multiplies_its_objective(on_squares, tmp_path, call, no_report):
    flags = ("--objective.contrast", "3", "--objective.grounding", "0.5", "--max-steps", "2", "--precision", "fp32")
    assert call(train, *on_squares, *flags, "--out", tmp_path / "run").code == 0
    history = read_history(tmp_path / "run/history.jsonl")
    factor = {"contrast": 3.0, "grounding": 0.5}
    for step in range(2):
        parts = [factor.get(n.split("/")[1], 1.0) * history[n][1][step] for n in DEFAULT_CURVES]
        assert history["loss"][1][step] == pytest.approx(sum(parts), rel=1e-5)


def gradients(config, tmp_path):
    """Names of the parameters that get a gradient from one step of the streams, and of those that do not."""
    torch.manual_seed(0)
    config = train.settle(replace(config, out=tmp_path))
    corpus = Corpus(config)
    model = Unimo2(replace(config.model, vocab=corpus.tokenizer.vocab_size)).train()
    for stream, batch in next(corpus.streams).items():
        result = STREAMS[stream](model, batch, config.objective, torch.Generator().manual_seed(1))
        assert {f"{stream}/{name}" for name in result.losses} == {
            name for name in curve_names(config) if name.startswith(f"{stream}/")
        }
        sum(result.losses.values()).backward()
    named = dict(model.named_parameters())
    got = {name for name, value in named.items() if value.grad is not None and value.grad.abs().sum() > 0}
    return got, named.keys() - got


@pytest.fixture
def small_config(squares):
    config = PRESETS["tiny"]
    tower = {name: replace(getattr(config.model, name), layers=1, heads=2, hidden=64) for name in ("image", "text")}
    model = replace(config.model, width=32, joint=tower["text"], **tower)
    model = replace(model, grounding=replace(model.grounding, codes=32, picks=8))
    return replace(
        config,
        model=model,
        data=replace(config.data, root=squares, pair_share=0.5, vocab=300, workers=0),
        batch=replace(config.batch, pairs=8, images=4, texts=4),
        objective=replace(
            config.objective,
            contrast=1.0,
            matching=1.0,
            masked_tokens=1.0,
            grounding=1.0,
            two_views=1.0,
            fused_share=1.0,
        ),
    )


def masked_codes(config, weight):
    return replace(config, objective=replace(config.objective, masked_codes=weight, masked_code_share=0.5))


def test_every_parameter_gets_a_gradient_from_the_streams_together(small_config, tmp_path):
    _, without = gradients(masked_codes(small_config, 1.0), tmp_path)
    assert without == set()


def test_without_masked_grounding_only_its_head_gets_no_gradient(small_config, tmp_path):
    got, without = gradients(masked_codes(small_config, 0.0), tmp_path)
    assert without and all(name.startswith("masked_code.") for name in without)
    assert "grounded.codebook" in got and "grounded.temperature" in got and "contrastive.temperature" in got


@pytest.mark.parametrize(
    ("method", "expected"),
    # The joint tower's norm of the codes has nothing to do where there are none.
    [("nearest", set()), ("none", {"joint.code_norm.weight", "joint.code_norm.bias"})],
)
def test_every_parameter_of_the_other_methods_gets_a_gradient(small_config, tmp_path, method, expected):
    model = replace(small_config.model, grounding=replace(small_config.model.grounding, method=method))
    _, without = gradients(masked_codes(replace(small_config, model=model), 1.0), tmp_path)
    assert without == expected
