"""A feature queue on two real processes holds every rank's rows, in rank order, the same on both."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vlblocks.nn.momentum import FeatureQueue

# Rows of each rank per step: uneven, and none at all.
STEPS = [(0, 2), (2, 1), (2, 1)]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    queue = FeatureQueue(size=5, width=1)
    for step, sizes in enumerate(STEPS):
        queue.update(torch.arange(sizes[rank])[:, None] + 100.0 * step + 10.0 * rank)
    torch.save(queue.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_both_ranks_hold_the_rows_of_both():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=2)
        states = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    for state in states:
        # Written in the order 10, 11 | 100, 101, 110 | 200, 201, 210 around a ring of five.
        assert state["features"].flatten().tolist() == [200.0, 201.0, 210.0, 101.0, 110.0]
        assert (int(state["cursor"]), int(state["filled"])) == (3, 5)
