import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vlblocks.errors import UserError
from vlblocks.nn import fusion
from vlblocks.nn.embed import PatchEmbed
from vlblocks.nn.transformer import FeedForward, Transformer, TransformerLayer, drop_path, uniform_layers
from vlblocks.ops.segments import SegmentMask

F64 = torch.float64


def stirred(module):
    """The module with all parameters away from their start, so that none acts as 0 or 1."""
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def gradients(out, inputs):
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), inputs)


def test_feed_forward_is_two_dense_layers_around_an_exact_gelu():
    block = stirred(FeedForward(width=8, hidden=24, dtype=F64))
    x = torch.randn(2, 3, 8, dtype=F64)
    inner = x @ block.fc1.weight.T + block.fc1.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(block(x), inner @ block.fc2.weight.T + block.fc2.bias)
    relu = FeedForward(width=8, hidden=24, activation=F.relu, dtype=F64)
    relu.load_state_dict(block.state_dict())
    torch.testing.assert_close(relu(x), block.fc2(F.relu(block.fc1(x))))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_layer_is_its_formula(norm, cross, layer_scale):
    layer = TransformerLayer(
        width=12,
        heads=3,
        hidden=20,
        norm=norm,
        norm_eps=1e-12,
        layer_scale=layer_scale,
        context_width=8 if cross else None,
        dtype=F64,
    )
    assert layer.norm1.eps == layer.norm2.eps == 1e-12 and layer.mlp.fc1.out_features == 20
    if layer_scale is not None:
        assert layer.ls1.gamma.eq(0.1).all()
    stirred(layer)
    x = torch.randn(2, 5, 12, dtype=F64)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    mask = SegmentMask.single(length=5, valid=valid)
    context = torch.randn(2, 4, 8, dtype=F64) if cross else None
    context_mask = torch.tensor([[True] * 4, [True, False, False, False]])[:, None, None] if cross else None

    steps = [(layer.norm1, getattr(layer.ls1, "gamma", 1.0), lambda y: layer.attn(y, mask=mask))]
    if cross:
        gamma = getattr(layer.ls_cross, "gamma", 1.0)
        steps.append((layer.norm_cross, gamma, lambda y: layer.cross(y, context, mask=context_mask)))
    steps.append((layer.norm2, getattr(layer.ls2, "gamma", 1.0), layer.mlp))
    want = x
    for layer_norm, gamma, branch in steps:
        want = want + gamma * branch(layer_norm(want)) if norm == "pre" else layer_norm(want + gamma * branch(want))
    got = layer(x, mask=mask, context=context, context_mask=context_mask)
    torch.testing.assert_close(got, want)


def test_post_norm_layer_equals_torch_encoder_layer():
    layer = stirred(TransformerLayer(width=16, heads=4, hidden=32, norm="post"))
    theirs = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True)
    names = {
        "self_attn.in_proj_weight": "attn.qkv.weight",
        "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj": "attn.proj",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    }
    ours = layer.state_dict()
    state = {}
    for key in theirs.state_dict():
        mine = key
        for a, b in names.items():
            mine = mine.replace(a, b)
        state[key] = ours[mine]
    theirs.load_state_dict(state)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(layer(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_pre_norm_stack_equals_a_timm_vision_transformer_under_its_own_names():
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32, depth=2).eval()
    patches = PatchEmbed(patch_size=16, width=192)
    layers = uniform_layers(width=192, heads=3, norm_eps=1e-6)
    stack = Transformer(layers=2, make_layer=layers, norm=nn.LayerNorm(192, eps=1e-6))
    state = stirred(theirs).state_dict()
    patches.load_state_dict({k[12:]: v for k, v in state.items() if k.startswith("patch_embed.")})
    stack.load_state_dict(
        {k.replace("blocks.", "layers."): v for k, v in state.items() if k.startswith(("blocks.", "norm."))}
    )
    images = torch.randn(2, 3, 32, 32)
    states = torch.cat([theirs.cls_token.expand(2, -1, -1), patches(images)], dim=1) + theirs.pos_embed
    torch.testing.assert_close(stack(states), theirs.forward_features(images), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_parameter_gets_a_gradient_and_padding_changes_nothing(norm):
    layers = uniform_layers(width=12, heads=3, norm=norm, layer_scale=0.5, context_width=8, dtype=F64)
    stack = stirred(Transformer(layers=2, make_layer=layers, norm=nn.LayerNorm(12, dtype=F64)))
    x = torch.randn(2, 6, 12, dtype=F64)
    context = torch.randn(2, 5, 8, dtype=F64)
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    context_valid = torch.arange(5) < torch.tensor([[5], [2]])
    mask = SegmentMask.single(length=6, valid=valid)
    out = stack(x, mask=mask, context=context, context_mask=context_valid[:, None, None])
    parameters = dict(stack.named_parameters())
    for name, gradient in zip(parameters, gradients(out[valid], list(parameters.values())), strict=True):
        # A bias of all keys alike shifts every score of a row by the same amount, which softmax ignores.
        if name.endswith("qkv.bias"):
            gradient = torch.cat([gradient[:12], gradient[24:]])
        elif name.endswith("kv.bias"):
            gradient = gradient[12:]
        assert gradient.abs().min() > 0, name
    alone = stack(x[1:, :4], context=context[1:, :2])
    torch.testing.assert_close(out[1:, :4], alone)
    spoilt, spoilt_context = x.masked_fill(~valid[..., None], 1e4), context.masked_fill(~context_valid[..., None], 1e4)
    again = stack(spoilt, mask=mask, context=spoilt_context, context_mask=context_valid[:, None, None])
    torch.testing.assert_close(again[valid], out[valid])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_neither_outputs_nor_gradients(dropout):
    layers = uniform_layers(
        width=12, heads=3, dropout=dropout, attention_dropout=dropout, drop_path=dropout, context_width=8
    )
    stack = Transformer(layers=3, make_layer=layers, norm=nn.LayerNorm(12))
    x = torch.randn(4, 6, 12, requires_grad=True)
    context = torch.randn(4, 5, 8, requires_grad=True)
    runs = []
    calls = []
    stack.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for stack.checkpointing in (False, True):
        torch.manual_seed(1)
        mask = SegmentMask.single(length=6, valid=torch.arange(6) < torch.tensor([[6], [4], [1], [6]]), causal=True)
        out = stack(x, mask=mask, context=context)
        runs.append((out, *gradients(out, [x, context, *stack.parameters()])))
    for plain, recomputed in zip(*runs, strict=True):
        assert torch.equal(plain, recomputed)
    assert len(calls) == 3
    with torch.no_grad():
        stack(x, mask=mask, context=context)
    assert len(calls) == 4


def test_layers_start_small_and_different():
    stack = Transformer(layers=3, make_layer=uniform_layers(width=64, heads=4))
    weights = [layer.attn.qkv.weight for layer in stack.layers]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    for name, parameter in stack.named_parameters():
        if "norm" in name:
            assert parameter.eq(1.0 if name.endswith("weight") else 0.0).all()
        elif name.endswith("bias"):
            assert parameter.eq(0).all()
        else:
            assert 0.018 < parameter.std() < 0.022, name


def test_a_stack_can_be_made_on_the_meta_device_and_filled_later():
    layers = uniform_layers(width=64, heads=4, layer_scale=0.25, context_width=32, device="meta", dtype=torch.bfloat16)
    stack = Transformer(layers=1, make_layer=layers)
    assert {(p.device.type, p.dtype) for p in stack.parameters()} == {("meta", torch.bfloat16)}
    stack.to_empty(device="cpu")
    for module in stack.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    layer = stack.layers[0]
    assert layer.ls_cross.gamma.eq(0.25).all() and layer.mlp.fc1.bias.eq(0).all()
    assert 0.018 < layer.cross.kv.weight.float().std() < 0.022


def test_drop_path_drops_examples_and_keeps_the_mean():
    x = torch.rand(4000, 2, 3) + 0.5
    out = drop_path(x, 0.25, True)
    dropped = out.eq(0).flatten(1)
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    assert 0.22 < dropped[:, 0].float().mean() < 0.28
    kept = ~dropped[:, 0]
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert drop_path(x, 0.25, False) is x and drop_path(x, 0.0, True) is x


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_whose_branches_are_dropped_is_its_residual(norm):
    layer = stirred(TransformerLayer(width=12, heads=3, norm=norm, drop_path=1 - 1e-9))
    x = torch.randn(2, 5, 12)
    want = x if norm == "pre" else layer.norm2(layer.norm1(x))
    torch.testing.assert_close(layer(x), want)
    layer.eval()
    assert not torch.allclose(layer(x), want, atol=1e-2)


def test_drop_path_and_dropout_differ_between_layers_as_asked():
    layers = uniform_layers(width=12, heads=3, drop_path=[0.0, 0.1, 0.2], dropout=0.1, attention_dropout=0.4)
    stack = Transformer(layers=3, make_layer=layers)
    assert [layer.drop_path for layer in stack.layers] == [0.0, 0.1, 0.2]
    layer = stack.layers[0]
    assert (layer.dropout.p, layer.mlp.dropout.p, layer.attn.dropout) == (0.1, 0.1, 0.4)
    x = torch.randn(2, 5, 12)
    assert not torch.equal(stack(x), stack(x))
    stack.eval()
    assert torch.equal(stack(x), stack(x))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cross", [False, True])
def test_decoding_with_caches_equals_the_whole_pass(norm, cross):
    """Image and codes prefilled, text token by token: the captioning table through a stack."""
    layers = uniform_layers(width=12, heads=3, norm=norm, context_width=8 if cross else None, dtype=F64)
    stack = stirred(Transformer(layers=3, make_layer=layers)).eval().requires_grad_(False)
    image, codes, text = 5, 3, 6
    x = torch.randn(2, image + codes + text, 12, dtype=F64)
    image_valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    context = torch.randn(2, 4, 8, dtype=F64) if cross else None
    table = lambda n: fusion.captioning(image=image, codes=codes, text=n, image_valid=image_valid)  # noqa: E731
    whole = stack(x, mask=table(text), context=context)

    caches = stack.new_caches()
    parts = [stack(x[:, : image + codes], mask=table(0), context=context, caches=caches)]
    for t in range(1, text + 1):
        new = x[:, image + codes + t - 1 : image + codes + t]
        parts.append(stack(new, mask=table(t).last_queries(1), caches=caches))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=1e-12)
    assert [cache.length for cache in caches] == [image + codes + text] * 3


def test_a_cross_attention_layer_without_a_context_skips_it():
    layer = stirred(TransformerLayer(width=12, heads=3, context_width=8))
    plain = TransformerLayer(width=12, heads=3)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "cross" not in k})
    x = torch.randn(2, 5, 12)
    assert torch.equal(layer(x), plain(x))
    assert not torch.allclose(layer(x, context=torch.randn(2, 3, 8)), plain(x), atol=1e-3)


def test_only_some_layers_may_read_the_context():
    plain, fused = uniform_layers(width=12, heads=3), uniform_layers(width=12, heads=3, context_width=8)
    stack = stirred(Transformer(layers=4, make_layer=lambda i: fused(i) if i % 2 else plain(i)))
    x, context = torch.randn(2, 5, 12), torch.randn(2, 3, 8)
    want = x
    for i, layer in enumerate(stack.layers):
        want = layer(want, context=context) if i % 2 else layer(want)
    assert torch.equal(stack(x, context=context), want)


def test_layers_of_ones_own_need_to_know_the_mask_only():
    class Mixer(nn.Module):
        def forward(self, x, *, mask):
            return x * mask.valid_tokens()[..., None]

    x, valid = torch.randn(1, 3, 4), torch.tensor([[True, False, True]])
    out = Transformer(layers=2, make_layer=lambda i: Mixer())(x, mask=SegmentMask.single(length=3, valid=valid))
    assert torch.equal(out, x * valid[..., None])
    assert torch.equal(Transformer(layers=0, make_layer=lambda i: Mixer())(x), x)


def test_the_feed_forward_comes_from_its_factory():
    layer = TransformerLayer(width=12, heads=3, make_ffn=lambda: nn.Linear(12, 12))
    assert isinstance(layer.mlp, nn.Linear) and layer(torch.randn(1, 2, 12)).shape == (1, 2, 12)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="heads=5 does not divide width=12"):
        TransformerLayer(width=12, heads=5)
    with pytest.raises(UserError, match="norm is 'middle': choose 'pre' or 'post'"):
        TransformerLayer(width=12, heads=3, norm="middle")
    with pytest.raises(UserError, match="layers is -1"):
        Transformer(layers=-1, make_layer=uniform_layers(width=12, heads=3))
    stack = Transformer(layers=2, make_layer=uniform_layers(width=12, heads=3))
    x = torch.zeros(1, 2, 12)
    with pytest.raises(UserError, match="no layer has cross-attention"):
        stack(x, context=x)
    with pytest.raises(UserError, match="without cross-attention"):
        stack.layers[0](x, context=x)
    with pytest.raises(UserError, match="1 caches for 2 layers"):
        stack(x, caches=stack.new_caches()[:1])
