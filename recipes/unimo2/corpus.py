"""The data of a run, as its configuration names it: tokenizer, training streams and the gallery to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vlblocks.data import (
    BadData,
    CaptionedImages,
    Gallery,
    ImageDataset,
    ImageSource,
    PairDataset,
    SceneCorpus,
    StreamMixer,
    TextDataset,
    Tokenizer,
    TwoViews,
    eval_transform,
    image_batches,
    load_hf_bpe,
    load_roberta_bpe,
    locate,
    read_image_folder,
    read_karpathy,
    read_texts,
    split_pairs,
    text_batches,
    train_tokenizer,
    train_transform,
)
from vlblocks.errors import UserError
from vlblocks.training import barrier, is_main

from .configs import RunConfig


class Sources(NamedTuple):
    """Raw data of the three streams."""

    pairs: CaptionedImages
    images: ImageSource
    texts: list[str]


class Corpus:
    """Everything a run reads. The main process trains and saves the tokenizer; the others load it.

    Args:
        resume: the run has begun, so the tokenizer in its folder is its own; otherwise one there is replaced.

    Raises:
        UserError: naming the file, folder or field that is wrong.
    """

    def __init__(self, config: RunConfig, *, resume: bool = False, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.bad = config, BadData(share=config.data.max_bad_share)
        self.sources = _training_sources(config, self.bad)
        self.tokenizer = self._tokenizer(config.out / "tokenizer.json", resume)
        data, batch = config.data, config.batch
        size, seed = config.model.image_size, config.seed
        crop = (data.min_crop, 1.0)
        text = {"tokenizer": self.tokenizer, "seed": seed, "max_length": data.max_text}
        once = train_transform(size, scale=crop, flip=0.5 * data.flip)
        twice = TwoViews(train_transform(size, scale=crop, flip=0.5 * data.flip, color_jitter=0.3))
        self.streams = StreamMixer(
            {
                "pairs": PairDataset(self.sources.pairs, transform=once, **text),
                "images": ImageDataset(self.sources.images, transform=twice, seed=seed),
                "texts": TextDataset(self.sources.texts, **text),
            },
            {
                "pairs": batch.pairs,
                "images": batch.images if len(self.sources.images) else 0,
                "texts": batch.texts if self.sources.texts else 0,
            },
            seed=seed,
            rank=rank,
            world_size=world_size,
            num_workers=data.workers,
            bad=self.bad,
        )

    def gallery(self) -> EvalPairs:
        """The held-out pairs, to retrieve one from the other."""
        gallery = heldout_pairs(self.config, self.bad)
        return EvalPairs(gallery, self.tokenizer, self.config.model.image_size, self.config.data.max_text)

    def _tokenizer(self, path: Path, resume: bool) -> Tokenizer:
        given = self.config.data.tokenizer or _initial_tokenizer(self.config.init)
        if is_main() and not (resume and path.exists()):
            if given is None:
                # Sentences that open with a capital would otherwise have tokens of their own.
                texts = [caption for captions in self.sources.pairs.captions for caption in captions]
                made = train_tokenizer(texts + self.sources.texts, self.config.data.vocab, lowercase=True)
            else:
                made = load_tokenizer(given)
            made.save(path)
        barrier()
        return Tokenizer.load(path)


class EvalPairs:
    """Pictures and captions in evaluation's order."""

    def __init__(self, gallery: Gallery, tokenizer: Tokenizer, image_size: int, max_text: int) -> None:
        self.gallery, self.tokenizer, self.max_text = gallery, tokenizer, max_text
        self.transform = eval_transform(image_size)
        self.text_image = torch.tensor(gallery.owners)

    def __len__(self) -> int:
        return len(self.gallery.images)

    def image(self, index: int) -> Tensor:
        """float32 [3, H, W] in [-1, 1]."""
        return self.transform(self.gallery.images[index])

    def image_batches(self):
        return image_batches(self.gallery.images, self.transform)

    def text_batches(self):
        return text_batches(self.gallery.captions, self.tokenizer, max_length=self.max_text)


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, or a folder with GPT-2 / RoBERTa (encoder.json, vocab.bpe, dict.txt) or Hugging Face files."""
    if not path.is_dir():
        return Tokenizer.load(path)
    if (path / "tokenizer.json").exists():
        return Tokenizer.load(path / "tokenizer.json")
    return load_roberta_bpe(path) if (path / "encoder.json").exists() else load_hf_bpe(path)


def _initial_tokenizer(init: Path | None) -> Path | None:
    """The tokenizer that the weights of `init` were trained with, if it is there: their word embeddings need it."""
    if init is None:
        return None
    path = (init if init.is_dir() else init.parent) / "tokenizer.json"
    return path if path.is_file() else None


def heldout_split(config: RunConfig) -> str:
    """What a run evaluates on: the validation split, or the embedded corpus's scenes of unseen combinations."""
    return "test" if config.data.root is None else "val"


def heldout_pairs(config: RunConfig, bad: BadData, split: str | None = None) -> Gallery:
    """Pairs of a split of a run's data; None: of what it evaluates on.

    Raises:
        UserError: the data has no such split.
    """
    size, split = config.model.image_size, split or heldout_split(config)
    if config.data.root is None:
        corpus = SceneCorpus(pairs=config.data.scenes, image_size=size)
        parts = {"train": corpus.pair_part, "val": corpus.image_part, "test": corpus.test_part}
        if split not in parts:
            raise UserError(f"--split {split}: the generated corpus has none; choose one of {', '.join(parts)}")
        # One sentence tells a scene whole: with five, finding one of them would be five times as easy.
        return parts[split].pairs().gallery(captions_per_image=1)
    json, folder = locate(config.data.root)
    return read_karpathy(json, folder, split=split, bad=bad, resolution=size).gallery(bad=bad)


def _training_sources(config: RunConfig, bad: BadData) -> Sources:
    data, size = config.data, config.model.image_size
    if data.root is None:
        # The corpus is the same for every seed of the training, so that seeds differ in the training alone.
        scenes = SceneCorpus(pairs=data.scenes, image_size=size)
        pairs, images, texts = scenes.pairs, scenes.images, scenes.texts
    else:
        json, folder = locate(data.root)
        pairs, images, texts = read_karpathy(json, folder, split="train", bad=bad, resolution=size), [], []
    if data.pair_share < 1:
        subset = split_pairs(pairs, fraction=data.pair_share)
        if data.root is not None:
            images, texts = subset.images, subset.texts
        pairs = subset.pairs
    if not data.unaligned:
        images, texts = [], []
    if data.extra_images is not None:
        if len(images):
            raise UserError("--data.extra-images: there are unaligned images already; add --data.no-unaligned")
        images = read_image_folder(data.extra_images, resolution=size)
    if data.extra_texts is not None:
        texts = [*texts, *read_texts(data.extra_texts, bad=bad)]
    return Sources(pairs, images, texts)
