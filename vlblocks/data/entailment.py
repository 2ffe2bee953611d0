"""SNLI-VE (Xie et al., 2019): whether a picture of Flickr30k entails a sentence, contradicts it or leaves it open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from vlblocks.data.formats import IMAGE_FOLDERS, IMAGE_SUFFIXES, _read
from vlblocks.data.scene_tasks import ENTAILMENT_LABELS
from vlblocks.data.sources import BadData, ImageFiles, ImageSource, Skipped
from vlblocks.errors import UserError

__all__ = ["EntailmentFiles", "EntailmentRows", "locate_entailment", "read_entailment"]

_UNDECIDED = "-"  # SNLI's word for people of different minds
_IMAGE_KEYS = ("Flickr30K_ID", "Flickr30kID")
_FILES = {"train": "*train.jsonl", "val": "*dev.jsonl", "test": "*test.jsonl"}
_FOLDERS = (*IMAGE_FOLDERS, "flickr30k_images", "flickr30k-images")


class EntailmentFiles(NamedTuple):
    """Where one split lies.

    Attributes:
        rows: the JSONL.
        images: folder of the pictures.
    """

    rows: Path
    images: Path


class EntailmentRows(NamedTuple):
    """Sentences on pictures, in the file's order.

    Attributes:
        images: I pictures by index, each there once.
        owners: N indices of pictures.
        texts: N sentences.
        labels: N indices of `scene_tasks.ENTAILMENT_LABELS`.
        ids: N names of the rows: their pairID, or else their line.
        undecided: how many more rows there are whose label is "-".
    """

    images: ImageSource
    owners: list[int]
    texts: list[str]
    labels: list[int]
    ids: list[str]
    undecided: int = 0


def locate_entailment(root: str | Path, split: str) -> EntailmentFiles:
    """One split's files in a folder: snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl and the pictures.

    Those lie in images/ or flickr30k_images/, else in the folder itself.

    Raises:
        UserError: there is no such folder, or it holds none or several of the file.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; pass the one that holds snli_ve_train.jsonl and images/")
    found = sorted(root.glob(_FILES[split]))
    if not found:
        raise UserError(f"{root}: holds no {_FILES[split]}; put SNLI-VE's files there, or name the file")
    if len(found) > 1:
        raise UserError(f"{root}: holds {found[0].name} and {found[1].name}; leave one of them, or name the file")
    return EntailmentFiles(found[0], next((root / name for name in _FOLDERS if (root / name).is_dir()), root))


def read_entailment(
    files: EntailmentFiles,
    *,
    bad: BadData | None = None,
    resolution: int | None = None,
    cache_bytes: int = 2**30,
) -> EntailmentRows:
    """SNLI-VE's JSONL: Flickr30K_ID (picture 36979.jpg is "36979" or "36979.jpg"), sentence2, gold_label.

    Rows whose label is "-" are passed over, as everybody does.

    Args:
        bad: counts rows that are malformed or have another label.
        resolution, cache_bytes: as in :class:`ImageFiles`.

    Raises:
        UserError: a file or folder is missing or not of this format, or no row is left.
    """
    path, bad = files.rows, bad or BadData()
    lines = [(number, line) for number, line in enumerate(_read(path).split("\n"), start=1) if line.strip()]
    if not files.images.is_dir():
        raise UserError(f"{files.images}: no such folder of images; pass the one that {path.name} belongs to")
    places: dict[str, int] = {}
    owners: list[int] = []
    texts: list[str] = []
    labels: list[int] = []
    ids: list[str] = []
    undecided = 0
    for number, line in lines:
        row, problem = _row(line)
        if problem and number == lines[0][0] and not isinstance(row, dict):
            raise UserError(f"{path}: line {number} {problem}; pass SNLI-VE's JSONL")
        if problem:
            bad.record(Skipped(f"{path.name}/row", f"{path}: line {number}", problem, len(lines)))
        elif row["gold_label"] == _UNDECIDED:
            undecided += 1
        else:
            owners.append(places.setdefault(_image_name(row), len(places)))
            texts.append(row["sentence2"].strip())
            labels.append(ENTAILMENT_LABELS.index(row["gold_label"]))
            ids.append(str(row.get("pairID") or number))
    if not texts:
        raise UserError(f"{path}: holds no row that can be used; pass another file")
    paths = [_picture(files.images, name) for name in places]
    if not any(candidate.exists() for candidate in paths[:20]):
        raise UserError(f"{files.images}: holds no {paths[0].name}, which {path.name} names; pass its pictures' folder")
    images = ImageFiles(paths, resolution=resolution, cache_bytes=cache_bytes)
    return EntailmentRows(images, owners, texts, labels, ids, undecided)


def _row(line: str) -> tuple[Any, str]:
    """A row, and what is wrong with it; the row is None where the file is likely to be another kind of file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None, "is not JSON"
    if not isinstance(row, dict):
        return None, "is no JSON object"
    for name in ("sentence2", "gold_label"):
        if not isinstance(row.get(name), str):
            return None, f"has no text {name!r}"
    if not _image_name(row):
        return None, f"has no {_IMAGE_KEYS[0]!r}"
    if not row["sentence2"].strip():
        return row, "has an empty sentence"
    if row["gold_label"] not in (*ENTAILMENT_LABELS, _UNDECIDED):
        return row, f"has the label {row['gold_label']!r}, which is none of {', '.join(ENTAILMENT_LABELS)}"
    return row, ""


def _image_name(row: dict[str, Any]) -> str:
    value = next((row[key] for key in _IMAGE_KEYS if key in row), "")
    return str(value).strip() if isinstance(value, (str, int)) else ""


def _picture(folder: Path, name: str) -> Path:
    return folder / (name if Path(name).suffix.lower() in IMAGE_SUFFIXES else f"{name}.jpg")
