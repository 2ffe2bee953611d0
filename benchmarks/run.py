"""Runs one benchmark suite: python benchmarks/run.py --suite NAME --out DIR [--device cpu|cuda] [--quick]

Writes DIR/NAME.json (rows), DIR/NAME.md (table) and DIR/NAME-*.png (charts).
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

import torch
from harness import describe_machine, finish_rows, plot_rows, table, write_suite

SUITES = Path(__file__).resolve().parent / "suites"


def available() -> list[str]:
    """Names of the suites beside this file."""
    return sorted(path.stem for path in SUITES.glob("*.py") if not path.stem.startswith("_"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", required=True, metavar="NAME", help=f"one of: {', '.join(available()) or 'none yet'}"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: does it run, not how fast")
    arguments = parser.parse_args()
    if arguments.suite not in available():
        return _mistake(f"--suite: no suite {arguments.suite!r}; choose from {', '.join(available()) or 'none'}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _mistake("--device: cuda is not to be had here; use --device cpu")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _mistake(f"--out: cannot make the folder {arguments.out} ({error.strerror}); choose another")

    suite = importlib.import_module(f"suites.{arguments.suite}")
    rows = finish_rows(suite.rows(arguments.device, arguments.quick))
    command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
    write_suite(arguments.suite, arguments.out, rows, describe_machine(arguments.device), command=command)
    if hasattr(suite, "plots"):
        suite.plots(rows, arguments.out)
    else:
        plot_rows(arguments.suite, rows, arguments.out)
    print(table(rows), end="")
    print(f"written to {arguments.out / arguments.suite}.json, .md and -*.png")
    return 0


def _mistake(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
