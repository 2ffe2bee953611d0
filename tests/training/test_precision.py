"""The choice of mixed precision follows the hardware."""

import pytest
import torch

from vlblocks.training import precision

FLAGS = "processor : 0\nflags\t\t: fpu sse2 avx512f{}\nbugs : avx512_bf16_bug\n"


@pytest.mark.parametrize(("extra", "fast"), [("", False), (" avx512_bf16", True), (" amx_bf16 amx_tile", True)])
def test_cpu_flags_decide_where_torch_does_not_know(tmp_path, monkeypatch, extra, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    (tmp_path / "cpuinfo").write_text(FLAGS.format(extra))
    assert precision.cpu_has_fast_bf16(tmp_path / "cpuinfo") is fast


def test_works_without_torchs_private_answer_and_without_proc(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert precision.cpu_has_fast_bf16(tmp_path / "none") is False


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "no")])
def test_a_cpu_gets_bf16_where_it_is_fast(monkeypatch, fast, chosen):
    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: fast)
    assert precision.default_mixed_precision("cpu") == chosen


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "no")])
def test_a_gpu_gets_bf16_from_ampere_on(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert precision.default_mixed_precision("cuda") == chosen


def test_other_devices_stay_in_float32():
    assert precision.default_mixed_precision("meta") == "no"
