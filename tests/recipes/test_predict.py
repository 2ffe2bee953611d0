"""predict.py: its numbers are those of the retrieval protocol and of the tasks, and a mistake is one line."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vlblocks.data import BadData, Gallery, ImageFiles, eval_transform, read_image, train_tokenizer
from vlblocks.evaluation import shared_codes
from vlblocks.training import config_to_dict
from vlblocks_recipes.unimo2 import predict
from vlblocks_recipes.unimo2.configs import PRESETS, ContrastConfig, GroundingConfig, ModelConfig, TowerConfig
from vlblocks_recipes.unimo2.corpus import EvalPairs
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.report import grounding_example
from vlblocks_recipes.unimo2.retrieval import CONTRAST_SHARE, JointScorer
from vlblocks_recipes.unimo2.retrieval import embed as embed_gallery
from vlblocks_recipes.unimo2.runs import load_base_run, run_settings
from vlblocks_recipes.unimo2.tasks.base import TaskModel, encode, pooled
from vlblocks_recipes.unimo2.tasks.captioning import CaptionConfig, CaptionData, caption
from vlblocks_recipes.unimo2.tasks.vqa import VisualQuestionAnswering, VqaConfig, VqaData

TEXTS = ["a red square on green", "near the top", "there is blue around white, number three, and no other colour"]
TOWER = TowerConfig(1, 2, 64, dropout=0.0)
SMALL = ModelConfig(
    width=32, image=TOWER, text=TOWER, joint=TOWER, image_size=32, patch_size=8, positions=40,
    grounding=GroundingConfig(codes=20, picks=6), contrast=ContrastConfig(width=16),
)  # fmt: skip


def write_run(folder, model=SMALL):
    """A run's folder with random weights, far enough apart to tell examples apart."""
    folder.mkdir(parents=True)
    words = [f"{text} {colour}" for text in TEXTS for colour in ("red", "green", "blue", "white", "what", "is")]
    tokenizer = train_tokenizer(words, 290, lowercase=True)
    tokenizer.save(folder / "tokenizer.json")
    config = replace(model, vocab=tokenizer.vocab_size)
    torch.manual_seed(1)
    net = Unimo2(config).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    preset = PRESETS["tiny"]
    settings = replace(preset, out=folder, model=config, data=replace(preset.data, max_text=20))
    (folder / "config.json").write_text(json.dumps(config_to_dict(settings)))
    save_file(net.state_dict(), folder / "model.safetensors")
    return folder


def fine_tuned(folder, run, config, facts, head):
    """The same model as a task's run."""
    folder.mkdir(parents=True)
    base = load_base_run(run)
    net = TaskModel(base.model, head)
    (folder / "config.json").write_text(json.dumps(run_settings(config, base.model.config)))
    (folder / "task.json").write_text(json.dumps(facts))
    base.tokenizer.save(folder / "tokenizer.json")
    save_file(net.state_dict(), folder / "model.safetensors")
    return net.eval(), base.tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures, two of them not square."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(4)
    files = []
    for number, size in enumerate([(40, 40, 3), (36, 60, 3), (50, 34, 3)]):
        files.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(files[-1])
    return files


def ask(call, *flags):
    done = call(predict, *flags)
    assert done.code == 0, done.err
    return json.loads(done.out)


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


GROUNDING = {
    "topk": GroundingConfig(codes=20, picks=6),
    "nearest": GroundingConfig(method="nearest", codes=20),
    "projected": GroundingConfig(codes=20, picks=6, project=True),
    "none": GroundingConfig(method="none"),
}


@pytest.mark.parametrize("grounding", GROUNDING)
def test_scores_are_those_of_retrieval(tmp_path, pictures, call, grounding):
    folder = write_run(tmp_path / "run", replace(SMALL, grounding=GROUNDING[grounding]))
    found = ask(call, "score", "--run", folder, "--image", *pictures, "--caption", *TEXTS)
    assert [(row["image"], row["caption"]) for row in found] == [(str(p), t) for t in TEXTS for p in pictures]
    model, tokenizer, max_text = load_base_run(folder)
    assert max_text == 20
    pairs = EvalPairs(Gallery(ImageFiles(pictures, resolution=32), TEXTS, [0, 1, 2]), tokenizer, 32, 20)
    gallery = embed_gallery(model, pairs.image_batches(), pairs.text_batches())
    images, texts = torch.tensor([0, 1, 2] * 3), torch.tensor([0] * 3 + [1] * 3 + [2] * 3)
    expected = {
        "score": JointScorer(model, gallery)(images, texts),
        "similarity": gallery.similarity().pairs(images, texts),
    }
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor([row[name] for row in found]), values, atol=1e-5, rtol=1e-4)
    assert len({round(row["score"], 4) for row in found}) == 9
    # The probability belongs to the matching logits, of which the score holds the second.
    for row, image, text in zip(found, images.tolist(), texts.tolist(), strict=True):
        tokens = torch.tensor(tokenizer.encode(TEXTS[text], 20))[None]
        with torch.no_grad():
            logits = model.match_logits(
                encode(model, pairs.image(image)[None], tokens, torch.ones_like(tokens).bool())
            )[0]
        assert row["match"] == pytest.approx(float(logits.softmax(0)[1]), abs=1e-5)
        assert row["score"] == pytest.approx(float(logits[1]) + CONTRAST_SHARE * row["similarity"], abs=1e-5)


@pytest.mark.parametrize("projected", [True, False])
def test_features_are_what_similarity_is_made_of(run, pictures, tmp_path, call, projected):
    if not projected:
        # Then a picture's feature has another length than 1.
        run = write_run(tmp_path / "run", replace(SMALL, contrast=ContrastConfig(width=None, normalize="none")))
    texts = tmp_path / "texts.txt.gz"
    with gzip.open(texts, "wt") as file:
        file.write("\n".join(TEXTS) + "\n")
    done = ask(call, "embed", "--run", run, "--images", *pictures, "--out", tmp_path / "images.npy")
    assert done == {"out": str(tmp_path / "images.npy"), "rows": 3, "width": 16 if projected else 32, "skipped": 0}
    ask(call, "embed", "--run", run, "--texts", texts, "--out", tmp_path / "texts.npy")
    image, text = np.load(tmp_path / "images.npy"), np.load(tmp_path / "texts.npy")
    assert image.dtype == text.dtype == np.float32
    assert json.loads((tmp_path / "images.json").read_text()) == [str(path) for path in pictures]
    assert json.loads((tmp_path / "texts.json").read_text()) == TEXTS
    scores = ask(call, "score", "--run", run, "--image", *pictures, "--caption", *TEXTS)
    similarity = np.array([row["similarity"] for row in scores]).reshape(3, 3).T
    assert np.allclose(image @ text.T, similarity, atol=1e-5)


def test_the_names_of_rows_do_not_overwrite_the_texts(run, tmp_path, call, monkeypatch):
    texts = tmp_path / "notes.json"
    texts.write_text("\n".join(TEXTS) + "\n")
    monkeypatch.chdir(tmp_path)
    # Named in two ways, it is one file.
    done = call(predict, "embed", "--run", run, "--texts", "notes.json", "--out", tmp_path / "notes.npy")
    one_line(done, "--out", "overwrite --texts")
    assert texts.read_text().split("\n") == [*TEXTS, ""] and not (tmp_path / "notes.npy").exists()
    assert ask(call, "embed", "--run", run, "--texts", texts, "--out", tmp_path / "other.npy")["rows"] == len(TEXTS)


def test_folders_and_unreadable_pictures(run, pictures, tmp_path, call, caplog):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for number, where in enumerate(("b.png", "a.png", "deep/c.png")):
        Image.open(pictures[number]).save(folder / where)
    (folder / "b.jpg").write_text("no picture")
    flags = ("--run", run, "--images", folder, pictures[0])
    one_line(call(predict, "embed", *flags, "--out", tmp_path / "x.npy"), folder / "b.jpg", "1 of 5")
    assert not (tmp_path / "x.npy").exists()
    done = ask(call, "embed", *flags, "--out", tmp_path / "x.npy", "--max-bad-share", "0.2")
    assert done["rows"] == 4 and done["skipped"] == 1 and str(folder / "b.jpg") in caplog.text
    names = json.loads((tmp_path / "x.json").read_text())
    assert names == [str(folder / "a.png"), str(folder / "b.png"), str(folder / "deep/c.png"), str(pictures[0])]
    rows = np.load(tmp_path / "x.npy")
    ask(call, "embed", "--run", run, "--images", *pictures, "--out", tmp_path / "y.npy")
    assert np.allclose(rows, np.load(tmp_path / "y.npy")[[1, 0, 2, 0]], atol=1e-6)


def test_drawing_shows_the_codes_that_a_pair_picks(run, pictures, tmp_path, call):
    out = tmp_path / "deep/codes.png"
    flags = ("--image", pictures[0], pictures[1], "--caption", *TEXTS[:2], "--codes", "2")
    done = ask(call, "draw", "--run", run, *flags, "--out", out)
    assert Image.open(out).format == "PNG" and min(Image.open(out).size) > 300
    model, tokenizer, max_text = load_base_run(run)
    pairs = EvalPairs(Gallery(ImageFiles(pictures[:2]), TEXTS[:2], [0, 1]), tokenizer, 32, max_text)
    examples = [grounding_example(model, pairs, index) for index in range(2)]
    assert done["codes"] == [[int(e.codes[row]) for row in shared_codes(e, 2)] for e in examples]
    with Image.open(out) as picture:
        small = np.asarray(picture.convert("L"))
    again = tmp_path / "other.png"
    ask(call, "draw", "--run", run, "--image", pictures[2], pictures[1], *flags[3:], "--out", again)
    assert not np.array_equal(small, np.asarray(Image.open(again).convert("L")))


def test_the_picture_under_the_heat_is_the_part_that_the_model_sees(run, pictures):
    model, tokenizer, max_text = load_base_run(run)
    pairs = EvalPairs(Gallery(ImageFiles(pictures), TEXTS, [0, 1, 2]), tokenizer, 32, max_text)
    whole = read_image(pictures[1])
    example = grounding_example(model, pairs, 1)
    assert whole.shape == (36, 60, 3) and np.array_equal(example.image, whole[:, 12:48])
    # Only what lies in it reaches the model.
    outside, inside = whole.copy(), whole.copy()
    outside[:, :10], inside[:, 14:20] = 0, 0
    seen = eval_transform(32)
    assert torch.equal(seen(outside), seen(whole)) and not torch.equal(seen(inside), seen(whole))
    assert grounding_example(model, pairs, 2).image.shape == (34, 34, 3)


@pytest.mark.parametrize(
    "decode", [(), ("--decode", "greedy"), ("--beams", "2"), ("--decode", "sample", "--seed", "3")]
)
def test_captions_are_the_tasks(run, pictures, tmp_path, call, decode):
    config = CaptionConfig(beams=3, max_length=8, min_length=2, decode_batch=2, data=CaptionData(embedded=True))
    net, tokenizer = fine_tuned(tmp_path / "task", run, config, {}, torch.nn.Identity())
    found = ask(call, "caption", "--run", tmp_path / "task", "--image", *pictures, *decode)
    given = dict(zip(decode[::2], decode[1::2], strict=True))
    chosen = replace(config, decode=given.get("--decode", "beam"), beams=int(given.get("--beams", 3)))
    images = torch.stack([eval_transform(32)(image) for image in ImageFiles(pictures, resolution=32)])
    draws = torch.Generator().manual_seed(int(given.get("--seed", 1)))
    expected = [
        text for part in images.split(2) for text in caption(net.base, part, chosen, tokenizer, generator=draws)
    ]
    assert [row["caption"] for row in found] == expected and all(expected)
    assert [row["image"] for row in found] == [str(path) for path in pictures]


ANSWERS = ["red", "two", "yes", "no", "a square"]


@pytest.fixture(scope="module")
def vqa_run(run, tmp_path_factory):
    """A run's folder, its network and its tokenizer."""
    folder = tmp_path_factory.mktemp("vqa") / "task"
    config = VqaConfig(dropout=0.0, data=VqaData(max_text=12))
    base = load_base_run(run)
    task = VisualQuestionAnswering(config, base.tokenizer, 32, BadData())
    task.answers = list(ANSWERS)
    torch.manual_seed(2)
    head = task.make_head(base.model)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return folder, *fine_tuned(folder, run, config, {"answers": ANSWERS}, head)


def test_answers_are_the_heads_best_first(vqa_run, pictures, call):
    folder, net, tokenizer = vqa_run
    questions = ["what colour is the square?", "is there red near the top?"]
    found = ask(call, "answer", "--run", folder, "--image", *pictures, "--question", *questions, "--top", "2")
    assert [(row["question"], row["image"]) for row in found] == [(q, str(p)) for q in questions for p in pictures]
    images = [eval_transform(32)(image)[None] for image in ImageFiles(pictures, resolution=32)]
    for number, row in enumerate(found):
        tokens = torch.tensor(tokenizer.encode(row["question"], 12))[None]
        joint = encode(net.base, images[number % 3], tokens, torch.ones_like(tokens).bool())
        with torch.no_grad():
            shares = net.head(pooled(net.base, joint))[0].sigmoid()
        best = sorted(range(len(ANSWERS)), key=lambda place: -shares[place])[:2]
        assert [one["answer"] for one in row["answers"]] == [ANSWERS[place] for place in best]
        assert [one["score"] for one in row["answers"]] == pytest.approx([float(shares[p]) for p in best], abs=1e-5)
    everything = ask(call, "answer", "--run", folder, "--image", pictures[0], "--question", "red?", "--top", "99")
    assert sorted(one["answer"] for one in everything[0]["answers"]) == sorted(ANSWERS)


def test_a_fine_tuned_run_scores_with_its_base(run, vqa_run, pictures, call):
    flags = ("--image", pictures[0], "--caption", TEXTS[0])
    assert ask(call, "score", "--run", vqa_run[0], *flags) == ask(call, "score", "--run", run, *flags)


def test_help_lists_the_commands_and_their_flags(call):
    done = call(predict)
    assert done.code == 0 and all(f"\n  {name} " in done.out for name in predict.COMMANDS)
    assert call(predict, "--help").out == done.out
    for name in predict.COMMANDS:
        done = call(predict, name, "--help")
        assert done.code == 0 and "--run" in done.out


def test_mistakes_are_one_line(run, vqa_run, pictures, tmp_path, call):
    picture, out = pictures[0], tmp_path / "x.npy"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for flags, words in (
        (["sing"], ["sing", "score", "draw"]),
        (["score", "--run", run, "--imge", picture], ["--imge", "--image"]),
        (["score", "--run", run, "--image", picture], ["--caption"]),
        (["score", "--run", run, "--caption", "a"], ["--image"]),
        (["score", "--run", run, "--image", tmp_path / "none.png", "--caption", "a"], ["none.png", "no such file"]),
        (["score", "--run", run, "--image", run / "config.json", "--caption", "a"], ["config.json", "give a picture"]),
        (["score", "--run", tmp_path / "none", "--image", picture, "--caption", "a"], ["--run", "none"]),
        (["score", "--run", run, "--image", picture, "--caption", "a", "--device", "gpu"], ["--device gpu"]),
        (["caption", "--run", run, "--image", picture], ["pretrain", "captioning"]),
        (["caption", "--run", run, "--image", picture, "--beams", "0"], ["--beams"]),
        (["caption", "--run", run, "--image", picture, "--decode", "best"], ["--decode", "best"]),
        (["answer", "--run", run, "--image", picture, "--question", "a"], ["pretrain", "vqa"]),
        (["answer", "--run", vqa_run[0], "--image", picture], ["--question"]),
        (["answer", "--run", vqa_run[0], "--image", picture, "--question", "a", "--top", "0"], ["--top"]),
        (["embed", "--run", run, "--out", out], ["--images", "--texts"]),
        (["embed", "--run", run, "--images", picture, "--texts", run / "config.json"], ["--images", "--texts"]),
        (["embed", "--run", run, "--images", picture, "--out", tmp_path / "x.txt"], ["--out", ".npy"]),
        (["embed", "--run", run, "--texts", tmp_path / "empty.txt", "--out", out], ["empty.txt"]),
        (["embed", "--run", run, "--texts", tmp_path / "none.txt", "--out", out], ["none.txt"]),
        (["embed", "--run", run, "--images", tmp_path / "folder", "--out", out], ["folder", "no picture"]),
        (["embed", "--run", run, "--images", tmp_path / "none.png", "--out", out], ["none.png", "no such file"]),
        (["draw", "--run", run, "--image", picture, "--out", tmp_path / "x.png"], ["1 pictures and 0 captions"]),
        (["draw", "--run", run, "--image", picture, "--caption", "a", "--out", out], ["--out", ".png"]),
        (["draw", "--run", run, "--image", picture, "--caption", "a", "--codes", "0"], ["--codes"]),
    ):
        one_line(call(predict, *flags), *words)
    assert not out.exists() and not (tmp_path / "x.png").exists()


def test_drawing_needs_codes(tmp_path, pictures, call):
    folder = write_run(tmp_path / "run", replace(SMALL, grounding=GROUNDING["none"]))
    one_line(call(predict, "draw", "--run", folder, "--image", pictures[0], "--caption", "a"), folder, "top-k")
