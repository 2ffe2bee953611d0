"""Everything that only a GPU can show: python benchmarks/gpu_check.py --out DIR [--suite NAME] [--device cpu]

For each suite first its checks (parity with float64, equal bits twice, no device sync, repetition at odd shapes), then,
if all hold, its benchmark. Leaves DIR/NAME.json, NAME.md and NAME-*.png, in at most 8 minutes a suite. With --device
cpu the same code runs at small sizes: a dry run, whose figures say nothing of a GPU. Needs only vlblocks_kernels,
vlblocks.ops and vlblocks.losses, torch, triton, numpy, matplotlib and tests/golden.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("vlblocks_kernels") is None:
    # On a machine where the project is only a folder.
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from run import run_suite  # noqa: E402

SUITES = tuple(sorted(path.stem for path in (ROOT / "benchmarks/checks").glob("*.py")))
MINUTES = 8.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--suite", choices=SUITES, help="only this one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run at small sizes")
    parser.add_argument("--quick", action="store_true", help="small sizes on a GPU, too")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device: cuda is not to be had here; --device cpu makes a dry run", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    quick = arguments.quick or arguments.device == "cpu"
    command = shlex.join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]])
    failed = 0
    for name in [arguments.suite] if arguments.suite else SUITES:
        began = time.monotonic()
        broken, held = run_checks(name, arguments.device, quick)
        failed += broken
        if broken:
            print(f"{name}: {broken} checks failed; no benchmark without them")
            continue
        left = MINUTES - (time.monotonic() - began) / 60
        facts = {"checks": f"{held} held, in {time.monotonic() - began:.0f} s"}
        run_suite(name, arguments.out, arguments.device, quick, command=command, minutes=left, facts=facts)
        print(f"{name}: {time.monotonic() - began:.0f} s in all", flush=True)
    return 1 if failed else 0


def run_checks(name: str, device: str, quick: bool) -> tuple[int, int]:
    """How many checks of a suite failed and held, each printed with its time."""
    failed = held = 0
    for what, check in importlib.import_module(f"checks.{name}").checks(device, quick):
        began = time.monotonic()
        try:
            check()
        except Exception:
            failed += 1
            print(f"{name}: {what}: FAILED\n{traceback.format_exc()}", flush=True)
        else:
            held += 1
            print(f"{name}: {what}: holds ({time.monotonic() - began:.1f} s)", flush=True)
    return failed, held


if __name__ == "__main__":
    sys.exit(main())
