"""Noise of denoising autoencoders: what is masked, removed, put in or moved before a model reads a text.

Every draw comes from the generator of the row (see `masking.generator`). Special tokens are neither masked nor removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmrecipe.data.tokenize.word_rows import SPECIAL

NEW = -1
"""Place of a token that the text did not have: a mask, a random token."""
SMALLEST_SHARE = 1e-7
"""Probability below which fairseq cuts its table of span lengths."""
LONGEST_TABLE = 128

Token = tuple[int, int]
"""(token id, its place in the text or `NEW`)."""


@dataclass(frozen=True)
class PlainText:
    """A text without the special tokens around it."""

    ids: Sequence[int]
    words: Sequence[int]
    """Word of each token, -1 for special tokens."""
    sentences: Sequence[int]
    """Sentence of each token, in ascending order."""

    def tokens(self) -> list[Token]:
        """Return every token with its place."""
        return [(token, place) for place, token in enumerate(self.ids)]


@dataclass(frozen=True)
class NoisePlan:
    """Which noises a text gets, applied in the order of the fields."""

    permute_sentences: float = 0.0
    """Share of the sentences that change places with one another."""
    mask_ratio: float = 0.0
    """Share of the words that are in spans."""
    poisson: float | None = 3.0
    """Mean length of a span in words; None: every span is one word."""
    replace_length: int = 1
    """Masks in the place of a span: one, none (0), or one for each token (-1)."""
    mask_tokens: float = 0.0
    """Share of the tokens that become one mask each."""
    delete: float = 0.0
    """Share of the tokens that are removed; probability of each word where `by_word`."""
    insert: float = 0.0
    """Tokens that are put in, as a share of the length."""
    rotate: float = 0.0
    """Probability that the text starts at another of its tokens."""
    mask_random: float = 0.1
    """Probability that a mask is a random token instead."""
    by_word: bool = False
    fairseq: bool = False
    """Do as fairseq's code does, in everything but its random generators."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that noise is made of."""

    mask_id: int
    pool: np.ndarray
    """(P,) ids that a random token is drawn from."""
    full_stop: int | None = None
    """Token that ends a sentence, in the way of fairseq."""
    around: int = 0
    """Number of special tokens around the text, which fairseq counts as part of it."""


def add_noise(text: PlainText, plan: NoisePlan, vocabulary: Vocabulary, draws: np.random.Generator) -> list[Token]:
    """Return the noised tokens of a text, each with its place in it."""
    noise = _Noise(text, plan, vocabulary, draws)
    tokens = text.tokens()
    if plan.permute_sentences:
        tokens = noise.permuted(tokens)
    if plan.mask_ratio:
        tokens = noise.infilled(tokens)
    if plan.mask_tokens:
        tokens = noise.masked(tokens)
    if plan.delete:
        tokens = noise.thinned(tokens)
    if plan.insert:
        length = len(tokens) + (vocabulary.around if plan.fairseq else 0)
        tokens = noise.inserted(tokens, math.ceil(length * plan.insert))
    if plan.rotate and draws.random() < plan.rotate:
        tokens = noise.rotated(tokens)
    return tokens


def span_lengths(budget: int, mean: float, draws: np.random.Generator, table: bool = False) -> list[int]:
    """Draw Poisson(mean) lengths until they add up to the budget, the last one trimmed to it.

    Args:
        table: draw from fairseq's table of probabilities, which ends where they fall below 1e-7.
    """
    probabilities = _poisson_table(mean) if table else None
    lengths: list[int] = []
    left = budget
    while left > 0:
        drawn = draws.poisson(mean) if probabilities is None else draws.choice(len(probabilities), p=probabilities)
        lengths.append(min(int(drawn), left))
        left -= lengths[-1]
    return lengths


def _poisson_table(mean: float) -> np.ndarray:
    shares = []
    for k in range(LONGEST_TABLE):
        shares.append(math.exp(-mean) * mean**k / math.factorial(k))
        if shares[-1] < SMALLEST_SHARE:
            break
    return np.array(shares) / sum(shares)


@dataclass(frozen=True)
class _Noise:
    text: PlainText
    plan: NoisePlan
    vocabulary: Vocabulary
    draws: np.random.Generator

    def word_of(self, token: Token) -> int:
        """Return the word of a token; special and new tokens belong to none."""
        return SPECIAL if token[1] == NEW else self.text.words[token[1]]

    def groups(self, tokens: list[Token]) -> list[list[int]]:
        """Return the indices of the tokens of each word, in the order of the tokens."""
        found: list[list[int]] = []
        before = SPECIAL
        for place, token in enumerate(tokens):
            word = self.word_of(token)
            if word != SPECIAL and word == before:
                found[-1].append(place)
            elif word != SPECIAL:
                found.append([place])
            before = word
        return found

    def mask(self, random: bool) -> Token:
        """Return a mask, or a random token."""
        if not random:
            return self.vocabulary.mask_id, NEW
        return int(self.vocabulary.pool[self.draws.integers(len(self.vocabulary.pool))]), NEW

    def permuted(self, tokens: list[Token]) -> list[Token]:
        """Exchange ceil(p n) of the n sentences among their places; what ends a sentence moves with it."""
        parts = self.by_full_stop(tokens) if self.plan.fairseq else self.by_sentence(tokens)
        chosen = self.draws.permutation(len(parts))[: math.ceil(len(parts) * self.plan.permute_sentences)]
        order = np.arange(len(parts))
        order[chosen] = self.draws.permutation(chosen)
        moved = [token for part in order for token in parts[part]]
        return moved + tokens[len(moved) :]

    def by_sentence(self, tokens: list[Token]) -> list[list[Token]]:
        """Return the tokens of each sentence."""
        parts: list[list[Token]] = []
        before = None
        for token in tokens:
            sentence = self.text.sentences[token[1]]
            if sentence != before:
                parts.append([])
            parts[-1].append(token)
            before = sentence
        return parts

    def by_full_stop(self, tokens: list[Token]) -> list[list[Token]]:
        """Return the tokens up to each first full stop of a run of them; the last token counts as one."""
        stops = [token == self.vocabulary.full_stop for token, _ in tokens]
        stops[-1] = True
        ends = [i + 1 for i, stop in enumerate(stops) if stop and not (i and stops[i - 1])]
        return [tokens[first:last] for first, last in zip([0, *ends], ends, strict=False)]

    def infilled(self, tokens: list[Token]) -> list[Token]:
        """Replace spans of words that begin at different words; a span of no words puts in a mask.

        A span ends at the end of the text and at special tokens. One that runs over the start of another takes its mask.
        """
        words = self.groups(tokens)
        budget = math.ceil(len(words) * self.plan.mask_ratio)
        if self.plan.poisson is None:
            lengths = [1] * budget
        else:
            lengths = span_lengths(budget, self.plan.poisson, self.draws, self.plan.fairseq)
        spans = [length for length in lengths if length]
        starts = self.draws.permutation(len(words))[: len(spans)].tolist()
        random = (self.draws.random(len(spans)) < self.plan.mask_random).tolist()
        runs = [self.run(words, start, length) for start, length in zip(starts, spans, strict=True)]
        # The first token of a span holds its mask, unless another span runs over it.
        covered = {place for run in runs for place in run[1:]}
        gone = covered | {run[0] for run in runs}
        shown: dict[int, Token] = {}
        for run, one in zip(runs, random, strict=True):
            if self.plan.replace_length == -1:
                shown |= {place: self.mask(one) for place in run}
            elif self.plan.replace_length == 1 and run[0] not in covered:
                shown[run[0]] = self.mask(one)
        kept = [shown.get(i, token) for i, token in enumerate(tokens) if i not in gone or i in shown]
        extra = len(lengths) - len(spans)
        if extra and self.plan.fairseq:
            length = len(kept) + self.vocabulary.around
            extra = math.ceil(length * (extra / length))
        return self.inserted(kept, extra)

    def run(self, words: list[list[int]], start: int, length: int) -> list[int]:
        """Return the indices of the tokens of a span: up to `length` words without a special token between them."""
        run = list(words[start])
        for word in words[start + 1 : start + length]:
            if word[0] != run[-1] + 1:
                break
            run += word
        return run

    def inserted(self, tokens: list[Token], count: int) -> list[Token]:
        """Put masks at random places, some of them random tokens (fairseq: a share rounded up, so at least one)."""
        if not count:
            return tokens
        new = np.zeros(len(tokens) + count, dtype=bool)
        new[self.draws.permutation(len(new))[:count]] = True
        random = self.draws.random(count) < self.plan.mask_random
        if self.plan.fairseq:
            random = self.draws.permutation(count) < math.ceil(count * self.plan.mask_random)
        masks, rest = (self.mask(bool(one)) for one in random), iter(tokens)
        return [next(masks) if is_new else next(rest) for is_new in new]

    def ordinary(self, tokens: Iterable[Token]) -> list[int]:
        """Return the indices of the tokens that may be masked or removed."""
        return [i for i, token in enumerate(tokens) if self.word_of(token) != SPECIAL]

    def masked(self, tokens: list[Token]) -> list[Token]:
        """Replace ceil(p n) of the n ordinary tokens by a mask each."""
        places = self.ordinary(tokens)
        chosen = self.draws.permutation(len(places))[: math.ceil(len(places) * self.plan.mask_tokens)]
        found = list(tokens)
        for i in sorted(chosen.tolist()):
            found[places[i]] = self.mask(bool(self.draws.random() < self.plan.mask_random))
        return found

    def thinned(self, tokens: list[Token]) -> list[Token]:
        """Remove ceil(p n) of the n ordinary tokens; or each word with probability p, all but at least one."""
        if self.plan.by_word:
            words = self.groups(tokens)
            kept = self.draws.random(len(words)) >= self.plan.delete
            if len(words) and not kept.any():
                kept[self.draws.integers(len(words))] = True
            gone = {place for word, stays in zip(words, kept, strict=True) if not stays for place in word}
        else:
            places = self.ordinary(tokens)
            chosen = self.draws.permutation(len(places))[: math.ceil(len(places) * self.plan.delete)]
            gone = {places[i] for i in chosen}
        return [token for i, token in enumerate(tokens) if i not in gone]

    def rotated(self, tokens: list[Token]) -> list[Token]:
        """Start at a random token; fairseq draws the first one and the end of the text, too, which change nothing."""
        if len(tokens) < 2:
            return tokens
        first = int(self.draws.integers(0, len(tokens) + 1) if self.plan.fairseq else self.draws.integers(1, len(tokens)))
        return tokens[first:] + tokens[:first]
