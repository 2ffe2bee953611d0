"""GroundedSpace, usage tracking, and the original's numbers."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from vlblocks.errors import UserError
from vlblocks.nn.grounding import GroundedSpace
from vlblocks.nn.usage import CodeUsageTracker


def space(**changes) -> GroundedSpace:
    return GroundedSpace(**({"width": 16, "codes": 40, "picks": 5} | changes))


def test_output_fits_its_description():
    module, x = space(), torch.randn(3, 7, 16)
    out = module(x)
    assert out.codes.shape == (3, 5, 16) and out.indices.shape == (3, 5) and out.scores.shape == (3, 40)
    picked = out.scores.gather(1, out.indices)
    assert (picked.diff(dim=1) <= 0).all()
    assert torch.equal(picked, out.scores.sort(descending=True).values[:, :5])
    assert torch.equal(out.codes, module.codebook[out.indices])
    torch.testing.assert_close(out.loss, out.token_loss + 0.25 * out.code_loss)
    bare = module(x, with_loss=False)
    assert bare.loss is None and bare.token_loss is None and bare.code_loss is None
    assert torch.equal(bare.indices, out.indices)


def test_every_parameter_and_the_tokens_get_a_gradient_from_the_loss_alone():
    module, x = space(temperature=5.0), torch.randn(3, 7, 16, requires_grad=True)
    module(x).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert x.grad.abs().sum() > 0
    x.grad = None
    module(x, with_loss=False).codes.sum().backward()
    assert x.grad is None


def test_one_batch_can_be_fitted():
    module = space(codes=12, picks=3, temperature=20.0)
    x = torch.randn(4, 1, 16).expand(4, 6, 16) + 0.05 * torch.randn(4, 6, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(120):
        out = module(x)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_padding_changes_nothing_by_default_and_counts_on_request():
    x = torch.randn(3, 9, 16)
    valid = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    module, original = space(), space(count_padding=True)
    original.load_state_dict(module.state_dict())
    out = module(x, valid)
    for row, length in enumerate((9, 4, 1)):
        alone = module(x[row : row + 1, :length])
        assert torch.equal(alone.indices[0], out.indices[row])
        torch.testing.assert_close(alone.scores[0], out.scores[row])
    refilled = x.masked_fill(~valid[..., None], float("nan"))
    again = module(refilled, valid)
    assert torch.equal(again.indices, out.indices) and torch.equal(again.loss, out.loss)
    whole = original(x, valid)
    assert torch.equal(whole.scores, module.scores(x)) and torch.equal(whole.loss, module(x).loss)
    assert not torch.equal(whole.loss, out.loss)


def test_scores_of_a_pair_are_the_sum_of_its_parts():
    module, image, text = space(), torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    valid = torch.rand(2, 4) < 0.6
    both = torch.cat([image, text], dim=1)
    whole = module(both, torch.cat([torch.ones(2, 6, dtype=torch.bool), valid], dim=1))
    parts = module.scores(image) + module.scores(text, valid)
    torch.testing.assert_close(parts, whole.scores)
    given = module(both, torch.cat([torch.ones(2, 6, dtype=torch.bool), valid], dim=1), scores=parts)
    assert given.scores is parts and torch.equal(given.indices, module.pick(parts).indices)


def test_all_codes_are_picked_when_there_are_no_more():
    out = space(codes=5)(torch.randn(3, 7, 16))
    assert torch.equal(out.indices.sort(1).values, torch.arange(5).expand(3, 5))


def test_temperature_is_clipped_and_gets_its_gradient_inside_the_range_only():
    x = torch.randn(2, 7, 16)
    for value, clipped, moves in ((0.5, 1.0, False), (7.0, 7.0, True), (20000.0, 10000.0, False)):
        module = space()
        nn.init.constant_(module.temperature, value)
        assert module.clipped_temperature().item() == clipped
        out = module(x)
        same = space(temperature=clipped)
        same.codebook = module.codebook
        assert torch.equal(out.loss, same(x).loss)
        (grad,) = torch.autograd.grad(out.loss, module.temperature)
        assert bool(grad != 0) == moves


def test_forward_changes_no_state():
    module = space()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.randn(3, 7, 16)).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_device_and_dtype_are_passed_on():
    module = space(device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
    assert all(buffer.is_meta for buffer in module.buffers())
    double = space(dtype=torch.float64)
    assert double(torch.randn(2, 3, 16, dtype=torch.float64)).loss.dtype == torch.float64


def test_autocast_gives_float32_losses():
    module, x = space(), torch.randn(2, 7, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    torch.testing.assert_close(out.loss, module(x, scores=out.scores).loss, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"picks": 41}, "picks"),
        ({"picks": 0}, "picks"),
        ({"temperature": 0.5}, "temperature"),
        ({"usage_decay": 1.5}, "decay"),
        ({"modalities": ()}, "modalities"),
    ],
)
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        space(**changes)


def test_wrong_scores_and_modalities_are_named():
    with pytest.raises(UserError, match="scores"):
        space().pick(torch.ones(2, 39))
    with pytest.raises(UserError, match="image, text"):
        space().update(torch.zeros(1, dtype=torch.long), "audio")
    with pytest.raises(UserError, match="image, text"):
        space().usage("audio")


def test_usage_by_modality():
    module = space(codes=8, picks=2)
    assert module.usage("image") == (0, 0.0)
    module.update(torch.tensor([[0, 1], [0, 1]]), "image")
    module.update(torch.tensor([[2, 3], [4, 5]]), "text")
    assert module.usage("image").used == 2 and module.usage("text").used == 4 and module.usage().used == 6
    assert module.usage("image").perplexity == pytest.approx(2) and module.usage("text").perplexity == pytest.approx(4)
    module.update(torch.tensor([0, 6]), "image", torch.tensor([True, False]))
    entropy = -(3 / 5) * math.log(3 / 5) - (2 / 5) * math.log(2 / 5)
    assert module.usage("image") == (2, pytest.approx(math.exp(entropy)))
    module.reset_usage()
    assert module.usage() == (0, 0.0)


def test_usage_decays_if_asked_to():
    tracker = CodeUsageTracker(codes=3, modalities=("a",), decay=0.5)
    tracker.update(torch.tensor([0, 0]), "a")
    tracker.update(torch.tensor([1]), "a")
    assert tracker.counts.tolist() == [[1.0, 1.0, 0.0]]
    assert tracker.usage("a") == (2, pytest.approx(2))


def test_counts_stay_whole_numbers_in_a_half_precision_module():
    module = space().bfloat16()
    for _ in range(300):
        module.update(torch.zeros(1, dtype=torch.long), "image")
    assert module.tracker.counts[0, 0] == 300


@pytest.mark.parametrize("case", ["pairs_topk", "pairs_topk_padded", "text_topk", "image_topk"])
def test_the_originals_picks_and_loss(reference, case):
    with np.load(reference / "golden" / "unimo2" / f"{case}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
        config = json.loads(str(file["config"]))
    codebook = arrays["param.vq_emb"]
    module = space(width=codebook.shape[1], codes=len(codebook), picks=config["topk"], count_padding=True)
    temperature = [value for name, value in arrays.items() if name.startswith("param.") and "topk_temp" in name]
    with torch.no_grad():
        module.codebook.copy_(codebook)
        module.temperature.copy_(temperature[0].reshape(1))
    states = [arrays[name][:, 1:] for name in ("out.vit_out", "out.text_out") if name in arrays]
    out = module(torch.cat(states, dim=1))
    assert torch.equal(out.indices, arrays["out.indices"])
    torch.testing.assert_close(out.codes, arrays["out.grounded"], rtol=0, atol=0)
    torch.testing.assert_close(out.loss, arrays["out.vq_loss"].reshape(()), rtol=1e-5, atol=0)
