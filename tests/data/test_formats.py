"""Formats: Karpathy's JSON and its variants, folders, texts, what is skipped and what is refused."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlblocks.data import (
    BadData,
    BadExampleError,
    CaptionedImages,
    ImageFiles,
    Skipped,
    locate,
    read_image,
    read_image_folder,
    read_karpathy,
    read_texts,
    split_pairs,
)
from vlblocks.errors import UserError


def save_picture(path: Path, shade: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 10, 200)).save(path)


def entry(name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions], **more}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of 10 training and 2 validation pictures in Karpathy's layout."""
    entries = [entry(f"{i}.png", "train" if i < 10 else "val", f"picture {i}", f"number {i} .") for i in range(12)]
    for i in range(12):
        save_picture(tmp_path / "images" / f"{i}.png", shade=20 * i)
    (tmp_path / "dataset_toy.json").write_text(json.dumps({"dataset": "toy", "images": entries}))
    return tmp_path


def refuses(act, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_split_is_read(data: Path) -> None:
    layout = locate(data)
    train = read_karpathy(layout.json, layout.images, split="train")
    val = read_karpathy(layout.json, layout.images, split="val")
    assert len(train.images) == len(train.captions) == len(train.image_ids) == 10
    assert train.captions[3] == ("picture 3", "number 3 .")
    assert train.images[3].shape == (10, 12, 3)
    assert (train.images[3][0, 0] == (60, 10, 200)).all()
    assert not set(train.image_ids) & set(val.image_ids)


def test_coco_folders_and_its_leftovers(tmp_path: Path) -> None:
    entries = [
        entry("a.png", "train", "one", filepath="train2014"),
        entry("b.png", "restval", "two", filepath="val2014"),
        entry("c.png", "val", "three", filepath="val2014"),
        entry("b.png", "test", "four", filepath="train2014"),
    ]
    for item in entries:
        save_picture(tmp_path / item["filepath"] / item["filename"])
    with gzip.open(tmp_path / "dataset_coco.json.gz", "wt") as file:
        json.dump({"images": entries}, file)
    layout = locate(tmp_path)
    assert layout.images == tmp_path
    train = read_karpathy(layout.json, layout.images, split="train")
    test = read_karpathy(layout.json, layout.images, split="test")
    assert [train.images.name(i) for i in range(2)] == [
        str(tmp_path / "train2014/a.png"),
        str(tmp_path / "val2014/b.png"),
    ]
    assert not set(train.image_ids) & set(test.image_ids)
    refuses(lambda: read_karpathy(layout.json, layout.images, split="restval"), "no split 'restval'")


def test_pictures_flat_although_the_json_names_folders(tmp_path: Path) -> None:
    save_picture(tmp_path / "Images" / "a.png")
    (tmp_path / "dataset_flat.json").write_text(
        json.dumps({"images": [entry("a.png", "train", "one", filepath="val2014")]})
    )
    layout = locate(tmp_path)
    assert read_karpathy(layout.json, layout.images, split="train").images[0].shape == (10, 12, 3)


def test_the_same_picture_named_twice_has_one_id(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    entries = [entry("a.png", "train", "one"), entry("a.png", "train", "two")]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": entries}))
    ids = read_karpathy(tmp_path / "dataset_x.json", tmp_path / "images", split="train").image_ids
    assert ids[0] == ids[1]


def test_pictures_open_when_asked_for_and_are_kept(data: Path) -> None:
    for i in range(1, 10):
        (data / "images" / f"{i}.png").unlink()
    train = read_karpathy(data / "dataset_toy.json", data / "images", split="train")
    first = train.images[0]
    with pytest.raises(BadExampleError, match=r"4\.png.*no such file"):
        train.images[4]
    (data / "images" / "0.png").unlink()
    assert train.images[0] is first


def test_a_cache_has_its_limit(data: Path) -> None:
    paths = sorted((data / "images").iterdir())
    images = ImageFiles(paths, cache_bytes=3 * 360)
    for i in range(5):
        assert images[i].nbytes == 360
    assert [images[i] is images[i] for i in range(5)] == [True, True, True, False, False]


def test_large_pictures_shrink_on_reading_and_small_ones_do_not_grow(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.jpg", size=(400, 200))
    save_picture(tmp_path / "b.jpg", size=(40, 20))
    images = read_image_folder(tmp_path, resolution=50)
    assert [images[i].shape for i in range(2)] == [(50, 100, 3), (20, 40, 3)]


def test_folders_are_searched_through(tmp_path: Path) -> None:
    for name in ("z.png", "a/b/c.JPG", "a/d.webp"):
        save_picture(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    images = read_image_folder(tmp_path)
    assert [Path(images.name(i)).name for i in range(len(images))] == ["c.JPG", "d.webp", "z.png"]
    refuses(lambda: read_image_folder(tmp_path / "none"), "none: no such folder")
    (tmp_path / "empty").mkdir()
    refuses(lambda: read_image_folder(tmp_path / "empty"), "empty: holds no picture")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (6, 4)).save(path)
    picture = read_image(path)
    assert picture.shape == (4, 6, 3)
    assert picture.dtype == np.uint8


def test_a_turned_photograph_is_set_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (8, 4, 3)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "header"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damaged_pictures_are_told_apart(tmp_path: Path, damage: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    raw = path.read_bytes()
    damaged = {"truncated": raw[: len(raw) // 2], "text": b"not a picture", "empty": b"", "header": raw[:30]}
    path.write_bytes(damaged[damage])
    with pytest.raises(BadExampleError) as caught:
        read_image(path)
    assert caught.value.name == str(path)


def test_karpathy_mistakes_are_told(data: Path, tmp_path: Path) -> None:
    images = data / "images"
    path = data / "other.json"

    def read(content: str, split: str = "train") -> None:
        path.write_text(content)
        refuses(lambda: read_karpathy(path, images, split=split), r"other\.json")

    refuses(lambda: read_karpathy(data / "none.json", images, split="train"), r"none\.json: no such file")
    read("")
    read("{")
    read("[]")
    read('{"annotations": []}')
    read('{"images": []}')
    read('{"images": [7]}')
    read('{"images": [{"filename": "a.png", "sentences": []}]}')
    read('{"images": [{"filename": "a.png", "split": "train", "sentences": [{"tokens": ["a"]}]}]}')
    read(json.dumps({"images": [{**entry("0.png", "train", "x"), "filepath": 7}]}))
    read(json.dumps({"images": [entry("0.png", "train", "x")]}), split="test")
    refuses(lambda: read_karpathy(data / "dataset_toy.json", data / "no", split="train"), "no such folder of images")
    (data / "elsewhere").mkdir()
    refuses(lambda: read_karpathy(data / "dataset_toy.json", data / "elsewhere", split="train"), r"holds no 0\.png")
    path.write_bytes(b"\xff\xfe\x00")
    refuses(lambda: read_karpathy(path, images, split="train"), "UTF-8")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda entry: 7, "is not an object"),
        (lambda entry: {**entry, "filename": ""}, "has no 'filename'"),
        (lambda entry: {**entry, "split": None}, "has no 'split'"),
        (lambda entry: {**entry, "filepath": 7}, "has a 'filepath'"),
        (lambda entry: {**entry, "sentences": "none"}, "has no list 'sentences'"),
        (lambda entry: {**entry, "sentences": [{"tokens": ["a"]}]}, "has a sentence without 'raw'"),
    ],
)
@pytest.mark.parametrize("place", [0, 5])
def test_a_malformed_entry_is_skipped_counted_and_named(data: Path, caplog, spoil, reason: str, place: int) -> None:
    path, images = data / "dataset_toy.json", data / "images"
    content = json.loads(path.read_text())
    content["images"][place] = spoil(content["images"][place])
    path.write_text(json.dumps(content))
    bad = BadData(share=0.1)
    with caplog.at_level(logging.WARNING):
        train = read_karpathy(path, images, split="train", bad=bad)
        val = read_karpathy(path, images, split="val", bad=bad)
    assert len(train.images) == 9 and len(val.images) == 2
    assert [texts[0] for texts in train.captions] == [f"picture {i}" for i in range(10) if i != place]
    # Once, however many splits are read.
    assert bad.counts() == {"dataset_toy.json/entry": 1}
    assert f"{path}: images[{place}]: {reason}" in caplog.text and "1 of 12" in caplog.text
    refuses(lambda: read_karpathy(path, images, split="train"), rf"images\[{place}\]: .*bad_share")


def test_layout_mistakes_are_told(tmp_path: Path) -> None:
    refuses(lambda: locate(tmp_path / "none"), "no such folder")
    refuses(lambda: locate(tmp_path), r"no dataset_\*\.json")
    (tmp_path / "dataset_a.json").write_text("{}")
    refuses(lambda: locate(tmp_path), "no folder images/")
    (tmp_path / "images").mkdir()
    assert locate(tmp_path) == (tmp_path / "dataset_a.json", tmp_path / "images")
    (tmp_path / "dataset_b.json").write_text("{}")
    refuses(lambda: locate(tmp_path), r"dataset_a\.json and dataset_b\.json")


def test_empty_captions_are_skipped_counted_and_limited(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = json.loads((data / "dataset_toy.json").read_text())
    content["images"][2]["sentences"][0]["raw"] = "  "
    (data / "dataset_toy.json").write_text(json.dumps(content))
    bad = BadData(share=0.05)
    with caplog.at_level(logging.WARNING):
        train = read_karpathy(data / "dataset_toy.json", data / "images", split="train", bad=bad)
    assert train.captions[2] == ("number 2 .",)
    assert bad.counts() == {"train/caption": 1}
    assert "2.png" in caplog.text
    path = data / "dataset_toy.json"
    refuses(lambda: read_karpathy(path, data / "images", split="train", bad=BadData(share=0.04)), r"2\.png.*bad_share")
    content["images"][2]["sentences"][1]["raw"] = ""
    path.write_text(json.dumps(content))
    bad = BadData(share=0.1)
    train = read_karpathy(path, data / "images", split="train", bad=bad)
    assert len(train.images) == 9
    assert bad.counts() == {"train/caption": 2, "train/uncaptioned image": 1}


def test_the_share_is_a_limit_that_may_be_met_but_not_passed(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadData()
    bad.record(Skipped("pairs/image", "a", "broken", 100))
    bad.record(Skipped("pairs/image", "a", "broken", 100))
    assert bad.total == 1
    assert len(caplog.records) == 1
    refuses(lambda: bad.record(Skipped("pairs/image", "b", "broken", 100)), r"^b: broken; 2 of 100")
    again = BadData()
    again.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    assert again.counts() == bad.counts() == {"pairs/image": 2}
    refuses(lambda: BadData(share=2.0), "bad_share")


def test_a_gallery_leaves_out_what_cannot_be_read(data: Path) -> None:
    (data / "images" / "4.png").write_bytes(b"")
    train = read_karpathy(data / "dataset_toy.json", data / "images", split="train")
    bad = BadData(share=0.1)
    gallery = train.gallery(captions_per_image=1, bad=bad)
    assert len(gallery.images) == len(gallery.captions) == 9
    assert gallery.captions[4] == "picture 5"
    assert gallery.owners == list(range(9))
    assert gallery.images.name(4).endswith("5.png")
    assert (gallery.images[4] == train.images[5]).all()
    assert bad.counts() == {"gallery/image": 1}
    refuses(lambda: train.gallery(bad=BadData()), r"4\.png")


def test_a_fraction_as_pairs_and_the_rest_unaligned(data: Path) -> None:
    train = read_karpathy(data / "dataset_toy.json", data / "images", split="train")
    part = split_pairs(train, fraction=0.3, seed=1)
    again = split_pairs(train, fraction=0.3, seed=1)
    larger = split_pairs(train, fraction=0.6, seed=1)
    assert (len(part.pairs.images), len(part.images), len(part.texts)) == (3, 7, 14)
    assert part.pairs.image_ids == again.pairs.image_ids
    assert part.texts == again.texts
    assert set(part.pairs.image_ids) < set(larger.pairs.image_ids)
    paired = {text for i in range(3) for text in part.pairs.captions[i]}
    every = {text for i in range(10) for text in train.captions[i]}
    assert paired.isdisjoint(part.texts)
    assert paired | set(part.texts) == every
    names = {part.pairs.images.name(i) for i in range(3)} | {part.images.name(i) for i in range(7)}
    assert len(names) == 10
    for i, number in enumerate(part.pairs.image_ids):
        assert part.pairs.captions[i][0] == f"picture {number}"
        assert (part.pairs.images[i] == train.images[number]).all()
    everything = split_pairs(train, fraction=1.0)
    assert (len(everything.pairs.images), len(everything.images), everything.texts) == (10, 0, [])
    refuses(lambda: split_pairs(train, fraction=0.01), r"fraction 0\.01")
    refuses(lambda: split_pairs(train, fraction=1.2), r"fraction 1\.2")


@pytest.mark.parametrize("packed", [False, True])
def test_texts_and_jsonl_plain_or_gzipped(tmp_path: Path, packed: bool) -> None:
    def write(name: str, content: str) -> Path:
        path = tmp_path / (f"{name}.gz" if packed else name)
        raw = content.encode()
        path.write_bytes(gzip.compress(raw) if packed else raw)
        return path

    assert read_texts(write("a.txt", "one\n\n two \r\nthree")) == ["one", "two", "three"]
    lines = '{"text": "one"}\n{"text": "t\u2028wo", "id": 3}\n'
    assert read_texts(write("b.jsonl", lines)) == ["one", "t\u2028wo"]
    assert read_texts(write("c.jsonl", '{"body": "one"}'), field="body") == ["one"]
    refuses(lambda: read_texts(write("d.jsonl", '{"body": "one"}')), r"d\.jsonl.*'text'")
    refuses(lambda: read_texts(write("e.txt", " \n ")), r"e\.txt.*is empty")
    bad = BadData(share=0.5)
    path = write("f.jsonl", '{"text": "one"}\n{"text": " "}\nnot json\n{"text": "two"}\n')
    assert read_texts(path, bad=bad) == ["one", "two"]
    assert bad.total == 2
    refuses(lambda: read_texts(path), r"f\.jsonl.*: line 2: empty text")


def test_unreadable_texts_are_told(tmp_path: Path) -> None:
    refuses(lambda: read_texts(tmp_path / "none.txt"), r"none\.txt: no such file")
    refuses(lambda: read_texts(tmp_path), "is a folder")
    path = tmp_path / "x.txt.gz"
    path.write_bytes(b"not gzip")
    refuses(lambda: read_texts(path), r"x\.txt\.gz: is damaged")
    path.write_bytes(gzip.compress(b"some text" * 100)[:-20])
    refuses(lambda: read_texts(path), r"x\.txt\.gz: is damaged")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refuses(lambda: read_texts(tmp_path / "latin.txt"), r"latin\.txt: is not UTF-8")


def test_flickr8k(reference: Path) -> None:
    layout = locate(reference / "data" / "flickr8k")
    train = read_karpathy(layout.json, layout.images, split="train", resolution=128)
    val = read_karpathy(layout.json, layout.images, split="val")
    assert (len(train.images), len(val.images)) == (5997, 1000)
    assert isinstance(train, CaptionedImages)
    assert min(train.images[17].shape[:2]) == 128
    gallery = val.gallery()
    assert len(gallery.captions) == 5000
    assert gallery.owners[-1] == 999
