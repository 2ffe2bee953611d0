"""Which parameters an optimiser decays."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

__all__ = ["adamw", "parameter_groups", "scale_rates"]

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def _named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is one of the dotted name's components, or a glob that matches the whole name."""
    return any(pattern in name.split(".") or fnmatchcase(name, pattern) for pattern in patterns)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, no_decay: Sequence[str] = ("codebook", "temperature")
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in at most two groups: decayed, and not.

    Not decayed: biases, scales and all else of at most one dimension, every parameter of a norm, and the names in
    `no_decay` (a component of the dotted name such as "codebook", or a glob over all of it). Word and position
    embeddings are decayed, as in BERT, RoBERTa and UNIMO-2. A parameter with several names (tied weights) appears
    once and is spared when any of its names says so; frozen parameters are left out.

    Each group holds "params", their "names" (kept in checkpoints, where `load_optimizer` compares them) and
    "weight_decay"; a group without parameters is left out.
    """
    in_norm = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter

    def spared(key: int) -> bool:
        return parameters[key].ndim <= 1 or key in in_norm or any(_named(name, no_decay) for name in names[key])

    groups = []
    for decay, keys in (
        (weight_decay, [key for key in parameters if not spared(key)]),
        (0.0, [key for key in parameters if spared(key)]),
    ):
        if keys:
            groups.append(
                {
                    "params": [parameters[key] for key in keys],
                    "names": [names[key][0] for key in keys],
                    "weight_decay": decay,
                }
            )
    return groups


def scale_rates(groups: list[dict[str, Any]], lr: float, scale: Callable[[str], float]) -> list[dict[str, Any]]:
    """The groups of `parameter_groups`, parted further so that each has one rate: `lr` times its names' `scale`."""
    parted = []
    for group in groups:
        by_scale: dict[float, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            by_scale.setdefault(scale(name), []).append((name, parameter))
        for factor, members in sorted(by_scale.items()):
            names, parameters = zip(*members, strict=True)
            parted.append({**group, "names": list(names), "params": list(parameters), "lr": lr * factor})
    return parted


def adamw(
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """AdamW with the betas and epsilon of UNIMO-2's pre-training, on groups from `parameter_groups`."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
