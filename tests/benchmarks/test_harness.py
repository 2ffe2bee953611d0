"""The benchmark harness on toy providers: what it measures is what they do."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

MIB = 2**20


@pytest.fixture(scope="module")
def load(request):
    """Import a script of benchmarks/ the way running it does, without leaving its folder on the path."""
    folder = request.config.rootpath / "benchmarks"

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def harness(load):
    return load("harness")


@pytest.fixture(scope="module")
def memory(load):
    return load("memory")


def test_providers_take_turns_and_keep_their_own_times(harness):
    calls = []
    providers = {
        "slow": lambda: (calls.append("slow"), time.sleep(0.012)),
        "fast": lambda: (calls.append("fast"), time.sleep(0.003)),
    }
    found = harness.time_alternating(providers, min_seconds=0.03, min_runs=4, warmup=1)
    assert 12 <= found["slow"].p20_ms <= found["slow"].p50_ms <= found["slow"].p80_ms
    assert 3 <= found["fast"].p50_ms < found["slow"].p50_ms
    # The fast one needs more runs for its share of time, and the slow one runs along with it.
    assert found["slow"].runs == found["fast"].runs >= 4
    rounds = [tuple(calls[i : i + 2]) for i in range(2, len(calls), 2)]
    assert set(rounds) == {("slow", "fast"), ("fast", "slow")}


def test_a_provider_that_fails_says_why_and_stops_nobody(harness):
    runs = iter(range(100))

    def absent():
        import no_such_package  # noqa: F401

    def later():
        if next(runs) > 2:
            raise RuntimeError("shapes differ\nmore lines")

    providers = {"absent": absent, "later": later, "huge": lambda: torch.empty(2**60), "fine": lambda: None}
    found = harness.time_alternating(providers, min_seconds=0, min_runs=6, warmup=1)
    assert found["absent"] == harness.Timing(note="not installed: no_such_package")
    assert found["later"] == harness.Timing(note="RuntimeError: shapes differ")
    assert found["huge"].note == "out of memory"
    assert found["fine"].runs == 6 and not found["fine"].note


def test_a_suite_is_stopped_between_problems(harness):
    rows = [harness.Row(op="dot", shape=f"n {n}", provider=name) for n in range(3) for name in ("eager", "ours")]
    started = []

    def together():
        for n in range(0, 6, 2):
            started.append(n)
            yield rows[n : n + 2]

    assert harness.collect(together()) == (rows, False) and harness.collect(iter(rows)) == (rows, False)
    started.clear()
    assert harness.collect(together(), minutes=-1) == (rows[:2], True) and started == [0]
    assert harness.collect(iter(rows), minutes=-1) == (rows[:1], True)


def test_rates_floor_and_speed_up_follow_from_what_is_known(harness):
    row = harness.Row(op="dot", shape="n 10", provider="ours", ours=True, p50_ms=2.0, flops=8e9, bytes=1e9)
    others = [
        harness.Row(op="dot", shape="n 10", provider=name, p50_ms=ms, note=note)
        for name, ms, note in (("eager", 6.0, ""), ("better", 3.0, ""), ("peer", None, "out of memory"))
    ]
    elsewhere = harness.Row(op="dot", shape="n 20", provider="eager", p50_ms=0.1)
    ceiling = harness.Ceiling(flops=8e12, bandwidth=2e12)
    mine, eager, *_ = harness.finish_rows([row, *others, elsewhere], ceiling)
    assert mine.tflops == pytest.approx(4.0) and mine.gbps == pytest.approx(500)
    assert mine.floor_ms == pytest.approx(1.0) and mine.bound == "compute" and mine.x_floor == pytest.approx(2.0)
    assert mine.speedup == pytest.approx(1.5)
    assert eager.speedup is None and eager.floor_ms is None
    memory_bound = harness.Row(op="copy", shape="n", provider="p", p50_ms=1.0, bytes=4e9)
    (found,) = harness.finish_rows([memory_bound], ceiling)
    assert (found.floor_ms, found.bound, found.x_floor) == (pytest.approx(2.0), "memory", pytest.approx(0.5))
    assert harness.finish_rows([mine]) == [mine]


def test_a_slow_moment_lowers_no_ceiling(harness, monkeypatch):
    moments = iter([harness.Ceiling(8.0, 1.0), harness.Ceiling(5.0, 2.0), harness.Ceiling(9.0, 2.0)])
    asked = []

    def measure(device, dtype, size):
        asked.append((device, dtype, size))
        return next(moments)

    monkeypatch.setattr(harness, "measure_ceiling", measure)
    ceilings = harness.Ceilings("cpu", 64)
    assert [ceilings["float32"], ceilings["float32"]] == [(8.0, 1.0), (8.0, 2.0)]
    assert ceilings["bfloat16"] == (9.0, 2.0)  # Its own.
    assert asked == [("cpu", torch.float32, 64)] * 2 + [("cpu", torch.bfloat16, 64)]


def test_the_table_has_blanks_for_what_is_unknown(harness):
    rows = [
        harness.Row(op="a|b", shape="n", provider="ours", ours=True, p50_ms=1.2345, p20_ms=1.0, p80_ms=1234.6),
        harness.Row(op="c", shape="n", provider="peer", error=1.5e-7, baseline_error=2e-7, note="not installed: peer"),
    ]
    head, rule, first, second = harness.table(rows).splitlines()
    assert head.count("|") == rule.count("|") == second.count("|") == first.replace("\\|", "").count("|")
    assert [cell.strip() for cell in second.split("|")[1:-1]] == [
        *("c", "n", "float32", "", "peer", "", "", "", "", "", "", "", "", "1.5e-07 / 2.0e-07", "not installed: peer")
    ]
    assert "**ours**" in first and "1.23 [1, 1235]" in first and "a\\|b" in first


def test_the_header_names_the_machine(harness):
    header = harness.describe_machine()
    assert {"device", "cores", "memory", "python", "torch", "triton", "commit", "date"} <= set(header)
    assert header["torch"] == torch.__version__ and all(header.values())


def test_peak_is_seen_even_when_it_is_gone_at_the_end(memory):
    def spike():
        torch.ones(80 * MIB // 4).sum()

    spike()
    assert memory.measure(spike) == pytest.approx(80, abs=6)
    assert memory.measure(lambda: None) < 4


def test_peak_is_sampled_where_the_mark_cannot_be_reset(memory, monkeypatch):
    monkeypatch.setattr(memory, "_reset_mark", lambda: False)

    def hold():
        block = torch.ones(80 * MIB // 4)
        time.sleep(0.05)
        return block

    assert memory.measure(hold) == pytest.approx(80, abs=6)


# Without PyTorch, so that the processes start at once.
BUILDER = """
import os
def build(mib, inputs_mib):
    inputs = b"x" * (inputs_mib * 2**20)
    return lambda: len(b"y" * (mib * 2**20)) + len(inputs)
def grown(mib):
    kept = []
    return lambda: kept.append(b"z" * (mib * 2**20))
def broken():
    import no_such_package
def crash():
    return lambda: os._exit(3)
"""


def test_peak_of_a_fresh_process_leaves_out_the_inputs(memory, tmp_path):
    file = tmp_path / "builder.py"
    file.write_text(BUILDER)
    found = memory.peak_memory(f"{file}:build", {"mib": 100, "inputs_mib": 300})
    assert not found.note and found.peak_mib == pytest.approx(100, abs=2)
    grown = memory.peak_memory(f"{file}:grown", {"mib": 20}, warmup=2, steps=3)
    assert grown.peak_mib == pytest.approx(60, abs=2)
    assert memory.peak_memory(f"{file}:broken") == memory.Memory(None, "not installed: no_such_package")
    assert memory.peak_memory(f"{file}:crash").note.startswith("process ended with 3")
    assert (
        memory.peak_memory(f"{file}:build", {"mib": 1, "inputs_mib": 1}, timeout=0.01).note == "not done after 0.01 s"
    )


SUITE = """
from harness import Row, time_alternating

def rows(device, quick):
    sizes = [100] if quick else [100, 1000]
    found = []
    for size in sizes:
        timed = time_alternating({"loop": lambda: [i for i in range(50 * size)], "ours": lambda: list(range(size))},
                                 min_seconds=0.0)
        found += [Row(op="list", shape=f"n {size}", provider=name, ours=name == "ours", p50_ms=t.p50_ms,
                      p20_ms=t.p20_ms, p80_ms=t.p80_ms, peak_mib=size / 10) for name, t in timed.items()]
        found.append(Row(op="list", shape=f"n {size}", provider="peer", note="not installed: peer"))
    return found
"""


@pytest.fixture
def copy(tmp_path, root):
    """The scripts in a folder of their own, with one toy suite."""
    folder = tmp_path / "benchmarks"
    (folder / "suites").mkdir(parents=True)
    for name in ("run.py", "harness.py", "memory.py"):
        shutil.copy(root / "benchmarks" / name, folder)
    (folder / "suites" / "toy.py").write_text(SUITE)
    return folder


def test_run_writes_rows_table_and_charts(copy, tmp_path):
    out = tmp_path / "results" / "deep"
    command = [sys.executable, str(copy / "run.py"), "--suite", "toy", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {"toy.json", "toy.md", "toy-time.png", "toy-memory.png"}
    assert {path.name for path in out.iterdir()} == files
    content = json.loads((out / "toy.json").read_text())
    assert len(content["rows"]) == 6 and content["suite"] == "toy" and content["header"]["torch"] == torch.__version__
    ours = [row for row in content["rows"] if row["ours"]]
    assert all(row["speedup"] > 1 for row in ours)
    text = (out / "toy.md").read_text()
    assert "not installed: peer" in text and "--suite toy" in text and "- commit: " in text
    assert Image.open(out / "toy-time.png").format == "PNG"


def test_run_answers_mistakes_with_one_line(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(copy))
    spec = importlib.util.spec_from_file_location("benchmarks_run", copy / "run.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def error_of(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        assert script.main() == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert error_of("--suite", "no", "--out", out) == "error: --suite: no suite 'no'; choose from toy\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error_of("--suite", "toy", "--out", out, "--device", "cuda").startswith("error: --device: cuda")
    (tmp_path / "file").write_text("")
    assert "error: --out: cannot make the folder" in error_of("--suite", "toy", "--out", tmp_path / "file")
    assert not out.exists()
