"""The suite `losses`: its arithmetic is that of the steps it times, and all providers compute one thing."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("suites", "suites.losses", "suites._contrastive", "suites._vocabulary", "checks", "checks.losses")


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from suites import losses

    yield losses
    for name in (*MODULES, "checks.grounding", "harness", "memory"):
        sys.modules.pop(name, None)


def toys(suite):
    return suite.problems("cpu", quick=True)


def test_flops_and_bytes_are_those_of_a_step(suite):
    problems = toys(suite)
    assert [problem.op for problem in problems] == ["InfoNCE", "SigLIP", "linear cross-entropy"]
    for problem in problems:
        inputs = problem.inputs()
        with FlopCounterMode(display=False) as counter:
            _, *gradients = suite.with_backward(problem.eager())(*inputs)
        flops, size = problem.work()
        assert flops == counter.get_total_flops()
        moved = sum(x.nbytes for x in (*inputs, *gradients) if x.is_floating_point() and x.numel() > 1)
        assert size == moved
        assert problem.gradients_mib() == sum(x.nbytes for x in gradients if x.numel() > 1) / 2**20
        with FlopCounterMode(display=False) as counter:
            suite.bare(*inputs)
        assert counter.get_total_flops() == flops


def test_the_floor_that_the_aims_are_about(suite):
    flops, size = suite.KINDS["Contrast"]("InfoNCE", 32768, 256, "bfloat16", "cpu").work()
    assert 1e3 * flops / 790e12 == pytest.approx(2.09, abs=0.005) and size / 4.3e12 < flops / 790e12


def test_what_has_an_aim_is_measured_and_comes_first(suite):
    on_cpu = [(problem.op, problem.shape) for problem in suite.problems("cpu", quick=False)]
    pairs, words = "N 8192, D 256", "rows 8192, V 50265, D 768"
    assert on_cpu[:3] == [("InfoNCE", pairs), ("SigLIP", pairs), ("linear cross-entropy", words)]
    # Every width and vocabulary, with fewer rows than a GPU takes.
    assert len(set(on_cpu)) == len(on_cpu) == 2 * 2 * 2 + (3 * 2 + 1)
    on_gpu = suite.problems("cuda", quick=False)
    assert [problem.shape for problem in on_gpu[:3]] == ["N 32768, D 256", "N 32768, D 256", words]
    assert {problem.dtype for problem in on_gpu} == {"bfloat16"}
    # Every size of either half, once.
    assert len({(problem.op, problem.shape) for problem in on_gpu}) == len(on_gpu) == 2 * 3 * 2 + 3 * 3 * 2


def test_providers_agree(suite):
    compared = set()
    for problem in toys(suite):
        inputs = problem.inputs()
        doubles = [x.double() if x.is_floating_point() else x for x in inputs]
        exact = suite.with_backward(problem.exact())(*doubles)
        makers = suite.makers(problem)
        if "open_clip" in makers:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "open_clip", None)
                assert "open_clip" in suite.make_all({"open_clip": makers["open_clip"]})[1]["open_clip"]
        # Compiling takes long, and the bare products are no loss.
        chosen = {name: make for name, make in makers.items() if name not in (suite.COMPILED, suite.BARE)}
        made, notes = suite.make_all(chosen)
        for name, loss in made.items():
            if name == "liger-kernel" and not torch.cuda.is_available():
                continue
            assert suite.relative_error(suite.with_backward(loss)(*inputs), exact) < 1e-5, (problem.op, name)
            compared.add((problem.op, name))
        assert all(notes.values())
    assert {(op, name) for op in ("InfoNCE", "SigLIP", "linear cross-entropy") for name in ("eager", "vlblocks")} <= (
        compared
    )


def test_a_provider_that_fails_is_a_row_that_says_so(suite, monkeypatch):
    problem = toys(suite)[0]

    def absent():
        import no_such_package  # noqa: F401

    def huge(*inputs):
        return torch.empty(2**60)

    def makers(problem):
        mine = problem.providers()[problem.ours]
        return {"eager": problem.eager, "absent": absent, "huge": lambda: huge, problem.ours: mine}

    monkeypatch.setattr(suite, "makers", makers)
    monkeypatch.setattr(suite, "peak_memory", lambda *a, **k: suite.Memory(3.0 + problem.gradients_mib()))
    monkeypatch.setattr(suite, "problems", lambda device, quick: [problem])
    (found,) = suite.rows("cpu", quick=True)
    rows = {row.provider: row for row in found}
    assert rows["absent"].note == "not installed: no_such_package" and rows["absent"].p50_ms is None
    assert rows["huge"].note == "out of memory" and rows["huge"].p50_ms is None
    ours, eager = rows["vlblocks"], rows["eager"]
    assert ours.ours and ours.peak_mib == pytest.approx(3.0) and ours.error < 1e-5 and ours.saved_mib > 0
    assert ours.speedup == pytest.approx(eager.p50_ms / ours.p50_ms)
    assert ours.floor_ms == eager.floor_ms > 0 and ours.x_floor == pytest.approx(ours.p50_ms / ours.floor_ms)


def test_a_check_sees_what_is_wrong(suite):
    from checks import losses

    g = torch.Generator().manual_seed(0)
    exact = torch.randn(50, generator=g).double()
    eager = exact.float()
    losses.compare(["x"], [eager], [eager], [exact], 1e-5)
    for wrong in (eager * (1 + 1e-4), eager.where(eager > 0, float("nan"))):
        with pytest.raises(AssertionError, match="x: "):
            losses.compare(["x"], [wrong], [eager], [exact], 1e-5)
    half = exact.half()
    with pytest.raises(AssertionError, match="eager by"):
        losses.compare(["x"], [half * 1.005], [half], [exact], 1e-2)
    with pytest.raises(AssertionError, match="where 0 should be"):
        losses.compare(["x"], [torch.full((3,), 0.01)], [torch.zeros(3)], [torch.zeros(3).double()], 1e-5)


@pytest.mark.parametrize("name", ["vocabulary_holds", "contrast_holds"])
def test_a_check_fails_with_a_wrong_kernel(suite, monkeypatch, name):
    from checks import losses

    def halved(loss):
        return lambda *args, **options: 0.5 * loss(*args, **options)

    for loss in ("linear_cross_entropy", "info_nce"):
        monkeypatch.setattr(losses, loss, halved(getattr(losses, loss)))
    kind = ("plain",) if name == "contrast_holds" else ()
    shape = (23, 24) if kind else (13, 37, 24)
    with pytest.raises(AssertionError, match="loss: off by"):
        getattr(losses, name)("cpu", shape, torch.float32, *kind)
