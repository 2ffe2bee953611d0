import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from vlblocks.errors import UserError
from vlblocks.nn.momentum import FeatureQueue, MomentumEncoder


def test_the_copy_follows_slowly_and_only_when_told():
    fast = nn.Linear(3, 2)
    slow = MomentumEncoder(fast, momentum=0.9)
    before = copy.deepcopy(fast.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(slow(x), fast(x)) and not slow(x).requires_grad
    assert all(not p.requires_grad for p in slow.parameters()) and all(p.requires_grad for p in fast.parameters())
    with torch.no_grad():
        fast.weight += 1.0
    slow(x)
    assert torch.equal(slow.module.weight, before["weight"])
    slow.update()
    torch.testing.assert_close(slow.module.weight, before["weight"] + 0.1)
    slow.update()
    torch.testing.assert_close(slow.module.weight, before["weight"] + 0.19)
    assert torch.equal(fast.weight, before["weight"] + 1.0)
    slow.update(momentum=0.0)
    assert torch.equal(slow.module.weight, fast.weight)
    slow.update(momentum=1.0)
    assert torch.equal(slow.module.weight, fast.weight)


def test_buffers_are_copied_and_the_copy_stays_in_evaluation_mode():
    fast = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    slow = MomentumEncoder(fast)
    slow.train()
    assert not slow.module[0].training and fast[1].training
    fast(torch.randn(8, 3) + 5.0)
    assert slow.module[0].running_mean.eq(0).all()
    slow.update()
    assert torch.equal(slow.module[0].running_mean, fast[0].running_mean)
    assert slow.module[0].num_batches_tracked == 1


def test_a_model_that_holds_both_keeps_each_parameter_once():
    model = nn.Module()
    model.encoder = nn.Linear(3, 2)
    model.teacher = MomentumEncoder(model.encoder)
    assert sorted(model.state_dict()) == [
        "encoder.bias",
        "encoder.weight",
        "teacher.module.bias",
        "teacher.module.weight",
    ]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.encoder.weight += 1.0
    twin.teacher.update(momentum=0.0)
    assert torch.equal(twin.teacher.module.weight, twin.encoder.weight)
    assert torch.equal(model.teacher.module.weight, model.encoder.weight)
    loaded = load(save(model.state_dict()))
    twin.load_state_dict(loaded)
    assert torch.equal(twin.encoder.weight, model.encoder.weight)


def test_several_modules_are_followed_together():
    towers = nn.ModuleDict({"image": nn.Linear(2, 2), "text": nn.Linear(2, 2)})
    slow = MomentumEncoder(towers, momentum=0.5)
    with torch.no_grad():
        towers["text"].bias.copy_(slow.module["text"].bias + 2.0)
    slow.update()
    torch.testing.assert_close(slow.module["text"].bias, towers["text"].bias - 1.0)


def test_momentum_is_a_share():
    with pytest.raises(UserError, match=r"momentum is 1\.5"):
        MomentumEncoder(nn.Linear(1, 1), momentum=1.5)
    with pytest.raises(UserError, match="momentum is -1"):
        MomentumEncoder(nn.Linear(1, 1)).update(momentum=-1)


@pytest.mark.parametrize("batches", [[3, 3, 3], [5, 5], [1] * 12, [12], [2, 11, 1], [0, 4, 0, 7], [5]])
def test_the_queue_holds_the_latest_rows_of_any_batches(batches):
    queue = FeatureQueue(size=5, width=2)
    assert not queue.valid.any()
    seen: list[float] = []
    for size in batches:
        rows = torch.arange(len(seen), len(seen) + size, dtype=torch.float32)
        queue.update(torch.stack([rows, -rows], dim=1))
        seen.extend(rows.tolist())
        held = queue.features[queue.valid]
        assert sorted(held[:, 0].tolist()) == seen[-5:]
        assert torch.equal(held[:, 1], -held[:, 0])
        # Row i went to place i modulo size, so the next one replaces the oldest.
        assert int(queue.cursor) == len(seen) % 5
        assert all(queue.features[int(v) % 5, 0] == v for v in seen[-5:])


def test_the_queue_keeps_no_graph_and_travels_in_a_state_dict():
    queue = FeatureQueue(size=4, width=2, dtype=torch.bfloat16)
    queue.update(torch.ones(3, 2, requires_grad=True) * 2)
    assert not queue.features.requires_grad and queue.features.dtype == torch.bfloat16
    other = FeatureQueue(size=4, width=2, dtype=torch.bfloat16)
    other.load_state_dict(load(save(queue.state_dict())))
    other.update(torch.full((2, 2), 3.0))
    assert other.features[:, 0].tolist() == [3.0, 2.0, 2.0, 3.0] and other.valid.all()
    assert list(queue.parameters()) == [] and queue.size == 4


def test_the_queue_names_mistakes():
    with pytest.raises(UserError, match="size is 0"):
        FeatureQueue(size=0, width=2)
    with pytest.raises(UserError, match=r"give \[b, 2\]"):
        FeatureQueue(size=4, width=2).update(torch.zeros(3, 3))
