"""Dense and embedding layers that start from a truncated normal of std 0.02 and zero biases, as ViT and BERT do.

They are subclasses, so that every `reset_parameters` call, such as the one that fills a model built on the meta device,
gives that start and not PyTorch's own.
"""

from __future__ import annotations

from torch import nn

STD = 0.02


class Linear(nn.Linear):
    """`torch.nn.Linear` started from a truncated normal; the bias is zero."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` started from a truncated normal; the bias is zero."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` started from a truncated normal."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=STD)
        self._fill_padding_idx_with_zero()
