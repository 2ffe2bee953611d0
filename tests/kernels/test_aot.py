"""Every kernel compiles for an H100 without a GPU, and the gate that says so can fail; CI compiles the other chips."""

import importlib.util
import sys

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from vlblocks_kernels.launch import CompileCase  # noqa: E402

SM = 90


@pytest.fixture(scope="module")
def aot(request):
    path = request.config.rootpath / "benchmarks" / "aot.py"
    spec = importlib.util.spec_from_file_location("benchmarks_aot", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@triton.jit
def product(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    grid = at[:, None] * BLOCK + at[None, :]
    tl.store(out + grid, tl.dot(tl.load(x + grid), tl.load(y + grid), input_precision="ieee"))


@triton.jit
def count(x):
    tl.atomic_add(x, 1)


def case(kernel, block=32, dtype="fp16", **changes):
    names = [name for name in kernel.arg_names if name != "BLOCK"]
    signature = {name: f"*{dtype}" for name in names}
    if "out" in signature:
        signature["out"] = "*fp32"
    constants = {"BLOCK": block} if "BLOCK" in kernel.arg_names else {}
    return CompileCase(kernel, "test", signature, constants, 4, 2)._replace(**changes)


def test_a_good_kernel_passes(aot):
    found = case(product, tensor_cores=True)
    facts = aot.compile_case(found, SM)
    assert facts.tensor_core > 0 and facts.registers > 0 and facts.stack == 0
    assert aot.judge(found, SM, facts) == ()


@pytest.mark.parametrize(
    "bad, rule",
    [
        (case(product, dtype="fp32", tensor_cores=True), "no tensor cores"),
        (case(product, tma=True), "no loads by descriptor"),
        (case(count, dtype="i32"), "atomics"),
        (case(product, block=128, warps=1), "stack"),
    ],
)
def test_each_rule_can_be_broken(aot, bad, rule):
    assert any(rule in broken for broken in aot.judge(bad, SM, aot.compile_case(bad, SM)))


def test_shared_memory_is_the_chips_own(aot):
    facts = aot.Facts(registers=64, stack=0, shared=150_000, tensor_core=1, tma=0, local_loads=0, atomics=0)
    assert aot.judge(case(product), 80, facts) == ()
    assert "shared memory" in aot.judge(case(product), 89, facts)[0]


def test_arguments_must_be_covered(aot):
    with pytest.raises(ValueError, match="out"):
        aot.compile_case(case(product, signature={"x": "*fp16", "y": "*fp16"}), SM)


def test_every_configuration_compiles_for_sm_90(aot):
    verdicts = aot.check_all((SM,))
    assert {verdict.module for verdict in verdicts} == set(aot.modules())
    broken = [f"{v.module} {v.label}: {'; '.join(v.broken)}" for v in verdicts if v.broken]
    assert not broken, "\n".join(broken)
