"""Span corruption of T5: spans become sentinels, and the target is what stood there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrecipe.core.errors import DataError
from llmrecipe.data.tokenize.word_rows import SPECIAL


@dataclass(frozen=True)
class CorruptedSpans:
    """A text whose spans are sentinels, and those spans."""

    source: list[int]
    target: list[int]
    """Each sentinel with the tokens of its span; a last sentinel where the text ends outside of one."""
    sentinel: list[bool]
    """Whether each target is a sentinel."""
    noised: int
    """Number of tokens in spans."""


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Return how many of `length` tokens are noise, and in how many spans, as T5 counts them.

    noise = round(density * length) from 1 to length - 1, spans = max(1, round(min(noise, length - noise) / mean_span)); a
    text of one token has none.

    Examples:
        >>> span_counts(568, 0.15, 3.0)
        (85, 28)
    """
    if length < 2:
        return 0, 0
    noise = min(max(int(np.round(length * density)), 1), length - 1)
    return noise, max(int(np.round(min(noise, length - noise) / mean_span)), 1)


def segment_lengths(items: int, segments: int, draws: np.random.Generator) -> np.ndarray:
    """Cut a number of items into non-empty segments, all ways equally likely; return their lengths (segments,)."""
    cuts = np.sort(draws.permutation(items - 1)[: segments - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [items])))


def noise_mask(length: int, density: float, mean_span: float, draws: np.random.Generator) -> np.ndarray:
    """Return which of `length` tokens are noise, (length,): spans alternate with kept tokens, which come first."""
    noise, spans = span_counts(length, density, mean_span)
    if not noise:
        return np.zeros(length, dtype=bool)
    noised, kept = segment_lengths(noise, spans, draws), segment_lengths(length - noise, spans, draws)
    lengths = np.stack((kept, noised), axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), lengths)


def corrupt_spans(ids: Sequence[int], words: Sequence[int], mask: np.ndarray, sentinels: Sequence[int]) -> CorruptedSpans:
    """Replace the spans of a text by sentinels.

    Args:
        words: word of each token, -1 for special tokens, which stay where they are and end a span.
        mask: which of the ordinary tokens are noise.
        sentinels: ids in the order they are used.

    Raises:
        DataError: there are more spans than sentinels.
    """
    drawn = iter(mask.tolist())
    noise = [word != SPECIAL and next(drawn) for word in words]
    source: list[int] = []
    target: list[int] = []
    is_sentinel: list[bool] = []
    used = 0

    def sentinel() -> int:
        nonlocal used
        if used >= len(sentinels):
            raise DataError(
                f"data.max_length: a text has more than {len(sentinels)} spans, one for each sentinel of the tokenizer "
                "(<extra_id_0>, ...); shorten the rows, add sentinels with tokenizer.add_tokens, or make fewer spans with "
                "objective.mean_span"
            )
        used += 1
        return sentinels[used - 1]

    for place, (token, noised) in enumerate(zip(ids, noise, strict=True)):
        if noised and not (place and noise[place - 1]):
            source.append(sentinel())
            target.append(source[-1])
            is_sentinel.append(True)
        if noised:
            target.append(token)
            is_sentinel.append(False)
        else:
            source.append(token)
    if not (noise and noise[-1]):
        target.append(sentinel())
        is_sentinel.append(True)
    return CorruptedSpans(source, target, is_sentinel, sum(noise))
