"""Streams: batches, order, shards, exact resume with and without workers, bad data."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlblocks.data import (
    BadData,
    CaptionedImages,
    EpochBatches,
    ImageDataset,
    ImageFiles,
    PairDataset,
    SceneCorpus,
    StreamMixer,
    TextDataset,
    Tokenizer,
    TwoViews,
    eval_transform,
    image_batches,
    pad_tokens,
    stream_loader,
    text_batches,
    train_tokenizer,
    train_transform,
)
from vlblocks.errors import UserError

SIZES = {"pairs": 4, "images": 3, "texts": 5}


@pytest.fixture(scope="module")
def corpus() -> SceneCorpus:
    return SceneCorpus(pairs=21, images=10, texts=17, test=6, image_size=32)


@pytest.fixture(scope="module")
def tokenizer(corpus: SceneCorpus) -> Tokenizer:
    return train_tokenizer([text for written in corpus.pairs.captions for text in written] + corpus.texts, 400)


def mixer(corpus: SceneCorpus, tokenizer: Tokenizer, **options: Any) -> StreamMixer:
    transform = train_transform(32, color_jitter=0.2)
    datasets = {
        "pairs": PairDataset(corpus.pairs, tokenizer=tokenizer, transform=transform),
        "images": ImageDataset(corpus.images, transform=TwoViews(transform)),
        "texts": TextDataset(corpus.texts, tokenizer=tokenizer),
    }
    return StreamMixer(datasets, options.pop("batch_sizes", SIZES), **options)


def flat(step: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{stream}.{name}": value for stream, batch in step.items() for name, value in batch.items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    one, two = flat(first), flat(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_step_is_as_the_recipes_expect(corpus: SceneCorpus, tokenizer: Tokenizer) -> None:
    step = next(mixer(corpus, tokenizer))
    assert list(step) == ["pairs", "images", "texts"]
    pairs = step["pairs"]
    assert set(pairs) == {"image", "tokens", "valid", "masked_tokens", "labels", "image_id"}
    assert set(step["images"]) == {"image", "image2"}
    assert set(step["texts"]) == {"tokens", "valid", "masked_tokens", "labels"}
    assert pairs["image"].shape == (4, 3, 32, 32)
    assert pairs["image"].dtype == torch.float32
    assert -1 <= pairs["image"].min() < pairs["image"].max() <= 1
    assert step["images"]["image2"].shape == (3, 3, 32, 32)
    for batch in (pairs, step["texts"]):
        tokens, valid, labels = batch["tokens"], batch["valid"], batch["labels"]
        assert tokens.dtype == labels.dtype == torch.long
        assert tokens.shape == valid.shape == labels.shape == batch["masked_tokens"].shape
        assert tokens.shape[1] % 8 == 0
        assert (tokens[:, 0] == 0).all()
        assert torch.equal(valid, tokens != 1)
        assert ((tokens == 2).sum(dim=1) == 1).all()
        chosen = labels != -100
        assert chosen.any(dim=1).all()
        assert torch.equal(labels[chosen], tokens[chosen])
        assert torch.equal(batch["masked_tokens"][~chosen], tokens[~chosen])
        assert not (chosen & ~valid).any()


def test_examples_are_the_scenes_they_say(corpus: SceneCorpus, tokenizer: Tokenizer) -> None:
    plain = PairDataset(corpus.pairs, tokenizer=tokenizer, transform=eval_transform(32))
    spoken = set()
    for epoch in range(12):
        example = plain[epoch, 7]
        assert example["image_id"] == 7
        assert torch.equal(example["image"], eval_transform(32)(corpus.pairs.images[7]))
        spoken.add(tokenizer.decode(example["tokens"]))
    assert spoken <= set(corpus.pairs.captions[7])
    assert len(spoken) > 2


def test_every_example_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    batches = EpochBatches(23, 5, seed=1)
    keys = [key for step in range(23) for key in batches.batch(step)]
    orders = [[index for epoch, index in keys if epoch == number] for number in range(5)]
    assert [sorted(order) for order in orders] == [list(range(23))] * 5
    assert len({tuple(order) for order in orders}) == 5
    walk = iter(batches)
    assert [next(walk) for _ in range(23)] == [batches.batch(step) for step in range(23)]
    assert EpochBatches(23, 5, seed=2).batch(0) != batches.batch(0)


def test_ranks_share_a_global_batch_without_overlap() -> None:
    whole = EpochBatches(20, 6, seed=3)
    parts = [EpochBatches(20, 2, seed=3, rank=rank, world_size=3) for rank in range(3)]
    for step in range(9):
        assert [key for part in parts for key in part.batch(step)] == whole.batch(step)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact_in_and_across_epochs(corpus: SceneCorpus, tokenizer: Tokenizer, workers: int) -> None:
    straight = mixer(corpus, tokenizer)
    steps = [next(straight) for _ in range(9)]
    assert straight.epochs()["images"] > 2
    first = mixer(corpus, tokenizer, num_workers=workers)
    for step in steps[:4]:
        assert same(next(first), step)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    resumed = mixer(corpus, tokenizer, num_workers=workers)
    resumed.load_state_dict(state)
    for step in steps[4:]:
        assert same(next(resumed), step)
    assert resumed.state_dict() == straight.state_dict()
    resumed.load_state_dict(state)
    assert same(next(resumed), steps[4])
    resumed.close()
    assert same(next(resumed), steps[5])
    resumed.close()


def test_loading_leaves_the_global_random_states_alone(corpus: SceneCorpus, tokenizer: Tokenizer) -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for _ in range(2):
        next(mixer(corpus, tokenizer))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_a_streams_loader_resumes_by_torchdatas_state_too(corpus: SceneCorpus, tokenizer: Tokenizer) -> None:
    dataset = TextDataset(corpus.texts, tokenizer=tokenizer)
    loader = stream_loader(dataset, EpochBatches(len(dataset), 4, seed=2))
    walk = iter(loader)
    for _ in range(5):
        next(walk)
    state = json.loads(json.dumps(loader.state_dict()))
    again = stream_loader(dataset, EpochBatches(len(dataset), 4, seed=2))
    again.load_state_dict(state)
    expected, resumed = next(walk), next(iter(again))
    assert torch.equal(expected["masked_tokens"], resumed["masked_tokens"])


def test_a_seed_changes_order_and_examples(corpus: SceneCorpus, tokenizer: Tokenizer) -> None:
    ids = [next(mixer(corpus, tokenizer, seed=seed))["pairs"]["image_id"].tolist() for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    texts = [TextDataset(corpus.texts, tokenizer=tokenizer, seed=seed) for seed in range(6)]
    masks = {tuple(dataset[0, 3]["labels"].tolist()) for dataset in texts}
    assert len(masks) > 1
    assert len({tuple(texts[0][epoch, 3]["labels"].tolist()) for epoch in range(6)}) > 1


def test_streams_may_be_left_out(corpus: SceneCorpus, tokenizer: Tokenizer) -> None:
    only = mixer(corpus, tokenizer, batch_sizes={"pairs": 2, "images": 0})
    assert list(next(only)) == ["pairs"]


def test_mistakes_are_told(corpus: SceneCorpus, tokenizer: Tokenizer) -> None:
    for sizes, match in (
        ({"pairs": 22}, "pairs: batch size 22 for 21 examples"),
        ({"pairs": -1}, "pairs: batch size -1"),
        ({}, "batch_sizes"),
        ({"sounds": 3}, "'sounds' is unknown"),
    ):
        with pytest.raises(UserError, match=match):
            mixer(corpus, tokenizer, batch_sizes=sizes)
    with pytest.raises(UserError, match="on 2 processes for 21 examples"):
        mixer(corpus, tokenizer, batch_sizes={"pairs": 11}, world_size=2)
    with pytest.raises(UserError, match="no data"):
        StreamMixer({}, {"pairs": 1})
    with pytest.raises(UserError, match="no examples"):
        EpochBatches(0, 1)
    state = mixer(corpus, tokenizer).state_dict()
    with pytest.raises(UserError, match="'pairs' was saved"):
        mixer(corpus, tokenizer, batch_sizes={"pairs": 5, "images": 3, "texts": 5}).load_state_dict(state)
    with pytest.raises(UserError, match="'texts' was saved"):
        mixer(corpus, tokenizer, batch_sizes={"pairs": 4, "images": 3}).load_state_dict(state)


@pytest.fixture
def damaged(tmp_path: Path) -> CaptionedImages:
    """Twelve pictures of which numbers 5 and 6 are damaged."""
    paths = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(path)
        paths.append(path)
    paths[5].write_bytes(b"damaged")
    paths[6].write_bytes(b"")
    return CaptionedImages(ImageFiles(paths), [(f"number {i}",) for i in range(12)], list(range(100, 112)))


def damaged_mixer(data: CaptionedImages, tokenizer: Tokenizer, share: float, workers: int = 0) -> StreamMixer:
    dataset = PairDataset(data, tokenizer=tokenizer, transform=eval_transform(16))
    return StreamMixer({"pairs": dataset}, {"pairs": 4}, bad=BadData(share=share), num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_is_replaced_and_counted_and_resumes(
    damaged: CaptionedImages, tokenizer: Tokenizer, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = damaged_mixer(damaged, tokenizer, 0.5, workers)
    epoch = [next(first)["pairs"] for _ in range(3)]
    ids = sorted(i for batch in epoch for i in batch["image_id"].tolist())
    assert ids == [100, 101, 102, 103, 104, 107, 107, 107, 108, 109, 110, 111]
    for batch in epoch:
        for picture, number, tokens in zip(batch["image"], batch["image_id"].tolist(), batch["tokens"], strict=True):
            assert picture[0, 0, 0] == pytest.approx(20 * (number - 100) / 127.5 - 1)
            assert tokenizer.decode(tokens) == f"number {number - 100}"
    assert first.bad.counts() == {"pairs/image": 2}
    assert "5.png" in caplog.text
    assert "6.png" in caplog.text
    state = json.loads(json.dumps(first.state_dict()))
    expected = next(first)
    first.close()
    resumed = damaged_mixer(damaged, tokenizer, 0.5, workers)
    resumed.load_state_dict(state)
    assert resumed.bad.counts() == {"pairs/image": 2}
    caplog.clear()
    assert same(next(resumed), expected)
    assert not caplog.records
    resumed.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_pictures_stop_the_run(damaged: CaptionedImages, tokenizer: Tokenizer, workers: int) -> None:
    steps = damaged_mixer(damaged, tokenizer, 0.1, workers)
    with pytest.raises(UserError, match=r"\.png: .* 2 of 12 pairs/images are bad.*bad_share") as caught:
        for _ in range(3):
            next(steps)
    assert "\n" not in str(caught.value)
    steps.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_picture_at_all(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    data = CaptionedImages(ImageFiles(paths), [("x",)] * 4, list(range(4)))
    steps = damaged_mixer(data, tokenizer, 1.0, workers)
    with pytest.raises(UserError, match=r"^\S+\.png: no such file.*repair") as caught:
        next(steps)
    assert "\n" not in str(caught.value)
    steps.close()


def test_padding_is_to_eight_but_not_past_the_longest_allowed() -> None:
    rows = [[0, 5, 2], [0, *[7] * 8, 2]]
    assert pad_tokens(rows).shape == (2, 16)
    padded = pad_tokens(rows, max_length=12)
    assert padded.tolist() == [[0, 5, 2, *[1] * 9], [0, *[7] * 8, 2, 1, 1]]
    assert pad_tokens(rows, -100)[0, -1] == -100


def test_evaluation_batches_keep_the_order(corpus: SceneCorpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    gallery = corpus.test.gallery(captions_per_image=1)
    transform = eval_transform(32)
    pictures = torch.cat(list(image_batches(gallery.images, transform, batch_size=4)))
    assert torch.equal(pictures, torch.stack([transform(gallery.images[i]) for i in range(6)]))
    texts = [
        tokenizer.decode(row)
        for tokens, valid in text_batches(gallery.captions, tokenizer, batch_size=4)
        for row in tokens
        if valid.shape == tokens.shape
    ]
    assert texts == gallery.captions
    with pytest.raises(UserError, match=r"x\.png"):
        next(image_batches(ImageFiles([tmp_path / "x.png"]), transform))


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_of_like_lengths_hold_every_example_once_an_epoch(world_size):
    lengths = np.random.default_rng(3).integers(1, 60, size=1003)
    ranks = [
        EpochBatches(1003, 8, seed=4, rank=rank, world_size=world_size, lengths=lengths) for rank in range(world_size)
    ]
    plain = EpochBatches(1003, 8, seed=4)
    spreads: dict[str, list[int]] = {"like": [], "any": []}
    keys = []
    for step in range(3 * 1003 // (8 * world_size)):
        whole = [key for batches in ranks for key in batches.batch(step)]
        keys += whole
        if len({epoch for epoch, _ in whole}) == 1:
            spreads["like"].append(np.ptp([lengths[index] for _, index in whole]))
        spreads["any"].append(np.ptp([lengths[index] for _, index in plain.batch(step)]))
    for epoch in range(2):
        assert sorted(index for of, index in keys if of == epoch) == list(range(1003))
    assert np.mean(spreads["like"]) < 0.3 * np.mean(spreads["any"])
    # Epochs differ in order, and short and long batches come mixed.
    orders = [[index for of, index in keys if of == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]
    means = [np.mean(lengths[orders[0][start : start + 8]]) for start in range(0, 1000, 8)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5
