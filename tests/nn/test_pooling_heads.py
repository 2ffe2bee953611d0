import pytest
import torch
import torch.nn.functional as F

from vlblocks.errors import UserError
from vlblocks.nn.heads import ClassificationHead, MaskedTokenHead, MatchingHead, Projection
from vlblocks.nn.pooling import AttentionPool, ClsPool, MeanPool

F64 = torch.float64
VALID = torch.tensor([[True, True, True, True], [True, True, False, False]])


@pytest.mark.parametrize("pool", [ClsPool(), MeanPool(), AttentionPool(width=8, heads=2, dtype=F64)])
def test_pools_ignore_padding(pool):
    x = torch.randn(2, 4, 8, dtype=F64)
    pooled = pool(x, VALID)
    assert pooled.shape == (2, 8)
    torch.testing.assert_close(pooled[1:], pool(x[1:, :2]))
    torch.testing.assert_close(pool(x.masked_fill(~VALID[..., None], float("nan")), VALID), pooled)
    torch.testing.assert_close(pool(x), pool(x, torch.ones_like(VALID)))


def test_mean_and_cls_by_hand():
    x = torch.tensor([[[1.0], [2.0], [6.0]], [[4.0], [5.0], [6.0]]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    assert MeanPool()(x, valid).tolist() == [[1.5], [0.0]]
    assert MeanPool()(x).tolist() == [[3.0], [5.0]]
    assert ClsPool()(x).tolist() == [[1.0], [4.0]]


def test_attention_pool_is_one_query_over_normed_states():
    pool = AttentionPool(width=8, heads=2, dtype=F64)
    assert 0 < pool.query.std() < 0.06
    x = torch.randn(2, 4, 8, dtype=F64)
    torch.testing.assert_close(pool(x), pool.attn(pool.query.repeat(2, 1, 1), pool.norm(x))[:, 0])
    shuffled = pool(x[:, [2, 0, 3, 1]], VALID[:, [2, 0, 3, 1]])
    torch.testing.assert_close(shuffled, pool(x, VALID))
    pool(x, VALID).pow(3).sum().backward()
    for name, parameter in pool.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("normalize", [False, True])
def test_projection(activation, normalize):
    head = Projection(in_width=8, out_width=5, activation=activation, normalize=normalize, dtype=F64)
    x = torch.randn(2, 3, 8, dtype=F64)
    want = x @ head.dense.weight.T + head.dense.bias
    if activation:
        want = want.clamp(min=0)
    if normalize:
        want = want / want.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(head(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_projection_survives_features_that_are_all_zero(dtype):
    head = Projection(in_width=4, out_width=3, activation="relu", normalize=True, dtype=dtype)
    with torch.no_grad():
        head.dense.bias.fill_(-100.0)
    x = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    out = head(x)
    assert out.dtype == dtype and out.eq(0).all()
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(head.dense.weight.grad).all()


def test_projection_refuses_an_unknown_activation():
    with pytest.raises(UserError, match="activation is 'tanh'"):
        Projection(in_width=4, out_width=3, activation="tanh")


def test_matching_and_classification():
    matching = MatchingHead(width=8)
    text, image = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(
        matching(text, image), F.linear(text * image, matching.dense.weight, matching.dense.bias)
    )
    assert matching(text, image).shape == (3, 2)
    head = ClassificationHead(width=8, classes=4, dropout=0.5)
    pooled = torch.randn(64, 8)
    assert not torch.equal(head(pooled), head(pooled))
    head.eval()
    torch.testing.assert_close(head(pooled), head.dense(pooled))
    assert head(pooled).shape == (64, 4)


def test_masked_token_head_is_tied_to_the_table_it_is_given():
    head = MaskedTokenHead(width=8, vocab=11, norm_eps=1e-12, dtype=F64)
    assert sorted(head.state_dict()) == ["bias", "dense.bias", "dense.weight", "norm.bias", "norm.weight"]
    assert head.norm.eps == 1e-12 and head.bias.eq(0).all()
    torch.nn.init.normal_(head.bias)
    table = torch.randn(11, 8, dtype=F64, requires_grad=True)
    states = torch.randn(5, 8, dtype=F64)
    logits = head(states, table)
    inner = F.layer_norm(F.gelu(head.dense(states)), (8,), head.norm.weight, head.norm.bias, 1e-12)
    torch.testing.assert_close(logits, inner @ table.T + head.bias)
    logits.pow(3).sum().backward()
    assert table.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
