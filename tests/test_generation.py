import itertools
import math

import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.generation import Recompute, Rules, beam_search, filtered_probabilities, greedy, sample

BOS, EOS = 0, 1
F64 = torch.float64


class TinyModel:
    """A random recurrent model over a few tokens, whose next token depends on all before and on the row's context."""

    def __init__(self, vocab=4, width=8, seed=0, sharpness=2.0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
        self.words, self.mix, self.out = draw(vocab, width), draw(width, width), sharpness * draw(width, vocab)
        self.contexts = draw(16, width)
        self.rows_seen = []

    def score(self, tokens, context):
        self.rows_seen.append(len(tokens))
        state = context
        for token in tokens.T:
            state = torch.tanh(state @ self.mix + self.words[token])
        return state @ self.out / math.sqrt(len(self.mix))

    def rows(self, count):
        return Recompute(self.score, self.contexts[:count])

    def log_prob(self, image, text):
        """Log-probability of one text with its end, a token at a time."""
        total = 0.0
        for n in range(len(text) + 1):
            logits = self.score(torch.tensor([[BOS, *text[:n]]]), self.contexts[image : image + 1])[0]
            total += float(logits.log_softmax(0)[[*text, EOS][n]])
        return total


def starts(count):
    return torch.full((count, 1), BOS)


def has_repeat(text, size):
    grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
    return len(set(grams)) < len(grams)


def close(found, wanted):
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=1e-9)


def ranked(generated):
    return [
        list(zip(texts, scores, strict=False))
        for texts, scores in zip(generated.texts(), generated.scores.tolist(), strict=True)
    ]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
@pytest.mark.parametrize(("shortest", "longest", "no_repeat"), [(0, 4, 0), (2, 3, 0), (0, 4, 2), (4, 4, 0)])
def test_a_beam_wide_enough_is_an_exhaustive_search(penalty, shortest, longest, no_repeat):
    model = TinyModel(vocab=4, seed=3)
    texts = [list(text) for n in range(shortest, longest + 1) for text in itertools.product((0, 2, 3), repeat=n)]
    # The start token is part of the row, so that it counts among the n-grams.
    texts = [text for text in texts if not no_repeat or not has_repeat([BOS, *text], no_repeat)]
    rules = Rules(eos_id=EOS, min_length=shortest, max_length=longest, no_repeat=no_repeat)
    generated = beam_search(model.rows(3), starts(3), rules, beams=200, length_penalty=penalty, returned=200)
    for image, found in enumerate(ranked(generated)):
        scored = [(t, model.log_prob(image, t) / ((5 + len(t) + 1) / 6) ** penalty) for t in texts]
        close(found, sorted(scored, key=lambda item: -item[1]))


def test_a_length_penalty_favours_longer_texts():
    model, rules = TinyModel(vocab=4, seed=3), Rules(eos_id=EOS, max_length=4)
    lengths = [
        int(beam_search(model.rows(16), starts(16), rules, beams=200, length_penalty=penalty).lengths.sum())
        for penalty in (0.0, 3.0)
    ]
    assert lengths[0] < lengths[1]


def slow_beam_search(model, image, rules, beams, penalty, vocab):
    """The search of the docstring with lists, one candidate at a time."""
    live, pool = [([], 0.0)], []
    for length in range(rules.max_length + 1):
        candidates = []
        for text, total in live:
            tokens = torch.tensor([[BOS, *text]])
            log_probs = model.score(tokens, model.contexts[image : image + 1])[0].log_softmax(0)
            for token in range(vocab):
                ends = token == EOS
                if (ends and length < rules.min_length) or (not ends and length == rules.max_length):
                    continue
                if not ends and (token in rules.banned or has_repeat([BOS, *text, token], rules.no_repeat or 99)):
                    continue
                candidates.append((text, token, total + float(log_probs[token])))
        candidates.sort(key=lambda item: -item[2])
        for text, token, total in candidates[:beams]:
            if token == EOS:
                pool.append((text, total / ((6 + length) / 6) ** penalty))
        live = [([*text, token], total) for text, token, total in candidates if token != EOS][:beams]
        if len(pool) >= beams or not live:
            break
    return sorted(pool, key=lambda item: -item[1])[:beams]


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_narrow_beam_equals_the_search_written_with_lists(beams, seed):
    model = TinyModel(vocab=7, seed=seed, sharpness=4.0)
    rules = Rules(eos_id=EOS, min_length=2, max_length=9, no_repeat=3, banned=(BOS, 4))
    generated = beam_search(model.rows(6), starts(6), rules, beams=beams, length_penalty=0.6, returned=beams)
    for image, found in enumerate(ranked(generated)):
        close(found, slow_beam_search(model, image, rules, beams, 0.6, vocab=7))
    assert len({len(text) for texts in generated.texts() for text in texts}) > 1
    assert torch.equal(generated.tokens[:, 0] == rules.pad_id, torch.arange(9) >= generated.lengths[:, :1])


@pytest.mark.parametrize("rules", [Rules(eos_id=EOS, max_length=7), Rules(eos_id=EOS, max_length=7, min_length=4)])
def test_one_beam_is_greedy_and_greedy_is_the_best_token_each_time(rules):
    model = TinyModel(vocab=6, seed=1, sharpness=4.0)
    found, beam = greedy(model.rows(8), starts(8), rules), beam_search(model.rows(8), starts(8), rules, beams=1)
    assert all(torch.equal(a, b) for a, b in zip(found[:2], beam[:2], strict=True))
    torch.testing.assert_close(found.scores, beam.scores)
    for image, [text] in enumerate(found.texts()):
        for n in range(len(text) + 1):
            logits = model.score(torch.tensor([[BOS, *text[:n]]]), model.contexts[image : image + 1])[0]
            if n < rules.min_length:
                logits[EOS] = -math.inf
            assert [*text, EOS][n] == (EOS if n == 7 else int(logits.argmax()))
        assert float(found.scores[image]) == pytest.approx(model.log_prob(image, text), abs=1e-9)


def test_a_batch_gives_what_its_rows_give_alone():
    model, rules = TinyModel(vocab=8, seed=5, sharpness=4.0), Rules(eos_id=EOS, max_length=8, no_repeat=2)
    decoders = {
        "greedy": lambda rows, n: greedy(rows, starts(n), rules),
        "beam": lambda rows, n: beam_search(rows, starts(n), rules, beams=3, length_penalty=0.6, returned=3),
    }
    for decode in decoders.values():
        whole = decode(model.rows(10), 10)
        for i in range(10):
            alone = decode(Recompute(model.score, model.contexts[i : i + 1]), 1)
            assert whole.texts()[i] == alone.texts()[0]
            torch.testing.assert_close(whole.scores[i], alone.scores[0])
    assert len({len(texts[0]) for texts in whole.texts()}) > 1


def test_ended_rows_are_not_computed_any_more():
    # A text ends when as many tokens as its context says are written.
    def score(tokens, wanted):
        rows.append(len(tokens))
        logits = torch.zeros(len(tokens), 5, dtype=F64)
        logits[:, 3] = 1.0
        logits[:, EOS] = torch.where(tokens.shape[1] - 1 == wanted, 9.0, -9.0)
        return logits

    wanted, rules = torch.tensor([3, 0, 1, 3]), Rules(eos_id=EOS, max_length=6, pad_id=4)
    rows = []
    found = greedy(Recompute(score, wanted), starts(4), rules)
    assert rows == [4, 3, 2, 2] and found.lengths[:, 0].tolist() == [3, 0, 1, 3]
    assert found.tokens[:, 0].tolist() == [[3, 3, 3, 4, 4, 4], [4] * 6, [3, 4, 4, 4, 4, 4], [3, 3, 3, 4, 4, 4]]
    rows = []
    found = beam_search(Recompute(score, wanted), starts(4), rules, beams=2, returned=2)
    # One row for each start at first; then two, but image 1 has one text only, the end being certain.
    assert rows[0] == 4 and rows[-1] < 8 and found.lengths[:, 0].tolist() == [3, 0, 1, 3]
    assert greedy(Recompute(score, wanted), starts(4), Rules(eos_id=EOS, max_length=2)).lengths.max() == 2


@pytest.mark.parametrize("decode", ["greedy", "beam", "sample"])
def test_no_trigram_occurs_twice(decode):
    vocab = 6
    cycle = torch.full((vocab, vocab), -4.0, dtype=F64)
    for token, following in ((BOS, 2), (2, 3), (3, 4), (4, 2), (5, 2)):
        cycle[token, following] = 4.0

    def run(no_repeat):
        rules = Rules(eos_id=EOS, min_length=20, max_length=20, no_repeat=no_repeat)
        model = Recompute(lambda tokens: cycle[tokens[:, -1]])
        if decode == "sample":
            return sample(model, starts(4), rules, generator=torch.Generator().manual_seed(0))
        return greedy(model, starts(1), rules) if decode == "greedy" else beam_search(model, starts(1), rules, beams=4)

    texts = [text for texts in run(3).texts() for text in texts]
    assert all(len(text) == 20 and not has_repeat([BOS, *text], 3) for text in texts)
    assert any(has_repeat(text, 2) for text in texts)
    assert any(has_repeat(text, 3) for texts in run(0).texts() for text in texts)


def test_a_row_that_may_say_nothing_more_ends_short_of_the_minimum():
    model = Recompute(lambda tokens: torch.zeros(len(tokens), 3, dtype=F64))
    rules = Rules(eos_id=EOS, min_length=9, max_length=9, no_repeat=1)
    # The start, 2, and then nothing new is left.
    for found in (greedy(model, starts(1), rules), beam_search(model, starts(1), rules, beams=3)):
        assert found.texts() == [[[2]]]


def slow_filter(shares, top_k, top_p):
    order = sorted(range(len(shares)), key=lambda i: -shares[i])[:top_k]
    norm = sum(shares[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if top_p is not None and mass >= top_p:
            break
        kept.append(i)
        mass += shares[i] / norm
    norm = sum(shares[i] for i in kept)
    return [shares[i] / norm if i in kept else 0.0 for i in range(len(shares))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.7), (5, 0.8), (1, None), (99, 1.0)])
def test_filtered_probabilities_equal_the_loop(temperature, top_k, top_p):
    log_probs = torch.randn(20, 12, dtype=F64).mul(2).log_softmax(1)
    log_probs[:, 4] = -math.inf
    got = filtered_probabilities(log_probs, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, found in zip(log_probs, got, strict=True):
        shares = [math.exp(x / temperature) for x in row.tolist()]
        want = slow_filter([share / sum(shares) for share in shares], top_k, top_p)
        assert found.tolist() == pytest.approx(want, abs=1e-9)


def test_top_k_keeps_one_of_equals_and_top_p_at_least_one_token():
    log_probs = torch.zeros(1, 4, dtype=F64).log_softmax(1)
    assert filtered_probabilities(log_probs, top_k=2).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert filtered_probabilities(log_probs, top_p=1e-3).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    # 0.25 + 0.25 reach exactly one half: a third is not needed.
    assert filtered_probabilities(log_probs, top_p=0.5).tolist() == [[0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 0.5, "top_k": 4, "top_p": 0.9}])
def test_samples_follow_the_filtered_distribution(options):
    model, count = TinyModel(vocab=6, seed=2), 20_000
    rules = Rules(eos_id=EOS, min_length=1, max_length=1, banned=(BOS,))
    found = sample(
        model.rows(2), starts(2), rules, samples=count, generator=torch.Generator().manual_seed(7), **options
    )
    assert found.tokens.shape == (2, count, 1) and found.lengths.unique().tolist() == [1]
    log_probs = model.score(starts(2), model.contexts[:2]).log_softmax(1)
    log_probs[:, [BOS, EOS]] = -math.inf
    want = filtered_probabilities(log_probs, **options)
    for row in range(2):
        shares = torch.bincount(found.tokens[row, :, 0], minlength=6) / count
        # Five standard deviations of a share.
        assert (shares - want[row]).abs().max() < 5 * 0.5 / math.sqrt(count)
        assert shares[want[row] == 0].sum() == 0


def test_samples_repeat_with_their_generator_and_score_what_they_say():
    model, rules = TinyModel(vocab=6, seed=4), Rules(eos_id=EOS, max_length=6)

    def draw(seed):
        return sample(model.rows(3), starts(3), rules, samples=4, generator=torch.Generator().manual_seed(seed))

    first = draw(1)
    assert torch.equal(first.tokens, draw(1).tokens) and not torch.equal(first.tokens, draw(2).tokens)
    for image, texts in enumerate(first.texts()):
        for text, score in zip(texts, first.scores[image].tolist(), strict=True):
            assert score == pytest.approx(model.log_prob(image, text), abs=1e-9)
    # Cold enough, it is greedy.
    cold = sample(model.rows(3), starts(3), rules, temperature=1e-4)
    assert torch.equal(cold.tokens, greedy(model.rows(3), starts(3), rules).tokens)


def test_mistakes_are_named():
    for wrong in ({"max_length": 3, "min_length": 4}, {"max_length": 0}, {"max_length": 3, "min_length": -1}):
        with pytest.raises(UserError, match="min_length"):
            Rules(eos_id=EOS, **wrong)
    with pytest.raises(UserError, match="no_repeat"):
        Rules(eos_id=EOS, max_length=3, no_repeat=-1)
    with pytest.raises(UserError, match="banned holds 1"):
        Rules(eos_id=EOS, max_length=3, banned=(EOS,))
    model, rules = TinyModel(), Rules(eos_id=EOS, max_length=3)
    for beams, returned in ((0, 1), (2, 3), (2, 0)):
        with pytest.raises(UserError, match="beams"):
            beam_search(model.rows(1), starts(1), rules, beams=beams, returned=returned)
    for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"samples": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            sample(model.rows(1), starts(1), rules, **wrong)
