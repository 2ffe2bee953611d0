"""The Triton operations of nearest codes and sums by code as PyTorch sees them: registration, compilation, export."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from vlblocks.ops.grounding import nearest_code, segment_sum

pytest.importorskip("triton")
from vlblocks_kernels import nearest_triton


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(metric, dtype):
    x, codes = torch.randn(9, 16, dtype=dtype), torch.randn(5, 16, dtype=dtype)
    opcheck(nearest_triton.nearest_code, (x, codes, metric))
    for valid in (None, torch.rand(9) < 0.5):
        opcheck(nearest_triton.segment_sum, (x, torch.randint(5, (9,)), 5, valid))


def test_opcheck_of_strided_inputs():
    x, codes = torch.randn(16, 9).T, torch.randn(16, 5).T
    opcheck(nearest_triton.nearest_code, (x, codes, "l2"))
    indices, valid = torch.randint(5, (9, 2))[:, 0], (torch.rand(9, 2) < 0.5)[:, 0]
    opcheck(nearest_triton.segment_sum, (x, indices, 5, valid))


def quantize(x, codes, valid):
    indices = nearest_code(x, codes, backend="triton")
    return indices, *segment_sum(x.flatten(0, 1), indices.flatten(), codes.shape[0], valid.flatten(), backend="triton")


def test_compiles_whole_with_static_and_dynamic_shapes():
    torch.compiler.reset()
    for dynamic in (False, True):
        compiled = torch.compile(quantize, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for batch in (2, 3):
            x, codes, valid = torch.randn(batch, 7, 16), torch.randn(5, 16), torch.rand(batch, 7) < 0.6
            torch.testing.assert_close(compiled(x, codes, valid), quantize(x, codes, valid))


class Quantize(torch.nn.Module):
    def forward(self, x, codes, valid):
        return quantize(x, codes, valid)


def test_exports():
    x, codes, valid = torch.randn(2, 7, 16), torch.randn(5, 16), torch.rand(2, 7) < 0.6
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = {"x": {1: tokens}, "codes": None, "valid": {1: tokens}}
    program = torch.export.export(Quantize(), (x, codes, valid), dynamic_shapes=shapes)
    for name in ("nearest_code", "segment_sum"):
        assert any(f"vlblocks.{name}" in str(node.target) for node in program.graph.nodes)
    for length in (7, 11):
        x, valid = torch.randn(2, length, 16), torch.rand(2, length) < 0.6
        torch.testing.assert_close(program.module()(x, codes, valid), quantize(x, codes, valid))


def test_gradients_and_autocast_stay_outside():
    x, codes = torch.randn(9, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    plain = nearest_code(x, codes, backend="triton")
    sums = segment_sum(x, plain, 5, backend="triton")
    assert not sums.sums.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(x, codes, backend="triton"), plain)
        assert torch.equal(segment_sum(x, plain, 5, backend="triton").sums, sums.sums)


def test_flops_are_those_of_the_matrix_product():
    x, codes = torch.randn(9, 16), torch.randn(5, 16)
    with FlopCounterMode(display=False) as counted:
        nearest_code(x, codes, backend="triton")
    assert counted.get_total_flops() == 2 * 9 * 16 * 5


def test_tables_have_every_chip():
    from vlblocks_kernels.launch import SMS

    assert tuple(nearest_triton.NEAREST) == SMS
    for sm in SMS:
        labels = [(case.kernel.__name__, case.label) for case in nearest_triton.compile_cases(sm)]
        assert len(labels) == len(set(labels)) == 11
