"""How much an answer agrees with a reference: exact match and the F1 of words, as SQuAD's evaluation computes them."""

from __future__ import annotations

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str, lower: bool = False, articles: bool = False, punctuation: bool = False) -> str:
    """Strip, and on request lower-case, drop articles, drop punctuation; runs of white space become one space."""
    if lower:
        text = text.lower()
    if punctuation:
        text = text.translate(PUNCTUATION)
    if articles:
        text = ARTICLES.sub(" ", text)
    return " ".join(text.split())


def same_answer(prediction: str, reference: str) -> float:
    """Return 1 where two texts are equal in lower case, without articles and without punctuation, else 0.

    Examples:
        >>> same_answer("The red hen.", "red hen")
        1.0
    """
    return float(normalise(prediction, True, True, True) == normalise(reference, True, True, True))


def word_f1(prediction: str, reference: str) -> float:
    """Compute F = 2 P R / (P + R) of the bags of words of two texts, normalised as in `same_answer`.

    Where a bag is empty it is 1 if both are, else 0.

    Examples:
        >>> word_f1("The red hen", "a red hen sat")
        0.8
    """
    ours, theirs = (normalise(text, True, True, True).split() for text in (prediction, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))
