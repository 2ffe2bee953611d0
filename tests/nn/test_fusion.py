import pytest
import torch
from torch import nn

from vlblocks.errors import UserError
from vlblocks.nn import fusion
from vlblocks.nn.attention import Attention
from vlblocks.nn.fusion import CoAttentionLayer, ModalityExperts
from vlblocks.nn.transformer import FeedForward, Transformer, TransformerLayer, uniform_layers

F64 = torch.float64
# Rows are queries and columns keys, in the order image, codes, text: the specification's item 22, written out.
TABLES = {
    "bottleneck": ("110", "111", "011"),
    "merged": ("111", "111", "111"),
    "captioning": ("110", "110", "11c"),
    "prefix_lm": ("110", "110", "11c"),
}


def expected(rows, lengths, valid, prefix):
    """[B, T, T] bool by loops over positions."""
    where = [(s, i) for s, n in enumerate(lengths) for i in range(n)]
    batch = len(valid)
    out = torch.zeros(batch, len(where), len(where), dtype=torch.bool)
    for b in range(batch):
        for q, (sq, iq) in enumerate(where):
            for k, (sk, ik) in enumerate(where):
                cell = rows[sq][sk]
                seen = cell == "1" or (cell == "c" and (ik <= iq or ik < prefix[b]))
                out[b, q, k] = seen and valid[b][q] and valid[b][k]
    return out


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("lengths", [(3, 2, 4), (0, 2, 4), (3, 2, 0), (3, 0, 4), (0, 0, 4)])
@pytest.mark.parametrize("masked_rows", ["zeros", "open"])
def test_tables_are_the_specification(name, lengths, masked_rows):
    image, codes, text = lengths
    image_valid = torch.arange(image) < torch.tensor([[image], [2]])
    text_valid = torch.arange(text) < torch.tensor([[text], [1]])
    prefix = torch.tensor([0, 0])
    given = {"image_valid": image_valid, "text_valid": text_valid, "masked_rows": masked_rows}
    if name == "prefix_lm":
        prefix = torch.tensor([2, 0])
        given["prefix"] = prefix
    mask = getattr(fusion, name)(image=image, codes=codes, text=text, **given)
    assert mask.names == ("image", "codes", "text") and mask.lengths == lengths
    valid = torch.cat([image_valid, torch.ones(2, codes, dtype=torch.bool), text_valid], dim=1)
    want = expected(TABLES[name], lengths, valid, prefix)
    if masked_rows == "open":
        want = want | ~want.any(dim=-1, keepdim=True)
    assert torch.equal(mask.dense()[:, 0].expand(2, -1, -1), want)


def test_tables_without_validity_have_no_padding():
    assert fusion.bottleneck(image=2, codes=1, text=2).dense()[0, 0].int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]


def test_codes_are_the_only_bridge():
    layer = TransformerLayer(width=12, heads=3, dtype=F64)
    x = torch.randn(1, 9, 12, dtype=F64)
    mask = fusion.bottleneck(image=3, codes=2, text=4)
    other = x.clone()
    other[:, :3] = torch.randn(1, 3, 12, dtype=F64)
    assert torch.equal(layer(x, mask=mask)[:, 5:], layer(other, mask=mask)[:, 5:])
    twice = lambda y: layer(layer(y, mask=mask), mask=mask)  # noqa: E731
    assert (twice(x) - twice(other))[:, 5:].abs().min() > 0


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_co_attention_is_two_cross_attentions_of_the_states_before_it(norm):
    block = CoAttentionLayer(image_width=16, text_width=8, heads=4, norm=norm, dtype=F64)
    image, text = torch.randn(2, 5, 16, dtype=F64), torch.randn(2, 4, 8, dtype=F64)
    image_valid = torch.arange(5) < torch.tensor([[5], [3]])
    text_valid = torch.arange(4) < torch.tensor([[4], [2]])

    def stream(side, x, context, valid):
        mask = valid[:, None, None]
        if norm == "pre":
            x = x + side.cross(side.norm1(x), side.norm_context(context), mask=mask)
            return x + side.mlp(side.norm2(x))
        x = side.norm1(x + side.cross(x, context, mask=mask))
        return side.norm2(x + side.mlp(x))

    out = block(image, text, image_valid=image_valid, text_valid=text_valid)
    torch.testing.assert_close(out.image, stream(block.image, image, text, text_valid))
    torch.testing.assert_close(out.text, stream(block.text, text, image, image_valid))
    short = block(image[1:, :3], text[1:, :2])
    torch.testing.assert_close(out.image[1:, :3], short.image)
    torch.testing.assert_close(out.text[1:, :2], short.text)


def test_co_attention_trains_every_parameter_of_both_streams():
    block = CoAttentionLayer(image_width=16, text_width=8, heads=4, dropout=0.1, attention_dropout=0.1)
    assert isinstance(block.image.cross, Attention) and block.image.mlp.fc1.out_features == 64
    out = block(torch.randn(4, 5, 16), torch.randn(4, 4, 8))
    (out.image.pow(3).sum() + out.text.pow(3).sum()).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_co_attention_names_mistakes():
    with pytest.raises(UserError, match="heads=3 does not divide width=8"):
        CoAttentionLayer(image_width=12, text_width=8, heads=3)
    with pytest.raises(UserError, match="norm"):
        CoAttentionLayer(image_width=8, text_width=8, heads=2, norm="none")


def experts(**segments):
    return ModalityExperts(experts=segments, make_ffn=lambda: FeedForward(width=12, hidden=24, dtype=F64))


def test_each_segment_goes_to_its_own_expert():
    block = experts(image="vision", text="language", codes="vision")
    assert sorted(block.experts) == ["language", "vision"]
    vision, language = block.experts["vision"], block.experts["language"]
    assert not torch.equal(vision.fc1.weight, language.fc1.weight)
    x = torch.randn(2, 9, 12, dtype=F64)
    want = torch.cat([vision(x[:, :5]), language(x[:, 5:])], dim=1)
    torch.testing.assert_close(block(x, fusion.merged(image=3, codes=2, text=4)), want)
    torch.testing.assert_close(block(x, {"image": slice(0, 5), "text": slice(5, 9)}), want)
    only_text = fusion.merged(text=9)
    torch.testing.assert_close(block(x, only_text), language(x))
    last = fusion.captioning(image=3, codes=2, text=8).last_queries(9)
    torch.testing.assert_close(block(x, last), torch.cat([vision(x[:, :1]), language(x[:, 1:])], dim=1))


def test_experts_in_a_stack_get_the_mask_and_gradients():
    make_ffn = lambda: experts(image="vision", text="language")  # noqa: E731
    stack = Transformer(layers=2, make_layer=uniform_layers(width=12, heads=3, make_ffn=make_ffn, dtype=F64))
    x = torch.randn(2, 7, 12, dtype=F64)
    mask = fusion.merged(image=3, text=4)
    out = stack(x, mask=mask)
    want = x
    for layer in stack.layers:
        want = want + layer.attn(layer.norm1(want), mask=mask)
        normed = layer.norm2(want)
        vision, language = layer.mlp.experts["vision"], layer.mlp.experts["language"]
        want = want + torch.cat([vision(normed[:, :3]), language(normed[:, 3:])], dim=1)
    torch.testing.assert_close(out, want)
    out.pow(3).sum().backward()
    for name, parameter in stack.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_experts_name_mistakes():
    block = experts(image="vision", text="language")
    x = torch.zeros(1, 4, 12, dtype=F64)
    with pytest.raises(UserError, match="needs to know the segments"):
        block(x, None)
    with pytest.raises(UserError, match="needs to know the segments"):
        TransformerLayer(width=12, heads=3, make_ffn=lambda: block, dtype=F64)(x)
    with pytest.raises(UserError, match="segment 'codes' has no expert"):
        block(x, fusion.merged(image=1, codes=1, text=2))
    with pytest.raises(UserError, match="starts at 3, not at 2"):
        block(x, {"image": slice(0, 2), "text": slice(3, 4)})
    with pytest.raises(UserError, match="segments end at 3 but x has 4"):
        block(x, fusion.merged(image=1, text=2))


def test_albef_fusion_is_a_layer_with_a_context():
    """Self-attention over text, attention to the image, feed-forward, as ALBEF's multimodal encoder stacks them."""
    layers = uniform_layers(width=8, heads=2, norm="post", context_width=12)
    stack = Transformer(layers=2, make_layer=layers)
    text, image = torch.randn(2, 4, 8), torch.randn(2, 5, 12, requires_grad=True)
    out = stack(text, context=image)
    assert isinstance(stack.layers[0].cross, nn.Module) and out.shape == text.shape
    (gradient,) = torch.autograd.grad(out.pow(3).sum(), image)
    assert (gradient.abs().sum(dim=-1) > 0).all()
