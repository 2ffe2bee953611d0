"""The field's file formats: Karpathy's JSON, folders of pictures, text and JSONL files, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlblocks.data.sources import BadData, CaptionedImages, Chosen, ImageFiles, ImageSource, Skipped
from vlblocks.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
IMAGE_FOLDERS = ("images", "Images")

# COCO's leftover of its validation part, which the field trains on.
_SAME_SPLIT = {"restval": "train"}


class Layout(NamedTuple):
    """A data set in Karpathy's layout.

    Attributes:
        json: Karpathy's file.
        images: folder of the pictures.
    """

    json: Path
    images: Path


class Subset(NamedTuple):
    """Part of a data set as pairs, the rest unaligned.

    Attributes:
        pairs: the pictures kept, with their captions.
        images: the rest's pictures.
        texts: the rest's captions, in an order that has nothing to do with the pictures'.
    """

    pairs: CaptionedImages
    images: ImageSource
    texts: list[str]


def locate(root: str | Path) -> Layout:
    """Find `dataset_*.json` and `images/` (or `Images/`) in a folder; COCO's `val2014/` and the like may lie in either.

    Raises:
        UserError: one of them is missing, or several JSON files are there.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; pass the one that holds dataset_*.json and images/")
    found = sorted(root.glob("dataset_*.json")) + sorted(root.glob("dataset_*.json.gz"))
    if not found:
        raise UserError(f"{root}: holds no dataset_*.json; put Karpathy's JSON there")
    if len(found) > 1:
        raise UserError(f"{root}: holds {found[0].name} and {found[1].name}; leave only one dataset_*.json")
    for name in IMAGE_FOLDERS:
        if (root / name).is_dir():
            return Layout(found[0], root / name)
    if (root / "train2014").is_dir() or (root / "val2014").is_dir():
        return Layout(found[0], root)
    raise UserError(f"{root}: holds no folder images/; put the pictures of {found[0].name} there")


def read_karpathy(
    path: str | Path,
    images: str | Path,
    *,
    split: str,
    bad: BadData | None = None,
    resolution: int | None = None,
    cache_bytes: int = 2**30,
) -> CaptionedImages:
    """One split of Karpathy's JSON (Karpathy and Fei-Fei 2015): Flickr8k, Flickr30k, COCO. Pictures open on demand.

    Args:
        path: the JSON: `images`, each with `filename`, `split`, `sentences` of `raw` text, and perhaps `filepath`.
        images: folder of the pictures; those with a `filepath` are in that folder of it where there is one.
        split: `train` (with COCO's `restval`), `val` or `test`.
        bad: counts malformed entries (once, whatever the split), empty captions, and pictures left with none.
        resolution, cache_bytes: as in :class:`ImageFiles`.

    Raises:
        UserError: a file or folder is missing or empty, this is not Karpathy's JSON, or it has no such split.
    """
    path, images = Path(path), Path(images)
    bad = bad or BadData()
    entries = _karpathy_entries(path, bad)
    if not images.is_dir():
        raise UserError(f"{images}: no such folder of images; pass the one that {path.name} belongs to")
    splits = {_SAME_SPLIT.get(entry["split"], entry["split"]) for entry in entries}
    if split not in splits:
        raise UserError(f"{path}: has no split {split!r}; use one of {', '.join(sorted(splits))}")

    ids = {name: number for number, name in enumerate(dict.fromkeys(_relative_name(entry) for entry in entries))}
    folders: dict[str, bool] = {}
    chosen = [entry for entry in entries if _SAME_SPLIT.get(entry["split"], entry["split"]) == split]
    total = sum(len(entry["sentences"]) for entry in chosen)
    paths: list[Path] = []
    captions: list[tuple[str, ...]] = []
    image_ids: list[int] = []
    for entry in chosen:
        name = _relative_name(entry)
        texts = []
        for number, sentence in enumerate(entry["sentences"]):
            raw = sentence["raw"].strip()
            if raw:
                texts.append(raw)
            else:
                where = f"{path.name}: caption {number} of {name}"
                bad.record(Skipped(f"{split}/caption", where, "empty caption", total))
        if not texts:
            bad.record(Skipped(f"{split}/uncaptioned image", f"{path.name}: {name}", "no caption", len(chosen)))
            continue
        folder = entry.get("filepath") or ""
        if folder not in folders:
            folders[folder] = (images / folder).is_dir()
        paths.append(images / name if folders[folder] else images / entry["filename"])
        captions.append(tuple(texts))
        image_ids.append(ids[name])
    if not paths:
        raise UserError(f"{path}: split {split!r} holds no picture with a caption; use another split or file")
    if not any(candidate.exists() for candidate in paths[:20]):
        raise UserError(
            f"{images}: holds no {paths[0].name}, which {path.name} names; pass the folder with its pictures"
        )
    return CaptionedImages(ImageFiles(paths, resolution=resolution, cache_bytes=cache_bytes), captions, image_ids)


def split_pairs(data: CaptionedImages, *, fraction: float, seed: int = 0) -> Subset:
    """Keep a fraction of the pictures as pairs; the others' pictures and captions become unaligned streams.

    The same fraction and seed choose the same pictures, and a smaller fraction's are among a larger one's.

    Raises:
        UserError: `fraction` is not in (0, 1] or leaves no pair.
    """
    total = len(data.images)
    kept = round(fraction * total)
    if not 0.0 < fraction <= 1.0 or kept < 1:
        raise UserError(f"fraction {fraction} of {total} pictures leaves no pairs; use a number above 0, up to 1")
    order = np.random.default_rng((seed, 23)).permutation(total)
    chosen, rest = sorted(order[:kept].tolist()), sorted(order[kept:].tolist())
    pairs = CaptionedImages(
        Chosen(data.images, chosen),
        [tuple(data.captions[i]) for i in chosen],
        [data.image_ids[i] for i in chosen],
    )
    texts = [text for i in rest for text in data.captions[i]]
    shuffled = np.random.default_rng((seed, 29)).permutation(len(texts))
    return Subset(pairs, Chosen(data.images, rest), [texts[i] for i in shuffled])


class ImageClasses(NamedTuple):
    """Pictures with one class each.

    Attributes:
        images: N pictures by index, uint8 [H, W, 3].
        labels: N indices of `names`.
        names: of the classes.
    """

    images: ImageFiles
    labels: list[int]
    names: list[str]


def read_image_classes(
    root: str | Path, *, names: Sequence[str] | None = None, resolution: int | None = None, cache_bytes: int = 2**30
) -> ImageClasses:
    """A folder with a folder of pictures for each class (ImageNet's layout), in sorted order.

    Args:
        names: the classes by index; None: the folders' names, sorted. A folder may be absent, but none be unknown.

    Raises:
        UserError: there is no such folder, it holds no class or no picture, or a class that is not in `names`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images; check the path")
    found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise UserError(f"{root}: holds no folder of a class; put the pictures of each class into a folder of its name")
    known = list(found if names is None else names)
    unknown = next((name for name in found if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"{root / unknown}: is none of the {len(known)} classes there are ({', '.join(known[:5])}, ...); "
            "pass pictures of those"
        )
    files = [(path, known.index(name)) for name in found for path in _pictures(root / name)]
    if not files:
        raise UserError(f"{root}: holds no picture; pass folders of {', '.join(sorted(IMAGE_SUFFIXES))} files")
    images = ImageFiles([path for path, _ in files], resolution=resolution, cache_bytes=cache_bytes)
    return ImageClasses(images, [label for _, label in files], known)


def _pictures(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def read_image_folder(root: str | Path, *, resolution: int | None = None, cache_bytes: int = 2**30) -> ImageFiles:
    """All pictures in a folder and the folders in it, by name in sorted order; opened when asked for.

    Raises:
        UserError: there is no such folder, or it holds no picture.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images; check the path")
    paths = _pictures(root)
    if not paths:
        raise UserError(f"{root}: holds no picture; pass a folder of {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return ImageFiles(paths, resolution=resolution, cache_bytes=cache_bytes)


def read_texts(path: str | Path, *, field: str = "text", bad: BadData | None = None) -> list[str]:
    """Texts of a file: one a line, or one a JSON object and line (`.jsonl`, its `field`); either may end in `.gz`.

    Blank lines of plain text part paragraphs and are passed over; an empty or damaged entry of a JSONL file is counted.

    Raises:
        UserError: the file is missing, damaged or without text, or its first entry has no such field.
    """
    path = Path(path)
    bad = bad or BadData()
    # Not splitlines(), which also parts JSON strings at characters such as U+2028.
    lines = [(number, line.strip()) for number, line in enumerate(_read(path).split("\n"), start=1) if line.strip()]
    if not any(suffix in (".jsonl", ".ndjson") for suffix in path.suffixes[-2:]):
        texts = [line for _, line in lines]
    else:
        texts = []
        for number, line in lines:
            text, reason = _json_text(line, field)
            if text:
                texts.append(text)
            elif number == lines[0][0] and reason != "empty text":
                raise UserError(
                    f"{path}: line {number} is not a JSON object with text in {field!r}; name the right field"
                )
            else:
                bad.record(Skipped("texts/text", f"{path}: line {number}", reason, len(lines)))
    if not texts:
        raise UserError(f"{path}: holds no text; pass a file with at least one line")
    return texts


def _json_text(line: str, field: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return "", "not JSON"
    value = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        return "", f"no text in {field!r}"
    return value.strip(), "empty text"


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; pass a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; convert it, or pass another file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path}: is damaged or not gzip; download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; download it again or pass another file")
    return text


def _karpathy_entries(path: Path, bad: BadData) -> Sequence[dict[str, Any]]:
    """The entries that are whole; a file without any is no such file."""
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON (line {error.lineno}: {error.msg}); download it again") from None
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: is not Karpathy's JSON, which has a list 'images'; pass a dataset_*.json")
    if not entries:
        raise UserError(f"{path}: its list 'images' is empty; pass another file")
    problems = [_karpathy_problem(entry) for entry in entries]
    if all(problems):
        raise UserError(f"{path}: is not Karpathy's JSON: images[0] {problems[0]}; pass a dataset_*.json")
    for number, problem in enumerate(problems):
        if problem:
            bad.record(Skipped(f"{path.name}/entry", f"{path}: images[{number}]", problem, len(entries)))
    return [entry for entry, problem in zip(entries, problems, strict=True) if not problem]


def _karpathy_problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "is not an object"
    for name in ("filename", "split"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            return f"has no {name!r}"
    if not isinstance(entry.get("filepath") or "", str):
        return "has a 'filepath' that is no text"
    sentences = entry.get("sentences")
    if not isinstance(sentences, list):
        return "has no list 'sentences'"
    if not all(isinstance(sentence, dict) and isinstance(sentence.get("raw"), str) for sentence in sentences):
        return "has a sentence without 'raw' text"
    return ""


def _relative_name(entry: dict[str, Any]) -> str:
    folder = entry.get("filepath")
    return f"{folder}/{entry['filename']}" if folder else entry["filename"]
