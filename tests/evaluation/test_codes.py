"""Overlap and usage of codes against sets and counters in Python."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlblocks.errors import UserError
from vlblocks.evaluation import code_overlap, code_usage, codes


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    pairs=st.integers(2, 9),
    picks=st.integers(1, 5),
    size=st.integers(1, 12),
    groups=st.integers(0, 4),
    block=st.sampled_from([1, 30, 10_000]),
    seed=st.integers(0, 1000),
)
def test_overlap_equals_the_sets(pairs, picks, size, groups, block, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randint(size, (2, pairs, picks), generator=generator)
    group = torch.randint(groups, (pairs,), generator=generator) * 7 if groups else None
    name = group.tolist() if groups else list(range(pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "_BLOCK_ELEMENTS", block)
        found = code_overlap(image, text, groups=group)
    share = [[len(set(i) & set(t)) / picks for t in text.tolist()] for i in image.tolist()]
    assert found.pair == pytest.approx(sum(share[m][m] for m in range(pairs)) / pairs)
    mismatched = [share[i][t] for i in range(pairs) for t in range(pairs) if name[i] != name[t]]
    if mismatched:
        assert found.random == pytest.approx(sum(mismatched) / len(mismatched))
    else:
        assert math.isnan(found.random)


def test_same_picks_overlap_fully_and_disjoint_ones_not_at_all():
    own = torch.arange(12).view(4, 3)
    assert code_overlap(own, own) == (1.0, 0.0)
    everyone = torch.arange(3).expand(4, 3)
    assert code_overlap(everyone, everyone) == (1.0, 1.0)
    assert code_overlap(own, own + 12) == (0.0, 0.0)
    with pytest.raises(UserError, match="image_picks and text_picks"):
        code_overlap(own, own[:2])


def test_usage_counts_and_perplexity():
    assert code_usage(torch.arange(8).view(2, 4), 32) == (8, pytest.approx(8.0))
    picks = torch.tensor([[0, 0, 0], [1, -1, -1]])
    shares = [count / 4 for count in Counter([0, 0, 0, 1]).values()]
    assert code_usage(picks, 5) == (2, pytest.approx(math.exp(-sum(p * math.log(p) for p in shares))))
    assert code_usage(torch.full((3,), -1), 4) == (0, 0.0)
    with pytest.raises(UserError, match="code 5, but codes=5"):
        code_usage(torch.tensor([5]), 5)
