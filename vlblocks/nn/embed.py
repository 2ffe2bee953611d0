"""From pixels and token ids to states: patch and text embeddings, and position tables for other grids."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.nn.layers import Conv2d, Embedding

Size = int | tuple[int, int]


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each (ViT: Dosovitskiy et al., 2021).

    Without padding the patches must tile the image. With it, the grid is a convolution's: rows and columns that do not
    fill a patch are left out (the original UNIMO-2 pads 7 pixels to patches of 16).

    Args:
        patch_size: height and width of a patch in pixels.
        width: D.
        channels: of the image.
        padding: zeros on every side, in pixels, vertically and horizontally.

    Raises:
        UserError: a patch size below 1 or a negative padding.
    """

    def __init__(
        self, *, patch_size: Size, width: int, channels: int = 3, padding: Size = 0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.patch_size, self.padding = _pair(patch_size), _pair(padding)
        if min(self.patch_size) < 1:
            raise UserError(f"patch_size is {patch_size}: give 1 pixel or more")
        if min(self.padding) < 0:
            raise UserError(f"padding is {padding}: give 0 pixels or more")
        self.proj = Conv2d(
            channels,
            width,
            kernel_size=self.patch_size,
            stride=self.patch_size,
            padding=self.padding,
            device=device,
            dtype=dtype,
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of height x width pixels.

        Raises:
            UserError: no whole number of patches fits and there is no padding, or not even one fits.
        """
        (ph, pw), (dh, dw) = self.patch_size, self.padding
        if (dh, dw) == (0, 0) and (height % ph or width % pw):
            raise UserError(
                f"image size {height} x {width} is not a multiple of patch_size {ph} x {pw}: resize the images, "
                "choose another patch_size, or set padding"
            )
        rows, columns = (height + 2 * dh) // ph, (width + 2 * dw) // pw
        if rows < 1 or columns < 1:
            raise UserError(f"image size {height} x {width} is smaller than patch_size {ph} x {pw}: use larger images")
        return rows, columns

    def forward(self, images: Tensor) -> Tensor:
        """images [B, channels, H, W] -> patches [B, P, D], row-major.

        Raises:
            UserError: the image size does not fit, see `grid`, or the channels do not.
        """
        if images.dim() != 4 or images.shape[1] != self.proj.in_channels:
            raise UserError(f"images have shape {list(images.shape)}: give [B, {self.proj.in_channels}, H, W]")
        rows, columns = self.grid(images.shape[-2], images.shape[-1])
        if self.padding != (0, 0):
            return self.proj(images).flatten(2).transpose(1, 2)
        # As a matrix product the patches come out in their final layout, and in bfloat16 a CPU is a quarter faster.
        ph, pw = self.patch_size
        patches = images.unflatten(3, (columns, pw)).unflatten(2, (rows, ph)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(len(images), rows * columns, -1), self.proj.weight.flatten(1), self.proj.bias)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, padding={self.padding}"


def interpolate_positions(
    table: Tensor,
    *,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix: int = 1,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """Resizes a table of positions to another grid of patches; the table itself where the grids are equal.

    Args:
        table: [1, prefix + h * w, D], patches row-major.
        old_grid: (h, w).
        new_grid: (h', w').
        prefix: leading rows, such as CLS, that belong to no patch and are kept.
        mode: "bicubic" or "bilinear"; pixel centres are aligned as in ViT (align_corners=False), without antialiasing.

    Returns:
        [1, prefix + h' * w', D]

    Raises:
        UserError: the table does not fit old_grid, or an unknown mode.
    """
    if mode not in ("bicubic", "bilinear"):
        raise UserError(f"mode is {mode!r}: choose 'bicubic' or 'bilinear'")
    h, w = old_grid
    if table.dim() != 3 or table.shape[0] != 1 or table.shape[1] != prefix + h * w:
        raise UserError(f"table has shape {list(table.shape)}: old_grid {h} x {w} needs [1, {prefix + h * w}, D]")
    if tuple(old_grid) == tuple(new_grid):
        return table
    grid = table[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
    if grid.dtype in (torch.float16, torch.bfloat16):
        grid = grid.float()
    grid = F.interpolate(grid, size=tuple(new_grid), mode=mode, align_corners=False)
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class TextEmbed(nn.Module):
    """Word plus position embeddings, layer norm, dropout (BERT and RoBERTa: Liu et al., 2019); no token types.

    Real tokens take the positions position_offset, position_offset + 1, ... in their order; padding, which does not
    count, takes the one before (RoBERTa: 2, 3, ... and 1).

    Args:
        vocab: number of words.
        width: D.
        positions: rows of the position table, the first `position_offset` included.
        pad_id: the id of padding; None: nothing is padding.
        position_offset: the first real token's position.
        norm_eps: of the layer norm; None: no norm (CLIP).
        dropout: share of elements dropped.
    """

    def __init__(
        self,
        *,
        vocab: int,
        width: int,
        positions: int,
        pad_id: int | None = 1,
        position_offset: int = 2,
        norm_eps: float | None = 1e-5,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.pad_id, self.position_offset = pad_id, position_offset
        self.word = Embedding(vocab, width, device=device, dtype=dtype)
        self.position = Embedding(positions, width, device=device, dtype=dtype)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, norm_eps, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    @property
    def max_tokens(self) -> int:
        """Number of real tokens that the position table has room for."""
        return self.position.num_embeddings - self.position_offset

    def position_ids(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> their positions [B, T], long."""
        if self.pad_id is None:
            return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) + self.position_offset
        real = tokens != self.pad_id
        ids = real.cumsum(dim=1) + (self.position_offset - 1)
        return torch.where(real, ids, max(self.position_offset - 1, 0))

    def positions(self, n: int) -> Tensor:
        """The first n real positions' embeddings, [n, D].

        Raises:
            UserError: the table has fewer.
        """
        self._check_length(n)
        return self.position.weight[self.position_offset : self.position_offset + n]

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """tokens [B, T] long; position_ids [B, T] or [1, T], by default `position_ids(tokens)` -> states [B, T, D].

        Raises:
            UserError: more tokens than positions.
        """
        if position_ids is None:
            self._check_length(tokens.shape[1])
            position_ids = self.position_ids(tokens)
        return self.dropout(self.norm(self.word(tokens) + self.position(position_ids)))

    def _check_length(self, n: int) -> None:
        if n > self.max_tokens:
            raise UserError(
                f"{n} positions are needed but TextEmbed has room for {self.max_tokens}: "
                f"shorten the input or set positions to at least {n + self.position_offset}"
            )
