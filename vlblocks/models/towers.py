"""The three towers of a grounded vision-language model, each usable alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.nn.attention import KVCache
from vlblocks.nn.embed import PatchEmbed, TextEmbed, interpolate_positions
from vlblocks.nn.layers import STD
from vlblocks.nn.transformer import Transformer
from vlblocks.ops.segments import MaskedRows, SegmentMask


class ImageTower(nn.Module):
    """Vision transformer: patches, a CLS state, learned positions, a transformer (Dosovitskiy et al., 2021).

    Images of another size than ``image_size`` are taken as they come; the position grid is resized to fit.

    Args:
        patch_embed: cuts and projects the patches.
        transformer: runs over [B, 1 + P, D].
        width: D.
        image_size: height and width in pixels for which the position table is made.
        interpolation: how the position grid is resized, "bicubic" or "bilinear".
        masked_rows: what padded states get, see :class:`vlblocks.ops.SegmentMask`.

    Raises:
        UserError: the patch does not divide ``image_size``.
    """

    def __init__(
        self,
        *,
        patch_embed: PatchEmbed,
        transformer: Transformer,
        width: int,
        image_size: int | tuple[int, int],
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        masked_rows: MaskedRows = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = patch_embed.grid(height, breadth)
        self.interpolation, self.masked_rows = interpolation, masked_rows
        self.patch_embed, self.transformer = patch_embed, transformer
        states = 1 + self.grid[0] * self.grid[1]
        self.cls = nn.Parameter(torch.empty(1, 1, width, device=device, dtype=dtype))
        self.positions = nn.Parameter(torch.empty(1, states, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The tower's own parameters; its parts have their own."""
        nn.init.trunc_normal_(self.cls, std=STD)
        nn.init.trunc_normal_(self.positions, std=STD)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """images [B, channels, H, W] in [-1, 1]; valid [B, 1 + P] bool -> states [B, 1 + P, D], CLS first."""
        patches = self.patch_embed(images)
        grid = self.patch_embed.grid(images.shape[-2], images.shape[-1])
        positions = interpolate_positions(self.positions, old_grid=self.grid, new_grid=grid, mode=self.interpolation)
        states = torch.cat([self.cls.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1) + positions
        mask = None
        if valid is not None:
            mask = SegmentMask.single(length=states.shape[1], valid=valid, masked_rows=self.masked_rows)
        return self.transformer(states, mask=mask)


class TextTower(nn.Module):
    """Text transformer over word and position embeddings (RoBERTa: Liu et al., 2019).

    Args:
        embed: word and position embeddings.
        transformer: runs over [B, T, D].
        masked_rows: what padded states get, see :class:`vlblocks.ops.SegmentMask`.
    """

    def __init__(self, *, embed: TextEmbed, transformer: Transformer, masked_rows: MaskedRows = "zeros") -> None:
        super().__init__()
        self.embed, self.transformer, self.masked_rows = embed, transformer, masked_rows

    def forward(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        mask: SegmentMask | Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """tokens [B, T]; valid [B, T] bool; or a whole mask (causal, say) in place of valid -> states [B, T, D].

        Without either every token is seen, padding too: it is not read off the ids. With caches tokens are the new ones
        only (see `Transformer.forward`) and position_ids [B or 1, T] must be given, or they would count from the start:
        `embed.position_offset` + their place in the sequence.

        Raises:
            UserError: both valid and mask are given, or a filled cache without position_ids.
        """
        if caches and caches[0].length and position_ids is None:
            raise UserError(
                "TextTower: give position_ids beside a filled cache (the tokens do not tell where they stand)"
            )
        if valid is not None and mask is not None:
            raise UserError("TextTower: give valid or mask, not both (a mask holds its own validity)")
        if valid is not None:
            mask = SegmentMask.single(length=tokens.shape[1], valid=valid, masked_rows=self.masked_rows)
        return self.transformer(self.embed(tokens, position_ids), mask=mask, caches=caches)


class JointStates(NamedTuple):
    """States of the joint tower, by segment.

    Attributes:
        image: [B, V, D], CLS first; None if not given.
        codes: [B, G, D]; None if not given.
        text: [B, T, D], CLS first; None if not given.
    """

    image: Tensor | None
    codes: Tensor | None
    text: Tensor | None


class JointTower(nn.Module):
    """One transformer over [image | codes | text]; a fusion table says who sees whom (UNIMO-2's grounded transformer).

    Only the codes pass the input norm; image and text states enter as their towers left them.

    Args:
        transformer: runs over [B, V + G + T, D].
        width: D.
        norm_eps: of the codes' input norm.
    """

    def __init__(
        self, *, transformer: Transformer, width: int, norm_eps: float = 1e-5, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.code_norm = nn.LayerNorm(width, eps=norm_eps, device=device, dtype=dtype)

    def forward(
        self,
        *,
        mask: SegmentMask | Tensor,
        image: Tensor | None = None,
        codes: Tensor | None = None,
        text: Tensor | None = None,
        code_positions: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> JointStates:
        """image [B, V, D], codes [B, G, D], text [B, T, D], any absent; code_positions [G, D] are added to the codes.

        With caches the segments hold new states only, and the mask is over all so far (see `Transformer.forward`): in
        captioning first image and codes, `fusion.captioning(image=V, codes=G)`, then the text as it comes,
        `fusion.captioning(image=V, codes=G, text=T).last_queries(n)`.

        Raises:
            UserError: no segment is given.
        """
        if codes is not None:
            codes = self.code_norm(codes if code_positions is None else codes + code_positions)
        segments = [image, codes, text]
        present = [segment for segment in segments if segment is not None]
        if not present:
            raise UserError("JointTower: give at least one of image, codes, text")
        states = self.transformer(torch.cat(present, dim=1), mask=mask, caches=caches)
        pieces = iter(states.split([segment.shape[1] for segment in present], dim=1))
        return JointStates(*(None if segment is None else next(pieces) for segment in segments))
