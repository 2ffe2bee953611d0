"""Typed settings of the UNIMO-2 recipe and its presets. Every field can be set from the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlblocks.errors import UserError


@dataclass(frozen=True)
class TowerConfig:
    layers: int
    heads: int
    hidden: int
    """Width of the feed-forward layer."""
    dropout: float = 0.1
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class GroundingConfig:
    method: Literal["topk", "nearest", "none"] = "topk"
    """topk: codes by accumulated similarity (the paper); nearest: one per token; none: the baseline without codes."""
    codes: int = 2048
    picks: int = 100
    """Codes picked per example (topk only)."""
    temperature: float = 10.0
    """Initial sharpness of the similarity, learnable, clipped to [1, 10000]."""
    project: bool = False
    """Match codes with L2-normalised ReLU projections of the states instead of the states."""
    positions: bool = False
    """Add text position rows by rank to the picked codes."""
    count_padding: bool = False
    """Let padded tokens count in the lookup, as the original does."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """What computes the lookup and its losses."""


@dataclass(frozen=True)
class ContrastConfig:
    pool: Literal["cls", "mean"] = "cls"
    """What stands for an image or a text: its CLS state (the paper), or the mean of its states."""
    width: int | None = 256
    """Width of the projections of both CLS states; None contrasts the states themselves."""
    activation: Literal["relu"] | None = None
    share_grounding: bool = False
    """Reuse the grounding projections (needs grounding.project)."""
    normalize: Literal["both", "image", "none"] = "both"
    """Which side is L2-normalised when there is no projection of its own."""
    temperature: float = 0.07


@dataclass(frozen=True)
class ModelConfig:
    width: int = 768
    image: TowerConfig = field(default_factory=lambda: TowerConfig(12, 12, 3072, dropout=0.0, norm_eps=1e-12))
    text: TowerConfig = field(default_factory=lambda: TowerConfig(12, 12, 3072))
    joint: TowerConfig = field(default_factory=lambda: TowerConfig(12, 12, 3072))
    image_size: int = 224
    patch_size: int = 16
    patch_padding: int = 0
    """Zero padding of the patch convolution; the original uses (patch - 1) // 2."""
    vocab: int = 50265
    """Overwritten by the tokenizer's size."""
    positions: int = 514
    grounding: GroundingConfig = GroundingConfig()
    contrast: ContrastConfig = ContrastConfig()
    masked_rows: Literal["zeros", "open"] = "zeros"
    """open: padded rows keep an ordinary softmax, as in the original."""
    checkpointing: bool = False
    """Recompute each layer in the backward instead of keeping its activations."""
    backend: Literal["auto", "reference", "sdpa", "triton", "flex", "xformers"] = "auto"

    def check(self) -> None:
        """Raises UserError for sizes that do not fit together, naming the field."""
        for name in ("image", "text", "joint"):
            tower: TowerConfig = getattr(self, name)
            if tower.heads < 1 or self.width % tower.heads:
                raise UserError(
                    f"model.{name}.heads: {tower.heads} heads do not divide model.width {self.width}; "
                    f"choose a divisor of {self.width}"
                )
        if self.patch_size < 1 or (not self.patch_padding and self.image_size % self.patch_size):
            raise UserError(
                f"model.image-size: {self.image_size} pixels are no multiple of model.patch-size {self.patch_size}; "
                f"choose a multiple of {self.patch_size}"
            )
        g = self.grounding
        if g.method == "topk" and not 1 <= g.picks <= g.codes:
            raise UserError(
                f"model.grounding.picks: cannot pick {g.picks} of {g.codes} codes; "
                "choose 1 <= picks <= model.grounding.codes"
            )
        if self.contrast.share_grounding and not g.project:
            raise UserError("model.contrast.share-grounding: needs model.grounding.project; set it to True")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weight of each objective; 0 switches it off."""

    contrast: float = 1.0
    matching: float = 1.0
    masked_tokens: float = 1.0
    grounding: float = 1.0
    masked_codes: float = 0.0
    two_views: float = 1.0
    whole_text: bool = True
    """Contrast and matching read the text as it is written; False: the masked copy serves all, as in the original."""
    fused_share: float = 1.0
    """Share of a batch's pairs that the joint tower sees (matching, masked tokens, grounding); contrast takes all."""
    masked_code_share: float = 0.15
    """Share of the picked codes that masked grounding hides."""


@dataclass(frozen=True)
class DataConfig:
    root: Path | None = None
    """Folder with a Karpathy JSON and its images; None: the embedded corpus."""
    scenes: int = 12000
    """Captioned scenes of the embedded corpus."""
    tokenizer: Path | None = None
    """tokenizer.json, or a folder with GPT-2 / RoBERTa BPE files; None: that of --init, or trained on the captions."""
    vocab: int = 2000
    """Size of a tokenizer trained here."""
    max_text: int = 64
    """Longest text in tokens, CLS and SEP included."""
    pair_share: float = 1.0
    """Share of the training images that come with their captions as pairs."""
    unaligned: bool = True
    """Use the other images and captions, if any, as unaligned streams."""
    extra_images: Path | None = None
    """Folder of images without captions."""
    extra_texts: Path | None = None
    """Text or JSONL file (plain or .gz) without images."""
    flip: bool = False
    """Mirror training images; wrong for captions that say left and right."""
    min_crop: float = 0.8
    """Smallest share of a training image that a random crop keeps."""
    max_bad_share: float = 0.01
    """Share of unreadable images and empty captions past which the run stops."""
    workers: int = 0
    """Data-loading processes per stream."""


@dataclass(frozen=True)
class BatchConfig:
    pairs: int = 64
    images: int = 64
    texts: int = 64
    accumulate: int = 1
    """Steps whose gradients are summed before the optimiser moves."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    warmup: float = 0.06
    """Share of the steps over which the learning rate rises."""
    decay: Literal["linear", "cosine"] = "linear"
    clip: float = 1.0
    """Largest gradient norm."""
    temperature_lr: float = 1.0
    """Learning rate of the temperatures, as a multiple of lr."""


@dataclass(frozen=True)
class RunConfig:
    """UNIMO-2 pre-training: pairs, images alone and texts alone, bridged by a grounded codebook."""

    preset: str = "tiny"
    """tiny, flickr8k, base or large: what all other settings start from."""
    task: Literal["pretrain"] = "pretrain"
    out: Path | None = None
    """Folder of the run; the same folder resumes. Default: runs/unimo2-PRESET."""
    restart: bool = False
    """Delete what the folder holds of an earlier run and begin anew."""
    init: Path | None = None
    """A finished run's folder, or its model.safetensors, to start from: its weights and its tokenizer."""
    max_steps: int = 1000
    """Optimiser steps of the whole run."""
    checkpoint_every: int = 200
    """Steps from one checkpoint to the next."""
    keep_checkpoints: int = 3
    """How many of the last checkpoints stay."""
    seed: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware has it, else fp32."""
    grounding: bool = True
    """--no-grounding trains the baseline without codes."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()

    def check(self) -> None:
        """Raises UserError for settings that do not fit together, naming the field."""
        least = {"max_steps": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "batch.accumulate": 1}
        least |= {"seed": 0, "data.workers": 0, "model.width": 1, "model.patch_size": 1}
        for name, low in least.items():
            section, _, field_name = name.rpartition(".")
            value = getattr(getattr(self, section) if section else self, field_name)
            if value < low:
                raise UserError(f"--{name.replace('_', '-')}: {value} is less than {low}; give at least {low}")
        self.model.check()
        if not 0 < self.data.pair_share <= 1:
            raise UserError(f"--data.pair-share: {self.data.pair_share} is no share; give a number in (0, 1]")
        if not 0 < self.objective.fused_share <= 1:
            raise UserError(
                f"--objective.fused-share: {self.objective.fused_share} is no share; give a number in (0, 1]"
            )
        if self.data.max_text > self.model.positions - 2:
            raise UserError(
                f"--data.max-text: {self.data.max_text} tokens need model.positions {self.data.max_text + 2}, "
                f"there are {self.model.positions}; lower one or raise the other"
            )


def _tower(layers: int, heads: int, hidden: int, dropout: float = 0.0) -> TowerConfig:
    return TowerConfig(layers, heads, hidden, dropout=dropout)


PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(
        preset="tiny",
        max_steps=420,
        checkpoint_every=105,
        model=ModelConfig(
            width=128,
            image=_tower(3, 4, 256),
            text=_tower(2, 4, 256),
            joint=_tower(2, 4, 256),
            image_size=48,
            patch_size=8,
            positions=66,
            grounding=GroundingConfig(codes=256, picks=16),
            contrast=ContrastConfig(pool="mean", width=128),
        ),
        data=DataConfig(vocab=400, max_text=64),
        batch=BatchConfig(pairs=128, images=24, texts=24),
        objective=ObjectiveConfig(fused_share=0.125),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05),
    ),
    "flickr8k": RunConfig(
        preset="flickr8k",
        max_steps=600,
        checkpoint_every=150,
        model=ModelConfig(
            width=192,
            image=_tower(3, 4, 768),
            text=_tower(2, 4, 768),
            joint=_tower(2, 4, 768),
            image_size=128,
            patch_size=16,
            positions=66,
            grounding=GroundingConfig(codes=512, picks=16),
            contrast=ContrastConfig(pool="mean", width=192),
        ),
        data=DataConfig(vocab=4000, max_text=48, flip=True, min_crop=0.5),
        batch=BatchConfig(pairs=96, images=24, texts=24),
        objective=ObjectiveConfig(fused_share=0.125),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
    ),
    "base": RunConfig(
        preset="base", max_steps=500_000, checkpoint_every=5000, objective=ObjectiveConfig(masked_codes=1.0)
    ),
    "large": RunConfig(
        preset="large",
        max_steps=500_000,
        checkpoint_every=5000,
        model=ModelConfig(
            width=1024,
            image=TowerConfig(24, 16, 4096, dropout=0.0, norm_eps=1e-12),
            text=TowerConfig(24, 16, 4096),
            joint=TowerConfig(24, 16, 4096),
        ),
        objective=ObjectiveConfig(masked_codes=1.0),
        optim=OptimConfig(lr=5e-5),
    ),
}
