"""Whole-word span masking: its share, its 80 / 10 / 10, whole words, spans, and what is never touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlblocks.data import SpanMasking
from vlblocks.errors import UserError

MASK = 999


def text(rng: np.random.Generator, words: int, longest: int = 3) -> tuple[np.ndarray, np.ndarray]:
    sizes = rng.integers(1, longest + 1, size=words)
    body = rng.integers(4, MASK, size=sizes.sum())
    starts = np.zeros(sizes.sum() + 2, dtype=bool)
    starts[[0, -1]] = True
    starts[1 + np.concatenate([[0], np.cumsum(sizes)[:-1]])] = True
    return np.concatenate([[0], body, [2]]), starts


def test_share_and_fates_are_as_set() -> None:
    rng = np.random.default_rng(0)
    masking = SpanMasking()
    tokens, starts = text(rng, 40)
    hidden, total, masked, kept, swapped = 0, 0, 0, 0, 0
    for _ in range(1500):
        out = masking(tokens, starts, rng, mask_id=MASK)
        chosen = out.labels != -100
        assert (out.labels[chosen] == tokens[chosen]).all()
        assert (out.tokens[~chosen] == tokens[~chosen]).all()
        hidden += chosen.sum()
        total += len(tokens) - 2
        masked += (out.tokens[chosen] == MASK).sum()
        kept += (out.tokens[chosen] == tokens[chosen]).sum()
        swapped += ((out.tokens[chosen] != tokens[chosen]) & (out.tokens[chosen] != MASK)).sum()
    assert hidden / total == pytest.approx(0.15, abs=0.003)
    assert masked / hidden == pytest.approx(0.8, abs=0.015)
    assert kept / hidden == pytest.approx(0.1, abs=0.015)
    assert swapped / hidden == pytest.approx(0.1, abs=0.015)


def test_spans_are_geometric_and_never_longer_than_the_longest() -> None:
    tokens = np.concatenate([[0], np.arange(4, 804), [2]])
    starts = np.ones(len(tokens), dtype=bool)
    lengths = []
    rng = np.random.default_rng(0)
    # So small a share that spans seldom meet, on a text so long that the budget seldom cuts one.
    for _ in range(300):
        chosen = SpanMasking(share=0.05).choose(tokens, starts, rng, mask_id=MASK)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
        lengths += list(edges[1::2] - edges[::2])
    weights = 0.8 ** np.arange(1, 11)
    expected = float((np.arange(1, 11) * weights).sum() / weights.sum())
    assert np.mean(lengths) == pytest.approx(expected, rel=0.12)
    only_short = SpanMasking(share=0.02, longest=1).choose(tokens, starts, rng, mask_id=MASK)
    assert only_short.sum() == pytest.approx(16, abs=1)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_whole_words_only_at_least_one_and_no_special_token(words: int, longest: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    tokens, starts = text(rng, words, longest)
    tokens = np.concatenate([tokens, [1, 1, 1]])
    starts = np.concatenate([starts, [True, True, True]])
    out = SpanMasking(share=share)(tokens, starts, rng, mask_id=MASK)
    chosen = out.labels != -100
    assert chosen.any()
    assert not chosen[tokens < 4].any()
    word = np.cumsum(starts)
    for number in np.unique(word):
        assert len(set(chosen[word == number])) == 1
    fresh = out.tokens[chosen]
    assert ((fresh >= 4) & (fresh <= MASK)).all()


def test_a_generator_in_the_same_state_gives_the_same_mask() -> None:
    tokens, starts = text(np.random.default_rng(0), 20)
    first = SpanMasking()(tokens, starts, np.random.default_rng(7), mask_id=MASK)
    again = SpanMasking()(tokens, starts, np.random.default_rng(7), mask_id=MASK)
    assert (first.tokens == again.tokens).all()
    assert (first.labels == again.labels).all()
    others = [SpanMasking()(tokens, starts, np.random.default_rng(s), mask_id=MASK).labels for s in range(8, 16)]
    assert any((other != first.labels).any() for other in others)


def test_nothing_to_mask_is_left_alone_and_everything_can_be() -> None:
    empty = np.array([0, 2, 1, 1])
    out = SpanMasking()(empty, np.ones(4, dtype=bool), np.random.default_rng(0), mask_id=MASK)
    assert (out.labels == -100).all()
    assert (out.tokens == empty).all()
    tokens, starts = text(np.random.default_rng(0), 9)
    full = SpanMasking(share=1.0, mask_rate=1.0, random_rate=0.0)(
        tokens, starts, np.random.default_rng(0), mask_id=MASK
    )
    assert (full.tokens[1:-1] == MASK).all()
    none = SpanMasking(share=0.0)(tokens, starts, np.random.default_rng(0), mask_id=MASK)
    assert (none.tokens == tokens).all()


@pytest.mark.parametrize(
    "wrong",
    [{"share": 1.5}, {"mask_rate": 0.9, "random_rate": 0.2}, {"geometric": 1.0}, {"longest": 0}],
)
def test_wrong_settings_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SpanMasking(**wrong)
