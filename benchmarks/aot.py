"""Compiles every Triton kernel for every chip without a GPU: python benchmarks/aot.py [--sm 90] [--out DIR]

One row per kernel, configuration and chip, with what the compiler made of it. Exits with 1 if any row breaks a rule:
no spills, shared memory within the chip, tensor cores for float16 and bf16, TMA on sm_90.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vlblocks_kernels
from vlblocks_kernels.launch import SMS, TMA_SM, CompileCase, Config

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory that one block may have, by chip (CUDA C++ programming guide, "Technical Specifications")."""


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a kernel."""

    registers: int
    stack: int  # bytes; spills go there
    shared: int  # bytes
    tensor_core: int  # instructions: HMMA (sm_80, 89, 120), HGMMA (sm_90), UTC*MMA (sm_100)
    tma: int  # loads by descriptor
    local_loads: int
    atomics: int


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    module: str
    label: str
    sm: int
    facts: Facts | None
    broken: tuple[str, ...]  # the rules it breaks; empty: none


def modules() -> list[str]:
    """Names of the modules with kernels."""
    folder = Path(vlblocks_kernels.__file__).parent
    return sorted(path.stem for path in folder.glob("*_triton.py"))


def cases(module: str, sm: int) -> list[CompileCase]:
    """Every configuration of a module's kernels for a chip."""
    return list(importlib.import_module(f"vlblocks_kernels.{module}").compile_cases(sm))


def compile_case(case: CompileCase, sm: int) -> Facts:
    """Compile as the run time would for tensors whose addresses are multiples of 16."""
    names = case.kernel.arg_names
    unknown = set(names) ^ (set(case.signature) | set(case.constants))
    if unknown:
        raise ValueError(f"{case.label}: signature and constants do not cover {', '.join(sorted(unknown))}")
    types = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    promised = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*") or name in case.divisible
    }
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs=promised,
    )
    options = Config({}, case.warps, case.stages, case.registers).options()
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _dump("-res-usage", file.name), _dump("-sass", file.name)
    return Facts(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        shared=compiled.metadata.shared,
        tensor_core=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)", code)),
        tma=len(re.findall(r"\bUTMALDG", code)),
        local_loads=len(re.findall(r"\bLDL", code)),
        atomics=len(re.findall(r"\b(?:RED|ATOMG?)\b", code)),
    )


def judge(case: CompileCase, sm: int, facts: Facts) -> tuple[str, ...]:
    """The rules that a compiled kernel breaks."""
    broken = []
    if facts.stack:
        broken.append(f"{facts.stack} bytes of stack")
    if facts.local_loads:
        broken.append(f"{facts.local_loads} local loads")
    if facts.shared > SHARED_BYTES[sm]:
        broken.append(f"{facts.shared} bytes of shared memory, the chip has {SHARED_BYTES[sm]}")
    if facts.atomics:
        broken.append(f"{facts.atomics} atomics")
    if case.tensor_cores and not facts.tensor_core:
        broken.append("no tensor cores")
    if case.tma and sm >= TMA_SM and not facts.tma:
        broken.append("no loads by descriptor")
    return tuple(broken)


def check(task: tuple[str, int, int]) -> Verdict:
    """Compile and judge one case: (module, chip, place in its list)."""
    module, sm, place = task
    case = cases(module, sm)[place]
    try:
        facts = compile_case(case, sm)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Verdict(module, f"{case.kernel.__name__} {case.label}", sm, None, (reason[:160],))
    return Verdict(module, f"{case.kernel.__name__} {case.label}", sm, facts, judge(case, sm, facts))


def check_all(sms: tuple[int, ...] = SMS, only: str = "", processes: int = 2) -> list[Verdict]:
    """Verdicts on everything, or on modules whose name contains `only`."""
    tasks = [(name, sm, i) for name in modules() if only in name for sm in sms for i in range(len(cases(name, sm)))]
    if processes == 1:
        return [check(task) for task in tasks]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(check, tasks, chunksize=4))


def table(verdicts: list[Verdict]) -> str:
    """Markdown, one row per verdict."""
    head = (
        "file",
        "kernel and configuration",
        "chip",
        "registers",
        "stack",
        "shared KiB",
        "tensor-core",
        "TMA",
        "verdict",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for v in verdicts:
        f = v.facts
        numbers = ["", "", "", "", ""]
        if f is not None:
            numbers = [str(f.registers), str(f.stack), f"{f.shared / 1024:.1f}", str(f.tensor_core), str(f.tma)]
        cells = [v.module, v.label, f"sm_{v.sm}", *numbers, "; ".join(v.broken) or "ok"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, choices=SMS, action="append", help="only this chip; may be repeated")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose name contains this")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/aot.md")
    arguments = parser.parse_args()
    verdicts = check_all(tuple(arguments.sm or SMS), arguments.only, min(2, os.cpu_count() or 1))
    text = table(verdicts)
    print(text, end="")
    bad = sum(bool(verdict.broken) for verdict in verdicts)
    print(f"{len(verdicts)} compiled, {bad} failed")
    if arguments.out is not None:
        from harness import write_atomic

        command = "python benchmarks/aot.py --out benchmarks/results"
        about = f"triton {triton.__version__}; {len(verdicts)} compiled, {bad} failed."
        write_atomic(arguments.out / "aot.md", f"# aot\n\nMade by `{command}`, {about}\n\n{text}".encode())
    return 1 if bad or not verdicts else 0


def _dump(flag: str, file: str) -> str:
    return subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump prints no {pattern}")
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
