"""Collectives without a process group: identities that keep gradients. With one: tests/distributed/test_losses.py."""

import torch

from vlblocks.ops import collectives


def test_one_rank_without_a_process_group():
    assert not collectives.is_distributed()
    assert collectives.world_size() == 1
    assert collectives.rank() == 0
    assert collectives.gather_sizes(7) == [7]
    assert collectives.row_offset([7]) == 0


def test_gather_with_grad_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    gathered = collectives.gather_with_grad(x)
    gathered.square().sum().backward()
    assert torch.equal(gathered, x)
    assert torch.equal(x.grad, 2 * x.detach())


def test_what_has_no_gradient_is_detached():
    x = torch.randn(3, 2, requires_grad=True)
    for result in (collectives.gather(x), collectives.all_reduce_sum(x), collectives.broadcast(x)):
        assert torch.equal(result, x)
        assert not result.requires_grad


def test_rank_share_is_one():
    assert collectives.rank_share(5) == 1
    assert collectives.rank_share(0) == 1
    share = collectives.rank_share(torch.tensor([3], dtype=torch.long))
    assert share.shape == ()
    assert share == 1
