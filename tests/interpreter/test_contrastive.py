"""The contrastive kernels in the interpreter, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import vlblocks_kernels.contrastive_triton as softmax
import vlblocks_kernels.sigmoid_contrast_triton as sigmoid
from vlblocks.losses import info_nce, siglip, two_view_contrast
from vlblocks_kernels.launch import Config

LIMIT = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
NOISE = 5e-7
"""An error that a few roundings of float32 make, and eager's may happen to have none of: below it, it is no measure."""
every_type = pytest.mark.parametrize("dtype", list(LIMIT), ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of each kind at few rows, and outputs that are NaN until they are written."""
    tile = Config({"BM": 32, "BN": 32, "BD": 32}, warps=4, stages=1)
    table = {sm: {"half": tile, "fp32": tile} for sm in softmax.TILES}
    for module, name in ((softmax, "TILES"), (sigmoid, "TILES"), (sigmoid, "GRADIENT")):
        monkeypatch.setattr(module, name, table)
    rest = Config({"BM": 16, "BN": 32, "BD": 32}, warps=4, stages=1)
    monkeypatch.setattr(softmax, "REST", {"half": rest, "fp32": rest})
    monkeypatch.setattr(softmax, "PANEL", 2)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def problem(dtype, rows=37, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(rows, width, generator=generator), dim=1) for _ in range(2))
    numbers = torch.tensor([0.07]), torch.tensor([8.0]), torch.tensor([-9.0])
    return [x.to(dtype).requires_grad_() for x in (image, text)], [x.requires_grad_() for x in numbers]


def ids_of(rows):
    return torch.randint(rows // 2, (rows,), generator=torch.Generator().manual_seed(3))


def weights_of(rows):
    return torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0]).repeat(-(-rows // 5))[:rows]


def nce(features, numbers, **options):
    return info_nce(*features, temperature=numbers[0], **options)


def sig(features, numbers, **options):
    return siglip(*features, scale=numbers[1], bias=numbers[2], **options)


def views(features, numbers, **options):
    return two_view_contrast(*features, temperature=numbers[0], **options)


LOSSES = {"nce": nce, "sig": sig, "views": views}


def run(loss, features, numbers, backend, **options):
    """The loss and all its gradients."""
    value = LOSSES[loss](features, numbers, backend=backend, **options)
    leaves = [x for x in (*features, *numbers) if x.requires_grad]
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return [value.detach(), *(g for g in grads if g is not None)]


def relative(found, exact):
    assert len(found) == len(exact)
    return [float((f.double() - e).norm() / e.norm().clamp_min(1e-30)) for f, e in zip(found, exact, strict=True)]


def check(loss, features, numbers, dtype, floor=NOISE, **options):
    wide = [[x.detach().double().requires_grad_() for x in part] for part in (features, numbers)]
    exact = run(loss, *wide, "reference", **options)
    errors = relative(run(loss, features, numbers, "triton", **options), exact)
    if dtype == torch.float32:
        plain = relative(run(loss, features, numbers, "reference", **options), exact)
        for ours, theirs in zip(errors, plain, strict=True):
            assert ours <= LIMIT[dtype] and ours <= max(floor, 2 * theirs), (errors, plain)
    else:
        assert all(error <= LIMIT[dtype] for error in errors[:3]), errors
        # A number's gradient is one sum that nearly cancels; in bf16 eager's own is off by 2e-2.
        assert all(error <= 3e-2 for error in errors[3:]), errors


@every_type
@pytest.mark.parametrize("loss", list(LOSSES))
def test_against_float64(loss, dtype):
    check(loss, *problem(dtype), dtype)


def test_rows_that_fill_their_tiles():
    check("nce", *problem(torch.float32, 64, 32), torch.float32)


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {"image_ids": ids_of(37), "weight": weights_of(37)}),
        (torch.bfloat16, {"image_ids": ids_of(37), "weight": weights_of(37)}),
        (torch.float32, {"image_ids": ids_of(37), "weight": weights_of(37), "same_id": "exclude"}),
        (torch.float16, {"image_ids": ids_of(37), "same_id": "exclude", "label_smoothing": 0.1}),
        (torch.float32, {"image_ids": torch.zeros(37, dtype=torch.long), "same_id": "exclude"}),
        (torch.float32, {"image_ids": ids_of(37), "reduction": "none", "chunk_bytes": 2000}),
    ],
    ids=["positive", "positive, bf16", "exclude", "exclude, fp16", "all one picture", "chunks"],
)
def test_nce_with_ids(dtype, options):
    check("nce", *problem(dtype), dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nce_with_a_queue(dtype):
    (queue_image, queue_text), _ = problem(dtype, 40, seed=7)
    valid = torch.arange(40) % 3 != 0
    queue = {"queue_image": queue_image.detach(), "queue_text": queue_text.detach(), "queue_valid": valid}
    check("nce", *problem(dtype), dtype, **queue, label_smoothing=0.1)


@pytest.mark.parametrize(
    "dtype, reduction", [(torch.float32, "mean"), (torch.float32, "none"), (torch.float16, "mean")], ids=str
)
def test_sigmoid_with_ids(dtype, reduction):
    options = {"image_ids": ids_of(37), "weight": weights_of(37), "reduction": reduction, "chunk_bytes": 2000}
    check("sig", *problem(dtype), dtype, **options)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(loss, rows):
    features, numbers = problem(torch.float32, rows)
    for have, want in zip(
        run(loss, features, numbers, "triton"), run(loss, features, numbers, "reference"), strict=True
    ):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    if rows and loss != "sig":
        assert all(part.abs().sum() == 0 for part in run(loss, features, numbers, "triton"))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_rows_far_apart_get_exponentials_of_their_own(loss):
    """Logits from about -1e4 to 1e4 within one tile: a common exponential would vanish, or overflow."""
    (image, text), numbers = problem(torch.float32)
    with torch.no_grad():
        image *= torch.logspace(-2, 2.8, len(image))[:, None]
        text *= torch.logspace(1, -1, len(text))[:, None]
    # A logit of 1e4 is rounded by 1e-3, in bits otherwise than in nats: two times eager's error is chance.
    check(loss, (image, text), numbers, torch.float32, floor=LIMIT[torch.float32])
    assert all(part.isfinite().all() for part in run(loss, (image, text), numbers, "triton"))


def test_excluded_logits_may_be_far_above():
    (image, text), numbers = problem(torch.float32)
    with torch.no_grad():
        text[7] = 400 * image[3]
    ids = torch.arange(37)
    ids[7] = 3
    check("nce", (image, text), numbers, torch.float32, image_ids=ids, same_id="exclude")


@pytest.mark.parametrize("loss", list(LOSSES))
def test_rows_of_weight_zero_give_nothing(loss):
    features, numbers = problem(torch.float16)
    assert all(part.abs().sum() == 0 for part in run(loss, features, numbers, "triton", weight=torch.zeros(37)))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_twice_the_same_bits(loss):
    features, numbers = problem(torch.bfloat16)
    first, second = (run(loss, features, numbers, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", ["nce", "sig"])
def test_gradients_of_a_mean_over_many_do_not_vanish_in_half(loss):
    features, numbers = problem(torch.float16)
    whole = run(loss, features, numbers, "triton", weight=torch.ones(37))
    tiny = run(loss, features, numbers, "triton", weight=torch.full((37,), 1e-7))
    # Those of the numbers are float32; the features' own vanish when they are rounded to their type.
    for have, want in zip(tiny[3:], whole[3:], strict=True):
        torch.testing.assert_close(have, 1e-7 * want, rtol=1e-3, atol=0)


def test_features_by_pointer_and_by_descriptor(monkeypatch):
    features, numbers = problem(torch.float32)
    descriptors = run("nce", features, numbers, "triton", image_ids=ids_of(37))
    monkeypatch.setattr(softmax, "takes_descriptors", lambda *_: False)
    pointers = run("nce", features, numbers, "triton", image_ids=ids_of(37))
    assert all(torch.equal(a, b) for a, b in zip(descriptors, pointers, strict=True))


def test_columns_past_the_last_are_not_written():
    (image, text), _ = problem(torch.float32, 33)
    pairing = softmax.Pairing(torch.arange(33))
    made = softmax.gradients_triton(
        image.detach(),
        text.detach(),
        torch.tensor([math.log2(math.e)]),
        pairing,
        softmax.Weights(torch.zeros(33), torch.ones(33), torch.zeros(33), torch.zeros(33), None, None),
        None,
        (True, True),
        None,
    )
    z = torch.exp2(torch.log2(torch.tensor(math.e)) * image @ text.T).detach()
    torch.testing.assert_close(made.left_grad, z @ text.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.right_grad, z.T @ image.detach(), rtol=1e-5, atol=1e-5)
