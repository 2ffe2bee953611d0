"""VectorQuantizer: losses, moving averages, revival, usage, and the original's numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlblocks.errors import UserError
from vlblocks.nn.quantizer import SMOOTHING, VectorQuantizer


def quantizer(**changes) -> VectorQuantizer:
    return VectorQuantizer(**({"width": 6, "codes": 10} | changes))


def test_codes_are_the_nearest_and_raw():
    module, x = quantizer(), torch.randn(3, 7, 6)
    out = module(x)
    assert torch.equal(out.indices, torch.cdist(x.flatten(0, 1), module.codebook.detach()).argmin(1).view(3, 7))
    assert torch.equal(out.codes, module.codebook[out.indices])
    assert torch.equal(module(x[0]).indices, out.indices[0])
    assert module(x, with_loss=False).loss is None


def test_loss_is_the_specifications_with_its_stop_gradients():
    module, x = quantizer(), torch.randn(3, 7, 6, requires_grad=True)
    out = module(x)
    codes = F.one_hot(out.indices, 10).float() @ module.codebook
    expected = ((codes - x.detach()) ** 2).mean() + 0.25 * ((x - codes.detach()) ** 2).mean()
    torch.testing.assert_close(out.loss, expected)
    leaves = (x, module.codebook)
    for ours, theirs in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_straight_through_gives_the_codes_gradient_to_the_tokens():
    module, x = quantizer(), torch.randn(3, 7, 6, requires_grad=True)
    out = module(x, straight_through=True)
    torch.testing.assert_close(out.codes, module(x).codes)
    weight = torch.randn_like(x)
    grads = torch.autograd.grad((out.codes * weight).sum(), (x, module.codebook), allow_unused=True)
    assert torch.equal(grads[0], weight) and (grads[1] is None or not grads[1].any())
    raw = torch.autograd.grad((module(x).codes * weight).sum(), (x, module.codebook), allow_unused=True)
    assert raw[0] is None and raw[1].any()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_padding_reaches_nothing_by_default_and_counts_on_request(metric):
    x, valid = torch.randn(3, 7, 6), torch.rand(3, 7) < 0.6
    valid[2] = False
    module, original = quantizer(metric=metric), quantizer(metric=metric, count_padding=True)
    original.load_state_dict(module.state_dict())
    poisoned = x.masked_fill(~valid[..., None], float("nan")).requires_grad_()
    out, alone = module(poisoned, valid), module(x[valid])
    torch.testing.assert_close(out.loss, alone.loss)
    assert torch.equal(out.indices[valid], alone.indices) and not out.codes[~valid].any()
    grads = torch.autograd.grad(out.loss, (poisoned, module.codebook))
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][~valid].any()
    assert torch.equal(original(x, valid).loss, module(x).loss)
    nothing = module(x, torch.zeros_like(valid))
    assert nothing.loss == 0


def test_cosine_compares_and_returns_unit_vectors():
    module, x = quantizer(metric="cosine"), torch.randn(3, 7, 6)
    with torch.no_grad():
        module.codebook.mul_(torch.rand(10, 1) + 0.5)
    out = module(x)
    expected = F.cosine_similarity(x[:, :, None], module.codebook.detach(), dim=-1).argmax(-1)
    assert torch.equal(out.indices, expected)
    torch.testing.assert_close(out.codes.norm(dim=-1), torch.ones(3, 7))
    torch.testing.assert_close(module(5 * x).loss, out.loss)
    similarity = F.cosine_similarity(x, out.codes, dim=-1)
    torch.testing.assert_close(out.codebook_loss, ((2 - 2 * similarity) / 6).mean())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_ema_equals_the_one_hot_formula(metric):
    module, x = quantizer(codebook="ema", metric=metric, decay=0.8), torch.randn(4, 9, 6)
    valid = torch.rand(4, 9) < 0.7
    assert not module.codebook.requires_grad
    counts, sums = torch.ones(10), module.codebook.clone()
    for _ in range(3):
        indices = module(x, valid).indices
        tokens = F.normalize(x, dim=-1)[valid] if metric == "cosine" else x[valid]
        one_hot = F.one_hot(indices[valid], 10).float()
        counts = 0.8 * counts + 0.2 * one_hot.sum(0)
        sums = 0.8 * sums + 0.2 * one_hot.T @ tokens
        smoothed = (counts + SMOOTHING) / (counts.sum() + 10 * SMOOTHING) * counts.sum()
        module.update(x, indices, valid)
        expected = sums / smoothed[:, None]
        expected = F.normalize(expected, dim=-1) if metric == "cosine" else expected
        torch.testing.assert_close(module.codebook.data, expected)


def test_ema_moves_codes_to_the_means_of_their_tokens():
    module = quantizer(codebook="ema", codes=3, decay=0.5)
    centres = 4 * torch.eye(6)[:3]
    with torch.no_grad():
        module.codebook.copy_(centres + 0.5)
        module.ema_sums.copy_(module.codebook)
    x = centres.repeat(50, 1) + 0.1 * torch.randn(150, 6)
    before = (module.codebook - centres).norm()
    for _ in range(20):
        module.update(x, module(x).indices)
    assert (module.codebook - centres).norm() < 0.1 * before
    out = module(x)
    assert out.codebook_loss == 0
    torch.testing.assert_close(out.loss, 0.25 * out.commitment_loss)


def test_a_code_that_nobody_takes_keeps_its_place_and_stays_finite():
    module = quantizer(codebook="ema", codes=2, decay=0.0)
    x = module.codebook[0].expand(5, 6).clone()
    for _ in range(3):
        module.update(x, torch.zeros(5, dtype=torch.long))
    assert module.codebook.isfinite().all()
    torch.testing.assert_close(module.codebook[0].data, x[0])


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_dead_codes_are_revived_by_tokens_of_the_batch(codebook):
    module = quantizer(codebook=codebook, revive_after=2)
    x, valid = torch.randn(4, 9, 6) + 3, torch.rand(4, 9) < 0.7
    indices = torch.zeros(4, 9, dtype=torch.long)
    indices[:, 1] = 1
    valid[:, :2] = True
    start = module.codebook.detach().clone()
    module.update(x.masked_fill(~valid[..., None], float("nan")), indices, valid)
    if codebook == "gradient":
        assert torch.equal(module.codebook, start)
    assert module.idle.tolist() == [0, 0] + [1] * 8
    module.update(x, indices, valid, generator=torch.Generator().manual_seed(3))
    assert module.idle.tolist() == [0] * 10
    revived = module.codebook[2:].detach()
    tokens = x[valid]
    matches = (revived[:, None] == tokens).all(-1)
    assert (matches.sum(1) == 1).all() and (matches.sum(0) <= 1).all()
    used = module(tokens).indices.unique()
    assert len(used) >= 8


def test_a_revived_code_of_a_moving_average_stays_where_it_was_put():
    module, x = quantizer(codebook="ema", revive_after=1), torch.randn(30, 6) + 3
    indices = torch.zeros(30, dtype=torch.long)
    module.update(x, indices)
    revived = module.codebook[1:].clone()
    module.revive_after = None
    module.update(x, indices)
    torch.testing.assert_close(module.codebook[1:].data, revived, rtol=1e-3, atol=0)


def test_no_more_codes_are_revived_than_there_are_tokens():
    module = quantizer(revive_after=1)
    start = module.codebook.detach().clone()
    x = torch.ones(3, 6)
    module.update(x, torch.zeros(3, dtype=torch.long))
    changed = (module.codebook != start).any(1)
    assert changed.tolist() == [False] + [True] * 3 + [False] * 6
    module.update(x[:0], torch.zeros(0, dtype=torch.long))
    assert module.codebook.isfinite().all()


def test_forward_changes_no_state():
    module = quantizer(codebook="ema", revive_after=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.randn(3, 7, 6))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_usage_by_modality():
    module, x = quantizer(), torch.randn(4, 6)
    module.update(x, torch.tensor([0, 1, 2, 3]), modality="image")
    module.update(x, torch.tensor([0, 0, 0, 4]), torch.tensor([True, True, True, False]), modality="text")
    assert module.usage("image") == (4, pytest.approx(4)) and module.usage("text") == (1, pytest.approx(1))
    module.track(torch.tensor([5]), "text")
    assert module.usage().used == 5
    module.reset_usage()
    assert module.usage() == (0, 0.0)


def test_low_precision_and_autocast():
    x = torch.randn(3, 7, 6)
    module = quantizer()
    out = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = module(x)
    assert torch.equal(same.loss, out.loss) and torch.equal(same.indices, out.indices)
    half = quantizer(dtype=torch.bfloat16, codebook="ema")
    low = half(x.bfloat16())
    half.update(x.bfloat16(), low.indices)
    assert low.loss.dtype == torch.float32 and half.codebook.dtype == torch.bfloat16
    double = quantizer(dtype=torch.float64)
    assert double(x.double()).loss.dtype == torch.float64


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"codes": 0}, "codes"),
        ({"metric": "dot"}, "metric"),
        ({"codebook": "frozen"}, "codebook"),
        ({"decay": 1.0}, "decay"),
        ({"revive_after": 0}, "revive_after"),
    ],
)
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        quantizer(**changes)


def test_wrong_shapes_are_named():
    with pytest.raises(UserError, match="valid"):
        quantizer()(torch.randn(2, 3, 6), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(UserError, match="codes"):
        quantizer()(torch.randn(2, 3, 5))


def test_the_originals_nearest_codes_and_loss(reference):
    with np.load(reference / "golden" / "unimo2" / "pairs_nearest.npz") as file:
        names = ("param.vq_emb", "out.vit_out", "out.text_out", "out.indices", "out.grounded", "out.vq_loss")
        codebook, image, text, indices, codes, loss = (torch.from_numpy(file[name]) for name in names)
    module = quantizer(width=codebook.shape[1], codes=len(codebook), count_padding=True)
    with torch.no_grad():
        module.codebook.copy_(codebook)
    out = module(torch.cat([image[:, 1:], text[:, 1:]], dim=1))
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.codes, codes, rtol=0, atol=0)
    torch.testing.assert_close(out.loss, loss.reshape(()), rtol=1e-5, atol=0)
