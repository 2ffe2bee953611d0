"""The Triton operations of scores and losses as PyTorch sees them: registration, compilation, export, gradients."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from vlblocks.ops.grounding import grounding_losses, grounding_scores
from vlblocks_kernels.grounding import grounding_losses_reference, soft_means_reference

pytest.importorskip("triton")
from vlblocks_kernels import grounding_losses_triton, grounding_triton


def draw(batch=3, tokens=7, width=16, codes=12, picks=4, dtype=torch.float32, share=0.7):
    x, e = torch.randn(batch, tokens, width, dtype=dtype), 0.5 * torch.randn(codes, width, dtype=dtype)
    indices = torch.rand(batch, codes).topk(picks).indices
    t = torch.tensor([1.3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, e, indices, t, torch.rand(batch, tokens) < share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded, dtype):
    x, codes, indices, t, valid = draw(dtype=dtype)
    valid = valid if padded else None
    opcheck(grounding_triton.grounding_scores, (x, codes, t, valid))
    leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]
    opcheck(grounding_losses_triton.grounding_losses, (leaves[0], leaves[1], indices, leaves[2], valid))


def test_opcheck_of_strided_inputs():
    x, codes, indices, t, valid = draw()
    x, valid, indices = x.mT.contiguous().mT, valid.T.contiguous().T, indices.T.contiguous().T
    assert not x.is_contiguous() and not valid.is_contiguous() and not indices.is_contiguous()
    opcheck(grounding_triton.grounding_scores, (x, codes, t, valid))
    leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]
    opcheck(grounding_losses_triton.grounding_losses, (leaves[0], leaves[1], indices, leaves[2], valid))


def test_opcheck_of_the_backward():
    x, codes, indices, t, valid = draw()
    kept = grounding_losses_triton.grounding_losses(x, codes, indices, t, valid)[2:]
    one = torch.ones(())
    opcheck(torch.ops.vlblocks.grounding_losses_backward.default, (one, one, x, codes, indices, t, valid, *kept))


@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(padded):
    x, codes, indices, t, valid = draw(2, 4, 3, 5, 2, dtype=torch.float64)
    valid = valid if padded else torch.ones_like(valid)
    valid[0, 0] = True

    def moving(x, codes, t):
        """Losses whose targets carry a gradient as well, as differences see them: by errors with frozen means."""
        q, e = grounding_losses(x, codes, indices, t, valid if padded else None, backend="triton")
        picked = codes[indices]
        means = soft_means_reference(x.detach(), picked.detach(), t.detach(), valid)
        of_tokens = (means.tokens - x)[valid].square().mean()
        of_codes = (means.codes - picked)[valid.any(1)].square().mean()
        return q + of_tokens - of_tokens.detach(), e + of_codes - of_codes.detach()

    assert torch.autograd.gradcheck(moving, [tensor.requires_grad_() for tensor in (x, codes, t)])


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_equal_the_references_also_of_one_loss_alone(padded):
    x, codes, indices, t, valid = draw()
    valid = valid if padded else None
    leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]
    for pick in (lambda q, e: q, lambda q, e: e, lambda q, e: q + 0.25 * e):
        found = [
            torch.autograd.grad(pick(*losses(*leaves[:2], indices, leaves[2], valid)), leaves)
            for losses in (lambda *args: grounding_losses(*args, backend="triton"), grounding_losses_reference)
        ]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def lookup(x, codes, t, valid):
    """Scores, picks and losses, as `GroundedSpace` has them."""
    indices = grounding_scores(x, codes, t, valid, backend="triton").topk(4).indices
    q, e = grounding_losses(x, codes, indices, t, valid, backend="triton")
    return q + 0.25 * e


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_static_and_dynamic_shapes(backend):
    torch.compiler.reset()
    compiled = torch.compile(lookup, fullgraph=True, dynamic=backend == "aot_eager", backend=backend)
    for batch, tokens in ((3, 7), (2, 9), (4, 5)) if backend == "aot_eager" else ((3, 7),):
        x, codes, _, t, valid = draw(batch, tokens)
        leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]
        found, expected = (f(*leaves, valid) for f in (compiled, lookup))
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b)


class Lookup(torch.nn.Module):
    def forward(self, x, codes, t, valid):
        return lookup(x, codes, t, valid)


def test_exports():
    x, codes, _, t, valid = draw()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = {"x": {1: tokens}, "codes": None, "t": None, "valid": {1: tokens}}
    program = torch.export.export(Lookup(), (x, codes, t, valid), dynamic_shapes=shapes)
    assert any("vlblocks.grounding_losses" in str(node.target) for node in program.graph.nodes)
    x, _, _, _, valid = draw(tokens=11)
    torch.testing.assert_close(program.module()(x, codes, t, valid), lookup(x, codes, t, valid))


def test_autocast_halves_the_scores_product_alone():
    x, codes, indices, t, valid = draw()
    leaves = [tensor.requires_grad_() for tensor in (x, codes, t)]

    def run():
        losses = grounding_losses(*leaves[:2], indices, leaves[2], valid, backend="triton")
        return [*losses, *torch.autograd.grad(sum(losses), leaves)]

    outside = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = grounding_scores(x, codes, t, valid, backend="triton")
        inside = run()
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))
    half = grounding_scores(x.bfloat16(), codes.bfloat16(), t, valid, backend="triton")
    assert torch.equal(scores, half) and scores.dtype == torch.float32
    assert not torch.equal(scores, grounding_scores(x, codes, t, valid, backend="triton"))


def test_inputs_of_two_types_meet_in_the_wider():
    x, codes, indices, t, valid = draw()
    half = x.bfloat16().requires_grad_()
    losses = grounding_losses(half, codes, indices, t, valid, backend="triton")
    torch.testing.assert_close(losses, grounding_losses(half.float(), codes, indices, t, valid, backend="triton"))
    assert torch.autograd.grad(sum(losses), half)[0].dtype == torch.bfloat16
    scores = grounding_scores(half, codes, t, valid, backend="triton")
    assert torch.equal(scores, grounding_scores(half.float(), codes, t, valid, backend="triton"))


def test_flops_are_those_of_the_matrix_products():
    batch, tokens, width, codes, picks = 3, 7, 16, 12, 4
    x, e, indices, t, valid = draw(batch, tokens, width, codes, picks)
    with FlopCounterMode(display=False) as counted:
        grounding_scores(x, e, t, valid, backend="triton")
    assert counted.get_total_flops() == 2 * batch * tokens * width * codes
    one = 2 * batch * tokens * width * picks
    x.requires_grad_()
    with FlopCounterMode(display=False) as counted:
        q, code = grounding_losses(x, e, indices, t, valid, backend="triton")
        assert counted.get_total_flops() == 3 * one
        (q + code).backward()
    assert counted.get_total_flops() == 9 * one


def test_nothing_over_tokens_and_picks_is_saved_for_the_backward():
    x, codes, indices, t, valid = draw(tokens=50, picks=9)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        grounding_losses(x, codes, indices, t, valid, backend="triton")
    assert x.shape in saved and codes.shape in saved
    assert max(shape.numel() for shape in saved if shape not in (x.shape, codes.shape)) <= 3 * 50


@pytest.mark.parametrize("slots", [2, 264])
@pytest.mark.parametrize("batch,tokens,tiles", [(256, 324, 16), (256, 197, 512), (3, 900, 1), (1, 1, 1), (7, 20, 4)])
def test_groups_of_examples_are_never_slower_than_one_or_all_by_their_own_count(batch, tokens, tiles, slots):
    def steps(group):
        rounds = -(-tiles * -(-batch // group) // slots)
        return rounds * -(-group * tokens // 128)

    group = grounding_triton.group_size(batch, tokens, tiles, 128, slots)
    assert 1 <= group <= min(batch, grounding_triton.LONGEST_GROUP)
    assert all(steps(group) <= steps(other) for other in range(1, min(batch, 16) + 1))


def test_tables_have_every_chip():
    from vlblocks_kernels.launch import SMS

    for table in (grounding_triton.SCORES, grounding_losses_triton.LOSSES):
        assert tuple(table) == SMS and all(set(kinds) == {"half", "fp32"} for kinds in table.values())
    for sm in SMS:
        assert len(grounding_triton.compile_cases(sm)) == 3
        assert len(grounding_losses_triton.compile_cases(sm)) == 24
