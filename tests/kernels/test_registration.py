"""What every registered operation gets: no autocast inside of it, wherever it is called, and its tensors' device."""

import pytest
import torch

from vlblocks.losses import info_nce, siglip, two_view_contrast
from vlblocks.ops import SegmentMask, attention
from vlblocks.ops.grounding import grounding_losses
from vlblocks.ops.linear_cross_entropy import linear_cross_entropy
from vlblocks_kernels.linear_cross_entropy import linear_cross_entropy_rows

TARGET = torch.tensor([3, -100, 0, 8, 1])
PICKS = torch.tensor([[0, 2], [1, 4], [2, 3], [0, 1], [4, 0]])


def attend(a, b):
    mask = SegmentMask.single(length=8, valid=torch.arange(8) < torch.tensor([[8], [5], [1], [8], [3]]))
    q, k = (x[:, None, None].expand(-1, 2, 8, -1) for x in (a, b[:5]))
    return attention(q, k, 2 * k, mask=mask, backend="triton")


LOSSES = {
    "linear_cross_entropy": lambda a, b: linear_cross_entropy(a, b, None, TARGET, label_smoothing=0.1),
    "linear_cross_entropy, rows": lambda a, b: linear_cross_entropy(a, b, None, TARGET, reduction="none"),
    "info_nce": lambda a, b: info_nce(a, b[:5], temperature=0.3, label_smoothing=0.2),
    "siglip": lambda a, b: siglip(a, b[:5], scale=3.0, bias=-1.0),
    "siglip, rows": lambda a, b: siglip(a, b[:5], scale=3.0, bias=-1.0, reduction="none"),
    "two_view_contrast": lambda a, b: two_view_contrast(a, b[:5], temperature=0.3),
    "attention": attend,
    "grounding_losses": lambda a, b: torch.stack(grounding_losses(a[:, None], b, PICKS, 1.3, backend="triton")),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_backward_within_autocast_gives_the_same_bits(name):
    a, b = torch.randn(5, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    loss = LOSSES[name](a, b).sum()
    expected = torch.autograd.grad(loss, (a, b), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, (a, b))
    assert all(torch.equal(have, want) for have, want in zip(found, expected, strict=True))


def test_kernels_are_launched_on_their_tensors_device(monkeypatch):
    seen = []

    class Device:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            seen.append(self.tensor)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    x = torch.randn(5, 16)
    linear_cross_entropy_rows(x, torch.randn(9, 16), None, TARGET, -100, 0.0, 0.0, 1000, False)
    assert [tensor.data_ptr() for tensor in seen] == [x.data_ptr()]
