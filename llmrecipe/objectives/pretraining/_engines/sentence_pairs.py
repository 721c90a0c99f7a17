"""Pairs of text segments from documents of sentences, as BERT makes them (google-research/bert, create_pretraining_data.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

TRIES = 10
"""Draws of another document before the pair is given up."""


@dataclass(frozen=True)
class Document:
    """A document of sentences."""

    ids: Sequence[int]
    words: Sequence[int]
    """Word of each token, -1 for special tokens."""
    lengths: Sequence[int]
    """Tokens of each sentence."""

    def sentences(self) -> list[list[tuple[int, int]]]:
        """Return each sentence as (token, word) pairs."""
        found, start = [], 0
        for length in self.lengths:
            found.append(list(zip(self.ids[start : start + length], self.words[start : start + length], strict=True)))
            start += length
        return found


Segment = list[tuple[int, int]]
"""Tokens with their words."""


@dataclass(frozen=True)
class Pair:
    """Two segments."""

    first: Segment
    second: Segment
    is_next: bool
    """Whether the second follows the first."""


@dataclass(frozen=True)
class PairPlan:
    """How pairs are made."""

    room: int
    """Most tokens of both segments, without special tokens."""
    p_random: float
    short_prob: float
    exact: bool
    """No pairs of chunks of one sentence, whose second segment cannot be the next one, and segments from elsewhere as long as
    those they replace, so that neither numbers nor lengths tell the label."""
    negatives: str
    """other_doc, same_doc or swap."""


def make_pairs(document: Document, plan: PairPlan, draws: np.random.Generator, other: Callable[[int], Document]) -> list[Pair]:
    """Return the pairs of a document.

    Sentences are gathered up to a target length (`room`, or with probability `short_prob` a random shorter one); the first
    segment is a random number of them from the start. The second is the rest, or with probability `p_random` (always where
    there is no rest) sentences from a random place elsewhere; then the rest is used for the next pair.

    Args:
        other: a number drawn from [0, 2^31) -> another document.
    """
    sentences = document.sentences()
    target = plan.room
    if draws.random() < plan.short_prob:
        target = int(draws.integers(2, max(plan.room, 2) + 1))
    found: list[Pair] = []
    chunk: list[int] = []
    at = 0
    while at < len(sentences):
        chunk.append(at)
        if at == len(sentences) - 1 or sum(len(sentences[i]) for i in chunk) >= target:
            pair, unused = _pair(document, sentences, chunk, target, plan, draws, other)
            at -= unused
            chunk = []
            if pair is not None:
                found.append(_cut(pair, plan.room, draws))
        at += 1
    return [pair for pair in found if pair.first and pair.second]


def _pair(
    document: Document,
    sentences: list[Segment],
    chunk: list[int],
    target: int,
    plan: PairPlan,
    draws: np.random.Generator,
    other: Callable[[int], Document],
) -> tuple[Pair | None, int]:
    """Return a pair of a chunk (None where it gives none), and how many of its sentences are left for the next one."""
    cut = int(draws.integers(1, len(chunk))) if len(chunk) > 1 else 1
    first = _joined(sentences[i] for i in chunk[:cut])
    rest = _joined(sentences[i] for i in chunk[cut:])
    alone = len(chunk) == 1
    if alone and (plan.exact or plan.negatives == "swap"):
        return None, 0
    if not alone and draws.random() >= plan.p_random:
        return Pair(first, rest, True), 0
    if plan.negatives == "swap":
        return Pair(rest, first, False), 0
    # BERT fills up to the target, so a negative pair is longer than a positive one at the end of a document.
    wanted = len(rest) if plan.exact else max(target - len(first), 1)
    if plan.negatives == "same_doc":
        places = [i for i in range(len(sentences)) if i not in chunk and i != chunk[-1] + 1]
        if not places:
            return None, 0
        start = places[int(draws.integers(len(places)))]
        return Pair(first, _run(sentences, start, wanted, plan.exact), False), len(chunk) - cut
    for _ in range(TRIES):
        another = other(int(draws.integers(2**31)))
        found = another.sentences()
        if list(another.ids) != list(document.ids) and not (plan.exact and sum(map(len, found)) < wanted):
            start = int(draws.integers(_starts(found, wanted) if plan.exact else len(found)))
            return Pair(first, _run(found, start, wanted, plan.exact), False), len(chunk) - cut
    return None, 0


def _joined(parts: Iterable[Segment]) -> Segment:
    return [token for part in parts for token in part]


def _starts(sentences: list[Segment], wanted: int) -> int:
    """Return how many of the first sentences have the wanted number of tokens from them on, at least one."""
    left, count = sum(map(len, sentences)), 0
    for sentence in sentences:
        if left < wanted:
            break
        left -= len(sentence)
        count += 1
    return max(count, 1)


def _run(sentences: list[Segment], start: int, wanted: int, exact: bool) -> Segment:
    """Return sentences from a place on until they have the wanted number of tokens, or no more than that many."""
    found: Segment = []
    for sentence in sentences[start:]:
        found += sentence
        if len(found) >= wanted:
            break
    return found[:wanted] if exact else found


def _cut(pair: Pair, room: int, draws: np.random.Generator) -> Pair:
    """Shorten the longer segment, at a random end each time, until both fit."""
    first, second = list(pair.first), list(pair.second)
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if draws.random() < 0.5 else -1)
    return Pair(first, second, pair.is_next)
