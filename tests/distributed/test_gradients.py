"""Averaged gradients of two real processes equal the full batch's."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vlblocks.training import average_gradients


def _model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"both": nn.Linear(3, 2), "one": nn.Linear(3, 2), "none": nn.Linear(3, 2)}).double()


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x = _model(), torch.arange(12.0, dtype=torch.float64).view(4, 3)
    loss = model["both"](x[2 * rank : 2 * rank + 2]).square().mean()
    if rank == 1:
        loss = loss + model["one"](x).square().mean()
    loss.backward()
    average_gradients(model.parameters())
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_the_full_batch():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    model, x = _model(), torch.arange(12.0, dtype=torch.float64).view(4, 3)
    (model["both"](x).square().mean() + model["one"](x).square().mean() / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert first[name] is None and second[name] is None
            continue
        torch.testing.assert_close(first[name], parameter.grad)
        assert torch.equal(first[name], second[name])
    assert model["none"].weight.grad is None
