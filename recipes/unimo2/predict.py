"""Use a finished run: python recipes/unimo2/predict.py COMMAND --run DIR [flags]

  score    how well captions fit images         --run DIR --image FILE ... --caption TEXT ...
  caption  describe images                      --run DIR --image FILE ...
  answer   answer questions about an image      --run VQA_DIR --image FILE --question TEXT ...
  embed    images or texts as rows of a .npy    --run DIR --images PATH ... | --texts FILE  --out FILE.npy
  draw     which codes bridge which patches and words, as a PNG
                                                --run DIR --image FILE ... --caption TEXT ... --out FILE.png

Prints one JSON. `predict.py COMMAND --help` lists a command's flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlblocks.data import (
    BadData,
    BadExampleError,
    CaptionedImages,
    Gallery,
    ImageFiles,
    Tokenizer,
    eval_transform,
    image_batches,
    read_image_folder,
    read_texts,
    text_batches,
)
from vlblocks.errors import UserError
from vlblocks.evaluation import plot_grounding, shared_codes
from vlblocks.training import json_text, parse, run_main, write_atomic, write_json_atomic
from vlblocks_recipes.unimo2.corpus import EvalPairs
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.objectives import lookup
from vlblocks_recipes.unimo2.report import grounding_example
from vlblocks_recipes.unimo2.retrieval import CONTRAST_SHARE
from vlblocks_recipes.unimo2.runs import load_base_run, load_task

BATCH = 64
# Parts of the model.
CONTRAST = ("contrast_image", "contrast_text")
CODES = ("grounded", "ground_image", "ground_text")


@dataclass(frozen=True)
class RunOptions:
    run: Path = Path("runs/unimo2-tiny")
    """Folder of a finished run: pre-trained, fine-tuned or converted."""
    device: str | None = None
    """cpu, cuda, ...; None: a GPU where there is one."""


@dataclass(frozen=True)
class ImageOptions(RunOptions):
    image: tuple[Path, ...] = ()
    """Pictures."""


@dataclass(frozen=True)
class ScoreOptions(ImageOptions):
    """Score every caption against every image."""

    caption: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionOptions(ImageOptions):
    """Describe images with a run that was fine-tuned for captioning; what is not set is the run's own."""

    decode: Literal["beam", "greedy", "sample"] | None = None
    beams: int | None = None
    """Width of a beam search."""
    seed: int = 1
    """Of sampling."""


@dataclass(frozen=True)
class AnswerOptions(ImageOptions):
    """Answer questions about an image with a run that was fine-tuned for vqa."""

    question: tuple[str, ...] = ()
    top: int = 3
    """How many answers, best first."""


@dataclass(frozen=True)
class EmbedOptions(RunOptions):
    """Write the contrastive features of images or texts, [N, F] float32; FILE.json beside it names the rows.

    images @ texts.T is the dual-encoder score that retrieval ranks by.
    """

    images: tuple[Path, ...] = ()
    """Pictures, or folders of pictures."""
    texts: Path | None = None
    """Text file with one a line, or JSONL; either may end in .gz."""
    out: Path = Path("features.npy")
    max_bad_share: float = 0.01
    """Share of unreadable pictures or entries past which it stops."""


@dataclass(frozen=True)
class DrawOptions(ImageOptions):
    """Draw which codes bridge which patches and words; the first caption belongs to the first image, and so on."""

    caption: tuple[str, ...] = ()
    codes: int = 3
    """How many codes of each pair, the most telling first."""
    out: Path = Path("grounding.png")


class Loaded(NamedTuple):
    """A run, ready on a device."""

    model: Unimo2
    tokenizer: Tokenizer
    max_text: int
    device: torch.device


def main() -> None:
    name, flags = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise UserError(f"{name}: there is no such command; choose one of {', '.join(COMMANDS)}")
    kind, command = COMMANDS[name]
    options = parse(kind(), flags, description=kind.__doc__)
    with torch.no_grad():
        print(json_text(command(options)))


def score(options: ScoreOptions) -> list[dict[str, Any]]:
    """For each pair: match (the matching head's probability), similarity (dual encoder) and score (spec 26)."""
    _require("caption", options.caption)
    run = _load(options, ("image", "text", "joint", *CONTRAST, *CODES, "image_pool", "text_pool", "matching"))
    pictures = _pictures(run, options.image)
    found = []
    for text in options.caption:
        tokens = torch.tensor(run.tokenizer.encode(text, run.max_text), device=run.device)[None]
        for chosen in pictures.split(BATCH):
            found += pair_scores(run.model, chosen, tokens)
    pairs = [(text, path) for text in options.caption for path in options.image]
    return [
        {"image": str(path), "caption": text, **numbers._asdict()}
        for (text, path), numbers in zip(pairs, found, strict=True)
    ]


class PairScore(NamedTuple):
    """How well an image and a text fit: what retrieval ranks by, its matching probability and its cosine or product."""

    score: float
    match: float
    similarity: float


def pair_scores(model: Unimo2, image: Tensor, tokens: Tensor) -> list[PairScore]:
    """Images [B, 3, H, W] against one text [1, T] without padding."""
    image_states, text_states = model.image(image), model.text(tokens)
    similarity = F.normalize(model.features("image", image_states), dim=-1) @ model.features("text", text_states)[0]
    text_states = text_states.expand(len(image), -1, -1)
    found = lookup(model, image_states, text_states, with_loss=False)
    logits = model.match_logits(model.fuse(image=image_states, codes=found.codes, text=text_states))
    columns = logits[:, 1] + CONTRAST_SHARE * similarity, logits.softmax(-1)[:, 1], similarity
    return [PairScore(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def describe(options: CaptionOptions) -> list[dict[str, Any]]:
    """A caption for each image."""
    from vlblocks_recipes.unimo2.tasks.captioning import caption

    _require("image", options.image)
    if options.beams is not None and options.beams < 1:
        raise UserError(f"--beams: {options.beams} is no number of beams; give at least 1")
    device = _device(options.device)
    task = load_task(options.run, "captioning")
    chosen = {name: getattr(options, name) for name in ("decode", "beams") if getattr(options, name) is not None}
    config = replace(task.config, **chosen)
    pictures = _pictures(Loaded(task.net.base.to(device), task.tokenizer, 0, device), options.image)
    generator = torch.Generator(device).manual_seed(options.seed)
    texts = [
        text
        for part in pictures.split(config.decode_batch)
        for text in caption(task.net.base, part, config, task.tokenizer, generator=generator)
    ]
    return [{"image": str(path), "caption": text} for path, text in zip(options.image, texts, strict=True)]


def answer(options: AnswerOptions) -> list[dict[str, Any]]:
    """The best answers to every question about every image, with their scores (independent, each in [0, 1])."""
    from vlblocks_recipes.unimo2.tasks.image_text import pair_logits

    _require("question", options.question)
    _require("image", options.image)
    if options.top < 1:
        raise UserError(f"--top: {options.top} is no number of answers; give at least 1")
    device = _device(options.device)
    task = load_task(options.run, "vqa")
    net, answers = task.net.to(device), task.task.answers
    pictures = _pictures(Loaded(net.base, task.tokenizer, task.config.data.max_text, device), options.image)
    found = []
    for question in options.question:
        texts = {name: tensor.to(device) for name, tensor in task.task.tokenize([question]).items()}
        for path, picture in zip(options.image, pictures, strict=True):
            logits = pair_logits(net, {"image": picture[None], **texts})[0]
            values, places = logits.sigmoid().topk(min(options.top, len(answers)))
            ranked = zip(places.tolist(), values.tolist(), strict=True)
            best = [{"answer": answers[place], "score": value} for place, value in ranked]
            found.append({"image": str(path), "question": question, "answers": best})
    return found


def embed(options: EmbedOptions) -> dict[str, Any]:
    """Features of every readable picture or text, in order."""
    if bool(options.images) == (options.texts is not None):
        raise UserError("--images, --texts: give one of them")
    if options.out.suffix != ".npy":
        raise UserError(f"--out {options.out}: name a .npy file")
    named = options.out.with_suffix(".json")
    if options.texts is not None and options.texts.resolve() == named.resolve():
        raise UserError(f"--out {options.out}: the names of its rows would overwrite --texts; name another file")
    side = "image" if options.images else "text"
    run, bad = _load(options, (side, *CONTRAST)), BadData(share=options.max_bad_share)
    if options.images:
        names, batches = _many_pictures(run, options.images, bad)
    else:
        names = read_texts(options.texts, bad=bad)
        batches = text_batches(names, run.tokenizer, max_length=run.max_text)
    rows = []
    for batch in batches:
        given, valid = (batch, None) if options.images else (batch[0], batch[1].to(run.device))
        states = getattr(run.model, side)(given.to(run.device), valid)
        found = run.model.features(side, states, valid)
        rows.append((F.normalize(found, dim=-1) if side == "image" else found).float().cpu())
    features = torch.cat(rows).numpy()
    write_json_atomic(named, names)
    write_atomic(options.out, lambda place: np.save(place, features))
    return {"out": str(options.out), "rows": len(features), "width": features.shape[1], "skipped": bad.total}


def draw(options: DrawOptions) -> dict[str, Any]:
    """A row for each pair: the picture, each code's heat on it, and each code's bars on the words."""
    if len(options.image) != len(options.caption) or not options.image:
        raise UserError(
            f"--image, --caption: {len(options.image)} pictures and {len(options.caption)} captions; "
            "give as many captions as pictures, at least one"
        )
    if options.codes < 1:
        raise UserError(f"--codes: {options.codes} is no number of codes; give at least 1")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out}: name a .png file")
    run = _load(options, ("image", "text", *CODES))
    if run.model.config.grounding.method != "topk":
        raise UserError(f"--run {options.run}: picks no codes for a pair (model.grounding.method); take a top-k run")
    _pictures(run, options.image)
    gallery = Gallery(ImageFiles(options.image), list(options.caption), list(range(len(options.image))))
    pairs = EvalPairs(gallery, run.tokenizer, run.model.config.image_size, run.max_text)
    examples = [grounding_example(run.model, pairs, index) for index in range(len(pairs))]
    plot_grounding(
        options.out, examples, codes_per_pair=options.codes, title="Codes that a pair picks: where they fire"
    )
    shown = [[int(example.codes[row]) for row in shared_codes(example, options.codes)] for example in examples]
    return {"out": str(options.out), "codes": shown}


COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "score": (ScoreOptions, score),
    "caption": (CaptionOptions, describe),
    "answer": (AnswerOptions, answer),
    "embed": (EmbedOptions, embed),
    "draw": (DrawOptions, draw),
}


def _load(options: RunOptions, needed: Sequence[str]) -> Loaded:
    run, device = load_base_run(options.run, needed), _device(options.device)
    return Loaded(run.model.to(device), run.tokenizer, run.max_text, device)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: is not to be had here; give cpu, or leave it out") from None
    return device


def _pictures(run: Loaded, paths: Sequence[Path]) -> Tensor:
    """[B, 3, H, W] of files that are named one by one; one that cannot be read is the user's to know of."""
    _require("image", paths)
    size = run.model.config.image_size
    images, transform, rows = ImageFiles(paths, resolution=size), eval_transform(size), []
    for index in range(len(paths)):
        try:
            rows.append(transform(images[index]))
        except BadExampleError as error:
            raise UserError(f"--image {error.name}: {error.reason}; give a picture") from None
    return torch.stack(rows).to(run.device)


def _many_pictures(run: Loaded, paths: Sequence[Path], bad: BadData) -> tuple[list[str], Iterator[Tensor]]:
    """Names and batches of files and of folders' files; those that cannot be read are skipped and counted."""
    files = [file for path in paths for file in (read_image_folder(path).paths if path.is_dir() else [path])]
    size = run.model.config.image_size
    images = ImageFiles(files, resolution=size)
    readable = CaptionedImages(images, [()] * len(files), range(len(files))).gallery(bad=bad).images
    if not len(readable):
        raise UserError("--images: none of them can be read; give pictures")
    return [readable.name(i) for i in range(len(readable))], image_batches(readable, eval_transform(size))


def _require(flag: str, values: Sequence[Any]) -> None:
    if not values:
        raise UserError(f"--{flag}: is not given; give at least one")


if __name__ == "__main__":
    run_main(main)
