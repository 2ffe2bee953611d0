"""Runs one benchmark suite: python benchmarks/run.py --suite NAME --out DIR [--device cpu|cuda] [--quick]

Writes DIR/NAME.json (rows), DIR/NAME.md (table) and DIR/NAME-*.png (charts).
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path

import torch
from harness import collect, describe_machine, finish_rows, plot_rows, table, write_suite

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
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after the problem that ends past this time")
    arguments = parser.parse_args()
    if arguments.suite not in available():
        return _mistake(f"--suite: no suite {arguments.suite!r}; choose from {', '.join(available()) or 'none'}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _mistake("--device: cuda is not to be had here; use --device cpu")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _mistake(f"--out: cannot make the folder {arguments.out} ({error.strerror}); choose another")

    # What a suite takes from the environment belongs to the command.
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("VLBLOCKS_")]
    command = shlex.join([*settings, "python", "benchmarks/run.py", *sys.argv[1:]])
    run_suite(
        arguments.suite, arguments.out, arguments.device, arguments.quick, command=command, minutes=arguments.minutes
    )
    print(f"written to {arguments.out / arguments.suite}.json, .md and -*.png")
    return 0


def run_suite(
    name: str,
    out: Path,
    device: str,
    quick: bool,
    *,
    command: str,
    minutes: float | None = None,
    facts: dict[str, str] | None = None,
) -> None:
    """Run a suite, print its table and write its files; `facts` join the header."""
    suite = importlib.import_module(f"suites.{name}")
    found, stopped = collect(suite.rows(device, quick), minutes)
    rows = finish_rows(found)
    header = describe_machine(device) | (facts or {})
    if stopped:
        header["stopped"] = f"after {minutes:g} minutes, with {len(rows)} rows"
    write_suite(name, out, rows, header, command=command)
    if hasattr(suite, "plots"):
        suite.plots(rows, out)
    else:
        plot_rows(name, rows, out)
    print(table(rows), end="")


def _mistake(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
