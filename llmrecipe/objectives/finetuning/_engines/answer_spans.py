"""Spans of a passage: their loss, the best one over all windows, how well it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.answer_match import normalise, same_answer, word_f1


def span_loss(scores: Tensor, real: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """Compute -(1/2) (log softmax(s)[start] + log softmax(e)[stop]) of each window, (W,).

    Args:
        scores: (W, L, 2) s and e of each token.
        real: (W, L) false at padding, which has no share in the softmax.
        starts, stops: (W,) places in the window.
    """
    if not len(scores):
        return scores.sum((1, 2))
    first, last = scores.masked_fill(~real[..., None], -torch.inf).unbind(-1)
    return 0.5 * (F.cross_entropy(first, starts, reduction="none") + F.cross_entropy(last, stops, reduction="none"))


def best_spans(scores: Tensor, inside: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return max s_i + e_j over i <= j < i + `most` of each window, (W,), with its i and j, (W,).

    Args:
        scores: (W, L, 2) s and e of each token.
        inside: (W, L) tokens a span may begin and end with. A window without any has -inf.

    The shortest of equal spans is taken, then the first.
    """
    first, last = scores.unbind(-1)
    windows, width = first.shape
    best = first.new_full((windows,), -torch.inf)
    i = torch.zeros(windows, dtype=torch.long, device=first.device)
    j = i.clone()
    for length in range(min(most, width)):
        kept = width - length
        fits = inside[:, :kept] & inside[:, length:]
        total = (first[:, :kept] + last[:, length:]).masked_fill(~fits, -torch.inf)
        value, place = total.max(1)
        better = value > best
        best = torch.where(better, value, best)
        i, j = torch.where(better, place, i), torch.where(better, place + length, j)
    return best, i, j


@dataclass(frozen=True)
class SpanAnswer:
    """The answer to one question."""

    text: str
    """The best span of all windows."""
    odds: float
    """Score of no answer minus that of the span."""

    def given(self, threshold: float | None) -> str:
        """Return the span, or no text where the odds of no answer are above a threshold."""
        return "" if threshold is not None and self.odds > threshold else self.text


def answer_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of a prediction with the answer that agrees best; no answer is right where there is none.

    Examples:
        >>> answer_scores("the red hen", ["hen", "red hen"]), answer_scores("", []), answer_scores("hen", [])
        ((1.0, 1.0), (1.0, 1.0), (0.0, 0.0))
    """
    known = [a for a in answers if normalise(a, True, True, True)] or [""]
    return max(same_answer(prediction, a) for a in known), max(word_f1(prediction, a) for a in known)


def best_threshold(odds: Tensor, span: Tensor, none: Tensor) -> tuple[float, float]:
    """Return the largest mean score that a threshold of the odds can give, and the least of these thresholds.

    Args:
        odds: (R,) score of no answer minus that of the best span; up to the threshold a question gets the span.
        span: (R,) score of a question that gets the span.
        none: (R,) score of a question that gets no answer.
    """
    order = torch.argsort(odds, stable=True)
    gained = torch.cat([span.new_zeros(1), (span - none)[order].cumsum(0)])
    cuts = torch.cat([odds[order][:1] - 1.0, odds[order]])
    # Questions with equal odds are decided alike: only the last of them is a threshold.
    last = torch.ones(len(cuts), dtype=torch.bool)
    last[:-1] = cuts[1:] != cuts[:-1]
    gained, cuts = gained[last], cuts[last]
    place = int(torch.argmax(gained))
    return float((none.sum() + gained[place]) / len(odds)), float(cuts[place])
