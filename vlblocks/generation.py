"""Decoding: greedy, beam search and sampling, batched, over any model that scores the next token.

A model takes part as a `NextToken`: it gives scores for what comes next, and goes on from the rows that it is told to.
So a key-value cache, or whatever else it keeps for each row, is its own business; `Recompute` is a model without any.
Rows whose text has ended are dropped, and the rest of the batch goes on without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vlblocks.errors import UserError

__all__ = ["Generated", "NextToken", "Recompute", "Rules", "beam_search", "filtered_probabilities", "greedy", "sample"]

# Shares of probability are summed as integers of this unit: a sum of floats has no deterministic form on a GPU.
_UNIT = 2**40


class NextToken(Protocol):
    """What decoding asks of a model."""

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [R, t] long, everything so far -> logits or log-probabilities of the next one, [R, V]."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what was row rows[i]; rows [R'] long, R' may be more or fewer than R."""
        ...


class Recompute:
    """A model without a cache, which looks at all tokens anew at each step.

    Args:
        score: called as `score(tokens, *context)`, gives [R, V].
        context: tensors [R, ...] that each row has, such as its image's states.
    """

    def __init__(self, score: Callable[..., Tensor], *context: Tensor) -> None:
        self.score, self.context = score, context

    def step(self, tokens: Tensor) -> Tensor:
        """[R, t] -> [R, V]"""
        return self.score(tokens, *self.context)

    def reorder(self, rows: Tensor) -> None:
        self.context = tuple(tensor.index_select(0, rows) for tensor in self.context)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which texts are allowed. Lengths count generated tokens, without the start and the end token.

    Attributes:
        eos_id: ends a text.
        max_length: a text of so many tokens must end.
        min_length: a shorter one may not.
        pad_id: fills up the rows of `Generated`.
        no_repeat: size of the n-grams that may not occur twice in a text, 3 for trigrams; 0: any may.
        banned: tokens that are never generated.

    Raises:
        UserError: lengths that exclude each other, a negative number, or the end token is banned.
    """

    eos_id: int
    max_length: int
    min_length: int = 0
    pad_id: int = 1
    no_repeat: int = 0
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.min_length <= self.max_length or self.max_length < 1:
            raise UserError(
                f"min_length {self.min_length} and max_length {self.max_length}: give 0 <= min_length <= max_length"
            )
        if self.no_repeat < 0:
            raise UserError(f"no_repeat {self.no_repeat}: give the size of n-grams, or 0 to let them repeat")
        if self.eos_id in self.banned:
            raise UserError(f"banned holds {self.eos_id}, the end of a text, so that none could end: leave it out")

    def log_probs(self, scores: Tensor, tokens: Tensor, length: int) -> Tensor:
        """Log-probabilities [R, V] of the next token, -inf where a rule forbids it (not renormalised).

        A row that nothing else is left to ends, however short it is.

        Args:
            scores: [R, V], logits or log-probabilities.
            tokens: [R, t], start and generated ones.
            length: how many of them were generated.
        """
        wide = scores if scores.dtype == torch.float64 else scores.float()
        forbidden = _repeats(tokens, self.no_repeat, wide.shape[1])
        forbidden[:, list(self.banned)] = True
        if length >= self.max_length:
            forbidden[:] = True
        forbidden[:, self.eos_id] = length < self.min_length
        forbidden[:, self.eos_id] &= ~forbidden.all(dim=1)
        return wide.log_softmax(dim=1).masked_fill(forbidden, float("-inf"))


class Generated(NamedTuple):
    """Texts, N for each of B starts, the best first.

    Attributes:
        tokens: [B, N, max_length] long, without start and end, filled up with padding.
        lengths: [B, N] long, tokens of each.
        scores: [B, N], log-probability of the text with its end (beam search: over the length penalty); -inf where
            fewer than N texts were found.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor

    def texts(self) -> list[list[list[int]]]:
        """The ids without padding, by start and rank; texts that were not found are left out."""
        found = zip(self.tokens.tolist(), self.lengths.tolist(), self.scores.isfinite().tolist(), strict=True)
        return [[ids[:n] for ids, n, real in zip(*one, strict=True) if real] for one in found]


@torch.no_grad()
def greedy(model: NextToken, start: Tensor, rules: Rules) -> Generated:
    """The most likely token at every step; start [B, S] long, the tokens that each text begins with."""
    return _one_by_one(model, start, rules, lambda log_probs: log_probs.argmax(dim=1))


@torch.no_grad()
def sample(
    model: NextToken,
    start: Tensor,
    rules: Rules,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Tokens drawn from `filtered_probabilities`, in no order of merit.

    Args:
        model: scores the next token.
        start: [B, S] long.
        rules: what is allowed.
        samples: N, texts for each start.
        temperature, top_k, top_p: as in `filtered_probabilities`.
        generator: of all draws, on the scores' device.

    Raises:
        UserError: a number that makes no sense.
    """
    if samples < 1:
        raise UserError(f"samples {samples}: give 1 or more")
    _check_filter(temperature, top_k, top_p)

    def draw(log_probs: Tensor) -> Tensor:
        shares = filtered_probabilities(log_probs, temperature=temperature, top_k=top_k, top_p=top_p)
        return torch.multinomial(shares, 1, generator=generator)[:, 0]

    rows = torch.arange(len(start), device=start.device).repeat_interleave(samples)
    if samples > 1:
        model.reorder(rows)
    found = _one_by_one(model, start[rows], rules, draw)
    return Generated(*(field.view(len(start), samples, *field.shape[2:]) for field in found))


def filtered_probabilities(
    log_probs: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """What sampling draws from: the distribution at a temperature, cut to its best tokens, renormalised.

    Args:
        log_probs: [R, V], -inf for what may not come.
        temperature: the log-probabilities' divisor.
        top_k: keeps the k likeliest tokens (Fan et al., 2018).
        top_p: then keeps the fewest of them, likeliest first, that hold this share together (nucleus: Holtzman et al.,
            2020).

    Returns:
        [R, V], rows that sum to 1.

    Raises:
        UserError: a number that makes no sense.
    """
    _check_filter(temperature, top_k, top_p)
    shares = (log_probs / temperature).softmax(dim=1)
    if top_k is None and top_p is None:
        return shares
    ordered, order = shares.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0.0
        ordered = ordered / ordered.sum(dim=1, keepdim=True)
    if top_p is not None:
        units = (ordered.double() * _UNIT).long()
        before = units.cumsum(dim=1) - units
        ordered = ordered.masked_fill(before >= int(top_p * _UNIT), 0.0)
        ordered = ordered / ordered.sum(dim=1, keepdim=True)
    return torch.zeros_like(shares).scatter(1, order, ordered)


@torch.no_grad()
def beam_search(
    model: NextToken,
    start: Tensor,
    rules: Rules,
    *,
    beams: int = 5,
    length_penalty: float = 0.0,
    returned: int = 1,
) -> Generated:
    """The best texts that a search of limited width finds.

    At each step the extensions of an image's open texts are ranked together; those among the best `beams` that end are
    finished, and the best `beams` others go on. A start is done once `beams` texts are finished. One beam is `greedy`,
    and as many as there are texts is an exhaustive search. The first step has one row for each start, so that what
    depends on the start alone, such as an image, is computed once.

    Args:
        model: scores the next token; has one row for each start.
        start: [B, S] long.
        rules: what is allowed.
        beams: K.
        length_penalty: a finished text's log-probability is divided by ((5 + n) / 6) ** length_penalty, n being its
            length with the end token (Wu et al., 2016); 0 ranks by the log-probability, more favours longer texts.
        returned: N, how many of the K texts to give.

    Raises:
        UserError: beams or returned make no sense.
    """
    if beams < 1 or not 1 <= returned <= beams:
        raise UserError(f"beams {beams} and returned {returned}: give 1 <= returned <= beams")
    batch, prefix = start.shape
    pool = _Pool(batch, beams, rules, start.device)
    # Open texts: [A, w, t] tokens and [A, w] log-probabilities of the starts still searched, numbers `active` [A].
    active, tokens, total = torch.arange(batch, device=start.device), start[:, None], None
    for length in range(rules.max_length + 1):
        count, width = tokens.shape[:2]
        log_probs = rules.log_probs(model.step(tokens.flatten(0, 1)), tokens.flatten(0, 1), length)
        vocab = log_probs.shape[1]
        extended = log_probs.view(count, width, vocab)
        if total is not None:
            extended = extended + total[..., None]
        best, place = extended.flatten(1).topk(min(2 * beams, width * vocab), dim=1)
        origin, token = place // vocab, place % vocab
        ends = token == rules.eos_id

        finished = best[:, :beams].masked_fill(~ends[:, :beams], float("-inf"))
        ended = tokens[:, :, prefix:].gather(1, origin[:, :beams, None].expand(-1, -1, length))
        pool.add(active, ended, finished / ((6 + length) / 6) ** length_penalty)

        total, chosen = best.masked_fill(ends, float("-inf")).topk(min(beams, best.shape[1]), dim=1)
        origin, token = origin.gather(1, chosen), token.gather(1, chosen)
        going = (~pool.is_full(active) & total.isfinite().any(dim=1)).nonzero()[:, 0]
        if len(going) == 0:
            break
        rows = (going[:, None] * width + origin[going]).flatten()
        if len(rows) != count * width or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            model.reorder(rows)
        kept = tokens.flatten(0, 1)[rows].view(len(going), -1, prefix + length)
        tokens = torch.cat([kept, token[going][..., None]], dim=2)
        active, total = active[going], total[going]
    return Generated(pool.tokens[:, :returned], pool.lengths[:, :returned], pool.scores[:, :returned])


class _Pool:
    """The best finished texts of each start, [B, K], best first."""

    def __init__(self, batch: int, size: int, rules: Rules, device: torch.device) -> None:
        self.pad_id = rules.pad_id
        self.tokens = torch.full((batch, size, rules.max_length), rules.pad_id, device=device)
        self.lengths = torch.zeros(batch, size, dtype=torch.long, device=device)
        self.scores = torch.full((batch, size), float("-inf"), device=device)

    def add(self, active: Tensor, tokens: Tensor, scores: Tensor) -> None:
        """tokens [A, k, n] and scores [A, k] (-inf: not finished) of the starts `active` [A]."""
        size, longest = self.tokens.shape[1:]
        length = tokens.shape[2]
        self.scores = self.scores.to(scores.dtype)
        padded = torch.nn.functional.pad(tokens, (0, longest - length), value=self.pad_id)
        lengths = torch.where(scores.isfinite(), length, 0)
        best, chosen = torch.cat([self.scores[active], scores], dim=1).topk(size, dim=1)
        everything = torch.cat([self.tokens[active], padded], dim=1)
        self.tokens[active] = everything.gather(1, chosen[..., None].expand(-1, -1, longest))
        self.lengths[active] = torch.cat([self.lengths[active], lengths], dim=1).gather(1, chosen)
        self.scores[active] = best

    def is_full(self, active: Tensor) -> Tensor:
        """[A] -> [A] bool"""
        return self.scores[active, -1].isfinite()


def _one_by_one(model: NextToken, start: Tensor, rules: Rules, choose: Callable[[Tensor], Tensor]) -> Generated:
    """One text for each row of start, tokens chosen by `choose` [R, V] -> [R]."""
    count, device = len(start), start.device
    written = torch.full((count, rules.max_length + 1), rules.pad_id, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    gained = []
    active, tokens = torch.arange(count, device=device), start
    for length in range(rules.max_length + 1):
        log_probs = rules.log_probs(model.step(tokens), tokens, length)
        token = choose(log_probs)
        row = log_probs.new_zeros(count)
        row[active] = log_probs.gather(1, token[:, None])[:, 0]
        gained.append(row)
        going = (token != rules.eos_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(active):
            model.reorder(going)
            active, tokens, token = active[going], tokens[going], token[going]
        written[active, length] = token
        lengths[active] += 1
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    scores = torch.stack(gained).sum(dim=0) if gained else torch.zeros(count, device=device)
    return Generated(written[:, None, : rules.max_length], lengths[:, None], scores[:, None])


def _repeats(tokens: Tensor, size: int, vocab: int) -> Tensor:
    """Tokens that would complete an n-gram that the row [R, t] holds already: [R, vocab] bool."""
    # One column more, to point to where there is nothing to forbid.
    found = torch.zeros(len(tokens), vocab + 1, dtype=torch.bool, device=tokens.device)
    if 0 < size <= tokens.shape[1]:
        grams = tokens.unfold(1, size, 1)
        again = (grams[:, :, :-1] == tokens[:, None, tokens.shape[1] - size + 1 :]).all(dim=2)
        found.scatter_(1, torch.where(again, grams[:, :, -1], vocab), True)
    return found[:, :vocab]


def _check_filter(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature > 0:
        raise UserError(f"temperature {temperature}: give a number above 0 (towards 0 it becomes greedy decoding)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}: give 1 or more, or None to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: give a share above 0, up to 1, or None to keep all tokens")
