"""Fine-tuning for retrieval: the losses against pairs scored one by one, what is drawn, runs, blind runs, mistakes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from vlblocks.data import BadData
from vlblocks.losses import draw_hard_negatives
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import train
from vlblocks_recipes.unimo2.runs import load_run, load_task
from vlblocks_recipes.unimo2.tasks import retrieval
from vlblocks_recipes.unimo2.tasks.base import TaskModel, encode
from vlblocks_recipes.unimo2.tasks.retrieval import Retrieval, RetrievalConfig, RetrievalData, sampled_pairs

RECALLS = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]


@pytest.fixture
def task_of(checkpoint):
    """A task on the random checkpoint and a few scenes, in float64: task_of(objective=...) -> (task, model)."""

    def make(**fields):
        torch.set_num_threads(1)
        _, model, tokenizer = load_run(checkpoint)
        # As after pre-training, scores differ from pair to pair.
        torch.nn.init.normal_(model.matching.dense.weight, std=1.0)
        config = RetrievalConfig(data=RetrievalData(embedded=True, scenes=30, held_out=12), **fields)
        task = Retrieval(config, tokenizer, model.config.image_size, BadData())
        return task, TaskModel(model.double(), torch.nn.Identity()).eval()

    return make


def batch_of(task, indices):
    examples = task.dataset("train")
    batch = task.batch([examples[0, index] for index in indices])
    assert batch.pop("skipped") == []
    return {**batch, "image": batch["image"].double()}


@torch.no_grad()
def pair_score(model, batch, image, text):
    """[no match, match] logits and the contrastive score of one pair, alone."""
    valid = batch["valid"][text]
    pixels, tokens = batch["image"][image][None], batch["tokens"][text][valid][None]
    features = model.features("image", model.image(pixels))[0], model.features("text", model.text(tokens))[0]
    logits = model.match_logits(encode(model, pixels, tokens, torch.ones_like(tokens, dtype=torch.bool)))[0]
    return logits, F.cosine_similarity(features[0], features[1], dim=0) * features[1].norm()


@pytest.mark.parametrize("negatives", [3, 50])
def test_circle_loss_is_that_of_pairs_scored_one_by_one(task_of, negatives):
    task, net = task_of(objective="circle", negatives=negatives, grounding=0.0, margin=0.3, scale=2.0)
    batch = batch_of(task, range(6))
    found = task.loss(net, batch, torch.Generator().manual_seed(5))
    images, texts = sampled_pairs(batch["image_id"], negatives, torch.Generator().manual_seed(5))
    assert images.shape == texts.shape == (6, 1 + 2 * min(negatives, 5))
    rows = []
    for row in range(6):
        scores = []
        for image, text in zip(images[row].tolist(), texts[row].tolist(), strict=True):
            logits, contrast = pair_score(net.base, batch, image, text)
            scores.append(float(logits[1] + 0.3 * contrast))
        true, wrong = scores[0], scores[1:]
        pull = math.exp(-2 * max(1.3 - true, 0) * (true - 0.7))
        push = sum(math.exp(2 * max(score + 0.3, 0) * (score - 0.3)) for score in wrong)
        rows.append(math.log(1 + push * pull))
    assert max(rows) - min(rows) > 0.1
    assert found.item() == pytest.approx(sum(rows) / 6, rel=1e-6)


def test_contrast_and_matching_are_those_of_pairs_scored_one_by_one(task_of):
    task, net = task_of(objective="itc_itm", grounding=0.0)
    batch = batch_of(task, range(5))
    found = task.loss(net, batch, torch.Generator().manual_seed(5))
    scores = [[pair_score(net.base, batch, image, text) for text in range(5)] for image in range(5)]
    similarity = torch.tensor([[float(contrast) for _, contrast in row] for row in scores]).double()
    similarity = similarity / net.base.temperature().item()
    own = torch.arange(5)
    contrast = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    # Features whose products are the similarities.
    features = similarity.float(), torch.eye(5)
    drawn = draw_hard_negatives(*features, temperature=1.0, generator=torch.Generator().manual_seed(5))
    pairs = [(i, i, 1) for i in range(5)] + [(i, int(t), 0) for i, t in enumerate(drawn.text_for_image)]
    pairs += [(int(i), t, 0) for t, i in enumerate(drawn.image_for_text)]
    matching = torch.stack([-scores[i][t][0].log_softmax(0)[label] for i, t, label in pairs]).mean()
    assert found.item() == pytest.approx(float(contrast + matching), rel=1e-6)


@pytest.mark.parametrize("objective", ["circle", "itc_itm"])
def test_all_that_a_score_passes_through_learns(task_of, objective):
    task, net = task_of(objective=objective, negatives=4, grounding=0.5)
    task.loss(net, batch_of(task, range(8)), torch.Generator().manual_seed(0)).backward()
    idle = {"masked_token", "masked_code"}
    for name, part in net.base.named_children():
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        # The contrastive temperature scales the contrast alone, and the original's score has none.
        if name not in idle and list(part.parameters()) and not (name == "contrastive" and objective == "circle"):
            assert any(grad.abs().sum() > 0 for grad in grads), name
    words = {name for name, p in net.base.text.named_parameters() if p.grad is None}
    assert not words, words


def test_wrong_pairs_are_others_each_drawn_once_and_anew_each_time():
    ids = torch.tensor([7, 3, 7, 5, 9, 1])
    generator = torch.Generator().manual_seed(0)
    draws = set()
    for _ in range(60):
        images, texts = sampled_pairs(ids, 2, generator)
        assert images.shape == texts.shape == (6, 5)
        own = torch.arange(6)
        assert torch.equal(images[:, 0], own) and torch.equal(texts[:, 0], own)
        # First wrong images with the own caption, then wrong captions with the own image.
        assert (texts[:, 1:3] == own[:, None]).all() and (images[:, 3:] == own[:, None]).all()
        for wrong in (images[:, 1:3], texts[:, 3:]):
            assert (ids[wrong] != ids[:, None]).all() and (wrong[:, 0] != wrong[:, 1]).all()
        draws.add(tuple(sorted(images[0, 1:3].tolist())))
    # The two pictures of id 7 have four others, hence six draws of two.
    assert draws == {(1, 3), (1, 4), (1, 5), (3, 4), (3, 5), (4, 5)}
    images, _ = sampled_pairs(ids, 10, generator)
    assert images.shape == (6, 1 + 2 * 4)
    assert sampled_pairs(torch.tensor([4, 4]), 10, generator)[0].shape == (2, 1)


@pytest.mark.parametrize("objective", ["circle", "itc_itm"])
def test_a_run_on_scenes_evaluates_as_it_did(quick, tmp_path, call, objective):
    flags = ("--task", "retrieval", *quick, "--objective", objective, "--rerank", "4", "--out", tmp_path)
    done = call(train, *flags)
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["val/gallery_size"] == 40 and 4 * 40 <= metrics["val/rerank_pairs_scored"] <= 8 * 40
    assert metrics["val/recall_mean"] == pytest.approx(sum(metrics[f"val/rerank_{name}"] for name in RECALLS) / 6)

    done = call(evaluation, "--run", tmp_path, "--task", "retrieval", "--rerank", "4", "--split", "val")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {name: found[name] for name in (*RECALLS, "rerank_text_to_image_r1", "codes_used")} == {
        name: metrics[f"val/{name}"] for name in (*RECALLS, "rerank_text_to_image_r1", "codes_used")
    }
    test = json.loads(call(evaluation, "--run", tmp_path, "--rerank", "all").out)
    assert test["rerank_pairs_scored"] == 40 * 40 and test["gallery_size"] == 40


def test_a_run_on_karpathys_files(squares, quick, tmp_path, call):
    flags = [flag for flag in quick if flag != "--data.embedded"]
    done = call(
        train, "--task", "retrieval", *flags, "--data.root", squares, "--data.val-images", "6", "--out", tmp_path
    )
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # Six pictures with two captions each.
    assert metrics["val/gallery_size"] == 6 and metrics["val/rerank_pairs_scored"] == 6 * 12
    found = json.loads(call(evaluation, "--run", tmp_path, "--rerank", "2").out)
    assert found["gallery_size"] == 12
    where = ("--pairs", squares / "dataset_squares.json", "--images", squares / "images")
    assert json.loads(call(evaluation, "--run", tmp_path, "--rerank", "2", *where).out) == found
    net = load_task(tmp_path, "retrieval").net
    assert sorted({name.partition(".")[0] for name in net.state_dict()}) == ["base"]


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_blind_run_sees_nothing_of_that_side(quick, squares, tmp_path, call, monkeypatch, side):
    seen = {"image": [], "text": []}
    own = retrieval.TaskPairs.image_batches, retrieval.TaskPairs.text_batches

    def images(self):
        for image in own[0](self):
            seen["image"].append(image)
            yield image

    def texts(self):
        for tokens, valid in own[1](self):
            seen["text"].append(tokens)
            yield tokens, valid

    monkeypatch.setattr(retrieval.TaskPairs, "image_batches", images)
    monkeypatch.setattr(retrieval.TaskPairs, "text_batches", texts)
    done = call(train, "--task", "retrieval", *quick, "--blind", side, "--out", tmp_path)
    assert done.code == 0, done.err
    other = "text" if side == "image" else "image"
    for rows, alike in ((torch.cat(seen[side]), True), (seen[other][0], False)):
        assert (rows == rows[0]).all().item() is alike
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # One of 40, as chance has it, give or take what rounding makes of equal scores.
    assert metrics["val/text_to_image_r1"] <= 0.05 and metrics["val/image_to_text_r1"] <= 0.05
    # Nor does eval.py, on the run's own pairs or on others.
    for flags in ((), ("--pairs", squares / "dataset_squares.json", "--images", squares / "images")):
        seen["image"].clear(), seen["text"].clear()
        done = call(evaluation, "--run", tmp_path, *flags)
        assert done.code == 0, done.err
        rows = torch.cat(seen[side])
        assert (rows == rows[0]).all()


def test_mistakes(quick, squares, tmp_path, call):
    plain = [flag for flag in quick if flag != "--data.embedded"]
    cases = [
        (plain, ["--data.root", "--data.embedded"]),
        ([*plain, "--data.root", tmp_path / "none"], [tmp_path / "none"]),
        ([*quick, "--objective", "triplet"], ["--objective", "circle", "itc_itm"]),
        ([*quick, "--rerank", "-1"], ["--rerank", "0 or more"]),
        ([*quick, "--negatives", "0"], ["--negatives", "at least 1"]),
        ([*quick, "--scale", "0"], ["--scale", "positive"]),
        ([*quick, "--data.min-crop", "0"], ["--data.min-crop"]),
    ]
    for flags, words in cases:
        done = call(train, "--task", "retrieval", *flags, "--out", tmp_path / "run")
        assert done.code == 2 and done.err.count("\n") == 1, done
        for word in words:
            assert str(word) in done.err, done.err
    (tmp_path / "data/images").mkdir(parents=True)
    only = json.loads((squares / "dataset_squares.json").read_text())
    only["images"] = [entry for entry in only["images"] if entry["split"] == "train"]
    (tmp_path / "data/dataset_only.json").write_text(json.dumps(only))
    for name in (entry["filename"] for entry in only["images"]):
        (tmp_path / "data/images" / name).symlink_to(squares / "images" / name)
    done = call(train, "--task", "retrieval", *plain, "--data.root", tmp_path / "data", "--out", tmp_path / "run")
    assert done.code == 2 and "no split 'val'" in done.err
