"""InfoNCE, SigLIP and two views: hand-computed cases, gradients and edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlblocks.errors import UserError
from vlblocks.losses import InfoNCE, SigLIP, clip_temperature, info_nce, siglip, two_view_contrast

ROWS, WIDTH = 5, 4


def features(rows=ROWS, *, scale=1.0):
    return [(torch.randn(rows, WIDTH, dtype=torch.float64) * scale).requires_grad_() for _ in range(2)]


def all_losses():
    return {
        "info_nce": lambda a, b, **kw: info_nce(a, b, temperature=0.1, **kw),
        "siglip": lambda a, b, **kw: siglip(a, b, scale=10.0, bias=-10.0, **kw),
        "two_view": lambda a, b, **kw: two_view_contrast(a, b, temperature=0.1, **kw),
    }


every_loss = pytest.mark.parametrize("name", list(all_losses()))


def test_info_nce_is_cross_entropy_both_ways():
    image, text = features()
    logits = image @ text.t() / 0.2
    own = torch.arange(ROWS)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    torch.testing.assert_close(info_nce(image, text, temperature=0.2), expected)
    torch.testing.assert_close(info_nce(image, text, logit_scale=5.0), expected)


def test_info_nce_by_hand():
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    # logits [[1, 1], [0, 1]]
    rows = [math.log(2), math.log(1 + math.exp(-1))]
    columns = [math.log(1 + math.exp(-1)), math.log(2)]
    expected = torch.tensor([(a + b) / 2 for a, b in zip(rows, columns, strict=True)])
    torch.testing.assert_close(info_nce(image, text, temperature=1.0, reduction="none"), expected)
    weight = torch.tensor([0.0, 3.0])
    by_weight = {
        reduction: info_nce(image, text, temperature=1.0, weight=weight, reduction=reduction)
        for reduction in ("none", "sum", "mean", "weighted")
    }
    torch.testing.assert_close(by_weight["none"], expected * weight)
    torch.testing.assert_close(by_weight["sum"], expected[1] * 3)
    torch.testing.assert_close(by_weight["mean"], expected[1] * 3 / 2)
    torch.testing.assert_close(by_weight["weighted"], expected[1])


def test_rows_of_weight_zero_stay_candidates():
    image, text = features()
    weight = torch.tensor([1, 0, 1, 1, 1])
    full = info_nce(image, text, temperature=0.3, reduction="none")
    torch.testing.assert_close(info_nce(image, text, temperature=0.3, weight=weight), (full * weight).sum() / ROWS)
    (gradient,) = torch.autograd.grad(info_nce(image, text, temperature=0.3, weight=weight), text)
    assert gradient[1].abs().sum() > 0


def test_rows_of_one_picture_are_all_positive():
    image, text = features()
    ids = torch.tensor([7, 3, 7, 1, 2])
    target = (ids[:, None] == ids[None]).double()
    target = target / target.sum(1, keepdim=True)
    logits = image @ text.t()
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
    torch.testing.assert_close(info_nce(image, text, temperature=1.0, image_ids=ids), expected)


def test_rows_of_one_picture_can_be_excluded():
    image, text = features()
    ids = torch.tensor([7, 3, 7, 1, 2])
    logits = image @ text.t()
    hidden = logits.clone()
    hidden[0, 2] = hidden[2, 0] = -math.inf
    own = torch.arange(ROWS)
    expected = (F.cross_entropy(hidden, own) + F.cross_entropy(hidden.t(), own)) / 2
    loss = info_nce(image, text, temperature=1.0, image_ids=ids, same_id="exclude")
    torch.testing.assert_close(loss, expected)


def test_a_mismatched_text_is_no_caption_of_its_picture():
    image, text = features()
    ids = torch.tensor([7, 3, 7, 1, 2])
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    logits = image @ text.t()
    to_text = F.cross_entropy(logits, torch.arange(ROWS), reduction="none")
    target = (ids[:, None] == ids[None]).double()
    to_image = F.cross_entropy(logits.t(), target / target.sum(1, keepdim=True), reduction="none")
    expected = ((to_text + to_image) / 2 * weight).mean()
    loss = info_nce(image, text, temperature=1.0, image_ids=ids, weight=weight)
    torch.testing.assert_close(loss, expected)
    matched = torch.eye(ROWS, dtype=torch.bool)
    matched[2, 0] = True  # row 2 has weight 0; row 0 must not count text 2
    signs = torch.where(matched, 1.0, -1.0)
    expected = (-F.logsigmoid(signs * logits).sum(1) * weight).mean()
    loss = siglip(image, text, scale=1.0, bias=0.0, image_ids=ids, weight=weight)
    torch.testing.assert_close(loss, expected)


def test_distinct_ids_change_nothing():
    image, text = features()
    ids = torch.arange(ROWS) * 3
    plain = info_nce(image, text, temperature=0.5)
    torch.testing.assert_close(info_nce(image, text, temperature=0.5, image_ids=ids), plain)
    torch.testing.assert_close(info_nce(image, text, temperature=0.5, image_ids=ids, same_id="exclude"), plain)


def test_siglip_is_the_sum_over_pairs_per_row():
    image, text = features()
    total = 0.0
    for i in range(ROWS):
        for j in range(ROWS):
            z = 1.0 if i == j else -1.0
            logit = 4.0 * float(image[i].detach() @ text[j].detach()) - 2.0
            total += math.log1p(math.exp(-z * logit))
    assert siglip(image, text, scale=4.0, bias=-2.0).item() == pytest.approx(total / ROWS, rel=1e-9)


def test_two_views_by_hand():
    view1, view2 = features()
    both = torch.cat([view1, view2]).detach()
    losses = []
    for i in range(2 * ROWS):
        partner = (i + ROWS) % (2 * ROWS)
        scores = [math.exp(float(both[i] @ both[j]) / 0.7) for j in range(2 * ROWS) if j != i]
        losses.append(-math.log(math.exp(float(both[i] @ both[partner]) / 0.7) / sum(scores)))
    assert two_view_contrast(view1, view2, temperature=0.7).item() == pytest.approx(sum(losses) / 10, rel=1e-9)


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 0, 2, 2])])
@pytest.mark.parametrize("same_id", ["positive", "exclude"])
def test_info_nce_gradcheck(ids, same_id):
    image, text = features()
    temperature = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])

    def loss(image, text, temperature):
        return info_nce(image, text, temperature=temperature, weight=weight, image_ids=ids, same_id=same_id)

    assert torch.autograd.gradcheck(loss, (image, text, temperature))


def test_siglip_gradcheck():
    scale, bias = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))
    ids = torch.tensor([0, 1, 0, 2, 2])
    assert torch.autograd.gradcheck(
        lambda a, b, s, c: siglip(a, b, scale=s, bias=c, image_ids=ids), (*features(), scale, bias)
    )


def test_two_view_gradcheck():
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, t: two_view_contrast(a, b, temperature=t), (*features(), temperature))


@pytest.mark.parametrize("name", ["info_nce", "two_view"])
def test_batch_of_one_has_no_negatives(name):
    image, text = features(1)
    loss = all_losses()[name](image, text)
    loss.backward()
    assert loss == 0
    assert image.grad.abs().sum() == 0


def test_siglip_of_one_pair_is_one_decision():
    image, text = features(1)
    logit = (image[0] @ text[0]).item()
    assert siglip(image, text, scale=1.0, bias=0.0).item() == pytest.approx(math.log1p(math.exp(-logit)))


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "weighted"])
@pytest.mark.parametrize("rows", [0, ROWS])
def test_nothing_that_counts_gives_zero(name, reduction, rows):
    image, text = features(rows)
    loss = all_losses()[name](image, text, weight=torch.zeros(rows), reduction=reduction)
    loss.backward()
    assert loss == 0
    for x in (image, text):
        assert torch.equal(x.grad, torch.zeros_like(x))


@every_loss
def test_extreme_logits_stay_finite(name):
    image, text = ((x.detach().float() * 1e4).requires_grad_() for x in features())
    loss = all_losses()[name](image, text)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(image.grad).all()
    assert torch.isfinite(text.grad).all()


@every_loss
def test_half_precision_is_upcast_even_under_autocast(name):
    image, text = (x.detach().bfloat16() for x in features())
    expected = all_losses()[name](image.float(), text.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = all_losses()[name](image, text)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@every_loss
def test_order_of_the_batch_does_not_matter(name):
    image, text = features()
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = all_losses()[name]
    torch.testing.assert_close(loss(image[order], text[order]), loss(image, text))


def test_temperature_gradient_stops_at_the_clip():
    image, text = (x.detach() for x in features())
    for value, moves in ((0.07, True), (0.49, True), (0.6, False), (0.0005, False)):
        temperature = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        info_nce(image, text, temperature=clip_temperature(temperature)).backward()
        assert bool(temperature.grad != 0) is moves
    for value, used in ((0.6, 0.5), (0.0005, 0.001)):
        clipped = clip_temperature(torch.tensor([value]))
        assert float(clipped) == pytest.approx(used)


def test_info_nce_module():
    image, text = (x.float() for x in features())
    module = InfoNCE(temperature=0.07)
    loss = module(image, text)
    torch.testing.assert_close(loss, info_nce(image, text, temperature=0.07))
    loss.backward()
    assert module.temperature.grad.shape == (1,)
    assert list(InfoNCE(learnable=False).parameters()) == []
    assert "temperature" in InfoNCE(learnable=False).state_dict()
    with torch.no_grad():
        module.temperature.fill_(7.0)
    torch.testing.assert_close(module(image, text), info_nce(image, text, temperature=0.5))


def test_siglip_module():
    image, text = (x.float() for x in features())
    module = SigLIP(scale=3.0, bias=-2.0)
    loss = module(image, text)
    torch.testing.assert_close(loss, siglip(image, text, scale=3.0, bias=-2.0))
    loss.backward()
    assert all(p.grad.abs() > 0 for p in module.parameters())


IDS = torch.tensor([7, 3, 7, 1, 3])
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)


def queues(size=6):
    generator = torch.Generator().manual_seed(4)
    image, text = torch.randn(2, size, WIDTH, dtype=torch.float64, generator=generator)
    return {"queue_image": image, "queue_text": text}


def teachers():
    generator = torch.Generator().manual_seed(5)
    image, text = torch.randn(2, ROWS, WIDTH, dtype=torch.float64, generator=generator)
    return {"teacher_image": image, "teacher_text": text, "alpha": 0.4}


VALID = {"queue_valid": torch.tensor([True, False, True, True, False, True])}
OPTIONS = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "positives": {"image_ids": IDS, "weight": WEIGHT},
    "excluded": {"image_ids": IDS, "weight": WEIGHT, "same_id": "exclude"},
    "smooth": {"label_smoothing": 0.2, "image_ids": IDS},
    "excluded, smooth": {"label_smoothing": 0.2, "image_ids": IDS, "weight": WEIGHT, "same_id": "exclude"},
    "queue": queues(),
    "queue, smooth": queues() | VALID | {"label_smoothing": 0.2},
    "teacher": teachers(),
    "teacher, excluded": teachers() | {"image_ids": IDS, "weight": WEIGHT, "same_id": "exclude"},
    "ALBEF": teachers() | queues() | VALID | {"image_ids": IDS, "weight": WEIGHT, "label_smoothing": 0.1},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def all_gradients(loss, *leaves):
    """The loss, and its gradients with unlike weights of its rows."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)]


def test_modules_pass_their_settings_on(monkeypatch):
    seen = []
    for name in ("info_nce", "siglip"):
        monkeypatch.setattr(f"vlblocks.losses.contrastive.{name}", lambda *_, **options: seen.append(options))
    features = torch.randn(2, 3)
    InfoNCE(label_smoothing=0.1, exchange="ring", chunk_bytes=64)(features, features)
    SigLIP(exchange="ring", chunk_bytes=64)(features, features)
    expected = {"exchange": "ring", "chunk_bytes": 64}
    assert seen[0].items() >= (expected | {"label_smoothing": 0.1}).items()
    assert seen[1].items() >= expected.items()


@every_option
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_in_tiles_equals_the_plain_twin(options, reduction):
    image, text = features()
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def run(backend, chunk_bytes=None):
        settings = {"reduction": reduction, "backend": backend, "chunk_bytes": chunk_bytes}
        return all_gradients(
            info_nce(image, text, temperature=temperature, **options, **settings), image, text, temperature
        )

    expected = run("reference")
    # One pair at a time, tiles that do not divide the batch, and all at once.
    for chunk in (1, 60, 130, None):
        for have, want in zip(run("chunked", chunk), expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"image_ids": IDS, "weight": WEIGHT}])
@pytest.mark.parametrize("reduction", ["mean", "weighted", "sum", "none"])
def test_siglip_in_tiles_equals_the_plain_twin(options, reduction):
    image, text = features()
    scale, bias = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))

    def run(backend, chunk_bytes=None):
        settings = {"reduction": reduction, "backend": backend, "chunk_bytes": chunk_bytes}
        return all_gradients(
            siglip(image, text, scale=scale, bias=bias, **options, **settings), image, text, scale, bias
        )

    expected = run("reference")
    for chunk in (1, 60, None):
        for have, want in zip(run("chunked", chunk), expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


def test_two_views_in_tiles_equal_the_plain_twin():
    views = features()
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def run(backend, chunk_bytes=None):
        settings = {"weight": WEIGHT, "backend": backend, "chunk_bytes": chunk_bytes}
        return all_gradients(two_view_contrast(*views, temperature=temperature, **settings), *views, temperature)

    expected = run("reference")
    for chunk in (1, 60, None):
        for have, want in zip(run("chunked", chunk), expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


@every_option
def test_info_nce_gradcheck_of_everything(options):
    image, text = features()
    temperature = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    # The teacher's logits share the temperature without a gradient: a number moved by hand would move them.
    constant = temperature.detach()
    inputs = (image, text) if "alpha" in options else (image, text, temperature)

    def loss(image, text, temperature=constant):
        return info_nce(image, text, temperature=temperature, chunk_bytes=60, **options)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("reduction", ["weighted", "none"])
def test_siglip_gradcheck_of_everything(reduction):
    scale, bias = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))

    def loss(image, text, scale, bias):
        settings = {"weight": WEIGHT, "image_ids": IDS, "reduction": reduction, "chunk_bytes": 60}
        return siglip(image, text, scale=scale, bias=bias, **settings)

    assert torch.autograd.gradcheck(loss, (*features(), scale, bias))


def test_queue_by_hand():
    image, text = features()
    queue = queues()
    to_text = torch.cat([image @ text.t(), image @ queue["queue_text"].t()], dim=1) / 0.3
    to_image = torch.cat([text @ image.t(), text @ queue["queue_image"].t()], dim=1) / 0.3
    own = torch.arange(ROWS)
    expected = (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2
    torch.testing.assert_close(info_nce(image, text, temperature=0.3, **queue), expected)
    smoothed = (
        F.cross_entropy(to_text, own, label_smoothing=0.1) + F.cross_entropy(to_image, own, label_smoothing=0.1)
    ) / 2
    torch.testing.assert_close(info_nce(image, text, temperature=0.3, label_smoothing=0.1, **queue), smoothed)


def test_what_a_queue_does_not_hold_yet_is_no_negative():
    image, text = features()
    queue = queues()
    queue["queue_image"][1] = queue["queue_text"][4] = math.nan
    valid = torch.tensor([True, False, True, True, False, True])
    clean = {name: x[valid] for name, x in queues().items()}
    whole = all_gradients(info_nce(image, text, temperature=0.3, **clean), image, text)
    queue = {name: x.nan_to_num(50.0) for name, x in queue.items()}
    found = all_gradients(info_nce(image, text, temperature=0.3, **queue, queue_valid=valid), image, text)
    for have, want in zip(found, whole, strict=True):
        torch.testing.assert_close(have, want)
    none = torch.zeros(6, dtype=torch.bool)
    torch.testing.assert_close(
        info_nce(image, text, temperature=0.3, **queue, queue_valid=none), info_nce(image, text, temperature=0.3)
    )


def test_teacher_by_hand():
    image, text = features()
    teacher = teachers()
    scores = teacher["teacher_image"] @ teacher["teacher_text"].t() / 0.3
    logits = image @ text.t() / 0.3
    hard = torch.eye(ROWS, dtype=torch.float64)
    expected = (
        F.cross_entropy(logits, 0.4 * scores.softmax(1) + 0.6 * hard)
        + F.cross_entropy(logits.t(), 0.4 * scores.t().softmax(1) + 0.6 * hard)
    ) / 2
    torch.testing.assert_close(info_nce(image, text, temperature=0.3, **teacher), expected)
    torch.testing.assert_close(
        info_nce(image, text, temperature=0.3, **(teacher | {"alpha": 0.0})), info_nce(image, text, temperature=0.3)
    )


def test_queue_and_teacher_get_no_gradient():
    image, text = features()
    constants = {name: x.requires_grad_() for name, x in (queues() | teachers()).items() if name != "alpha"}
    info_nce(image, text, temperature=0.3, **constants).backward()
    assert image.grad.abs().sum() > 0
    assert all(x.grad is None for x in constants.values())


@pytest.mark.parametrize("name", ["info_nce", "two_view", "siglip"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(name, size):
    image, text = (torch.full((3, 1), value, requires_grad=True) for value in (size, 1.0))
    number = torch.ones(1, requires_grad=True)
    loss = {
        "info_nce": lambda: info_nce(image, text, temperature=number),
        "siglip": lambda: siglip(image, text, scale=number, bias=0.0),
        "two_view": lambda: two_view_contrast(image, text, temperature=number),
    }[name]()
    loss.backward()
    if name == "info_nce":
        assert loss.item() == pytest.approx(math.log(3), rel=1e-2)
    assert all(x.isfinite().all() for x in (loss, image.grad, text.grad, number.grad))


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_stay_finite(temperature):
    image, text = (x.detach().float().requires_grad_() for x in features())
    number = torch.tensor([temperature], requires_grad=True)
    for loss in (info_nce(image, text, temperature=number), two_view_contrast(image, text, temperature=number)):
        image.grad = text.grad = number.grad = None
        loss.backward()
        assert all(x.isfinite().all() for x in (loss, image.grad, text.grad, number.grad))


def test_small_losses_of_pairs_are_not_lost():
    """At a logit of 20 a right pair loses 2e-9, which 1 + 2e-9 rounds away in float32."""
    from vlblocks_kernels.sigmoid_contrast import _softplus_sums

    z = torch.tensor([[-20.0, -20.0, -20.0], [-10.0, -15.0, -5.0], [30.0, 0.0, -30.0]])
    exact = F.softplus(z.double()).sum(1)
    found = _softplus_sums(z, torch.empty(9), torch.empty(9))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_a_frozen_side_costs_no_gradient():
    image, text = features()
    for loss in all_losses().values():
        (found,) = torch.autograd.grad(loss(image, text.detach()), image)
        expected, _ = torch.autograd.grad(loss(image, text), (image, text))
        torch.testing.assert_close(found, expected)
        (found,) = torch.autograd.grad(loss(image.detach(), text), text)
        _, expected = torch.autograd.grad(loss(image, text), (image, text))
        torch.testing.assert_close(found, expected)


def test_a_number_alone_can_learn():
    image, text = (x.detach() for x in features())
    number = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: info_nce(image, text, temperature=t), (number,))
    assert torch.autograd.gradcheck(lambda s: siglip(image, text, scale=s, bias=-s), (number,))
    assert torch.autograd.gradcheck(lambda s: siglip(image, text, scale=s, bias=-s, reduction="none"), (number,))


def test_a_weight_can_learn():
    image, text = (x.detach() for x in features())
    weight = WEIGHT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: siglip(image, text, scale=2.0, bias=-1.0, weight=w), (weight,))
    assert torch.autograd.gradcheck(lambda w: info_nce(image, text, temperature=0.5, weight=w), (weight,))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda a, b: info_nce(a, b, temperature=1.0, queue_image=a), "queue_image, queue_text"),
        (lambda a, b: info_nce(a, b, temperature=1.0, queue_image=a[:, :2], queue_text=b[:, :2]), "queue_image"),
        (lambda a, b: info_nce(a, b, temperature=1.0, queue_valid=torch.ones(2)), "queue_valid"),
        (
            lambda a, b: info_nce(a, b, temperature=1.0, queue_image=a, queue_text=b, queue_valid=torch.ones(5)),
            "queue_valid",
        ),
        (lambda a, b: info_nce(a, b, temperature=1.0, teacher_text=b), "teacher_image, teacher_text"),
        (lambda a, b: info_nce(a, b, temperature=1.0, teacher_image=a[:3], teacher_text=b[:3]), "teacher_image"),
        (lambda a, b: info_nce(a, b, temperature=1.0, alpha=2.0), "alpha"),
        (lambda a, b: info_nce(a, b, temperature=1.0, label_smoothing=-1), "label_smoothing"),
        (lambda a, b: info_nce(a, b, temperature=1.0, exchange="star"), "exchange"),
        (lambda a, b: info_nce(a, b, temperature=1.0, backend="cuda"), "backend"),
        (lambda a, b: siglip(a, b, scale=1.0, bias=0.0, chunk_bytes=0), "chunk_bytes"),
        (lambda a, b: siglip(a, b, scale=1.0, bias=0.0, reduction="avg"), "reduction"),
        (lambda a, b: two_view_contrast(a, b, temperature=1.0, backend="fast"), "backend"),
        (lambda a, b: info_nce(a, b[:3], temperature=1.0), "text"),
        (lambda a, b: info_nce(a, b), "temperature"),
        (lambda a, b: info_nce(a, b, temperature=1.0, logit_scale=1.0), "logit_scale"),
        (lambda a, b: info_nce(a, b, temperature=1.0, weight=torch.ones(2)), "weight"),
        (lambda a, b: info_nce(a, b, temperature=1.0, image_ids=torch.ones(2)), "image_ids"),
        (lambda a, b: info_nce(a, b, temperature=1.0, same_id="both"), "same_id"),
        (lambda a, b: info_nce(a, b, temperature=1.0, reduction="max"), "reduction"),
        (lambda a, b: siglip(a[None], b, scale=1.0, bias=0.0), "image"),
        (lambda a, b: two_view_contrast(a, b[:3], temperature=1.0), "view2"),
        (lambda a, b: InfoNCE(temperature=0.7), "temperature_range"),
        (lambda a, b: SigLIP(scale=0.0), "scale"),
    ],
)
def test_mistakes_are_named(call, named):
    with pytest.raises(UserError, match=named) as caught:
        call(*features())
    assert "\n" not in str(caught.value)
