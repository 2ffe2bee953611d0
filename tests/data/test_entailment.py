"""SNLI-VE's files: which picture a sentence is on, undecided rows, what is malformed."""

import json

import numpy as np
import pytest
from PIL import Image

from vlblocks.data import BadData, EntailmentFiles, locate_entailment, read_entailment
from vlblocks.data.scene_tasks import ENTAILMENT_LABELS
from vlblocks.errors import UserError


def row(image, label, text="A man sleeps.", **more):
    return {"Flickr30K_ID": image, "gold_label": label, "sentence1": "A dog runs.", "sentence2": text, **more}


ROWS = [
    row("36979", "contradiction", " A man sleeps. ", pairID="36979.jpg#0r1c"),
    row("4705552913", "entailment", "Two women hold packages.", pairID="4705552913.jpg#2r1e"),
    row("36979", "-", "Nobody agrees.", pairID="36979.jpg#0r2n"),
    row("36979", "neutral", "It is \u2028 Sunday."),
]


@pytest.fixture
def files(tmp_path):
    root = tmp_path / "snli_ve"
    (root / "flickr30k_images").mkdir(parents=True)
    for name, shade in (("36979", 30), ("4705552913", 220)):
        Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(root / f"flickr30k_images/{name}.jpg")
    return rewrite(EntailmentFiles(root / "snli_ve_train.jsonl", root / "flickr30k_images"), ROWS)


def rewrite(files, rows):
    lines = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in rows]
    files.rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def test_rows_and_pictures_find_each_other(files):
    found = read_entailment(files)
    assert found.texts == ["A man sleeps.", "Two women hold packages.", "It is \u2028 Sunday."]
    assert [ENTAILMENT_LABELS[label] for label in found.labels] == ["contradiction", "entailment", "neutral"]
    assert found.ids == ["36979.jpg#0r1c", "4705552913.jpg#2r1e", "4"]
    assert len(found.images) == 2
    assert [round(found.images[owner].mean()) for owner in found.owners] == [30, 220, 30]


def test_undecided_rows_are_passed_over_and_not_bad(files):
    bad = BadData(share=0.0)
    found = read_entailment(files, bad=bad)
    assert found.undecided == 1 and len(found.texts) == 3 and bad.total == 0


def test_other_spellings_of_a_picture_s_name(files):
    renamed = {"Flickr30kID": 36979, "gold_label": "neutral", "sentence2": "x"}
    found = read_entailment(rewrite(files, [renamed, row("36979.jpg", "neutral")]))
    assert found.owners == [0, 1] and all(round(found.images[i].mean()) == 30 for i in (0, 1))


def test_the_folder_as_it_is_published(files):
    root = files.rows.parent
    for name in ("snli_ve_dev.jsonl", "snli_ve_test.jsonl"):
        (root / name).write_text(files.rows.read_text(encoding="utf-8"), encoding="utf-8")
    assert locate_entailment(root, "train") == files
    assert locate_entailment(root, "val").rows.name == "snli_ve_dev.jsonl"
    (root / "images").mkdir()
    assert locate_entailment(root, "test") == (root / "snli_ve_test.jsonl", root / "images")


BROKEN = {
    "not JSON": ('{"Flickr30K_ID": "3', "is not JSON"),
    "no object": ("[1]", "is no JSON object"),
    "no sentence": ({"Flickr30K_ID": "36979", "gold_label": "neutral"}, "has no text 'sentence2'"),
    "no label": ({"Flickr30K_ID": "36979", "sentence2": "x"}, "has no text 'gold_label'"),
    "no picture's name": ({"gold_label": "neutral", "sentence2": "x"}, "has no 'Flickr30K_ID'"),
    "empty sentence": (row("36979", "neutral", "  "), "has an empty sentence"),
    "other label": (row("36979", "yes"), "label 'yes', which is none of entailment, neutral, contradiction"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_row_is_skipped_counted_and_named(files, name):
    broken, problem = BROKEN[name]
    bad = BadData(share=0.3)
    assert len(read_entailment(rewrite(files, [*ROWS, broken]), bad=bad).texts) == 3
    ((where, reason),) = bad.state_dict()["snli_ve_train.jsonl/row"].items()
    assert where == f"{files.rows}: line 5" and problem in reason
    with pytest.raises(UserError, match=r"line 5: .*repair the data"):
        read_entailment(files)


def test_wrong_files_are_one_line(files, tmp_path):
    with pytest.raises(UserError, match="pass its pictures' folder"):
        read_entailment(files._replace(images=tmp_path))
    with pytest.raises(UserError, match="no such folder of images"):
        read_entailment(files._replace(images=tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no \*dev\.jsonl"):
        locate_entailment(files.rows.parent, "val")
    with pytest.raises(UserError, match="line 1 is not JSON; pass SNLI-VE's JSONL"):
        read_entailment(rewrite(files, ["a\tb\tc", *ROWS]))
    with pytest.raises(UserError, match="no row that can be used"):
        read_entailment(rewrite(files, [row("36979", "-")]))
