"""eval.py: one JSON on stdout, equal to what training reported, and re-ranking that equals scoring every pair."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vlblocks.data import BadData
from vlblocks.evaluation import retrieval_ranks, summarize_ranks
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import retrieval, runs, train
from vlblocks_recipes.unimo2.corpus import EvalPairs, heldout_pairs
from vlblocks_recipes.unimo2.objectives import lookup

RANKS = {f"{way}_{what}" for way in ("text_to_image", "image_to_text") for what in ("r1", "r5", "r10", "median_rank")}
CODES = {"codes_used", "code_perplexity_image", "code_perplexity_text", "code_overlap_pair", "code_overlap_random"}


def evaluate(call, *flags):
    done = call(evaluation, *flags)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found.pop("task") == "retrieval"
    assert all(type(value) in (int, float) for name, value in found.items() if name != "split")
    return found


@pytest.fixture
def run_of(on_squares, tmp_path, call, no_report):
    """A run on the small data set, its matching head made to tell pairs apart: run_of(*flags) is its folder."""

    def make(*flags):
        out = tmp_path / "run"
        done = call(train, *on_squares, "--precision", "fp32", "--max-steps", "2", *flags, "--out", out)
        assert done.code == 0, done.err
        weights = load_file(out / "model.safetensors")
        # Two steps leave all scores alike; without differences between pairs a wrong pair would not show.
        for name in ("matching.dense.weight", "text_pool.dense.weight", "image_pool.dense.weight"):
            weights[name] = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(7))
        save_file(weights, out / "model.safetensors")
        return out

    return make


def test_held_out_pairs_give_what_training_reported(trained, call):
    found = evaluate(call, "--run", trained.folder, "--task", "retrieval")
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    assert found.keys() == RANKS | CODES | {"gallery_size", "skipped", "split"}
    skipped, split = found.pop("skipped"), found.pop("split")
    assert skipped == 0 and split == "test" and found == {name: metrics[f"val/{name}"] for name in found}


def test_a_data_set_of_ones_own(trained, squares, call):
    where = ("--pairs", squares / "dataset_squares.json", "--images", squares / "images")
    found = evaluate(call, "--run", trained.folder, *where, "--rerank", "4")
    again = {f"rerank_{name}" for name in RANKS} | {"rerank_pairs_scored"}
    assert found.keys() == RANKS | CODES | again | {"gallery_size", "skipped", "split"}
    assert found["gallery_size"] == 12 and found["split"] == "test"
    # Of 12 x 24 pairs, the 4 best of each query, some of them on both lists.
    assert 4 * 24 <= found["rerank_pairs_scored"] <= 4 * (12 + 24)
    found = evaluate(call, "--run", trained.folder, *where, "--split", "val")
    assert found["gallery_size"] == 10 and found["split"] == "val"


def test_a_split_of_the_run_s_own_data(run_of, trained, call):
    folder = run_of()
    sizes = {split: evaluate(call, "--run", folder, "--split", split) for split in ("train", "val", "test")}
    assert {split: found["gallery_size"] for split, found in sizes.items()} == {"train": 24, "val": 10, "test": 12}
    assert all(found["split"] == split for split, found in sizes.items())
    # What the run held out itself.
    assert evaluate(call, "--run", folder) == sizes["val"]
    assert evaluate(call, "--run", trained.folder, "--split", "val")["gallery_size"] == 1000
    for run in (folder, trained.folder):
        done = call(evaluation, "--run", run, "--split", "tset")
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert all(word in done.err for word in ("tset", "train", "val", "test"))


@torch.no_grad()
def scores_of_every_pair(folder):
    """[I, T] scores of spec item 26, each pair alone through towers, codes and joint tower."""
    config, model, tokenizer = runs.load_run(folder)
    gallery = heldout_pairs(config, BadData())
    pairs = EvalPairs(gallery, tokenizer, config.model.image_size, config.data.max_text)
    rows = []
    for index in range(len(pairs)):
        image = model.image(pairs.image(index)[None])
        row = []
        for caption in gallery.captions:
            tokens = torch.tensor(tokenizer.encode(caption, config.data.max_text))[None]
            text = model.text(tokens)
            joint = model.fuse(image=image, codes=lookup(model, image, text).codes, text=text)
            contrast = F.normalize(model.features("image", image), dim=-1) * model.features("text", text)
            row.append(model.match_logits(joint)[0, 1] + 0.3 * contrast.sum())
        rows.append(torch.stack(row))
    return torch.stack(rows), pairs.text_image


KINDS = [(), ("--no-grounding",), ("--model.grounding.method", "nearest")]


@pytest.mark.parametrize("flags", KINDS, ids=["grounded", "no grounding", "a code for each token"])
def test_reranking_everything_equals_scoring_every_pair(run_of, call, flags):
    folder = run_of(*flags)
    scores, text_image = scores_of_every_pair(folder)
    assert scores.std() > 0.1
    expected = summarize_ranks(retrieval_ranks(scores, text_image))
    found = evaluate(call, "--run", folder, "--rerank", "1000")
    assert evaluate(call, "--run", folder, "--rerank", "all") == found
    assert {name: found[f"rerank_{name}"] for name in RANKS} == {name: expected[name] for name in RANKS}
    assert found["rerank_pairs_scored"] == scores.numel()
    assert any(found[f"rerank_{name}"] != found[name] for name in RANKS)
    assert (found.keys() >= CODES) == (not flags)


@pytest.mark.parametrize("flags", KINDS, ids=["grounded", "no grounding", "a code for each token"])
def test_however_few_pairs_pass_the_joint_tower_at_once(run_of, flags):
    config, model, tokenizer = runs.load_run(run_of(*flags))
    found = heldout_pairs(config, BadData())
    pairs = EvalPairs(found, tokenizer, config.model.image_size, config.data.max_text)
    gallery = retrieval.embed(model, pairs.image_batches(), pairs.text_batches())
    lengths = gallery.text_valid.sum(1)
    # Texts of several lengths, of each more than pass at once.
    assert len(lengths.unique()) > 1
    images, texts = torch.meshgrid(torch.arange(len(pairs)), torch.arange(len(lengths)), indexing="ij")
    scores = [
        retrieval.JointScorer(model, gallery, states=states)(images.flatten(), texts.flatten())
        for states in (None, 60, 90, 120)
    ]
    assert scores[0].std() > 0.1
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-4, atol=1e-4)


def test_folds_are_galleries_of_their_own(run_of, call):
    folder = run_of()
    scores, text_image = scores_of_every_pair(folder)
    # Ten images in three parts, as equal as can be, each with its two captions.
    parts = [(0, 4), (4, 7), (7, 10)]
    by_hand = [
        summarize_ranks(retrieval_ranks(scores[first:last, 2 * first : 2 * last], text_image[: 2 * (last - first)]))
        for first, last in parts
    ]
    found = evaluate(call, "--run", folder, "--rerank", "all", "--folds", "3")
    assert found["folds"] == 3 and found["gallery_size"] == pytest.approx(10 / 3)
    assert found["rerank_pairs_scored"] == sum(2 * (last - first) ** 2 for first, last in parts)
    for name in RANKS:
        assert found[f"rerank_{name}"] == pytest.approx(sum(part[name] for part in by_hand) / 3)
    listed = evaluate(call, "--run", folder, "--rerank", "8", "--folds", "3")
    assert {name: listed[f"rerank_{name}"] for name in RANKS} == {name: found[f"rerank_{name}"] for name in RANKS}


def test_a_killed_evaluation_continues_with_the_scores_it_had(run_of, call, tmp_path, monkeypatch):
    folder, out = run_of(), tmp_path / "evaluation"
    flags = ("--run", folder, "--rerank", "all")
    whole, bars, bar = evaluate(call, *flags), {}, retrieval._bar

    def kept_bar(total, unit, quiet):
        bars[unit] = bar(total, unit, quiet)
        return bars[unit]

    monkeypatch.setattr(retrieval, "_bar", kept_bar)
    monkeypatch.setattr(retrieval, "score_every_pair", partial(retrieval.score_every_pair, block=16))
    own, scored = retrieval.JointScorer._batch, []

    def until(limit):
        def batch(self, images, texts, longest):
            if sum(scored) >= limit:
                raise KeyboardInterrupt
            scored.append(len(images))
            return own(self, images, texts, longest)

        monkeypatch.setattr(retrieval.JointScorer, "_batch", batch)

    until(limit=50)
    assert call(evaluation, *flags, "--out", out).code == 130
    first = sum(scored)
    assert 50 <= first < 200
    scored.clear()
    until(limit=1000)
    found = evaluate(call, *flags, "--out", out)
    # What was scored in blocks that ended is not scored again.
    assert sum(scored) == 200 - found["rerank_pairs_recalled"] and found["rerank_pairs_recalled"] >= first - 16 > 0
    assert {**found, "rerank_pairs_recalled": 0} == {**whole, "rerank_pairs_recalled": 0}
    assert json.loads((out / "retrieval.json").read_text()) == {"task": "retrieval", **found}
    # What was known already tells nothing of the time that the rest takes.
    assert bars["pair"].n == 200 and bars["pair"].n - bars["pair"].initial == sum(scored)

    # The same pairs serve a shorter list and folds; another model's or other data's do not.
    scored.clear()
    assert evaluate(call, "--run", folder, "--rerank", "4", "--folds", "2", "--out", out)["rerank_pairs_recalled"] > 0
    assert not scored
    weights = load_file(folder / "model.safetensors")
    weights["matching.dense.weight"] += 0.1
    save_file(weights, folder / "model.safetensors")
    assert evaluate(call, *flags, "--out", out)["rerank_pairs_recalled"] == 0
    assert sum(scored) == 200


def test_progress_is_shown_with_the_time_left(run_of, call):
    done = call(evaluation, "--run", run_of(), "--rerank", "all")
    assert json.loads(done.out)["rerank_pairs_scored"] == 200
    for line in ("images: 100%", "captions: 100%", "pairs: 100%"):
        assert line in done.err
    assert re.search(r"200/200 \[\d\d:\d\d<\d\d:\d\d, .*pair/s\]", done.err), done.err


def test_reranking_one_candidate_keeps_the_first(run_of, call):
    found = evaluate(call, "--run", run_of(), "--rerank", "1")
    for way in ("text_to_image", "image_to_text"):
        assert found[f"rerank_{way}_r1"] == found[f"{way}_r1"]


def test_every_image_and_caption_passes_its_tower_once(run_of, call, monkeypatch):
    folder = run_of()
    counts = {"image": 0, "text": 0}
    own, rows = runs.load_run, {"image": 0, "text": 0}

    def counted(run, weights):
        config, model, tokenizer = own(run, weights)
        for name in counts:

            def count(module, args, name=name):
                counts[name] += len(args[0])

            getattr(model, name).register_forward_pre_hook(count)
        return config, model, tokenizer

    def looked_up(model, image=None, text=None, **more):
        for name, states in (("image", image), ("text", text)):
            rows[name] += 0 if states is None else len(states)
        return lookup(model, image, text, **more)

    monkeypatch.setattr(evaluation, "load_run", counted)
    monkeypatch.setattr(retrieval, "lookup", looked_up)
    found = evaluate(call, "--run", folder, "--rerank", "8")
    assert found["rerank_pairs_scored"] > 80
    # Nor are a pair's codes: both sides' scores are added.
    assert counts == rows == {"image": 10, "text": 20}


def test_the_states_are_kept_only_for_the_joint_tower(run_of, call, monkeypatch):
    folder, kept, own = run_of(), [], retrieval.embed
    monkeypatch.setattr(retrieval, "embed", lambda *args, **more: kept.append(own(*args, **more)) or kept[-1])
    plain = evaluate(call, "--run", folder)
    reranked = evaluate(call, "--run", folder, "--rerank", "2")
    assert all(reranked[name] == plain[name] for name in plain)
    assert [part.image_states is None and part.text_states is None for part in kept] == [True, False]
    assert kept[0].image_features.shape == kept[1].image_features.shape


def test_skipped_images_are_counted(run_of, own_squares, call):
    folder = run_of("--data.max-bad-share", "0.1")
    (own_squares / "images/test_04.png").write_bytes(b"")
    where = ("--pairs", own_squares / "dataset_squares.json", "--images", own_squares / "images")
    found = evaluate(call, "--run", folder, *where)
    assert found["skipped"] == 1 and found["gallery_size"] == 11


def test_mistakes(trained, squares, tmp_path, call):
    json_file, images = squares / "dataset_squares.json", squares / "images"
    (tmp_path / "other.json").write_text("[]")
    cases = [
        (("--run", tmp_path / "none"), ["--run", tmp_path / "none", "no such folder"]),
        (("--run", tmp_path), [tmp_path / "config.json", "no such file"]),
        (("--pairs", json_file), ["--pairs, --images", "both"]),
        (("--images", images), ["--pairs, --images", "both"]),
        (("--rerank", "-1"), ["--rerank", "0 or more"]),
        (("--rerank", "every"), ["--rerank"]),
        (("--folds", "0"), ["--folds", "1 or more"]),
        (("--folds", "401"), ["--folds", "400 images", "at most 400"]),
        (("--split", "tset", "--pairs", json_file, "--images", images), [json_file, "'tset'", "test, train, val"]),
        (("--pairs", tmp_path / "other.json", "--images", images), [tmp_path / "other.json", "Karpathy"]),
        (("--pairs", json_file, "--images", tmp_path), [tmp_path, "test_00.png"]),
        (("--pears", json_file), ["--pears", "--pairs"]),
        (("--task", "sorting"), ["--task", "retrieval"]),
    ]
    for flags, words in cases:
        done = call(evaluation, "--run", trained.folder, *flags)
        assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done
        assert done.err.startswith("error: ")
        for word in words:
            assert str(word) in done.err, done.err


def test_a_run_with_a_tokenizer_of_another_size(trained, tmp_path, call):
    from vlblocks.data import train_tokenizer

    folder = shutil.copytree(trained.folder, tmp_path / "run")
    train_tokenizer(["a few words"], 262).save(folder / "tokenizer.json")
    done = call(evaluation, "--run", folder)
    assert done.code == 2 and done.err.count("\n") == 1 and str(folder / "model.safetensors") in done.err
