"""The contrastive operations: what PyTorch demands of an operation, and the sums against the whole matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlblocks.losses import info_nce, siglip, two_view_contrast
from vlblocks.ops import contrastive as ops
from vlblocks_kernels.contrastive import (
    CACHE_BYTES,
    LOG2E,
    Pairing,
    Weights,
    contrast,
    contrast_backward,
    draw_pairs,
    gradients_chunked,
    merge,
    sums_chunked,
    tile_shape,
)
from vlblocks_kernels.sigmoid_contrast import sigmoid_chunked, sigmoid_contrast, sigmoid_contrast_rows

ROWS, COLUMNS, WIDTH = 6, 9, 4


def problem(rows=ROWS, columns=COLUMNS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    right = torch.randn(columns, WIDTH, generator=generator).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    return left, right, torch.tensor([1.3], dtype=wide, requires_grad=True)


def relations(rows=ROWS, columns=COLUMNS):
    """Partners (one row has none), ids, and ids as rows see them."""
    generator = torch.Generator().manual_seed(1)
    partner = torch.randperm(columns, generator=generator)[:rows]
    partner[-1] = -5
    ids = torch.randint(3, (rows + columns,), generator=generator).int()
    captions = ids[rows:].masked_fill(torch.arange(columns) % 4 == 1, -1)
    return partner, ids[:rows], ids[rows:], captions


def terms(size, dtype=torch.float64, seed=2):
    return torch.rand(3, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_down(left, right, scale, partner, row_ids, column_ids, captions, exclude, row_terms, column_terms):
    """Both results of `contrast`, from the whole matrix."""
    z = scale * left @ right.T
    own = partner[:, None] == torch.arange(len(right))
    found = []
    for ids, weights, axis in ((captions, row_terms, 1), (column_ids, column_terms, 0)):
        others = (row_ids[:, None] == ids) & ~own
        shown = z.masked_fill(others, -math.inf) if exclude else z
        lse = torch.logsumexp(shown / LOG2E, axis) * LOG2E
        linear = weights[0] * (z * own).sum(axis) + weights[1] * (z * others).sum(axis) + weights[2] * z.sum(axis)
        found.append(torch.stack([lse, linear]))
    return found


def options(exclude, smooth=True, columns=True, dtype=torch.float64, chunk=None, triton=False, teacher=None):
    teachers = teacher or (None, None)
    column_terms = terms(COLUMNS, dtype, 3) if columns else None
    return (*relations(), exclude, terms(ROWS, dtype), column_terms, smooth, *teachers, chunk, triton)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("chunk", [8, 100, None])
def test_sums_equal_the_whole_matrix(exclude, chunk):
    inputs = problem()
    settings = options(exclude, chunk=chunk)
    found, expected = contrast(*inputs, *settings), written_down(*inputs, *settings[:7])
    weights = [torch.randn(2, size, dtype=torch.float64) for size in (ROWS, COLUMNS)]
    grads = []
    for results in (found, expected):
        total = sum((part * weight).sum() for part, weight in zip(results, weights, strict=True))
        grads.append(torch.autograd.grad(total, inputs))
    for have, want in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("taught", [False, True])
def test_merged_sums_are_those_over_all_candidates(taught):
    left, right, scale = problem()
    generator = torch.Generator().manual_seed(5)
    teacher = [torch.randn(n, 3, generator=generator, dtype=torch.float64) if taught else None for n in (ROWS, COLUMNS)]

    def rows_of(part):
        taught_part = None if teacher[1] is None else teacher[1][part]
        arguments = (None, None, None, None, False, terms(ROWS), None, False, teacher[0], taught_part, None, False)
        return contrast(left, right[part], scale, *arguments)[0]

    whole, parts = rows_of(slice(None)), merge(rows_of(slice(0, 4)), rows_of(slice(4, None)))
    torch.testing.assert_close(parts, whole)
    weights = torch.ones_like(whole)
    if taught:
        weights[2] = 0  # the teacher's own sums are constants
    for have, want in zip(
        torch.autograd.grad((parts * weights).sum(), (left, right), retain_graph=True),
        torch.autograd.grad((whole * weights).sum(), (left, right)),
        strict=True,
    ):
        torch.testing.assert_close(have, want)
    nothing = whole.new_full(whole.shape, -math.inf)
    nothing[1::2] = 0
    torch.testing.assert_close(merge(merge(nothing, nothing), whole), whole)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_gradcheck(exclude, columns):
    settings = options(exclude, columns=columns, chunk=100)
    assert torch.autograd.gradcheck(lambda *x: contrast(*x, *settings), problem())


def test_gradcheck_of_the_sigmoid_losses():
    left, right, scale = problem()
    bias = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    weight = torch.rand(ROWS, dtype=torch.float64)
    relation = relations()[:3]

    def total(*x):
        return sigmoid_contrast(*x, weight, *relation, 100, False, True, True)[0]

    assert torch.autograd.gradcheck(total, (left, right, scale, bias))
    assert torch.autograd.gradcheck(
        lambda *x: sigmoid_contrast_rows(*x, *relation, 100, False), (left, right, scale, bias)
    )


@pytest.mark.parametrize("triton", [False, True])
def test_opcheck(triton):
    left, right, scale = problem(dtype=torch.float32)
    settings = options(False, dtype=torch.float32, triton=triton)
    teacher = [torch.randn(n, 3) for n in (ROWS, COLUMNS)]
    torch.library.opcheck(contrast, (left, right, scale, *settings))
    torch.library.opcheck(contrast, (left, right, scale, *options(True, False, False, torch.float32, teacher=teacher)))
    known = left.detach(), right.detach(), scale.detach()
    rows, columns = contrast(*known, *settings)
    grads = torch.ones_like(rows), torch.ones_like(columns)
    torch.library.opcheck(contrast_backward, (*grads, rows, columns, *known, *settings, True, True))
    bias, weight = torch.zeros(1, requires_grad=True), torch.ones(ROWS)
    relation = (*relations()[:3], None, triton)
    torch.library.opcheck(sigmoid_contrast, (left, right, scale, bias, weight, *relation, True, True))
    torch.library.opcheck(sigmoid_contrast_rows, (left, right, scale, bias, *relation))


LOSSES = {
    "info_nce": lambda a, b, n: info_nce(a, b, temperature=n, image_ids=torch.arange(len(a)) // 2, label_smoothing=0.1),
    "siglip": lambda a, b, n: siglip(a, b, scale=n, bias=-n),
    "siglip, rows": lambda a, b, n: siglip(a, b, scale=n, bias=-n, reduction="none").sum(),
    "two views": lambda a, b, n: two_view_contrast(a, b, temperature=n),
    "albef": lambda a, b, n: info_nce(
        a,
        b,
        temperature=n,
        queue_image=QUEUE[0],
        queue_text=QUEUE[1],
        queue_valid=torch.tensor([True, False, True]),
        teacher_image=b.detach(),
        teacher_text=a.detach(),
        label_smoothing=0.1,
    ),
}
QUEUE = torch.linspace(-1, 1, 6 * WIDTH).view(2, 3, WIDTH)
every_loss = pytest.mark.parametrize("name", list(LOSSES))


@every_loss
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(name, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (7, 12) if dynamic else (7,):
        inputs = problem(rows, rows, torch.float32)
        found, expected = compiled(*inputs), LOSSES[name](*inputs)
        torch.testing.assert_close(found, expected)
        for have, want in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(have, want)


@every_loss
def test_exports(name):
    class Loss(torch.nn.Module):
        def forward(self, left, right, number):
            return LOSSES[name](left, right, number)

    inputs = [x.detach() for x in problem(7, 7, torch.float32)]
    program = torch.export.export(Loss(), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), LOSSES[name](*inputs))


@pytest.mark.parametrize(
    "name, forward, backward", [("info_nce", 1, 2), ("siglip", 3, 0), ("siglip, rows", 1, 3), ("two views", 4, 8)]
)
def test_flops_are_counted_once(name, forward, backward):
    """In products of all pairs; of the logits that a backward makes again only those of "rows" count."""
    inputs = problem(7, 7, torch.float32)
    with FlopCounterMode(display=False) as counter:
        loss = LOSSES[name](*inputs)
    product = 2 * 7 * 7 * WIDTH
    assert counter.get_total_flops() == forward * product
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == backward * product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("chunk", [4096, None])
def test_memory_that_nobody_wrote_reaches_nothing(name, dtype, chunk, poisoned_memory, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr("vlblocks_kernels.contrastive.CACHE_BYTES", chunk)
    inputs = problem(67, 67, dtype)
    found = LOSSES[name](*inputs)
    assert found.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(found, inputs))


@pytest.mark.parametrize("size", [20.0, 60.0])
@pytest.mark.parametrize("ids", [None, torch.zeros(2, dtype=torch.int32)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_match_that_is_nearly_certain_has_its_small_loss(size, ids, dtype, limit):
    left, right = torch.full((2, 1), size, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    if ids is None:
        right[0] = -1
    one = torch.ones(1, dtype=dtype)
    pairing = Pairing(torch.tensor([1, -1]), ids, ids)
    loss, made, bias_grad = sigmoid_chunked(left, right, one, 0 * one, pairing, one.expand(2), (True, True), None)
    z, number = size * right.double()[:, 0], one.double()
    matched = torch.tensor([[False, True], [False, False]]) if ids is None else torch.ones(2, 2, dtype=torch.bool)
    sign = 1 - 2 * matched.double()
    expected = torch.nn.functional.softplus(sign * z).sum(1)
    dz = sign * torch.sigmoid(sign * z)
    # The second row of a partner alone has a loss that is not small.
    torch.testing.assert_close(loss.double(), expected, rtol=limit, atol=0)
    torch.testing.assert_close(bias_grad.double(), dz.sum() * number, rtol=limit, atol=0)
    torch.testing.assert_close(made.left_grad.double(), dz @ right.double(), rtol=limit, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype):
    inputs = problem(7, 7, dtype)
    settings = (torch.arange(7), None, None, None, False, terms(7, torch.float32), terms(7, torch.float32), True)
    found = contrast(*inputs, *settings, None, None, None, False)
    exact = contrast(
        *(x.detach().double() for x in inputs),
        *settings[:5],
        *(x.double() for x in settings[5:7]),
        True,
        None,
        None,
        None,
        False,
    )
    for have, want in zip(found, exact, strict=True):
        assert have.dtype == torch.float32
        torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found[0].sum() + found[1].sum(), inputs)
    assert [grad.dtype for grad in grads] == [dtype, dtype, torch.float32]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2**20), st.booleans())
def test_tiles_keep_within_their_bytes(rows, columns, chunk, on_gpu):
    r, c = tile_shape(rows, columns, 4, chunk, on_gpu)
    assert 1 <= r <= rows and 1 <= c <= columns
    assert r * c * 4 <= max(chunk, 4)
    # And use them, unless the matrix is smaller.
    assert r * c * 4 >= min(chunk, 4 * rows * columns) / 4 or chunk < 64


def test_tiles_stay_in_a_cache():
    r, c = tile_shape(8192, 8192, 4, None, False)
    assert CACHE_BYTES / 2 <= 4 * r * c <= CACHE_BYTES


def held_by(name, chunk_bytes, largest_tensor):
    """Bytes of the largest tensor that 400 pairs need; by the functions themselves, operations hide theirs."""
    rows = 400
    left, right = torch.randn(2, rows, WIDTH)
    scale, numbers, ids = torch.ones(1), torch.ones(rows), torch.arange(rows) // 2
    pairing = Pairing(torch.arange(rows), ids.int(), ids.int())
    weights = Weights(numbers, numbers, numbers, numbers, None, None)
    calls = {
        "sums": lambda: sums_chunked(left, right, scale, pairing, None, True, chunk_bytes),
        "gradients": lambda: gradients_chunked(
            left, right, scale, pairing, None, weights, weights, (True, True), chunk_bytes
        ),
        "sigmoid": lambda: sigmoid_chunked(left, right, scale, scale, pairing, numbers, (True, True), chunk_bytes),
        "draws": lambda: draw_pairs(left, right, scale, ids, None, chunk_bytes),
    }
    with largest_tensor() as mode:
        calls[name]()
    return mode.bytes


@pytest.mark.parametrize("name", ["sums", "gradients", "sigmoid", "draws"])
def test_no_temporary_is_as_large_as_the_matrix(name, largest_tensor):
    features = 4 * 400 * WIDTH
    # A partner's place is an int64 index, and so is a place drawn.
    assert held_by(name, 4096, largest_tensor) <= max(features, 4096)
    assert held_by(name, 4 * 400 * 400, largest_tensor) == 4 * 400 * 400


def test_backends_are_chosen_in_one_place(monkeypatch):
    x = torch.zeros(2, 2)
    assert not ops.takes_triton(x, "auto")
    assert not ops.takes_triton(x, "chunked")
    assert ops.takes_triton(x, "triton")
    assert not ops.takes_triton(x.double(), "triton")
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ops.UserError, match="Triton is not installed"):
        ops.takes_triton(x, "triton")
    assert not ops.takes_triton(x, "auto")


@pytest.mark.parametrize("name", ["info_nce", "siglip", "two_view"])
def test_triton_without_a_gpu_gives_the_chunked_numbers(name):
    left, right, _ = problem(7, 7, torch.float32)
    found = [
        {
            "info_nce": lambda b: info_nce(left, right, temperature=0.2, backend=b),
            "siglip": lambda b: siglip(left, right, scale=3.0, bias=-2.0, backend=b),
            "two_view": lambda b: two_view_contrast(left, right, temperature=0.2, backend=b),
        }[name](backend)
        for backend in ("triton", "chunked")
    ]
    assert torch.equal(*found)
