"""Cross-entropy without its logits: chunked against whole, and what PyTorch demands of an operation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlblocks.errors import UserError
from vlblocks.ops.linear_cross_entropy import linear_cross_entropy
from vlblocks_kernels.linear_cross_entropy import linear_cross_entropy_rows, linear_cross_entropy_total


def problem(rows=13, vocab=37, width=8, dtype=torch.float64, ignored=0.3, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(vocab, generator=generator).to(dtype).requires_grad_() if bias else None
    target = torch.randint(vocab, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = -100
    return x, weight, b, target


def gradients(loss, *inputs, again=False):
    known = [x for x in inputs if x is not None]
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad((loss * weights).sum(), known, retain_graph=again)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing, z_loss, bias", [(0.0, 0.0, True), (0.1, 0.0, False), (0.2, 1e-2, True)])
def test_equals_cross_entropy_written_down(reduction, smoothing, z_loss, bias):
    x, weight, b, target = problem(bias=bias)
    logits = x @ weight.T + (0 if b is None else b)
    rows = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    rows = rows + z_loss * logits.logsumexp(1).square() * (target != -100)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (target != -100).sum()}[reduction]
    for backend, chunk in itertools.product(("chunked", "triton", "reference"), (1, 1000, 2**28)):
        found = linear_cross_entropy(
            x,
            weight,
            b,
            target,
            label_smoothing=smoothing,
            z_loss=z_loss,
            reduction=reduction,
            chunk_bytes=chunk,
            backend=backend,
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for have, want in zip(
            gradients(found, x, weight, b), gradients(expected, x, weight, b, again=True), strict=True
        ):
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    rows=st.integers(0, 9),
    vocab=st.sampled_from([1, 2, 63, 64, 65]),
    chunk=st.integers(1, 20_000),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 5),
)
def test_chunks_change_only_rounding(rows, vocab, chunk, ignored, seed):
    x, weight, b, target = problem(rows, vocab, 5, torch.float32, ignored, seed)
    found = linear_cross_entropy(x, weight, b, target, chunk_bytes=chunk)
    whole = linear_cross_entropy(x, weight, b, target, backend="reference")
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    for have, want in zip(gradients(found, x, weight, b), gradients(whole, x, weight, b), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction):
    x, weight, b, target = problem(ignored=1.1)
    x.data[:] = float("nan")
    loss = linear_cross_entropy(x, weight, b, target, reduction=reduction)
    assert (loss == 0).all()
    assert all((grad == 0).all() for grad in gradients(loss, x, weight, b))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_reach_nothing(reduction):
    x, weight, b, target = problem()
    clean = gradients(linear_cross_entropy(x, weight, b, target, reduction=reduction), x, weight, b)
    x.data[target == -100] = float("nan")
    loss = linear_cross_entropy(x, weight, b, target, reduction=reduction)
    found = gradients(loss, x, weight, b)
    assert loss.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(size):
    x = torch.full((3, 1), size, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, None, torch.tensor([0, 1, 2]), z_loss=1e-4)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, x, weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    x, weight, b, target = problem(5, 7, 3)

    def loss(x, weight, b):
        return linear_cross_entropy(x, weight, b, target, label_smoothing=0.1, z_loss=0.1, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (x, weight, b))


def test_opcheck():
    x, weight, b, target = problem(dtype=torch.float32)
    options = (-100, 0.1, 1e-3)
    scale = torch.ones(1)
    torch.library.opcheck(
        linear_cross_entropy_total, (x, weight, b, target, scale, *options, True, True, True, 1000, False)
    )
    torch.library.opcheck(linear_cross_entropy_rows, (x, weight, None, target, *options, 1000, True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(reduction, dynamic):
    torch._dynamo.reset()

    def step(x, weight, b, target):
        return linear_cross_entropy(x, weight, b, target, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (13, 21) if dynamic else (13,):
        inputs = problem(rows)
        found, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(found, expected)
        for have, want in zip(gradients(found, *inputs[:3]), gradients(expected, *inputs[:3]), strict=True):
            torch.testing.assert_close(have, want)


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, x, weight, target):
            return linear_cross_entropy(x, weight, None, target)

    x, weight, _, target = problem(dtype=torch.float32)
    program = torch.export.export(Loss(), (x.detach(), weight.detach(), target))
    torch.testing.assert_close(program.module()(x, weight, target), linear_cross_entropy(x, weight, None, target))


@pytest.mark.parametrize("reduction, backward, products", [("mean", 0, 3), ("none", 2, 1)])
def test_flops_are_counted_once(reduction, backward, products):
    x, weight, _, target = problem(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, weight, None, target, reduction=reduction)
    assert counter.get_total_flops() == products * 2 * 13 * 37 * 8
    with FlopCounterMode(display=False) as counter:
        loss.sum().backward()
    assert counter.get_total_flops() == backward * 2 * 13 * 37 * 8


def test_autocast_runs_the_products_in_half_and_the_softmax_in_float32():
    x, weight, b, target = problem(64, 300, 32, torch.float32)
    exact = linear_cross_entropy(x.double(), weight.double(), b.double(), target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, b, target)
    assert loss.dtype == torch.float32
    assert 1e-7 < abs(loss.item() / exact.item() - 1) < 1e-2
    assert all(grad.dtype == torch.float32 for grad in gradients(loss, x, weight, b))


def test_tied_weights_get_both_gradients():
    words = torch.nn.Embedding(11, 4, dtype=torch.float64)
    tokens = torch.tensor([1, 5, 5])

    def loss(backend):
        return linear_cross_entropy(words(tokens), words.weight, None, tokens, backend=backend)

    (found,), (expected,) = (torch.autograd.grad(loss(b), words.weight) for b in ("chunked", "reference"))
    torch.testing.assert_close(found, expected)


def test_a_frozen_weight_costs_no_gradient():
    x, weight, _, target = problem()
    loss = linear_cross_entropy(x, weight.detach(), None, target)
    (found,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(linear_cross_entropy(x, weight, None, target, backend="reference"), x)
    torch.testing.assert_close(found, expected)


def test_a_loss_can_be_weighted_and_used_twice():
    x, weight, b, target = problem()
    loss = linear_cross_entropy(x, weight, b, target)
    once = torch.autograd.grad(loss, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(3 * loss, x)[0], 3 * once)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"target": torch.zeros(4, dtype=torch.long)}, "target"),
        ({"target": torch.zeros(13)}, "long"),
        ({"weight": torch.zeros(37, 9)}, "weight"),
        ({"bias": torch.zeros(36)}, "bias"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"reduction": "avg"}, "reduction"),
        ({"backend": "cuda"}, "backend"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
    ],
)
def test_mistakes_are_named(change, says):
    x, weight, b, target = problem(dtype=torch.float32)
    given = {"x": x, "weight": weight, "bias": b, "target": target} | change
    with pytest.raises(UserError, match=says):
        linear_cross_entropy(**given)
