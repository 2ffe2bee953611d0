"""One training step of the UNIMO-2 recipe against the same model run the way the original runs it.

Ours: three homogeneous sub-batches (pairs, images, texts), one backward each, attention segment by segment, scores
without [B, N, C]. The original's way: one padded batch in which images get a dummy text and texts a dummy image, dense
masks in a plain softmax, the similarity of all tokens with all codes kept for the backward, codes looked up by a
one-hot product.
Same weights, same objectives, same losses: tests/benchmarks/test_train_step.py compares them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import Row, time_alternating
from memory import peak_memory
from torch import Tensor

from vlblocks.losses import draw_hard_negatives, masked_rows, masked_token_loss, matching_loss, two_view_contrast
from vlblocks.nn import fusion
from vlblocks_recipes.unimo2.configs import PRESETS, GroundingConfig, ModelConfig, ObjectiveConfig, TowerConfig
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.objectives import STREAMS

OBJECTIVES = ObjectiveConfig(whole_text=False)


def configs() -> dict[str, ModelConfig]:
    """The models of this suite: the tiny preset, and one of 384 wide towers of 6 layers each."""
    tower = TowerConfig(6, 6, 1536, dropout=0.0)
    wide = ModelConfig(
        width=384,
        image=tower,
        text=tower,
        joint=tower,
        image_size=128,
        patch_size=16,
        vocab=4000,
        positions=66,
        grounding=GroundingConfig(codes=1024, picks=32),
    )
    return {"tiny": PRESETS["tiny"].model, "384x6": wide}


def make_batch(config: ModelConfig, size: int, length: int = 32, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random inputs of the three streams, `size` examples each; texts of a third to the whole `length`."""
    generator = torch.Generator().manual_seed(seed)

    def images() -> Tensor:
        return torch.rand(size, 3, config.image_size, config.image_size, generator=generator) * 2 - 1

    def texts() -> dict[str, Tensor]:
        tokens = torch.randint(4, config.vocab - 1, (size, length), generator=generator)
        lengths = torch.randint(length // 3, length + 1, (size,), generator=generator)
        lengths[0] = length
        valid = torch.arange(length) < lengths[:, None]
        tokens = torch.where(valid, tokens, 1)
        tokens[:, 0] = 0
        hidden = (torch.rand(size, length, generator=generator) < 0.15) & valid
        hidden[:, 1] = True
        labels = torch.where(hidden, tokens, -100)
        return {
            "tokens": tokens,
            "valid": valid,
            "masked_tokens": tokens.masked_fill(hidden, config.vocab - 1),
            "labels": labels,
        }

    pairs = {"image": images(), **texts(), "image_id": torch.arange(size)}
    return {"pairs": pairs, "images": {"image": images(), "image2": images()}, "texts": texts()}


def our_losses(model: Unimo2, batch: dict, stream: str, weights: ObjectiveConfig = OBJECTIVES) -> dict[str, Tensor]:
    """Unweighted losses of one stream, as the recipe computes them."""
    generator = torch.Generator(model.image.cls.device).manual_seed(0)
    return STREAMS[stream](model, batch[stream], weights, generator).losses


def our_step(model: Unimo2, batch: dict[str, dict[str, Tensor]]) -> None:
    """Forward and backward of the three streams, one after the other."""
    model.zero_grad(set_to_none=True)
    for stream in batch:
        sum(our_losses(model, batch, stream).values()).backward()


def original_losses(
    model: Unimo2, batch: dict[str, dict[str, Tensor]], weights: ObjectiveConfig = OBJECTIVES
) -> dict[str, dict[str, Tensor]]:
    """The same losses from one padded batch; the model should have backend="reference"."""
    pairs, images, texts = batch["pairs"], batch["images"], batch["texts"]
    size, device = len(pairs["image"]), pairs["image"].device
    streams = {name: slice(i * size, (i + 1) * size) for i, name in enumerate(("pairs", "images", "texts"))}
    pixels = torch.cat([pairs["image"], images["image"], torch.zeros_like(pairs["image"])])
    blank = torch.ones_like(pairs["tokens"])
    tokens = torch.cat([pairs["masked_tokens"], blank, texts["masked_tokens"]])
    text_valid = torch.cat([pairs["valid"], torch.zeros_like(pairs["valid"]), texts["valid"]])
    states = 1 + model.image.grid[0] * model.image.grid[1]
    image_valid = torch.ones(3 * size, states, dtype=torch.bool, device=device)
    image_valid[streams["texts"]] = False

    image = model.image(pixels, image_valid)
    text = model.text(tokens, text_valid)
    found, code_losses = one_hot_lookup(model, image, text, image_valid, text_valid, streams)
    joint = dense_joint(model, image, found, text, image_valid, text_valid)

    losses: dict[str, dict[str, Tensor]] = {name: {} for name in streams}
    generator = torch.Generator(device).manual_seed(0)
    own = streams["pairs"]
    features = model.features("image", image[own]), model.features("text", text[own], text_valid[own])
    losses["pairs"]["contrast"] = model.contrastive(*features, image_ids=pairs["image_id"])
    # The same draw: losses are compared.
    negatives = draw_hard_negatives(
        *features, temperature=model.temperature(), image_ids=pairs["image_id"], generator=generator
    )
    rows = torch.arange(size, device=device)
    wrong_image = image[own][torch.cat([rows, negatives.image_for_text])]
    text_rows = torch.cat([negatives.text_for_image, rows])
    wrong_text, wrong_valid = text[own][text_rows], text_valid[own][text_rows]
    seen = image_valid[own].repeat(2, 1)
    codes, _ = one_hot_lookup(model, wrong_image, wrong_text, seen, wrong_valid, None)
    wrong = dense_joint(model, wrong_image, codes, wrong_text, seen, wrong_valid)
    true = type(joint)(*(part[own] for part in joint))
    logits = torch.cat([model.match_logits(true), model.match_logits(wrong)])
    losses["pairs"]["matching"] = matching_loss(logits, (torch.arange(3 * size, device=device) < size).long())
    for name, labels in (("pairs", pairs["labels"]), ("texts", texts["labels"])):
        masked = masked_rows(joint.text[streams[name]], labels)
        losses[name]["masked_tokens"] = masked_token_loss(model.token_logits(masked.rows), masked.labels)
    other = model.features("image", model.image(images["image2"]))
    first = model.features("image", image[streams["images"]])
    losses["images"]["two_views"] = two_view_contrast(first, other, temperature=model.temperature())
    for name in streams:
        losses[name]["grounding"] = code_losses[name]
    return {name: {key: value for key, value in part.items() if getattr(weights, key)} for name, part in losses.items()}


def original_step(model: Unimo2, batch: dict[str, dict[str, Tensor]]) -> None:
    """Forward and backward of the one padded batch."""
    model.zero_grad(set_to_none=True)
    sum(value for part in original_losses(model, batch).values() for value in part.values()).backward()


def dense_joint(model, image, codes, text, image_valid, text_valid):
    """The joint tower under a mask of [B, 1, T, T]."""
    mask = fusion.bottleneck(
        image=image.shape[1], codes=codes.shape[1], text=text.shape[1], image_valid=image_valid, text_valid=text_valid
    ).dense()
    return model.fuse(image=image, codes=codes, text=text, mask=mask)


def one_hot_lookup(model, image, text, image_valid, text_valid, streams) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes [B, K, D] by a one-hot product, and each stream's grounding loss, from the whole similarity [B, N, C]."""
    grounded = model.grounded
    tokens = torch.cat([image[:, 1:], text[:, 1:]], dim=1)
    valid = torch.cat([image_valid[:, 1:], text_valid[:, 1:]], dim=1)
    similarity = torch.sigmoid(grounded.clipped_temperature() * (tokens @ grounded.codebook.T)) * valid[..., None]
    indices = similarity.sum(1).topk(grounded.picks, dim=1).indices
    one_hot = F.one_hot(indices, len(grounded.codebook)).to(tokens.dtype)
    codes = one_hot @ grounded.codebook
    losses = {}
    for name, rows in (streams or {}).items():
        x, real, picked = tokens[rows], valid[rows][..., None], codes[rows]
        weight = similarity[rows] @ one_hot[rows].transpose(1, 2)
        means = (weight.transpose(1, 2) @ x) / (weight.sum(1)[..., None] + 1e-18)
        mixed = (weight @ picked) / (weight.sum(2, keepdim=True) + 1e-18)
        code_loss = F.mse_loss(means, picked.detach())
        token_loss = ((mixed - x.detach()).square() * real).sum() / (real.sum() * x.shape[-1])
        losses[name] = token_loss + grounded.code_weight * code_loss
    return codes, losses


WAYS = {"vlblocks": our_step, "the original's way": original_step}


def build(name: str, size: int, way: str, device: str = "cpu") -> Any:
    """Model and inputs of one measurement -> the step, without arguments."""
    config = configs()[name]
    if WAYS[way] is original_step:
        config = replace(config, backend="reference")
    torch.manual_seed(0)
    model = Unimo2(config).train().to(device)
    batch = {
        stream: {key: value.to(device) for key, value in part.items()}
        for stream, part in make_batch(config, size).items()
    }
    return lambda: WAYS[way](model, batch)


def rows(device: str, quick: bool) -> list[Row]:
    """One row per model and way; memory in fresh processes, time alternating in this one."""
    found = []
    for name, size in (("tiny", 8 if quick else 64), ("384x6", 2 if quick else 16)):
        steps = {way: build(name, size, way, device) for way in WAYS}
        timings = time_alternating(
            steps, min_seconds=1.0 if quick else 20.0, min_runs=2 if quick else 5, warmup=1, device=device
        )
        for way in WAYS:
            options = {"name": name, "size": size, "way": way, "device": device}
            memory = peak_memory("suites/train_step.py:build", options, device=device)
            timing = timings[way]
            found.append(
                Row(
                    op="training step",
                    shape=f"{name}, {size} pairs + {size} images + {size} texts",
                    provider=way,
                    mode="forward + backward",
                    ours=way == "vlblocks",
                    p50_ms=timing.p50_ms,
                    p20_ms=timing.p20_ms,
                    p80_ms=timing.p80_ms,
                    peak_mib=memory.peak_mib,
                    note=timing.note or memory.note,
                )
            )
    return found
