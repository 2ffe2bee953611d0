"""Ways to bring image and text together: tables over one joint transformer, and layers.

A table says which segment of [image | codes | text] attends to which and is a function that returns a `SegmentMask`.
The segments' names are "image", "codes" and "text"; a segment that is absent has length 0. All tables take the lengths
in states (CLS included) and the validity of image and text, bool, True = real; codes are never padded. A row that may
attend to nothing follows `masked_rows`, see `SegmentMask`.

As layers there are `CoAttentionLayer` and `ModalityExperts` here; ALBEF's (self-attention, attention to the other
modality, feed-forward) is `vlblocks.nn.TransformerLayer` with `context_width`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.nn.attention import Attention
from vlblocks.nn.transformer import FeedForward, check_norm
from vlblocks.ops.segments import MaskedRows, SegmentMask

_ALL = ("image", "codes", "text")


def _table(
    lengths: tuple[int, int, int],
    sees: Mapping[str, Iterable[str]],
    image_valid: Tensor | None,
    text_valid: Tensor | None,
    masked_rows: MaskedRows,
    *,
    causal: bool = False,
    prefix: Tensor | None = None,
) -> SegmentMask:
    return SegmentMask.build(
        dict(zip(_ALL, lengths, strict=True)),
        sees,
        valid={"image": image_valid, "text": text_valid},
        causal="text" if causal else None,
        prefix=prefix,
        masked_rows=masked_rows,
    )


def bottleneck(
    *,
    image: int = 0,
    codes: int = 0,
    text: int = 0,
    image_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    masked_rows: MaskedRows = "zeros",
) -> SegmentMask:
    """Image and text each see themselves and the codes; only the codes see all: the one bridge (UNIMO-2).

    Without text (or image) it is the table for images (texts) alone.

    Args:
        image: V, length of the image segment.
        codes: G.
        text: T.
        image_valid: [B, V] bool.
        text_valid: [B, T] bool.
        masked_rows: "zeros" or "open".
    """
    sees = {"image": ("image", "codes"), "codes": _ALL, "text": ("codes", "text")}
    return _table((image, codes, text), sees, image_valid, text_valid, masked_rows)


def merged(
    *,
    image: int = 0,
    codes: int = 0,
    text: int = 0,
    image_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    masked_rows: MaskedRows = "zeros",
) -> SegmentMask:
    """Every segment sees every segment: a single stream (ViLT: Kim et al., 2021; FLAVA; UNIMO-2 without codes).

    Arguments as `bottleneck`'s.
    """
    sees = {"image": _ALL, "codes": _ALL, "text": _ALL}
    return _table((image, codes, text), sees, image_valid, text_valid, masked_rows)


def captioning(
    *,
    image: int = 0,
    codes: int = 0,
    text: int = 0,
    image_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    masked_rows: MaskedRows = "zeros",
) -> SegmentMask:
    """Image and codes see each other and no text; text sees them and, causally, itself (UNIMO-2's captioning).

    Since image and codes do not depend on the text, decoding computes them once and keeps them in a cache. Arguments as
    `bottleneck`'s.
    """
    return prefix_lm(
        image=image,
        codes=codes,
        text=text,
        image_valid=image_valid,
        text_valid=text_valid,
        masked_rows=masked_rows,
    )


def prefix_lm(
    *,
    image: int = 0,
    codes: int = 0,
    text: int = 0,
    prefix: Tensor | None = None,
    image_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    masked_rows: MaskedRows = "zeros",
) -> SegmentMask:
    """As `captioning`, but all text tokens see an example's first prefix[b] ones, such as a prompt or a question.

    (UniLM: Dong et al., 2019; with the image as part of the prefix SimVLM: Wang et al., 2022, except that the image
    does not see the text's prefix.) Arguments as `bottleneck`'s, and:

    Args:
        prefix: [B] long, number of leading text tokens that are bidirectional; None: none.
    """
    sees = {"image": ("image", "codes"), "codes": ("image", "codes"), "text": _ALL}
    return _table((image, codes, text), sees, image_valid, text_valid, masked_rows, causal=True, prefix=prefix)


class FusedStates(NamedTuple):
    """States of two streams.

    Attributes:
        image: [B, V, image width].
        text: [B, T, text width].
    """

    image: Tensor
    text: Tensor


class _Stream(nn.Module):
    """One side of a co-attention layer: attention to the other side, then a feed-forward network."""

    def __init__(
        self,
        *,
        width: int,
        context_width: int,
        heads: int,
        pre_norm: bool,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
        backend: str,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = nn.LayerNorm(width, eps=norm_eps, **factory)
        # A pre-norm stream normalises only its own states; the other side's need it as well before they are read.
        self.norm_context = nn.LayerNorm(context_width, eps=norm_eps, **factory) if pre_norm else nn.Identity()
        self.cross = Attention(
            width=width,
            heads=heads,
            context_width=context_width,
            dropout=attention_dropout,
            backend=backend,
            **factory,
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, **factory)
        self.mlp = FeedForward(width=width, hidden=4 * width, dropout=dropout, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, valid: Tensor | None) -> Tensor:
        mask = None if valid is None else valid[:, None, None, :]
        context = self.norm_context(context)
        if self.pre_norm:
            x = x + self.dropout(self.cross(self.norm1(x), context, mask=mask))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.dropout(self.cross(x, context, mask=mask)))
        return self.norm2(x + self.mlp(x))


class CoAttentionLayer(nn.Module):
    """Two streams that read each other's keys and values at the same time, then a feed-forward network in each.

    The co-attentional transformer layer of ViLBERT (Lu et al., 2019) and, with a `TransformerLayer` per stream between
    two of them, LXMERT's (Tan and Bansal, 2019) without weight sharing. The feed-forward networks are 4 times as wide.

    Args:
        image_width: of the image stream.
        text_width: of the text stream.
        heads: must divide both widths.
        norm: "pre" or "post".
        norm_eps: of all layer norms.
        dropout: after the attention's projection and at the feed-forward's end.
        attention_dropout: share of attention probabilities dropped.
        backend: of `vlblocks.ops.attention`.

    Raises:
        UserError: heads do not divide a width, or an unknown norm.
    """

    def __init__(
        self,
        *,
        image_width: int,
        text_width: int,
        heads: int,
        norm: Literal["pre", "post"] = "post",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_norm(norm)
        shared: dict[str, Any] = {
            "heads": heads,
            "pre_norm": norm == "pre",
            "norm_eps": norm_eps,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "backend": backend,
            "factory": {"device": device, "dtype": dtype},
        }
        self.image = _Stream(width=image_width, context_width=text_width, **shared)
        self.text = _Stream(width=text_width, context_width=image_width, **shared)

    def forward(
        self, image: Tensor, text: Tensor, *, image_valid: Tensor | None = None, text_valid: Tensor | None = None
    ) -> FusedStates:
        """image [B, V, image width], text [B, T, text width], validity [B, V] and [B, T] bool, None: all real.

        Padded states are read by nobody; what they become themselves means nothing.
        """
        return FusedStates(self.image(image, text, text_valid), self.text(text, image, image_valid))


class ModalityExperts(nn.Module):
    """A feed-forward network per modality in place of one: each segment's states go to its own expert.

    (Mixture of modality experts, VLMo: Bao et al., 2022.) Which state goes where follows from the segments alone, so
    nothing depends on data. Given to `TransformerLayer(make_ffn=...)` it gets the layer's SegmentMask. An expert whose
    segments are all empty in a batch takes no part and gets no gradient.

    Args:
        experts: segment -> name of its expert; segments may share one (VLMo's vision-language expert).
        make_ffn: builds an expert; called once per name.
    """

    routed = True

    def __init__(self, *, experts: Mapping[str, str], make_ffn: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.expert_of = dict(experts)
        self.experts = nn.ModuleDict({name: make_ffn() for name in dict.fromkeys(experts.values())})

    def forward(self, x: Tensor, segments: SegmentMask | Mapping[str, slice] | Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]

        Args:
            x: [B, T, D].
            segments: where each segment is in x: a mask, or name -> slice(start, stop) in sequence order.

        Raises:
            UserError: no segments, one without an expert, or segments that do not tile x.
        """
        if isinstance(segments, SegmentMask):
            segments = {name: segments.query_slice(name) for name in segments.names}
        if not isinstance(segments, Mapping):
            raise UserError("ModalityExperts needs to know the segments: give a SegmentMask or {name: slice} as mask")
        done, parts = 0, []
        for name, piece in segments.items():
            if piece.start == piece.stop:
                continue
            if name not in self.expert_of:
                raise UserError(f"segment {name!r} has no expert: add it to experts ({', '.join(self.expert_of)})")
            if piece.start != done:
                raise UserError(f"segment {name!r} starts at {piece.start}, not at {done}: give slices that tile x")
            done = piece.stop
            parts.append(self.experts[self.expert_of[name]](x[:, piece]))
        if done != x.shape[1]:
            raise UserError(f"segments end at {done} but x has {x.shape[1]} states: give slices that tile x")
        return torch.cat(parts, dim=1) if len(parts) != 1 else parts[0]
