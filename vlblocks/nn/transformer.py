"""Transformer layers, pre- or post-norm, and a stack of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlblocks.errors import UserError
from vlblocks.nn.attention import Attention, KVCache
from vlblocks.nn.layers import Linear
from vlblocks.ops.segments import SegmentMask

Mask = SegmentMask | Tensor | None


class FeedForward(nn.Module):
    """fc2(activation(fc1 x)), then dropout (Vaswani et al., 2017).

    Args:
        width: D.
        hidden: inner width.
        activation: between the two; exact GELU by default.
        dropout: share of output elements dropped.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = Linear(hidden, width, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.dropout(self.fc2(self.activation(self.fc1(x))))


class LayerScale(nn.Module):
    """A learned factor per channel, started small (CaiT: Touvron et al., 2021); parameter `gamma` [D]."""

    def __init__(self, *, width: int, init: float, device=None, dtype=None) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return x * self.gamma


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zeroes whole examples of x [B, ...] with probability `rate` and scales the rest to keep the mean.

    Applied to a residual branch it is stochastic depth (Huang et al., 2016). The identity out of training.
    """
    if not training or rate == 0.0:
        return x
    kept = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device) >= rate
    return x * (kept.to(x.dtype) / (1.0 - rate))


def check_norm(norm: str) -> None:
    """Raises UserError unless norm is "pre" or "post"."""
    if norm not in ("pre", "post"):
        raise UserError(f"norm is {norm!r}: choose 'pre' or 'post'")


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if asked for, and a feed-forward network, each around a residual.

    "pre": x + f(LN x) (ViT). "post": LN(x + f(x)) (BERT). With `context_width` it is the fusion layer of ALBEF (Li et
    al., 2021) and BLIP: self-attention, attention to the other modality, feed-forward; called without a context it
    skips the middle one, as BLIP's text encoder does on text alone. Names as in timm's ViT block.

    A feed-forward that treats segments differently declares it by an attribute `routed = True` and is then called as
    `mlp(x, mask)`; see `vlblocks.nn.fusion.ModalityExperts`. Any other is called as `mlp(x)`.

    Args:
        width: D.
        heads: H, must divide D.
        hidden: inner width of the feed-forward network; None: 4 * width.
        norm: "pre" or "post".
        norm_eps: of all layer norms.
        dropout: after the attention's projection and at the feed-forward's end.
        attention_dropout: share of attention probabilities dropped.
        layer_scale: first value of a learned factor per channel on every branch; None: no such factor.
        drop_path: probability that an example skips a branch in training.
        context_width: of the states that cross-attention reads; None: no cross-attention.
        make_ffn: makes the feed-forward network, in place of `hidden`, `dropout` at its end included.
        backend: of `vlblocks.ops.attention`.

    Raises:
        UserError: heads do not divide the width, or an unknown norm.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        context_width: int | None = None,
        make_ffn: Callable[[], nn.Module] | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_norm(norm)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pre_norm, self.drop_path, self.has_cross = norm == "pre", drop_path, context_width is not None
        attend: dict[str, Any] = {"width": width, "heads": heads, "dropout": attention_dropout, "backend": backend}

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(width=width, init=layer_scale, **factory)

        self.norm1 = nn.LayerNorm(width, eps=norm_eps, **factory)
        self.attn = Attention(**attend, **factory)
        self.ls1 = scale()
        if context_width is not None:
            self.norm_cross = nn.LayerNorm(width, eps=norm_eps, **factory)
            self.cross = Attention(context_width=context_width, **attend, **factory)
            self.ls_cross = scale()
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, **factory)
        if make_ffn is None:
            self.mlp: nn.Module = FeedForward(width=width, hidden=hidden or 4 * width, dropout=dropout, **factory)
        else:
            self.mlp = make_ffn()
        self.ls2 = scale()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """States [B, T, D] -> states [B, T, D].

        Args:
            x: [B, T, D]; with a cache the new positions only.
            mask: of self-attention, see `Attention`; a SegmentMask if the feed-forward is routed.
            context: [B, S, context width], what cross-attention reads; None skips it, unless the cache holds it.
            context_mask: bool, broadcastable to [B, H, T, S]; for padding valid[:, None, None, :].
            cache: of this layer, for decoding.

        Raises:
            UserError: a context for a layer without cross-attention.
        """
        x = self._residual(x, self.norm1, self.ls1, lambda y: self.dropout(self.attn(y, mask=mask, cache=cache)))
        if not self.has_cross:
            if context is not None:
                raise UserError("context is given to a layer without cross-attention: set context_width")
        elif context is not None or (cache is not None and cache.context is not None):
            x = self._residual(
                x,
                self.norm_cross,
                self.ls_cross,
                lambda y: self.dropout(self.cross(y, context, mask=context_mask, cache=cache)),
            )
        routed = getattr(self.mlp, "routed", False)
        return self._residual(x, self.norm2, self.ls2, lambda y: self.mlp(y, mask) if routed else self.mlp(y))

    def _residual(self, x: Tensor, norm: nn.Module, scale: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + drop_path(scale(branch(norm(x))), self.drop_path, self.training)
        return norm(x + drop_path(scale(branch(x)), self.drop_path, self.training))

    def extra_repr(self) -> str:
        return f"norm={'pre' if self.pre_norm else 'post'}, drop_path={self.drop_path}"


def uniform_layers(
    *,
    width: int,
    heads: int,
    hidden: int | None = None,
    norm: Literal["pre", "post"] = "pre",
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    layer_scale: float | None = None,
    drop_path: float | Sequence[float] = 0.0,
    context_width: int | None = None,
    make_ffn: Callable[[], nn.Module] | None = None,
    backend: str = "auto",
    device=None,
    dtype=None,
) -> Callable[[int], TransformerLayer]:
    """A `make_layer` for `Transformer`: every call builds one more layer of these settings, each with its own start.

    Arguments as `TransformerLayer`'s; `drop_path` may also hold one rate per layer (usually rising from 0).
    """

    def make_layer(index: int) -> TransformerLayer:
        return TransformerLayer(
            width=width,
            heads=heads,
            hidden=hidden,
            norm=norm,
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            layer_scale=layer_scale,
            drop_path=drop_path[index] if isinstance(drop_path, Sequence) else drop_path,
            context_width=context_width,
            make_ffn=make_ffn,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    return make_layer


class Transformer(nn.Module):
    """Layers one after the other, then a norm if given.

    Args:
        layers: how many; 0 is allowed.
        make_layer: builds layer i; see `uniform_layers`. A layer of one's own is called as `layer(x, mask=mask)`, with
            `cache=` too when decoding, and with `context=` and `context_mask=` where its attribute `has_cross` is True.
        norm: after the last layer, as pre-norm stacks need.
        checkpointing: whether to recompute every layer in the backward pass instead of keeping its activations.

    Raises:
        UserError: a negative number of layers.
    """

    def __init__(
        self,
        *,
        layers: int,
        make_layer: Callable[[int], nn.Module],
        norm: nn.Module | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if layers < 0:
            raise UserError(f"layers is {layers}: give 0 or more")
        self.layers = nn.ModuleList([make_layer(i) for i in range(layers)])
        self.norm = nn.Identity() if norm is None else norm
        self.checkpointing = checkpointing

    def new_caches(self) -> list[KVCache]:
        """Empty caches, one per layer, for decoding one batch of sequences."""
        return [KVCache() for _ in self.layers]

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """States [B, T, D] -> states [B, T, D]; arguments as `TransformerLayer.forward`'s, with one cache per layer.

        Decoding: prefill with all known positions, then pass only the n new ones with the same caches and a mask over
        all `length` positions so far, `SegmentMask.single(length=length, causal=True).last_queries(n)`. A context need
        not be passed again, but its `context_mask` must be, at every step. Activation checkpointing does not apply
        while decoding.

        Raises:
            UserError: a context although no layer has cross-attention, or a wrong number of caches.
        """
        if context is not None and not any(getattr(layer, "has_cross", False) for layer in self.layers):
            raise UserError("context is given but no layer has cross-attention: set context_width")
        if caches is not None and len(caches) != len(self.layers):
            raise UserError(f"{len(caches)} caches for {len(self.layers)} layers: use new_caches()")
        recompute = self.checkpointing and caches is None and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            given: dict[str, Any] = {"mask": mask}
            if getattr(layer, "has_cross", False):
                given.update(context=context, context_mask=context_mask)
            if caches is not None:
                given["cache"] = caches[i]
            x = checkpoint(layer, x, use_reentrant=False, **given) if recompute else layer(x, **given)
        return self.norm(x)
