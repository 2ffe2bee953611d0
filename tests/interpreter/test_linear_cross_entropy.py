"""The Triton softmax of linear_cross_entropy, in the interpreter."""

import pytest
import torch

import vlblocks_kernels.linear_cross_entropy_triton as kernels
from vlblocks.ops.linear_cross_entropy import linear_cross_entropy

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


NOISE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""An error that a few roundings make, and eager's may happen to have none of: it is no measure where it is less."""


@pytest.fixture(autouse=True)
def small_blocks_and_poisoned_memory(monkeypatch):
    """Several blocks in a row; fresh memory holds NaN."""
    monkeypatch.setattr(kernels, "CONFIG", kernels.Config({"BLOCK": 32}, warps=4, stages=1))
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def problem(dtype, rows=7, vocab=70, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(vocab, (rows,), generator=generator)
    if rows > 2:
        target[1] = -100
    return x, weight, bias, target


def run(inputs, backend, **options):
    *leaves, target = inputs
    loss = linear_cross_entropy(*leaves, target, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def relative(found, exact):
    return [float((f.double() - e).norm() / e.norm().clamp_min(1e-30)) for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab", [1, 31, 32, 70])
def test_against_float64(dtype, reduction, vocab):
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": reduction, "chunk_bytes": 600}
    inputs = problem(dtype, vocab=vocab)
    exact_inputs = (*[x.detach().double().requires_grad_() for x in inputs[:3]], inputs[3])
    exact = run(exact_inputs, "reference", **options)
    found, eager = (
        relative(run(inputs, "triton", **options), exact),
        relative(run(inputs, "reference", **options), exact),
    )
    # Of one word, all that is left of a gradient is the z-loss's: a difference of numbers hundreds of times as large.
    floor = (LIMIT if vocab == 1 else NOISE)[dtype]
    for ours, theirs in zip(found, eager, strict=True):
        assert ours <= LIMIT[dtype] and ours <= max(floor, 2 * theirs), (found, eager)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    inputs = problem(torch.float32, rows=rows)
    for have, want in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_twice_the_same_bits():
    inputs = problem(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(size):
    x = torch.full((3, 1), size, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    assert all(part.isfinite().all() for part in run((x, weight, bias, torch.tensor([0, 1, 2])), "triton"))


def test_columns_past_the_vocabulary_are_not_written():
    logits = torch.randn(3, 96)
    before = logits.clone()
    kernels.softmax_rows_triton(
        logits[:, :70], torch.tensor([0, 69, 5]), None, torch.ones(1).expand(3), kernels.Settings()
    )
    assert torch.equal(logits[:, 70:], before[:, 70:])
    torch.testing.assert_close(logits[:, :70].sum(1), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_logit_of_minus_infinity_has_no_probability(reduction):
    x, weight, bias, target = problem(torch.float32)
    with torch.no_grad():
        bias[-1] = -float("inf")
        target[target == len(bias) - 1] = 0
    options = {"z_loss": 1e-3, "reduction": reduction}
    found, plain = (run((x, weight, bias, target), backend, **options) for backend in ("triton", "chunked"))
    for have, want in zip(found, plain, strict=True):
        assert have.isfinite().all()
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrong", [-1, 70, 71, 100_000_000])
def test_a_target_outside_of_the_vocabulary_is_not_a_number(reduction, wrong):
    x, weight, bias, target = problem(torch.float32)
    target[3] = wrong
    loss, x_grad, *others = run((x, weight, bias, target), "triton", reduction=reduction)
    bad = torch.arange(len(x)) == 3
    assert torch.equal(loss.isnan(), bad if reduction == "none" else torch.tensor(True))
    assert torch.equal(x_grad.isnan().any(1), bad)
    assert all(part.isnan().any() for part in others)
