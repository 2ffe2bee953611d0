"""Four published designs assembled from the blocks, in at most 40 lines each; every one overfits a batch."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlblocks.losses import (
    InfoNCE,
    masked_rows,
    masked_token_loss,
    matching_loss,
    mine_hard_negatives,
)
from vlblocks.models import ImageTower, JointTower, TextTower
from vlblocks.nn import (
    ClassificationHead,
    FeatureQueue,
    GroundedSpace,
    MaskedTokenHead,
    MatchingHead,
    MomentumEncoder,
    PatchEmbed,
    Projection,
    TextEmbed,
    Transformer,
    fusion,
    uniform_layers,
)

WIDTH, VOCAB, IMAGE = 32, 50, 32


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, VOCAB - 1, (6, 9), generator=generator)
    tokens[:, 0] = 0
    valid = torch.arange(9) < torch.tensor([9, 7, 8, 9, 5, 6])[:, None]
    tokens[~valid] = 1
    labels = torch.full_like(tokens, -100)
    labels[:, 2] = tokens[:, 2]
    masked = tokens.clone()
    masked[:, 2] = VOCAB - 1
    image = torch.rand(6, 3, IMAGE, IMAGE, generator=generator) * 2 - 1
    return {"image": image, "tokens": tokens, "valid": valid, "masked": masked, "labels": labels}


class Clip(nn.Module):
    """Two towers and a contrastive loss (Radford et al., 2021)."""

    def __init__(self):
        super().__init__()
        layers = uniform_layers(width=WIDTH, heads=4, hidden=64)
        self.image = ImageTower(
            patch_embed=PatchEmbed(patch_size=8, width=WIDTH),
            transformer=Transformer(layers=2, make_layer=layers, norm=nn.LayerNorm(WIDTH)),
            width=WIDTH,
            image_size=IMAGE,
        )
        self.text = TextTower(
            embed=TextEmbed(vocab=VOCAB, width=WIDTH, positions=20),
            transformer=Transformer(layers=2, make_layer=layers, norm=nn.LayerNorm(WIDTH)),
        )
        self.project_image = Projection(in_width=WIDTH, out_width=16, activation=None, normalize=True)
        self.project_text = Projection(in_width=WIDTH, out_width=16, activation=None, normalize=True)
        self.contrast = InfoNCE(temperature=0.07)

    def forward(self, batch):
        image = self.project_image(self.image(batch["image"])[:, 0])
        text = self.project_text(self.text(batch["tokens"], batch["valid"])[:, 0])
        return {"contrast": self.contrast(image, text)}


class Albef(nn.Module):
    """Align before fuse: contrast with a momentum encoder and queue, then cross-attention (Li et al., 2021)."""

    def __init__(self):
        super().__init__()
        self.towers = Clip()
        self.momentum = MomentumEncoder(self.towers, momentum=0.9)
        self.queue = FeatureQueue(size=12, width=16)
        layers = uniform_layers(width=WIDTH, heads=4, hidden=64, context_width=WIDTH)
        self.fusion = Transformer(layers=2, make_layer=layers, norm=nn.LayerNorm(WIDTH))
        self.match = ClassificationHead(width=WIDTH, classes=2)

    def forward(self, batch):
        towers, valid = self.towers, batch["valid"]
        image, text = towers.image(batch["image"]), towers.text(batch["tokens"], valid)
        image_features, text_features = towers.project_image(image[:, 0]), towers.project_text(text[:, 0])
        contrast = towers.contrast(image_features, text_features)
        with torch.no_grad():
            older = self.momentum.module
            slow = older.project_text(older.text(batch["tokens"], valid)[:, 0])
            negatives = mine_hard_negatives(image_features @ text_features.T / 0.07)
        queued = torch.cat([slow, self.queue.features])
        queue_loss = F.cross_entropy(image_features @ queued.T / 0.07, torch.arange(len(image)))
        self.queue.update(slow)
        rows = torch.arange(len(image))
        texts = torch.cat([rows, negatives.text_for_image, rows])
        images = torch.cat([rows, rows, negatives.image_for_text])
        text_mask = valid[texts][:, None, None]
        fused = self.fusion(text[texts], mask=text_mask, context=image[images])
        logits = self.match(fused[:, 0])
        matching = matching_loss(logits, (texts == images).long())
        return {"contrast": contrast, "matching": matching, "queue": queue_loss}


class Vilt(nn.Module):
    """One transformer over [image | text] without towers (Kim et al., 2021)."""

    def __init__(self):
        super().__init__()
        self.image = PatchEmbed(patch_size=8, width=WIDTH)
        self.text = TextEmbed(vocab=VOCAB, width=WIDTH, positions=20)
        self.kind = nn.Embedding(2, WIDTH)
        layers = uniform_layers(width=WIDTH, heads=4, hidden=64)
        self.joint = JointTower(
            transformer=Transformer(layers=2, make_layer=layers, norm=nn.LayerNorm(WIDTH)), width=WIDTH
        )
        self.match = ClassificationHead(width=WIDTH, classes=2)
        self.words = MaskedTokenHead(width=WIDTH, vocab=VOCAB)

    def forward(self, batch):
        image = self.image(batch["image"]) + self.kind.weight[0]
        text = self.text(batch["masked"]) + self.kind.weight[1]
        images = torch.cat([image, image.roll(1, 0)])
        texts, valid = text.repeat(2, 1, 1), batch["valid"].repeat(2, 1)
        mask = fusion.merged(image=images.shape[1], text=texts.shape[1], text_valid=valid)
        joint = self.joint(mask=mask, image=images, text=texts)
        labels = torch.arange(len(texts)) < len(text)
        rows, targets, _ = masked_rows(joint.text[: len(text)], batch["labels"])
        words = masked_token_loss(self.words(rows, self.text.word.weight), targets)
        return {"matching": matching_loss(self.match(joint.text[:, 0]), labels.long()), "words": words}


class Unimo2(nn.Module):
    """Towers bridged by a grounded codebook (Li et al., 2022)."""

    def __init__(self):
        super().__init__()
        self.towers = Clip()
        self.grounded = GroundedSpace(width=WIDTH, codes=64, picks=8)
        layers = uniform_layers(width=WIDTH, heads=4, hidden=64, norm="post")
        self.joint = JointTower(transformer=Transformer(layers=2, make_layer=layers), width=WIDTH)
        self.match = MatchingHead(width=WIDTH)
        self.words = MaskedTokenHead(width=WIDTH, vocab=VOCAB)

    def forward(self, batch):
        towers, valid = self.towers, batch["valid"]
        image, text = towers.image(batch["image"]), towers.text(batch["masked"], valid)
        features = towers.project_image(image[:, 0]), towers.project_text(text[:, 0])
        losses = {"contrast": towers.contrast(*features)}
        images, texts = torch.cat([image, image.roll(1, 0)]), text.repeat(2, 1, 1)
        valid = valid.repeat(2, 1)
        real = torch.cat([torch.ones(images.shape[:2], dtype=torch.bool)[:, 1:], valid[:, 1:]], dim=1)
        found = self.grounded(torch.cat([images[:, 1:], texts[:, 1:]], dim=1), real)
        mask = fusion.bottleneck(image=images.shape[1], codes=8, text=texts.shape[1], text_valid=valid)
        joint = self.joint(mask=mask, image=images, codes=found.codes, text=texts)
        labels = torch.arange(len(texts)) < len(text)
        losses["matching"] = matching_loss(self.match(joint.text[:, 0], joint.image[:, 0]), labels.long())
        rows, targets, _ = masked_rows(joint.text[: len(text)], batch["labels"])
        losses["words"] = masked_token_loss(self.words(rows, towers.text.embed.word.weight), targets)
        return losses | {"grounding": found.loss}


# These cannot vanish: a few codes do not equal all states, and the queue holds older copies of the batch's own texts.
FLOORED = ("grounding", "queue")


@pytest.mark.parametrize("design", [Clip, Albef, Vilt, Unimo2])
def test_overfits_one_batch(design, batch):
    torch.manual_seed(0)
    model = design()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    model.train()
    first = {name: loss.item() for name, loss in model(batch).items()}
    for _ in range(250):
        optimizer.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        optimizer.step()
        if design is Albef:
            model.momentum.update()
    for name, loss in losses.items():
        # Negatives that are mined anew at each step end it high or low by chance: it only has to fall.
        chance = name in FLOORED or (design is Albef and name == "matching")
        limit = first[name] if chance else 0.15 * first[name]
        assert loss.item() < limit, f"{name}: {first[name]:.3f} -> {loss.item():.3f}"


@pytest.mark.parametrize("design", [Clip, Albef, Vilt, Unimo2])
def test_fits_in_forty_lines(design):
    assert len(inspect.getsource(design).splitlines()) <= 40
