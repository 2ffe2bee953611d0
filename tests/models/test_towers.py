"""The towers alone, and the joint one over segments."""

import pytest
import torch
from torch import nn

from vlblocks.errors import UserError
from vlblocks.models import ImageTower, JointTower, TextTower
from vlblocks.nn import PatchEmbed, TextEmbed, Transformer, fusion, interpolate_positions, uniform_layers
from vlblocks.ops import SegmentMask

WIDTH = 16


def stack(layers=1, **options):
    make_layer = uniform_layers(width=WIDTH, heads=2, hidden=32, **options)
    return Transformer(layers=layers, make_layer=make_layer, norm=nn.LayerNorm(WIDTH, **options))


def image_tower(**options):
    patches = PatchEmbed(patch_size=4, width=WIDTH, **options)
    return ImageTower(patch_embed=patches, transformer=stack(**options), width=WIDTH, image_size=(8, 12), **options)


def text_tower():
    return TextTower(embed=TextEmbed(vocab=20, width=WIDTH, positions=12), transformer=stack())


def test_an_image_is_cls_and_patches_with_their_positions():
    tower = image_tower()
    images = torch.randn(2, 3, 8, 12)
    patches = tower.patch_embed(images)
    want = tower.transformer(torch.cat([tower.cls.expand(2, -1, -1), patches], dim=1) + tower.positions)
    torch.testing.assert_close(tower(images), want)
    assert want.shape == (2, 1 + 2 * 3, WIDTH)


def test_an_image_of_another_size_gets_a_resized_grid():
    tower = image_tower()
    images = torch.randn(1, 3, 16, 8)
    table = interpolate_positions(tower.positions, old_grid=(2, 3), new_grid=(4, 2))
    want = tower.transformer(torch.cat([tower.cls, tower.patch_embed(images)], dim=1) + table)
    torch.testing.assert_close(tower(images), want)


def test_padded_patches_and_tokens_change_nothing():
    image, text = image_tower(), text_tower()
    images, tokens = torch.randn(1, 3, 8, 12), torch.tensor([[0, 5, 6, 2, 1, 1]])
    seen = torch.tensor([[True] * 4 + [False] * 3])
    other = images.clone()
    other[:, :, 4:] = 9.0  # the second row of patches
    torch.testing.assert_close(image(images, seen)[:, :4], image(other, seen)[:, :4])
    assert not torch.allclose(image(images)[:, :4], image(other)[:, :4])
    torch.testing.assert_close(text(tokens, tokens != 1)[:, :4], text(tokens[:, :4]))


def test_a_text_takes_validity_or_a_whole_mask():
    tower = text_tower()
    tokens = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    valid = tokens != 1
    mask = SegmentMask.single(length=4, valid=valid)
    assert torch.equal(tower(tokens, valid), tower(tokens, mask=mask))
    causal = SegmentMask.single(length=4, causal=True)
    changed = torch.tensor([[0, 5, 6, 9], [0, 7, 2, 9]])
    torch.testing.assert_close(tower(tokens[:1], mask=causal)[:, :3], tower(changed[:1], mask=causal)[:, :3])
    with pytest.raises(UserError, match="valid or mask"):
        tower(tokens, valid, mask=mask)


def test_the_joint_tower_norms_codes_only_and_returns_its_segments():
    tower = JointTower(transformer=Transformer(layers=0, make_layer=nn.Identity), width=WIDTH)
    image, codes, text = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH), torch.randn(2, 5, WIDTH)
    positions = torch.randn(4, WIDTH)
    mask = fusion.bottleneck(image=3, codes=4, text=5)
    states = tower(mask=mask, image=image, codes=codes, text=text, code_positions=positions)
    assert torch.equal(states.image, image) and torch.equal(states.text, text)
    assert torch.equal(states.codes, tower.code_norm(codes + positions))
    alone = tower(mask=fusion.bottleneck(codes=4, text=5), codes=codes, text=text)
    assert alone.image is None and torch.equal(alone.codes, tower.code_norm(codes))
    with pytest.raises(UserError, match="at least one"):
        tower(mask=mask)


def test_the_joint_tower_follows_its_table():
    tower = JointTower(transformer=stack(), width=WIDTH)
    image, codes, text = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH), torch.randn(2, 5, WIDTH)
    mask = fusion.bottleneck(image=3, codes=4, text=5)
    before = tower(mask=mask, image=image, codes=codes, text=text)
    after = tower(mask=mask, image=image, codes=codes, text=torch.randn_like(text))
    torch.testing.assert_close(after.image, before.image)
    assert not torch.allclose(after.codes, before.codes)


def test_an_image_tower_made_on_the_meta_device_is_filled_by_its_resets():
    tower = image_tower(device="meta").to_empty(device="cpu")
    for parameter in tower.parameters():
        nn.init.constant_(parameter, 7.0)
    for module in tower.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in tower.named_parameters():
        assert parameter.abs().max() <= (1.0 if "norm" in name else 0.2), name


@pytest.mark.parametrize("size", [8, (9, 8)])
def test_a_patch_that_does_not_divide_the_image_is_named(size):
    with pytest.raises(UserError, match="patch_size"):
        ImageTower(patch_embed=PatchEmbed(patch_size=3, width=WIDTH), transformer=stack(), width=WIDTH, image_size=size)


def test_decoding_without_positions_is_refused():
    tower = TextTower(embed=TextEmbed(vocab=20, width=WIDTH, positions=12), transformer=stack())
    caches, tokens = tower.transformer.new_caches(), torch.randint(4, 19, (2, 3))
    mask = SegmentMask.single(length=3, causal=True)
    whole = tower(tokens, mask=mask)
    tower(tokens[:, :2], mask=SegmentMask.single(length=2, causal=True), caches=caches)
    with pytest.raises(UserError, match="position_ids"):
        tower(tokens[:, 2:], mask=mask.last_queries(1), caches=caches)
    last = tower(tokens[:, 2:], mask=mask.last_queries(1), caches=caches, position_ids=torch.tensor([[4]]))
    torch.testing.assert_close(last, whole[:, 2:])
