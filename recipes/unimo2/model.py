"""UNIMO-2 as an assembly of blocks (Li et al., Findings of ACL 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vlblocks.losses import InfoNCE, clip_temperature, linear_cross_entropy, masked_grounding_loss
from vlblocks.models import ImageTower, JointStates, JointTower, TextTower
from vlblocks.nn import (
    ClsPool,
    GroundedSpace,
    KVCache,
    MaskedTokenHead,
    MatchingHead,
    MeanPool,
    PatchEmbed,
    Projection,
    TextEmbed,
    Transformer,
    VectorQuantizer,
    fusion,
    uniform_layers,
)
from vlblocks.ops import SegmentMask

from .configs import ModelConfig, TowerConfig


class Unimo2(nn.Module):
    """Image tower, text tower, a codebook between them and a joint tower over [image | codes | text].

    Raises:
        UserError: the configuration's sizes do not fit together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        width, g, c = config.width, config.grounding, config.contrast

        def transformer(tower: TowerConfig, norm: str) -> Transformer:
            layers = uniform_layers(
                width=width,
                heads=tower.heads,
                hidden=tower.hidden,
                norm=norm,
                norm_eps=tower.norm_eps,
                dropout=tower.dropout,
                attention_dropout=tower.dropout,
                backend=config.backend,
            )
            final = nn.LayerNorm(width, eps=tower.norm_eps) if norm == "pre" else None
            return Transformer(layers=tower.layers, make_layer=layers, norm=final, checkpointing=config.checkpointing)

        def dense(activation: str | None, normalize: bool, out: int = width) -> Projection:
            return Projection(in_width=width, out_width=out, activation=activation, normalize=normalize)

        self.image = ImageTower(
            patch_embed=PatchEmbed(patch_size=config.patch_size, width=width, padding=config.patch_padding),
            transformer=transformer(config.image, "pre"),
            width=width,
            image_size=config.image_size,
            masked_rows=config.masked_rows,
        )
        self.text = TextTower(
            embed=TextEmbed(
                vocab=config.vocab,
                width=width,
                positions=config.positions,
                norm_eps=config.text.norm_eps,
                dropout=config.text.dropout,
            ),
            transformer=transformer(config.text, "post"),
            masked_rows=config.masked_rows,
        )
        self.joint = JointTower(
            transformer=transformer(config.joint, "post"), width=width, norm_eps=config.joint.norm_eps
        )
        self.grounded: GroundedSpace | VectorQuantizer | None = None
        if g.method == "topk":
            self.grounded = GroundedSpace(
                width=width,
                codes=g.codes,
                picks=g.picks,
                temperature=g.temperature,
                count_padding=g.count_padding,
                backend=g.backend,
            )
        elif g.method == "nearest":
            self.grounded = VectorQuantizer(
                width=width, codes=g.codes, count_padding=g.count_padding, backend=g.backend
            )
        project = g.project and self.grounded is not None
        self.ground_image = dense("relu", True) if project else nn.Identity()
        self.ground_text = dense("relu", True) if project else nn.Identity()

        self.contrast_pool = MeanPool() if c.pool == "mean" else ClsPool()
        if c.width is not None and not c.share_grounding:
            self.contrast_image = dense(c.activation, True, c.width)
            self.contrast_text = dense(c.activation, True, c.width)
        self.contrastive = InfoNCE(temperature=c.temperature)
        self.image_pool, self.text_pool = dense("relu", False), dense("relu", False)
        self.matching = MatchingHead(width=width)
        self.masked_token = MaskedTokenHead(width=width, vocab=config.vocab, norm_eps=config.joint.norm_eps)
        if self.grounded is not None:
            self.masked_code = MaskedTokenHead(width=width, vocab=g.codes, norm_eps=config.joint.norm_eps)

    def states_to_ground(
        self,
        image: Tensor | None,
        text: Tensor | None,
        image_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Image then text states without their CLS, [B, N, D], and their validity [B, N] or None (all real)."""
        states, valid, known = [], [], False
        for tower, tower_valid, project in (
            (image, image_valid, self.ground_image),
            (text, text_valid, self.ground_text),
        ):
            if tower is not None:
                states.append(project(tower[:, 1:]))
                known |= tower_valid is not None
                whole = torch.ones(tower.shape[:2], dtype=torch.bool, device=tower.device)
                valid.append((whole if tower_valid is None else tower_valid)[:, 1:])
        return torch.cat(states, dim=1), torch.cat(valid, dim=1) if known else None

    def fuse(
        self,
        *,
        image: Tensor | None = None,
        codes: Tensor | None = None,
        text: Tensor | None = None,
        image_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
        mask: SegmentMask | Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> JointStates:
        """Joint states of what is given; without a mask, by the bottleneck table (or the merged one without codes)."""
        lengths = {n: s.shape[1] for n, s in (("image", image), ("codes", codes), ("text", text)) if s is not None}
        if mask is None:
            table = fusion.merged if codes is None else fusion.bottleneck
            mask = table(**lengths, image_valid=image_valid, text_valid=text_valid, masked_rows=self.config.masked_rows)
        positions = None
        if codes is not None and self.config.grounding.positions:
            positions = self.text.embed.positions(codes.shape[1])
        return self.joint(mask=mask, image=image, codes=codes, text=text, code_positions=positions, caches=caches)

    def features(self, side: Literal["image", "text"], states: Tensor, valid: Tensor | None = None) -> Tensor:
        """What a side is contrasted by, [B, F], from its tower's states [B, N, D] and their validity [B, N]."""
        pooled, c = self.contrast_pool(states, valid), self.config.contrast
        if c.share_grounding:
            return getattr(self, f"ground_{side}")(pooled)
        if c.width is not None:
            return getattr(self, f"contrast_{side}")(pooled)
        return nn.functional.normalize(pooled, dim=-1) if c.normalize in ("both", side) else pooled

    def temperature(self) -> Tensor:
        """The contrastive temperature [1], within its range."""
        return clip_temperature(self.contrastive.temperature, *self.contrastive.temperature_range)

    def match_logits(self, joint: JointStates) -> Tensor:
        """Matching logits [B, 2] (no match, match) from the joint CLS states."""
        return self.matching(self.text_pool(joint.text[:, 0]), self.image_pool(joint.image[:, 0]))

    def token_logits(self, states: Tensor) -> Tensor:
        """Word logits [M, vocab] of joint text states [M, D]; the output weights are the word embeddings."""
        return self.masked_token(states, self.text.embed.word.weight)

    def token_loss(self, states: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of states [..., D] with labels [...], -100 = none, without holding `token_logits`."""
        head, words = self.masked_token, self.text.embed.word.weight
        return linear_cross_entropy(head.features(states), words, head.bias, labels, label_smoothing=label_smoothing)

    def code_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of joint code states [B, K, D] with labels [B, K]; the output weights are the codebook."""
        head, codebook = self.masked_code, self.grounded.codebook
        return masked_grounding_loss(states, labels, codebook, bias=head.bias, features=head.features)
