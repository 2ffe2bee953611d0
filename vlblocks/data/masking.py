"""Whole-word span masking for masked language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlblocks.errors import UserError

IGNORED = -100


class MaskedTokens(NamedTuple):
    """A text with hidden tokens, and what they were.

    Attributes:
        tokens: [T] int64, the input with some tokens replaced.
        labels: [T] int64, the original id where it is to be predicted, else -100.
    """

    tokens: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SpanMasking:
    """Hides spans of whole words (spec item 27; SpanBERT, Joshi et al. 2020).

    A span's length in words is l with probability proportional to p (1 - p)^l, l = 0 .. `longest` (length 0 hides
    nothing), its first word uniform. Spans are drawn until `share` of the tokens are hidden: a word that would pass
    that number is hidden with the probability that keeps the expected share exact, and one word always is. A hidden
    token becomes the mask, a random token, or stays, drawn token by token.

    Args:
        share: share of the non-special tokens to hide.
        geometric: p.
        longest: longest span, words.
        mask_rate, random_rate: shares of hidden tokens that become the mask or a random token.

    Raises:
        UserError: a rate lies outside [0, 1] or `longest` is below 1.
    """

    share: float = 0.15
    geometric: float = 0.2
    longest: int = 10
    mask_rate: float = 0.8
    random_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("share", "mask_rate", "random_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} {getattr(self, name)} is not a share; use a number from 0 to 1")
        if self.mask_rate + self.random_rate > 1.0 + 1e-9:
            raise UserError("mask_rate and random_rate pass 1 together; lower one")
        if not 0.0 < self.geometric < 1.0:
            raise UserError(f"geometric {self.geometric} is not a probability; use a number between 0 and 1")
        if self.longest < 1:
            raise UserError(f"longest {self.longest} allows no span; use 1 or more words")

    def __call__(
        self, tokens: np.ndarray, word_starts: np.ndarray, rng: np.random.Generator, *, mask_id: int
    ) -> MaskedTokens:
        """Mask one text.

        Args:
            tokens: [T] ids; 0 to 3 and `mask_id`, which is the vocabulary's last id, are never touched.
            word_starts: [T] bool, true where a word begins (`Tokenizer.word_starts`).
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        hidden = self.choose(tokens, word_starts, rng, mask_id=mask_id)
        labels = np.where(hidden, tokens, IGNORED)
        masked = tokens.copy()
        where = np.flatnonzero(hidden)
        fate = rng.random(len(where))
        masked[where[fate < self.mask_rate]] = mask_id
        swapped = where[(fate >= self.mask_rate) & (fate < self.mask_rate + self.random_rate)]
        if mask_id > 4:
            masked[swapped] = rng.integers(4, mask_id, size=len(swapped))
        return MaskedTokens(masked, labels)

    def choose(
        self, tokens: np.ndarray, word_starts: np.ndarray, rng: np.random.Generator, *, mask_id: int
    ) -> np.ndarray:
        """The tokens to hide, [T] bool: whole words only, at least one word wherever there is one."""
        real = (tokens > 3) & (tokens != mask_id)
        hidden = np.zeros(len(tokens), dtype=bool)
        if self.share == 0.0 or not real.any():
            return hidden
        begins = real & np.asarray(word_starts, dtype=bool)
        begins[1:] |= real[1:] & ~real[:-1]
        begins[0] = real[0]
        starts = np.flatnonzero(begins)
        word_of = np.cumsum(begins) - 1
        lengths = np.bincount(word_of[real], minlength=len(starts))
        room = max(1.0, self.share * float(real.sum()))
        # Lengths 0 .. longest; a draw of 0 hides nothing, so it is as well never drawn.
        weights = (1.0 - self.geometric) ** np.arange(1, self.longest + 1)
        cumulative = np.cumsum(weights / weights.sum())
        taken = np.zeros(len(starts), dtype=bool)
        done = False
        while not done and not taken.all():
            span = 1 + int(np.searchsorted(cumulative, rng.random(), side="right"))
            first = int(rng.integers(len(starts)))
            for word in range(first, min(first + span, len(starts))):
                if taken[word]:
                    continue
                size = float(lengths[word])
                if size > room:
                    taken[word] = rng.random() < room / size or not taken.any()
                    done = True
                    break
                taken[word] = True
                room -= size
                if room <= 0.0:
                    done = True
                    break
        return real & taken[np.clip(word_of, 0, None)]
