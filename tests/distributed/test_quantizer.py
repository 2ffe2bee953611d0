"""Two real gloo processes keep the codebook and the counts that one process has with the whole batch.

The file is its own worker: `python test_quantizer.py RANK FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vlblocks.nn.quantizer import VectorQuantizer
from vlblocks.nn.usage import CodeUsageTracker

ROWS = (5, 2)  # of each rank: uneven on purpose
CASES = (("ema", "l2"), ("ema", "cosine"), ("gradient", "l2"))


def steps(codebook: str, metric: str, rows: slice, seed: int) -> dict[str, torch.Tensor]:
    """Three steps on these rows of the batch; only rank 0's draws (seed 7) may decide."""
    torch.manual_seed(0)
    module = VectorQuantizer(width=4, codes=24, metric=metric, codebook=codebook, decay=0.7, revive_after=2)
    decayed = CodeUsageTracker(codes=24, decay=0.5)
    generator = torch.Generator().manual_seed(seed)
    for step in range(3):
        torch.manual_seed(step)
        x, valid = torch.randn(sum(ROWS), 3, 4), torch.rand(sum(ROWS), 3) < 0.6
        valid[ROWS[0] :] &= step != 1  # in the second step rank 1 has padding only
        x, valid = x[rows], valid[rows]
        indices = module(x, valid).indices
        module.update(x, indices, valid, modality="image", generator=generator)
        decayed.update(indices, "text", valid)
    return {**module.state_dict(), "decayed": decayed.counts}


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    torch.save([steps(*case, rows, 7 + rank) for case in CASES], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizer")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_equal_one(ranks, case):
    whole = steps(*CASES[case], slice(None), 7)
    first, second = ranks[0][case], ranks[1][case]
    assert whole.keys() == first.keys()
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)
    torch.manual_seed(0)
    start = VectorQuantizer(width=4, codes=24, metric=CASES[case][1]).codebook
    assert (whole["codebook"] != start).any(1).sum() > 10, "the steps revived nothing: the comparison would be empty"


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
