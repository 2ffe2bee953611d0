"""Re-ranking against a slow reference, each pair asked for once, and scores that survive a killed evaluation."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlblocks.errors import UserError
from vlblocks.evaluation import retrieval
from vlblocks.evaluation.reranking import KeptScores, rerank, score_every_pair, shortlist
from vlblocks.evaluation.retrieval import FeatureScores, retrieval_ranks


def slow_rerank(scores, owner, k, better):
    """Two full orders from sorted lists: the shortlist by the better scores, the rest as it was."""
    images, texts = scores.shape
    by_text, by_image = [], []
    for t in range(texts):
        order = sorted(range(images), key=lambda i: -scores[i, t].item())
        order = sorted(order[:k], key=lambda i: -better[i, t].item()) + order[k:]
        by_text.append(1 + order.index(owner[t]))
    for i in range(images):
        order = sorted(range(texts), key=lambda t: -scores[i, t].item())
        order = sorted(order[:k], key=lambda t: -better[i, t].item()) + order[k:]
        places = [order.index(t) for t in range(texts) if owner[t] == i]
        # Own captions ahead of the best one cannot be; those behind do not count.
        by_image.append(1 + min(places) if places else 0)
    return by_text, by_image


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    images=st.integers(1, 6),
    texts=st.integers(1, 12),
    k=st.integers(1, 14),
    block=st.sampled_from([1, 5, 1000]),
    seed=st.integers(0, 1000),
)
def test_rerank_equals_the_slow_reference_and_scores_each_pair_once(images, texts, k, block, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, better = torch.randn(2, images, texts, generator=generator)
    owner = torch.randint(images, (texts,), generator=generator)
    seen = []

    def scorer(image, text):
        assert len(image) <= block
        seen.extend(zip(image.tolist(), text.tolist(), strict=True))
        return better[image, text]

    found = rerank(scores, k, scorer, block=block)
    ranks = found.ranks(owner)
    assert (ranks.text_to_image.tolist(), ranks.image_to_text.tolist()) == slow_rerank(
        scores, owner.tolist(), k, better
    )
    assert len(seen) == len(set(seen)) == found.pairs_scored
    assert seen == sorted(seen)


def test_rerank_counts_ties_against_the_query_and_rejects_a_wrong_scorer():
    owner = torch.arange(4)
    found = rerank(torch.eye(4), 3, lambda image, text: torch.zeros(len(image)))
    assert found.ranks(owner).text_to_image.tolist() == [3, 3, 3, 3]
    assert found.ranks(owner).image_to_text.tolist() == [3, 3, 3, 3]
    with pytest.raises(UserError, match=r"scorer: returned shape \[.*, 2\]"):
        rerank(torch.eye(4), 2, lambda image, text: torch.zeros(len(image), 2))
    with pytest.raises(UserError, match="k: must be"):
        rerank(torch.eye(4), 0, lambda image, text: torch.zeros(len(image)))
    with pytest.raises(UserError, match="block: must be"):
        rerank(torch.eye(4), 2, lambda image, text: torch.zeros(len(image)), block=0)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    images=st.integers(1, 9),
    texts=st.integers(1, 14),
    k=st.integers(1, 15),
    elements=st.sampled_from([1, 20, 10_000]),
    seed=st.integers(0, 1000),
)
def test_a_shortlist_found_block_by_block_is_that_of_the_whole(images, texts, k, elements, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(images, 5, generator=generator), torch.randn(texts, 5, generator=generator)
    whole = image @ text.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_BLOCK_ELEMENTS", elements)
        found = shortlist(FeatureScores(image, text), k)
    for candidates, scores in ((found.image_candidates, whole), (found.text_candidates, whole.T)):
        assert torch.equal(candidates, scores.topk(min(k, scores.shape[1]), dim=1).indices)
    listed = {(i, t) for i, row in enumerate(found.image_candidates.tolist()) for t in row}
    listed |= {(i, t) for t, row in enumerate(found.text_candidates.tolist()) for i in row}
    assert found.pairs.tolist() == sorted(i * texts + t for i, t in listed)


def test_a_score_that_is_no_number_is_on_a_list_last():
    scores = torch.tensor([[float("nan"), 1.0, 2.0], [0.0, float("nan"), 3.0]])
    assert shortlist(scores, 2).image_candidates.tolist() == [[2, 1], [2, 0]]
    assert shortlist(scores, 1).text_candidates.tolist() == [[1], [0], [1]]


def test_a_right_candidate_without_a_number_does_not_hide_another():
    better = torch.tensor([[float("nan"), 2.0, 1.0, 1.0], [0.0, 0.0, 1.0, 2.0]])
    found = rerank(torch.zeros(2, 4), 4, lambda image, text: better[image, text])
    assert found.ranks(torch.tensor([0, 0, 1, 1])).image_to_text.tolist() == [1, 1]


def test_every_pair_is_what_reranking_all_candidates_gives():
    better, owner = torch.randn(7, 12), torch.randint(7, (12,))
    asked = []

    def scorer(image, text):
        asked.extend(zip(image.tolist(), text.tolist(), strict=True))
        return better[image, text]

    found = score_every_pair(7, 12, scorer, block=5)
    assert torch.equal(found, better)
    assert asked == [(i, t) for i in range(7) for t in range(12)]
    again = rerank(torch.randn(7, 12), 12, scorer)
    for ranks, right in zip(again.ranks(owner), retrieval_ranks(better, owner), strict=True):
        assert torch.equal(ranks, right)


class Killed(Exception):
    pass


def counting(better, stop_after=None):
    """A scorer, and the list of pairs that it was asked for; it dies when it has been asked for too many."""
    asked = []

    def scorer(image, text):
        if stop_after is not None and len(asked) >= stop_after:
            raise Killed
        asked.extend(zip(image.tolist(), text.tolist(), strict=True))
        return better[image, text]

    return scorer, asked


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    scores, better, owner = torch.randn(8, 20), torch.randn(8, 20), torch.randint(8, (20,))
    whole = rerank(scores, 6, counting(better)[0])

    scorer, first = counting(better, stop_after=30)
    kept = KeptScores(scorer, tmp_path, fingerprint="abc", seconds=0)
    with pytest.raises(Killed):
        rerank(scores, 6, kept, block=10)
    assert len(first) == 30 and kept.recalled == 0

    scorer, second = counting(better)
    kept = KeptScores(scorer, tmp_path, fingerprint="abc", seconds=0)
    again = rerank(scores, 6, kept, block=7)
    assert len(kept) == kept.recalled == 30
    assert not set(first) & set(second) and len(first) + len(second) == whole.pairs_scored
    for found, right in zip(again[1:], whole[1:], strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(right))
    kept.save()

    # All of it is known now, whichever candidates are asked for; a scorer that must not be called shows it.
    full = KeptScores(counting(better, stop_after=0)[0], tmp_path, fingerprint="abc")
    assert torch.equal(rerank(scores, 3, full).text_scores, rerank(scores, 3, counting(better)[0]).text_scores)
    # Another model or other data: none of it is.
    other = KeptScores(counting(better)[0], tmp_path, fingerprint="abd")
    rerank(scores, 3, other)
    assert len(other) == other.recalled == 0
    assert (again.ranks(owner).text_to_image <= 8).all()


def test_kept_scores_are_found_in_whatever_order_they_were_asked(tmp_path):
    better, pairs = torch.randn(5, 7), torch.randperm(35, generator=torch.Generator().manual_seed(1))
    kept = KeptScores(counting(better)[0], tmp_path, fingerprint="abc")
    for part in pairs.split(12):
        kept(part // 7, part % 7)
    kept.save()
    again, order = KeptScores(counting(better, stop_after=0)[0], tmp_path, fingerprint="abc"), pairs.flip(0)
    assert torch.equal(again(order // 7, order % 7), better.flatten()[order]) and again.recalled == 35


def test_files_of_scores_are_written_now_and_then_whole_or_not_at_all(tmp_path, monkeypatch):
    import vlblocks.evaluation.reranking as module

    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    kept = KeptScores(lambda image, text: image + text / 10, tmp_path / "new", fingerprint="f", seconds=30)
    pair = torch.tensor([3]), torch.tensor([4])
    for now, files in ((10.0, 0), (29.0, 0), (30.0, 1), (59.0, 1), (61.0, 2)):
        kept(pair[0] + int(now), pair[1])
        assert len(list((tmp_path / "new").iterdir())) == files

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    kept(pair[0], pair[1])
    with pytest.raises(OSError, match="No space"):
        kept.save()
    assert len(list((tmp_path / "new").iterdir())) == 2

    (tmp_path / "new" / "scores-f-00002.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"scores-f-00002.safetensors: damaged"):
        KeptScores(lambda image, text: image, tmp_path / "new", fingerprint="f")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        KeptScores(lambda image, text: image, tmp_path / "file" / "sub", fingerprint="f")
