"""Image transforms: range, seeds of their own, flips, views."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from vlblocks.data import ImageTransform, TwoViews, eval_transform, seeded, train_transform
from vlblocks.errors import UserError


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(48, 80, 3), dtype=np.uint8)


def test_output_is_x_over_half_less_one() -> None:
    picture = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    out = eval_transform(32)(picture)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(out, eval_transform(32)(Image.fromarray(picture)))


def test_sizes_may_be_rectangular(picture: np.ndarray) -> None:
    assert train_transform((32, 64))(picture, 0).shape == (3, 32, 64)
    assert eval_transform((32, 64))(picture).shape == (3, 32, 64)
    views = TwoViews(train_transform(24))(picture, 0)
    assert views.image.shape == views.image2.shape == (3, 24, 24)


def test_a_seed_fixes_the_result_whatever_ran_before(picture: np.ndarray) -> None:
    transform = train_transform(32, flip=0.5, color_jitter=0.4, grayscale=0.2)
    first = transform(picture, 5)
    random.seed(99)
    torch.manual_seed(98)
    np.random.seed(97)
    assert torch.equal(transform(picture, 5), first)
    assert not torch.equal(transform(picture, 6), first)


def test_the_callers_random_states_are_put_back(picture: np.ndarray) -> None:
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    train_transform(32, color_jitter=0.4, flip=0.5)(picture, 3)
    with pytest.raises(RuntimeError, match="inside"), seeded(3, numpy=True):
        random.random()
        np.random.rand()
        torch.rand(1)
        raise RuntimeError("inside")
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_numpy_is_seeded_where_a_transform_needs_it(picture: np.ndarray) -> None:
    def noisy(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.random.randint(0, 255, size=(3, 8, 8), dtype=np.uint8))

    transform = ImageTransform(noisy, (8, 8), numpy=True)
    assert torch.equal(transform(picture, 1), transform(picture, 1))
    assert not torch.equal(transform(picture, 1), transform(picture, 2))


def test_captions_that_say_left_stay_true_unless_flips_are_asked_for() -> None:
    half = np.zeros((32, 32, 3), dtype=np.uint8)
    half[:, :16] = 255
    plain, flipped = train_transform(32), train_transform(32, flip=1.0)
    for seed in range(20):
        out = plain(half, seed)
        assert out[..., :8].mean() > out[..., -8:].mean()
        out = flipped(half, seed)
        assert out[..., :8].mean() < out[..., -8:].mean()


def test_two_views_differ(picture: np.ndarray) -> None:
    views = TwoViews(train_transform(32, scale=(0.3, 0.6)))(picture, 1)
    assert not torch.equal(views.image, views.image2)
    again = TwoViews(train_transform(32, scale=(0.3, 0.6)))(picture, 1)
    assert torch.equal(views.image, again.image)
    assert torch.equal(views.image2, again.image2)


def test_evaluation_keeps_the_centre() -> None:
    picture = np.zeros((40, 80, 3), dtype=np.uint8)
    picture[:, 20:60] = 255
    assert (eval_transform(40)(picture) == 1).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: train_transform(0), "image size"),
        (lambda: train_transform(32, scale=(0.9, 0.5)), "scale"),
        (lambda: train_transform(32, flip=2.0), "flip"),
        (lambda: eval_transform(32, crop=0.0), "crop"),
    ],
)
def test_wrong_settings_are_told(make, name: str) -> None:
    with pytest.raises(UserError, match=name):
        make()
