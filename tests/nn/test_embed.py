import pytest
import torch
import torch.nn.functional as F

from vlblocks.errors import UserError
from vlblocks.nn.embed import PatchEmbed, TextEmbed, interpolate_positions


@pytest.mark.parametrize("patch, padding, size", [(4, 0, (12, 20)), ((2, 5), 0, (6, 15)), (4, 1, (12, 13)), (8, 3, 24)])
def test_patch_embed_is_its_convolution(patch, padding, size):
    height, width = (size, size) if isinstance(size, int) else size
    block = PatchEmbed(patch_size=patch, width=16, padding=padding, dtype=torch.float64)
    images = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    want = block.proj(images)
    assert block.grid(height, width) == tuple(want.shape[2:])
    want = want.flatten(2).transpose(1, 2)
    got = block(images)
    torch.testing.assert_close(got, want)
    probe = torch.randn_like(got)
    inputs = [images, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * probe).sum(), inputs),
        torch.autograd.grad((want * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_patches_are_row_major():
    block = PatchEmbed(patch_size=2, width=1, channels=1)
    with torch.no_grad():
        block.proj.weight.fill_(0.25)
    image = torch.arange(6.0).reshape(1, 1, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert block(image).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_the_original_grid_is_padded_to_14_by_14():
    assert PatchEmbed(patch_size=16, width=8, padding=7).grid(224, 224) == (14, 14)


def test_patch_embed_names_what_does_not_fit():
    block = PatchEmbed(patch_size=16, width=8)
    with pytest.raises(UserError, match="30 x 32 is not a multiple of patch_size 16 x 16"):
        block(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UserError, match=r"give \[B, 3, H, W\]"):
        block(torch.zeros(1, 1, 32, 32))
    with pytest.raises(UserError, match="smaller than patch_size"):
        PatchEmbed(patch_size=16, width=8, padding=1).grid(8, 32)
    for settings in ({"patch_size": 0}, {"patch_size": 4, "padding": -1}):
        with pytest.raises(UserError):
            PatchEmbed(width=8, **settings)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_interpolation_resizes_the_grid_and_keeps_the_prefix(mode):
    table = torch.randn(1, 2 + 3 * 5, 4, dtype=torch.float64, requires_grad=True)
    resized = interpolate_positions(table, old_grid=(3, 5), new_grid=(6, 4), prefix=2, mode=mode)
    assert resized.shape == (1, 2 + 24, 4)
    assert torch.equal(resized[:, :2], table[:, :2])
    grid = table[0, 2:].reshape(3, 5, 4).permute(2, 0, 1)[None]
    want = F.interpolate(grid, size=(6, 4), mode=mode, align_corners=False)[0].permute(1, 2, 0).reshape(24, 4)
    torch.testing.assert_close(resized[0, 2:], want)
    (gradient,) = torch.autograd.grad(resized.square().sum(), table)
    assert (gradient != 0).all()


@pytest.mark.parametrize("padding", [0, 7])
def test_224_to_384_is_14_by_14_to_24_by_24(padding):
    block = PatchEmbed(patch_size=16, width=8, padding=padding)
    old, new = block.grid(224, 224), block.grid(384, 384)
    assert (old, new) == ((14, 14), (24, 24)) and block(torch.zeros(1, 3, 384, 384)).shape == (1, 24 * 24, 8)
    table = torch.randn(1, 1 + 14 * 14, 8)
    resized = interpolate_positions(table, old_grid=old, new_grid=new)
    grid = table[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    want = F.interpolate(grid, size=(24, 24), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(resized[:, :1], table[:, :1])
    torch.testing.assert_close(resized[:, 1:], want)


def test_bilinear_interpolation_by_hand():
    table = torch.tensor([[[9.0], [0.0], [1.0]]])
    resized = interpolate_positions(table, old_grid=(1, 2), new_grid=(1, 4), mode="bilinear")
    assert resized.flatten().tolist() == [9.0, 0.0, 0.25, 0.75, 1.0]


def test_interpolation_returns_an_equal_grid_untouched_and_checks_the_table():
    table = torch.randn(1, 7, 4)
    assert interpolate_positions(table, old_grid=(2, 3), new_grid=(2, 3)) is table
    assert interpolate_positions(table.bfloat16(), old_grid=(2, 3), new_grid=(3, 2)).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"old_grid 3 x 3 needs \[1, 10, D\]"):
        interpolate_positions(table, old_grid=(3, 3), new_grid=(3, 3))
    with pytest.raises(UserError, match="mode"):
        interpolate_positions(table, old_grid=(2, 3), new_grid=(3, 2), mode="nearest")


def test_positions_start_at_2_and_padding_takes_1():
    block = TextEmbed(vocab=20, width=8, positions=10)
    tokens = torch.tensor([[0, 5, 6, 2, 1, 1], [1, 1, 0, 7, 9, 2]])
    assert block.position_ids(tokens).tolist() == [[2, 3, 4, 5, 1, 1], [1, 1, 2, 3, 4, 5]]
    want = block.norm(block.word(tokens) + block.position(block.position_ids(tokens)))
    assert torch.equal(block(tokens), want)
    bert = TextEmbed(vocab=20, width=8, positions=10, pad_id=0, position_offset=0)
    assert bert.position_ids(torch.tensor([[4, 5, 0, 0]])).tolist() == [[0, 1, 0, 0]]
    plain = TextEmbed(vocab=20, width=8, positions=10, pad_id=None, position_offset=0)
    assert plain.position_ids(tokens).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_text_embed_matches_the_step_by_step_use_with_given_positions():
    block = TextEmbed(vocab=20, width=8, positions=10)
    tokens = torch.tensor([[0, 5, 6, 2]])
    steps = [block(tokens[:, t : t + 1], torch.tensor([[2 + t]])) for t in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), block(tokens))


def test_ranks_get_the_text_positions_with_gradient():
    block = TextEmbed(vocab=20, width=8, positions=10)
    rows = block.positions(3)
    assert torch.equal(rows, block.position(torch.tensor([2, 3, 4])))
    rows.sum().backward()
    assert block.position.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [2, 3, 4]


def test_text_embed_options_and_limits():
    block = TextEmbed(vocab=20, width=8, positions=10, norm_eps=None, dropout=0.5)
    tokens = torch.randint(2, 20, (4, 8))
    assert (block(tokens) == 0).any()
    block.eval()
    assert torch.equal(block(tokens), block.word(tokens) + block.position.weight[2:10])
    with pytest.raises(UserError, match="9 positions are needed but TextEmbed has room for 8"):
        block(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(UserError, match="at least 11"):
        block.positions(9)


def test_blocks_start_small_also_when_made_on_the_meta_device():
    with torch.device("meta"):
        blocks = torch.nn.ModuleList(
            [PatchEmbed(patch_size=16, width=64, dtype=torch.bfloat16), TextEmbed(vocab=500, width=64, positions=66)]
        )
    assert all(p.device.type == "meta" for p in blocks.parameters())
    blocks.to_empty(device="cpu")
    for module in blocks.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert blocks[0].proj.weight.dtype == torch.bfloat16
    assert blocks[0].proj.bias.eq(0).all()
    for weight in (blocks[0].proj.weight, blocks[1].word.weight, blocks[1].position.weight):
        assert 0.018 < weight.float().std() < 0.022
