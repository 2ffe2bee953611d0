"""Multi-head attention over one sequence or from one to another, with a key-value cache for decoding."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.nn.layers import Linear
from vlblocks.ops.attention import attention
from vlblocks.ops.segments import SegmentMask

_Store: TypeAlias = tuple[Tensor, Tensor]


class KVCache:
    """What one layer has attended to so far: keys and values of its own sequence, and of a fixed context.

    Own keys and values grow by `append`; a context's are stored once and serve every later step. One cache belongs to
    one layer and one batch of sequences; `Transformer.new_caches` makes a stack's. A step that is refused, such as one
    with a mask of another length, leaves it as it was.

    Attributes:
        length: positions of its own sequence so far.
        context: keys and values of the context, [B, H, S, Dh] each; None before the first step that had one.
    """

    def __init__(self) -> None:
        self.length = 0
        self.context: tuple[Tensor, Tensor] | None = None
        self._store: _Store | None = None

    @property
    def keys(self) -> Tensor | None:
        """[B, H, length, Dh], None while empty."""
        return None if self._store is None else self._store[0][:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        """[B, H, length, Dh], None while empty."""
        return None if self._store is None else self._store[1][:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, H, n, Dh] -> all so far, [B, H, length, Dh] each.

        Without gradients the store grows by a quarter when it is full, so that most steps copy nothing old.
        """
        self._take(*self._extended(keys, values))
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _extended(self, keys: Tensor, values: Tensor) -> tuple[_Store, int]:
        """The store with n more positions, and the length it then has; the cache itself stays at its length."""
        old, length = self.length, self.length + keys.shape[2]
        if self._store is None:
            return (keys, values), length
        if torch.is_grad_enabled() and (keys.requires_grad or self._store[0].requires_grad):
            old_keys, old_values = (part[:, :, :old] for part in self._store)
            return (torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)), length
        store = self._store
        if length > store[0].shape[2]:
            store = (_grown(store[0], old, length), _grown(store[1], old, length))
        # Nobody reads past the length, so that writing there changes nothing until it is taken.
        store[0][:, :, old:length] = keys
        store[1][:, :, old:length] = values
        return store, length

    def _take(self, store: _Store, length: int) -> None:
        self._store, self.length = store, length

    def reorder(self, index: Tensor) -> None:
        """Makes row i go on from what was row index[i]; index [B'] long (beam search: the surviving beams' origins)."""
        if self._store is not None:
            self._store = (self._store[0].index_select(0, index), self._store[1].index_select(0, index))
        if self.context is not None:
            self.context = (self.context[0].index_select(0, index), self.context[1].index_select(0, index))


def _grown(store: Tensor, length: int, needed: int) -> Tensor:
    room = store.new_empty((*store.shape[:2], max(needed, length + max(length // 4, 64)), store.shape[3]))
    room[:, :, :length] = store[:, :, :length]
    return room


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al., 2017) with an output projection.

    Self-attention has one fused `qkv` projection, its rows in the order q, k, v, each [heads, D / heads]. With
    `context_width` it is cross-attention: `q` from the states, `kv` from the context. `proj` comes last. Names as in
    timm.

    Args:
        width: D, of the states.
        heads: H, must divide D.
        context_width: of the context's states; given: cross-attention.
        bias: whether q, k and v have biases.
        qk_norm: layer norms over each head's queries and keys (ViT-22B: Dehghani et al., 2023).
        dropout: share of attention probabilities dropped in training.
        backend: of `vlblocks.ops.attention`.

    Raises:
        UserError: heads do not divide the width.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        context_width: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UserError(f"heads={heads} does not divide width={width}: choose heads that divide the width")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.dropout, self.backend = heads, dropout, backend
        self.is_cross = context_width is not None
        if context_width is None:
            self.qkv = Linear(width, 3 * width, bias=bias, **factory)
        else:
            self.q = Linear(width, width, bias=bias, **factory)
            self.kv = Linear(context_width, 2 * width, bias=bias, **factory)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6, **factory) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6, **factory) if qk_norm else None
        self.proj = Linear(width, width, **factory)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: SegmentMask | Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """States attend to themselves, or to a context -> [B, T, D].

        Args:
            x: [B, T, D].
            context: [B, S, context width], for cross-attention only; not read once the cache holds its keys and values.
            mask: a SegmentMask, or bool broadcastable to [B, H, T, keys], True = may attend; for a padded context
                valid[:, None, None, :]. With a cache the keys are all positions so far and the queries the new ones:
                `mask.last_queries(T)`. None: everything is seen.
            cache: keys and values of earlier steps; the new ones are added.

        Raises:
            UserError: a context for self-attention, or none for cross-attention.
        """
        if self.is_cross:
            q = self._split(self.q(x), 1)[0]
            k, v = self._context_kv(context, cache)
        else:
            if context is not None:
                raise UserError("context is given to self-attention: set context_width for cross-attention")
            q, k, v = self._split(self.qkv(x), 3)
            k = self._normed(k, self.k_norm, v)
            if cache is not None:
                added = cache._extended(k, v)
                k, v = (part[:, :, : added[1]] for part in added[0])
        q = self._normed(q, self.q_norm, v)
        dropout_p = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask=mask, dropout_p=dropout_p, backend=self.backend)
        if cache is not None and not self.is_cross:
            # Only now that attention has found the mask to fit.
            cache._take(*added)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _normed(self, x: Tensor, norm: nn.Module | None, like: Tensor) -> Tensor:
        # Under autocast a layer norm returns float32, and attention wants one dtype.
        return x if norm is None else norm(x).to(like.dtype)

    def _context_kv(self, context: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.context is not None:
            return cache.context
        if context is None:
            raise UserError("context is missing: cross-attention needs [B, S, context width]")
        k, v = self._split(self.kv(context), 2)
        k = self._normed(k, self.k_norm, v)
        if cache is not None:
            cache.context = (k, v)
        return k, v

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}, backend={self.backend!r}"
