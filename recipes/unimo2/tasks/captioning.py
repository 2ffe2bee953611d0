"""Captions of pictures: a causal text over [image, codes], decoded by beam search."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlblocks.data import (
    CaptionedImages,
    ImageSource,
    Tokenizer,
    eval_transform,
    locate,
    next_readable,
    read_karpathy,
    train_transform,
)
from vlblocks.data.sources import Chosen
from vlblocks.errors import UserError
from vlblocks.evaluation import CaptionFile, caption_metrics, check_caption_metrics
from vlblocks.generation import Generated, NextToken, Rules, beam_search, greedy, sample
from vlblocks.nn import fusion
from vlblocks.ops import SegmentMask, rank_share
from vlblocks.training import config_to_dict

from ..model import Unimo2
from ..objectives import lookup
from .base import (
    Autocast,
    Examples,
    Split,
    Task,
    TaskConfig,
    TaskData,
    TaskModel,
    TaskOptim,
    pad_texts,
    scene_splits,
)

# The number that COCO knows a picture by is in its file's name.
_COCO_NAME = re.compile(r"COCO_\w+_(\d{12})\.\w+$")


@dataclass(frozen=True)
class CaptionData(TaskData):
    root: Path | None = None
    """Folder with a Karpathy JSON (splits train, val and test) and its images."""
    val_images: int | None = 500
    """How many images of the validation split are captioned; None: all."""
    flip: bool = False
    """Mirror training images; wrong for captions that say left and right."""
    min_crop: float = 0.8
    """Smallest share of a training image that a random crop keeps."""


@dataclass(frozen=True)
class CaptionConfig(TaskConfig):
    task: str = "captioning"
    epochs: float = 0.6
    """An epoch has every caption once. The original takes 10, at --optim.lr 1e-5."""
    batch: int = 32
    label_smoothing: float = 0.1
    """Share of a target's probability that is spread over the vocabulary."""
    decode: Literal["beam", "greedy", "sample"] = "beam"
    beams: int = 5
    length_penalty: float = 0.6
    """beam: log-probabilities are divided by ((5 + length) / 6) to this power; more favours longer captions."""
    min_length: int = 5
    """Fewest tokens of a caption."""
    max_length: int = 50
    """Most tokens of a caption."""
    no_repeat: int = 0
    """Size of the n-grams of tokens that may not occur twice in a caption, 3 for trigrams; 0: any may."""
    temperature: float = 1.0
    """sample: of the distribution drawn from."""
    top_k: int | None = None
    """sample: draw from the k likeliest tokens only."""
    top_p: float | None = None
    """sample: draw from the fewest tokens only that have this share together (nucleus)."""
    decode_batch: int = 32
    """Images that are captioned at once."""
    optim: TaskOptim = field(default_factory=lambda: TaskOptim(lr=1e-3))
    data: CaptionData = field(default_factory=CaptionData)


class Pictures(NamedTuple):
    """Pictures to caption.

    Attributes:
        images: by index.
        ids: COCO's number of a picture, else its file's name.
        references: what people wrote of each.
    """

    images: ImageSource
    ids: list[int | str]
    references: list[Sequence[str]]


class Captioning(Task):
    """What a picture shows, in a sentence: BLEU-4, CIDEr, ROUGE-L."""

    Config = CaptionConfig
    watch = "cider"
    sides = ("image",)  # the text is its own

    def __init__(self, config: CaptionConfig, *context: Any) -> None:
        super().__init__(config, *context)
        self.rules = caption_rules(config, self.tokenizer)
        self.pictures = cache(self.pictures)

    def facts(self) -> dict[str, Any]:
        return {}

    def make_head(self, model: Unimo2) -> nn.Module:
        room = model.text.embed.max_tokens - 1
        if self.config.max_length > room:
            raise UserError(
                f"--max-length: {self.config.max_length} tokens, but the checkpoint has positions for {room} after "
                "the first; give at most that"
            )
        return nn.Identity()

    def dataset(self, split: Split) -> Examples:
        if split == "train":
            return self._training()
        # Before an epoch of training, not after it.
        check_caption_metrics()
        images, transform = self.pictures(split).images, eval_transform(self.image_size)
        return Examples(len(images), lambda epoch, index: {"image": transform(images[index])})

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"image": torch.stack([example["image"] for example in examples])}
        if "tokens" in examples[0]:
            batch |= pad_texts([example["tokens"] for example in examples])
        return batch

    def loss(self, net: TaskModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        model, tokens = net.base, batch["tokens"]
        image, codes = image_and_codes(model, batch["image"])
        states = caption_states(model, tokens[:, :-1], image, codes)
        targets = tokens[:, 1:].masked_fill(~batch["valid"][:, 1:], -100)
        loss = model.token_loss(states, targets, label_smoothing=self.config.label_smoothing)
        return loss * rank_share((targets != -100).sum(), device=loss.device)

    def evaluate(self, net: TaskModel, split: Split, *, autocast: Autocast, out: Path | None) -> dict[str, float | str]:
        """bleu_4, cider, rouge_l; with `out` also meteor and spice, and the captions in captions_SPLIT.json."""
        pictures = self.pictures(split)
        if out is None:
            found = self._captions(net, split, autocast)
        else:
            of = {"weights": weights_digest(net), "split": split, "settings": config_to_dict(self.config)}
            of["settings"] = {name: value for name, value in of["settings"].items() if name != "out"}
            with CaptionFile(out / f"captions_{split}.json", of) as file:
                self._captions(net, split, autocast, file)
            found = file.captions
        references = dict(zip(pictures.ids, pictures.references, strict=True))
        return {**caption_metrics(found, references, slow=out is not None), "images": len(found)}

    def pictures(self, split: Split) -> Pictures:
        """The readable pictures of a split, with their captions."""
        data = self._captioned(split)
        limit = self.config.data.val_images if split == "val" else None
        if limit is not None and limit < len(data.images):
            data = CaptionedImages(Chosen(data.images, range(limit)), data.captions, data.image_ids)
        gallery = data.gallery(bad=self.bad)
        references: list[list[str]] = [[] for _ in range(len(gallery.images))]
        for caption, owner in zip(gallery.captions, gallery.owners, strict=True):
            references[owner].append(caption)
        return Pictures(gallery.images, image_ids(gallery.images), references)

    def _captions(
        self, net: TaskModel, split: Split, autocast: Autocast, file: CaptionFile | None = None
    ) -> dict[int | str, str]:
        """Captions by image id; those that the file has already are not made again."""
        examples, ids, device = self.dataset(split), self.pictures(split).ids, next(net.parameters()).device
        found = {} if file is None else dict(file.captions)
        for first in range(0, len(ids), self.config.decode_batch):
            chosen = range(first, min(first + self.config.decode_batch, len(ids)))
            # A batch is made again whole, or what it draws would depend on where an earlier run was stopped.
            if all(ids[index] in found for index in chosen):
                continue
            images = self.batch([examples[0, index] for index in chosen])["image"].to(device)
            generator = torch.Generator(device).manual_seed(self.config.seed + chosen[0])
            with autocast():
                texts = caption(net.base, images, self.config, self.tokenizer, generator=generator)
            new = {ids[i]: text for i, text in zip(chosen, texts, strict=True) if ids[i] not in found}
            found |= new
            if file is not None:
                file.add(new)
        return found

    def _training(self) -> Examples:
        """One example for each caption."""
        data, settings = self._captioned("train"), self.config.data
        crop = (settings.min_crop, 1.0)
        transform = train_transform(self.image_size, scale=crop, flip=0.5 * settings.flip)
        rows = [(image, number) for image in range(len(data.images)) for number in range(len(data.captions[image]))]

        def make(epoch: int, index: int) -> dict[str, Any]:
            image, number = rows[index]
            picture, found, skipped = next_readable(data.images, image, "train/image")
            written = data.captions[found]
            tokens = self.tokenizer.encode(written[number % len(written)], settings.max_text)
            seed = int(self.rng("train", epoch, index).integers(2**62))
            return {"image": transform(picture, seed), "tokens": tokens, "skipped": skipped}

        return Examples(len(rows), make)

    def _captioned(self, split: Split) -> CaptionedImages:
        data = self.config.data
        if data.embedded:
            return scene_splits(data, self.image_size)[split].pairs()
        if data.root is None:
            raise UserError("--data.root: name a folder with dataset_*.json and images/, or use --data.embedded")
        json, folder = locate(data.root)
        return read_karpathy(json, folder, split=split, bad=self.bad, resolution=self.image_size)


class CaptionDecoder:
    """A model's next-token scores over images, with a cache; a `vlblocks.generation.NextToken`.

    Image and codes do not see the text, so that their keys and values in the joint tower are computed once.

    Args:
        model: in evaluation mode.
        image: [B, 3, H, W].
    """

    def __init__(self, model: Unimo2, image: Tensor) -> None:
        self.model, self.length = model, 0
        states, codes = image_and_codes(model, image)
        self.before = {"image": states.shape[1], "codes": 0 if codes is None else codes.shape[1]}
        self.text_caches, self.joint_caches = model.text.transformer.new_caches(), model.joint.transformer.new_caches()
        model.fuse(image=states, codes=codes, mask=self._mask(0), caches=self.joint_caches)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [R, t], all so far -> logits [R, vocab]; only those that came since the last step are computed."""
        model, length = self.model, tokens.shape[1]
        new = length - self.length
        positions = torch.arange(self.length, length, device=tokens.device) + model.text.embed.position_offset
        causal = SegmentMask.single(length=length, causal=True).last_queries(new)
        text = model.text(tokens[:, self.length :], mask=causal, position_ids=positions[None], caches=self.text_caches)
        joint = model.fuse(text=text, mask=self._mask(length).last_queries(new), caches=self.joint_caches)
        self.length = length
        return model.token_logits(joint.text[:, -1])

    def reorder(self, rows: Tensor) -> None:
        for kept in (*self.text_caches, *self.joint_caches):
            kept.reorder(rows)

    def _mask(self, text: int) -> SegmentMask:
        return fusion.captioning(**self.before, text=text, masked_rows=self.model.config.masked_rows)


def image_and_codes(model: Unimo2, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """image [B, 3, H, W] -> its states [B, V, D] and the codes [B, G, D] that it alone picks (spec 10, 19)."""
    states = model.image(image)
    return states, lookup(model, states, with_loss=False).codes


def caption_states(model: Unimo2, tokens: Tensor, image: Tensor, codes: Tensor | None) -> Tensor:
    """Joint states [B, T, D] of tokens [B, T], each seeing image, codes and the tokens up to it.

    Padding comes last, so that no real token sees it and it needs no mask.
    """
    length = tokens.shape[1]
    text = model.text(tokens, mask=SegmentMask.single(length=length, causal=True))
    mask = fusion.captioning(
        image=image.shape[1],
        codes=0 if codes is None else codes.shape[1],
        text=length,
        masked_rows=model.config.masked_rows,
    )
    return model.fuse(image=image, codes=codes, text=text, mask=mask).text


def caption(
    model: Unimo2,
    images: Tensor,
    config: CaptionConfig,
    tokenizer: Tokenizer,
    *,
    generator: torch.Generator | None = None,
) -> list[str]:
    """A caption for each of images [B, 3, H, W]."""
    start = torch.full((len(images), 1), tokenizer.cls_id, device=images.device)
    with torch.no_grad():
        found = decode(CaptionDecoder(model, images), start, config, caption_rules(config, tokenizer), generator)
    return [" ".join(tokenizer.decode(texts[0]).split()) for texts in found.texts()]


def decode(
    model: NextToken, start: Tensor, config: CaptionConfig, rules: Rules, generator: torch.Generator | None = None
) -> Generated:
    """What a task's settings say, of any model."""
    if config.decode == "greedy":
        return greedy(model, start, rules)
    if config.decode == "sample":
        drawn = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        return sample(model, start, rules, generator=generator, **drawn)
    return beam_search(model, start, rules, beams=config.beams, length_penalty=config.length_penalty)


def caption_rules(config: CaptionConfig, tokenizer: Tokenizer) -> Rules:
    """Which captions a task's settings allow."""
    return Rules(
        eos_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id,
        min_length=config.min_length,
        max_length=config.max_length,
        no_repeat=config.no_repeat,
        banned=tuple(special for special in tokenizer.special_ids if special != tokenizer.sep_id),
    )


def image_ids(images: ImageSource) -> list[int | str]:
    """COCO's numbers, else file names, or whole paths where two files have one name."""
    paths = [images.name(index) for index in range(len(images))]
    found: list[int | str] = []
    for path in paths:
        numbered = _COCO_NAME.search(path)
        found.append(int(numbered[1]) if numbered else Path(path).name)
    return found if len(set(found)) == len(found) else list(paths)


def weights_digest(net: nn.Module) -> str:
    """A short name of all weights together."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
