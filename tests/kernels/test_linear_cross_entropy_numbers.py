"""Cross-entropy without its logits: its accuracy in half types, and the memory that it holds and reads."""

import pytest
import torch

import vlblocks_kernels.linear_cross_entropy as kernels
from vlblocks.ops.linear_cross_entropy import linear_cross_entropy
from vlblocks_kernels.linear_cross_entropy import ALIGN, CHUNK_BYTES, Settings, linear_cross_entropy_chunked

HALF = [torch.float16, torch.bfloat16]
TYPES = [torch.float32, *HALF]
EVERYTHING = (True, True, True)


def problem(rows, vocab, width, dtype, ignored=0.0):
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(vocab, width).to(dtype)
    target = torch.randint(vocab, (rows,))
    target[torch.rand(rows) < ignored] = -100
    return x, weight, torch.randn(vocab).to(dtype), target


def run(x, weight, bias, target, scale=1.0, **options):
    """The loss, and the gradients of scale times it to x, weight and bias."""
    leaves = [part.clone().requires_grad_() for part in (x, weight, bias)]
    loss = linear_cross_entropy(*leaves, target, **options).sum()
    return [loss.detach(), *torch.autograd.grad(loss * scale, leaves)]


def errors(found, exact):
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


def worst(found, exact):
    # Python's max may pass over NaN.
    return float(torch.tensor(errors(found, exact)).max())


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=str)
def test_gradients_of_a_mean_over_many_rows_do_not_vanish_in_float16(options):
    inputs = problem(4096, 8000, 8, torch.float16, ignored=0.1)
    found = run(*inputs, **options)
    exact = run(*(part.double() for part in inputs[:3]), inputs[3], backend="reference", **options)
    assert worst(found, exact) < 3e-3


def test_gradients_of_losses_of_very_unlike_weights_do_not_vanish_in_float16():
    x, weight, bias, target = problem(64, 300, 16, torch.float16)
    rows = 10.0 ** -torch.arange(64).fmod(3).double() / 1e5
    found, exact = [], []
    for results, dtype, backend in ((found, torch.float16, "chunked"), (exact, torch.float64, "reference")):
        leaves = [part.to(dtype).requires_grad_() for part in (x, weight, bias)]
        losses = linear_cross_entropy(*leaves, target, reduction="none", chunk_bytes=9000, backend=backend)
        # A loss scale, as training in float16 has one.
        results += torch.autograd.grad((losses * rows.to(losses.dtype)).sum() * 2**16, leaves)
    assert worst(found, exact) < 3e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_beyond_float16_is_none_of_its_numbers(reduction):
    inputs = problem(300, 50, 8, torch.float16)
    found = run(*inputs, scale=2.0**16 if reduction == "mean" else 2.0**16 / 300, reduction=reduction)
    exact = run(*(part.double() for part in inputs[:3]), inputs[3], backend="reference")
    assert all(part.isfinite().all() for part in found)
    assert worst(found[1:], [2**16 * part for part in exact[1:]]) < 3e-3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab", [400, 403])
def test_what_lies_past_the_vocabulary_reaches_nothing(dtype, reduction, vocab, poisoned_memory):
    """oneDNN's product of bfloat16 reads past a row's end where there are few rows: that is memory nobody wrote."""
    limit = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
    for rows in (1, 2, 3, 7, 16, 17, 31, 32, 33, 40, 47, 48, 63, 64, 65, 96, 100):
        inputs = problem(rows, vocab, 128, dtype)
        inputs = [inputs[0] / 8, *inputs[1:]]
        found = run(*inputs, reduction=reduction)
        exact = run(*(part.double() for part in inputs[:3]), inputs[3], backend="reference", reduction=reduction)
        assert worst(found, exact) < limit, rows


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_weights_gradient_is_added_up_in_float32(dtype, reduction):
    """In the inputs' type 64 sums would cost a digit."""
    inputs = problem(512, 60, 16, dtype)
    exact = run(*(part.double() for part in inputs[:3]), inputs[3], backend="reference", reduction=reduction)
    one, many = (
        errors(run(*inputs, reduction=reduction, chunk_bytes=size), exact)[2] for size in (2**28, 8 * ALIGN * 2)
    )
    assert many <= 2 * one


@pytest.mark.parametrize("vocab", [1, 63, 64, 65])
def test_rows_of_logits_start_at_multiples_of_64_and_ignored_ones_are_none(vocab):
    x, weight, bias, target = problem(37, vocab, 8, torch.float32, ignored=0.5)
    seen = []

    def watched(logits, target, *others):
        seen.append((logits.clone(), target.clone(), logits.stride(0)))
        return kernels.softmax_rows(logits, target, *others)

    size = 5 * 4 * (-(-vocab // ALIGN) * ALIGN)
    linear_cross_entropy_chunked(
        x, weight, bias, target, torch.ones(1), None, Settings(), EVERYTHING, size, softmax=watched
    )
    counted = target != -100
    assert all(stride % ALIGN == 0 and len(part) <= 5 for part, _, stride in seen)
    assert torch.equal(torch.cat([part for _, part, _ in seen]), target[counted])
    torch.testing.assert_close(torch.cat([part for part, _, _ in seen]), x[counted] @ weight.T + bias)


@pytest.mark.parametrize("lse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_more_than_a_chunk_is_held(dtype, lse, largest_tensor):
    rows, vocab, width, size = 1000, 500, 8, 2**15
    x, weight, bias, target = problem(rows, vocab, width, dtype)
    known = (x @ weight.T + bias).float().logsumexp(1) if lse else None

    def held(chunk_bytes):
        arguments = (torch.ones(1), known, Settings(), EVERYTHING, chunk_bytes)
        with largest_tensor() as mode:
            linear_cross_entropy_chunked(x, weight, bias, target, *arguments)
        return mode.bytes

    # The products of float16 are made in float32 on a CPU, the softmax always.
    limit = max(size * (4 // x.element_size()), 4 * vocab * width, 8 * rows, 4 * rows * width)
    assert held(size) <= limit < held(CHUNK_BYTES)


def test_a_chunk_is_256_mib_unless_told_otherwise(monkeypatch):
    asked = []
    chunked = linear_cross_entropy_chunked
    monkeypatch.setattr(kernels, "linear_cross_entropy_chunked", lambda *args: asked.append(args[8]) or chunked(*args))
    for reduction in ("mean", "none"):
        run(*problem(3, 5, 4, torch.float32), reduction=reduction)
    assert asked == [256 * 2**20] * 3
