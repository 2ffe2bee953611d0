"""The fine-tuning loop on a model of a few numbers: best weights, early stopping, resuming, rates by layer."""

import json
import math
from datetime import timedelta

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from vlblocks.errors import UserError
from vlblocks.training import (
    Plan,
    Schedule,
    Steps,
    adamw,
    finetune,
    freeze,
    latest_checkpoint,
    layer_scales,
    make_accelerator,
    parameter_groups,
    read_history,
    read_tensors,
    scale_rates,
)
from vlblocks.training.finetuning import Watch


class Block(nn.Module):
    def __init__(self, layers, norm=False):
        super().__init__()
        self.embed = nn.Embedding(2, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))
        if norm:
            self.norm = nn.LayerNorm(3)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text, self.joint = Block(3, norm=True), Block(2), Block(2)
        self.pool = nn.Linear(3, 3)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.head = Base(), nn.Linear(3, 1)


STAGES = (("base.image", "base.text"), ("base.joint",), ("base",))


def test_rates_fall_layer_by_layer_from_the_head_down():
    scale = layer_scales(Towers(), stages=STAGES, decay=0.5)
    # From the top: head; pool; two joint layers and what lies beneath them; three layers of the towers; embeddings.
    below = {
        **{"pool.weight": 1, "joint.layers.1.bias": 2, "joint.layers.0.weight": 3},
        **{"joint.embed.weight": 4, "image.layers.2.weight": 5, "image.norm.weight": 5, "text.layers.1.weight": 5},
        **{"image.layers.1.weight": 6, "text.layers.0.bias": 6, "image.layers.0.weight": 7},
        **{"image.embed.weight": 8, "text.embed.weight": 8},
    }
    steps = {"head.weight": 0, **{f"base.{name}": count for name, count in below.items()}}
    assert {name: scale(name) for name in steps} == {name: 0.5**count for name, count in steps.items()}


def test_a_decay_of_one_leaves_all_rates_and_others_are_refused():
    model = Towers()
    scale = layer_scales(model, stages=STAGES, decay=1.0)
    assert {scale(name) for name, _ in model.named_parameters()} == {1.0}
    for decay in (0.0, 1.5, -1.0):
        with pytest.raises(UserError, match="layer decay"):
            layer_scales(model, stages=STAGES, decay=decay)


def test_groups_have_one_rate_each_and_every_parameter_once():
    model = Towers()
    scale = layer_scales(model, stages=STAGES, decay=0.5)
    groups = scale_rates(parameter_groups(model, weight_decay=0.1), 8.0, scale)
    for group in groups:
        assert {8.0 * scale(name) for name in group["names"]} == {group["lr"]}
        assert group["weight_decay"] == (
            0.1 if "weight" in group["names"][0] and "norm" not in group["names"][0] else 0
        )
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len({id(parameter) for group in groups for parameter in group["params"]}) == len(names)


@pytest.mark.parametrize(
    ("metric", "values", "best", "since"),
    [
        ("accuracy", [0.1, 0.3, 0.2, 0.3], 1, 2),
        ("-loss", [3.0, 1.0, 2.0], 1, 1),
        ("accuracy", [math.nan, math.nan], 0, 1),
        ("accuracy", [math.nan, 0.0, math.nan], 1, 1),
    ],
)
def test_the_best_is_the_first_of_the_highest(metric, values, best, since):
    watch = Watch(metric)
    for step, value in enumerate(values):
        watch.see(step, {watch.name: value, "other": "text"})
    assert (watch.step, watch.since) == (best, since)
    again = Watch(metric)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert (again.step, again.since) == (best, since)


def test_watching_what_is_not_measured_lists_what_is():
    with pytest.raises(UserError, match=r"--watch bleu: .* choose one of accuracy, f1"):
        Watch("bleu").see(1, {"accuracy": 0.5, "tokenizer": "simple", "f1": 0.1})


class Killed(Exception):
    pass


class Line(nn.Module):
    """y = w x + b, its x dropped at random, so that a resumed run must have the same draws."""

    def __init__(self):
        super().__init__()
        self.line, self.drop = nn.Linear(4, 1), nn.Dropout(0.3)

    def forward(self, x):
        return self.line(self.drop(x))[:, 0]


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield make_accelerator("fp32")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    AcceleratorState._reset_state(True)


def test_processes_wait_longer_than_any_evaluation_takes(accelerator):
    # NCCL's own 10 minutes would end the others while the main process evaluates COCO.
    assert accelerator.init_handler.timeout >= timedelta(hours=12)


class Position:
    """What a process keeps besides: how many batches were drawn."""

    def __init__(self):
        self.drawn = 0

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


def run(
    accelerator,
    out,
    *,
    scores=None,
    die_at=None,
    steps=12,
    patience=None,
    accumulate=1,
    frozen=False,
    first=False,
    watch="score",
):
    """Fit a line; `scores` replace the measured metric; dies before the batch `die_at`."""
    torch.manual_seed(3)
    model, position, evaluations = Line(), Position(), iter(scores or ())
    kept = freeze([model.drop, model.line] if frozen else [])
    if frozen:
        model.line.bias.requires_grad_(True)
    data = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 8, 4, generator=data)
    target = torch.tensor([1.0, -2.0, 0.5, 0.0])

    def batches(start):
        for number in range(start, 10**6):
            if number == die_at:
                raise Killed
            position.drawn += 1
            x = inputs[number % 64]
            yield {"x": x, "y": x @ target + 0.3}

    def evaluate():
        assert not model.training and not torch.is_grad_enabled()
        x = inputs.flatten(0, 1)
        loss = (model(x) - x @ target - 0.3).square().mean().item()
        return {"loss": loss, "score": next(evaluations, -loss), "unit": "none"}

    optimizer = Steps(
        model,
        adamw(parameter_groups(model, weight_decay=0.0), lr=0.1),
        accelerator=accelerator,
        schedule=Schedule(total=steps, warmup=2),
        clip=1.0,
        folder=out / "checkpoints",
        keep=1,
    )
    done = finetune(
        model,
        optimizer,
        plan=Plan(steps=steps, accumulate=accumulate, evaluate_every=3, watch=watch, patience=patience, seed=5),
        out=out,
        batches=batches,
        loss=lambda batch, _: (model(batch["x"]) - batch["y"]).square().mean(),
        evaluate=evaluate,
        frozen=kept,
        stateful={"position": position},
        check_first=first,
    )
    return model, done, position


def test_a_run_learns_and_leaves_the_best_weights(accelerator, tmp_path):
    model, done, _ = run(accelerator, tmp_path, steps=40)
    history = read_history(tmp_path / "history.jsonl")
    assert history["val/loss"][0] == [*range(3, 40, 3), 40]
    best = min(range(14), key=lambda place: history["val/loss"][1][place])
    assert done.best_step == history["val/loss"][0][best] and done.metrics["loss"] == history["val/loss"][1][best]
    assert done.metrics["unit"] == "none" and done.steps == 40 and done.skipped == 0
    assert history["val/loss"][1][-1] < 0.3 * history["val/loss"][1][0]
    weights = read_tensors(tmp_path / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_best_weights_are_those_of_the_best_step(accelerator, tmp_path):
    model, done, _ = run(accelerator, tmp_path / "whole", scores=[0.1, 0.9, 0.3, 0.2])
    assert (done.best_step, done.metrics["score"]) == (6, 0.9)
    # The only weights that stay are the last checkpoint's and the best.
    assert sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir()) == [
        "best-00000006.safetensors",
        "step-00000012",
    ]
    last = read_tensors(latest_checkpoint(tmp_path / "whole/checkpoints") / "model.safetensors")
    assert not torch.equal(last["line.weight"], model.line.weight)


def test_patience_stops_the_run(accelerator, tmp_path):
    _, done, position = run(accelerator, tmp_path, scores=[0.5, 0.4, 0.4, 0.9], patience=2)
    assert (done.steps, done.best_step, position.drawn) == (9, 3, 9)
    # The finished run stays finished.
    _, again, position = run(accelerator, tmp_path, patience=2)
    assert (again.steps, again.best_step, position.drawn) == (9, 3, 9)


@pytest.mark.parametrize("die_at", [1, 5, 7, 11, 22, 23])
def test_a_run_that_dies_and_goes_on_ends_with_the_same_bits(accelerator, tmp_path, die_at):
    whole, expected, _ = run(accelerator, tmp_path / "whole", accumulate=2)
    with pytest.raises(Killed):
        run(accelerator, tmp_path / "cut", accumulate=2, die_at=die_at)
    model, done, position = run(accelerator, tmp_path / "cut", accumulate=2)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert done._replace(seconds=0) == expected._replace(seconds=0)
    assert position.drawn == 24
    histories = [read_history(tmp_path / name / "history.jsonl") for name in ("whole", "cut")]
    assert histories[0] == histories[1]


def test_a_kill_between_the_best_weights_and_their_checkpoint_loses_nothing(accelerator, tmp_path, monkeypatch):
    whole, expected, _ = run(accelerator, tmp_path / "whole")
    own = Steps.save

    def save(self, step, *rest):
        if step == 9:
            raise Killed
        own(self, step, *rest)

    monkeypatch.setattr(Steps, "save", save)
    with pytest.raises(Killed):
        run(accelerator, tmp_path / "cut")
    # The best of step 9 is there, and so is that of step 6, which the last checkpoint speaks of.
    names = {path.name for path in (tmp_path / "cut/checkpoints").iterdir()}
    assert {"best-00000006.safetensors", "best-00000009.safetensors", "step-00000006"} <= names
    monkeypatch.undo()
    model, done, _ = run(accelerator, tmp_path / "cut")
    assert torch.equal(model.line.weight, whole.line.weight) and done.best_step == expected.best_step


def test_frozen_parts_neither_learn_nor_drop(accelerator, tmp_path):
    torch.manual_seed(3)
    before = Line().line
    model, _, _ = run(accelerator, tmp_path, frozen=True)
    assert torch.equal(model.line.weight, before.weight) and not torch.equal(model.line.bias, before.bias)
    assert not model.drop.training and not model.line.training


def test_accumulated_batches_make_the_same_step_as_one(accelerator, tmp_path):
    models = []
    for accumulate in (1, 2):
        model = nn.Linear(2, 1)
        with torch.no_grad():
            model.weight.fill_(0.5), model.bias.zero_()
        rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
        pieces = [rows] if accumulate == 1 else list(rows.split(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        taken = Steps(
            model,
            optimizer,
            accelerator=accelerator,
            schedule=Schedule(kind="constant", total=1),
            clip=1e9,
            folder=tmp_path / f"{accumulate}",
            keep=1,
        )
        finetune(
            model,
            taken,
            plan=Plan(steps=1, accumulate=accumulate, evaluate_every=1, watch="score"),
            out=tmp_path / f"{accumulate}",
            batches=lambda start, pieces=pieces: iter([{"x": piece} for piece in pieces]),
            loss=lambda batch, _, model=model: model(batch["x"]).square().mean(),
            evaluate=lambda: {"score": 0.0},
        )
        models.append(model)
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-7)
    # By hand: outputs 1.5 and 1; the mean square's gradient in the weight is 1.5 x [1, 2] + 1 x [3, -1].
    assert torch.allclose(models[0].weight, torch.tensor([[0.5 - 0.1 * 4.5, 0.5 - 0.1 * 2.0]]))


def test_a_wrong_metric_is_found_before_the_first_step(accelerator, tmp_path):
    with pytest.raises(UserError, match="--watch blue"):
        run(accelerator, tmp_path, watch="blue", first=True)
    assert not (tmp_path / "checkpoints").exists()
