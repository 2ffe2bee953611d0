"""Two real processes: one checkpoint with both ranks' states, one decision about a bad step, one error for all."""

import os
import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent(
    """
    import errno, math, os, sys
    from pathlib import Path

    import torch
    import torch.distributed as dist

    from vlblocks.errors import UserError
    from vlblocks.training import NonFiniteGuard, RunLog, is_main, latest_checkpoint, load_checkpoint, save_checkpoint
    from vlblocks.training import seed_everything, set_rng_state

    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert is_main() == (rank == 0)
    seed_everything(3, rank=rank)
    path = save_checkpoint(folder / "ckpt", 5, model={"w": torch.ones(2)}, rank_state={"cursor": 10 + rank})
    drawn = torch.rand(3)
    saved = load_checkpoint(path)
    assert latest_checkpoint(folder / "ckpt") == path and len(saved.ranks) == 2
    mine = saved.of_rank(rank, 2)
    assert mine["cursor"] == 10 + rank
    set_rng_state(mine["rng"])
    assert torch.equal(torch.rand(3), drawn)
    set_rng_state(saved.of_rank(1 - rank, 2)["rng"])
    assert not torch.equal(torch.rand(3), drawn)

    guard = NonFiniteGuard(limit=2)
    assert not guard.check(1, loss=math.nan if rank == 1 else 1.0)
    try:
        guard.check(2, loss=math.nan if rank == 1 else 1.0)
        raise SystemExit("not stopped")
    except UserError as error:
        assert ("another rank" in str(error)) == (rank == 0)

    with RunLog(folder / f"log{rank}", total_steps=1) as log:
        log.step(1, {"a": 1.0})

    if rank == 0:
        def full(_):
            raise OSError(errno.ENOSPC, "full")
        os.fsync = full
    try:
        save_checkpoint(folder / "ckpt", 6, model={"w": torch.ones(2)})
        raise SystemExit("not stopped")
    except UserError as error:
        assert "disk is full" in str(error)
    assert latest_checkpoint(folder / "ckpt") == path
    dist.destroy_process_group()
    """
)


def test_two_processes_agree(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    assert "log0" in os.listdir(tmp_path) and "log1" not in os.listdir(tmp_path)
