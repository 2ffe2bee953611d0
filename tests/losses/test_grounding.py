"""Grounding loss against its definition, token by token."""

import pytest
import torch

from vlblocks.losses import grounding_loss


def test_terms_by_hand():
    x, codes = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    indices = torch.tensor([[5, 0], [2, 3]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    token_terms, code_terms = [], []
    for b in range(2):
        tokens, picked = x[b, valid[b]], codes[indices[b]]
        fires = torch.sigmoid(2.0 * tokens @ picked.t())
        for n, token in enumerate(tokens):
            mean_code = sum(fires[n, k] * picked[k] for k in range(2)) / fires[n].sum()
            token_terms.append((mean_code - token).square().mean())
        for k in range(2):
            mean_token = sum(fires[n, k] * tokens[n] for n in range(len(tokens))) / fires[:, k].sum()
            code_terms.append((mean_token - picked[k]).square().mean())
    found = grounding_loss(x, codes, indices, 2.0, valid, code_weight=0.5)
    torch.testing.assert_close(found.token_loss, torch.stack(token_terms).mean())
    torch.testing.assert_close(found.code_loss, torch.stack(code_terms).mean())
    torch.testing.assert_close(found.loss, found.token_loss + 0.5 * found.code_loss)


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_valid_gives_zero(batch):
    x, codes = torch.randn(batch, 3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    valid = torch.zeros(batch, 3, dtype=torch.bool)
    loss = grounding_loss(x, codes, torch.zeros(batch, 2, dtype=torch.long), 2.0, valid).loss
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(codes.grad, torch.zeros_like(codes))
