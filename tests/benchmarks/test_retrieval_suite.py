"""The two ways of the retrieval suite score alike, and its rows are what a whole evaluation gives."""

import re
import sys
from pathlib import Path

import pytest
import torch

from vlblocks.data import SceneCorpus, train_tokenizer
from vlblocks_recipes.unimo2.configs import ContrastConfig, GroundingConfig, ModelConfig, TowerConfig
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.retrieval import JointScorer, embed, evaluate_pairs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from suites import retrieval

    yield retrieval
    for name in ("suites", "suites.retrieval", "harness"):
        sys.modules.pop(name, None)


@pytest.fixture
def gallery(suite):
    """Twelve scenes with their sixty captions."""
    captions = [caption for written in SceneCorpus(pairs=60, test=0).pairs.captions for caption in written]
    return suite.gallery_of(12, 32, train_tokenizer(captions, 400), 64)


def model_of(vocab):
    tower = TowerConfig(layers=1, heads=2, hidden=32, dropout=0.0)
    torch.manual_seed(0)
    model = Unimo2(
        ModelConfig(
            width=32,
            image=tower,
            text=tower,
            joint=tower,
            image_size=32,
            vocab=vocab,
            positions=66,
            grounding=GroundingConfig(codes=32, picks=4),
            contrast=ContrastConfig(pool="mean", width=32),
        )
    )
    # Scores that differ between pairs, as a trained model's do.
    for part in (model.matching, model.image_pool, model.text_pool):
        torch.nn.init.normal_(next(part.parameters()), std=1.0)
    return model.eval()


def test_both_ways_score_pairs_alike(suite, gallery):
    model = model_of(gallery.tokenizer.vocab_size).double()
    images, texts = suite.sampled(gallery, 150)
    assert len({(i, t) for i, t in zip(images.tolist(), texts.tolist(), strict=True)}) == 150
    pixels, tokens, valid = suite.prepared(gallery, images, texts)
    found = suite.original_scores(model, pixels.double(), tokens, valid)
    embedded = embed(model, (batch.double() for batch in gallery.image_batches()), gallery.text_batches())
    ours = JointScorer(model, embedded)(images, texts)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, found.float(), rtol=1e-4, atol=1e-5)


def test_rows(suite, gallery):
    model = model_of(gallery.tokenizer.vocab_size)
    every, *lists = suite.agreement(model, gallery)
    assert [row.provider for row in lists] == ["--rerank 64", "--rerank 16"] and not every.ours
    # 64 candidates are all there are; 16 are fewer than the sixty captions.
    whole = evaluate_pairs(model, gallery, depth="all", quiet=True)
    short = evaluate_pairs(model, gallery, depth=16, quiet=True)
    assert lists[0].error == 0
    assert lists[1].error == max(abs(short[f"rerank_{name}"] - whole[f"rerank_{name}"]) for name in suite.RECALLS)
    assert f"{100 * whole['rerank_image_to_text_r5']:.1f}" in every.note

    rows = {row.provider: row for row in suite.times(model, gallery, 100)}
    assert {row.shape for row in rows.values()} == {"12 images x 60 captions"}
    original = rows["the original's way"]
    seconds = float(re.search(r"took ([0-9.]+) s", original.note).group(1))
    assert original.note.startswith("extrapolated: 100 of 720 pairs") and not original.ours
    assert original.p50_ms == pytest.approx(7.2e3 * seconds, abs=7.2e3 * 0.05)
    assert rows["--rerank all"].note.startswith("extrapolated")
    assert rows["--rerank 16"].note.startswith(f"{short['rerank_pairs_scored']} of 720 pairs scored")
    assert rows["--rerank 16"].ours and rows["--rerank 16"].p50_ms > 0
