"""Parameter groups: who is decayed, who is not, who is there at all."""

import torch
from torch import nn

from vlblocks.training import adamw, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.codebook = nn.Parameter(torch.randn(5, 4))
        self.temperature = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.word.weight
        self.recodebooked = nn.Linear(4, 4, bias=False)


def names(groups):
    return {group["weight_decay"]: group["names"] for group in groups}


def test_norms_biases_and_named_parameters_are_not_decayed():
    groups = parameter_groups(Model(), weight_decay=0.1)
    assert names(groups) == {
        0.1: ["word.weight", "layer.weight", "recodebooked.weight"],
        0.0: ["codebook", "temperature", "layer.bias", "norm.weight", "norm.bias"],
    }


def test_every_trainable_parameter_appears_once_and_only_those():
    model = Model()
    found = [id(p) for group in parameter_groups(model, weight_decay=0.1) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_pattern_spares_a_tied_weight_by_any_of_its_names_and_globs_match_whole_names():
    groups = names(parameter_groups(Model(), weight_decay=0.1, no_decay=("head", "lay*weight")))
    assert groups[0.1] == ["codebook", "recodebooked.weight"]
    assert "word.weight" in groups[0.0] and "layer.weight" in groups[0.0]


def test_groups_without_parameters_are_left_out():
    assert [g["weight_decay"] for g in parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)] == [0.1]


def test_decay_shrinks_only_the_decayed_group():
    model = Model()
    optimizer = adamw(parameter_groups(model, weight_decay=0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["layer.weight"], before["layer.weight"] * (1 - 0.1 * 0.5))
    for name in ("codebook", "temperature", "layer.bias", "norm.weight", "frozen.weight"):
        assert torch.equal(after[name], before[name]), name
