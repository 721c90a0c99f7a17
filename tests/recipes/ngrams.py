"""An interpolated trigram: what a language model from nothing has to beat."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

Document = Sequence[int]
ORDER = 3
UNSEEN = -1.0
ROUNDS = 20
"""Steps of expectation maximisation for the weights."""


def counted(documents: Sequence[Document]) -> list[dict[Document, dict[int, int]]]:
    """How often each token follows each history, by the length of the history: none, one token and two."""
    found: list[dict[Document, dict[int, int]]] = [defaultdict(lambda: defaultdict(int)) for _ in range(ORDER)]
    for document in documents:
        for i in range(1, len(document)):
            for n in range(min(ORDER, i + 1)):
                found[n][tuple(document[i - n : i])][document[i]] += 1
    return found


def own_bits(documents: Sequence[Document], order: int) -> float:
    """The entropy of documents by their own counts, in bits: the least that any n-gram model of an order up to 3 can give."""
    seen = [counts.values() for counts in counted(documents)[order - 1].values()]
    return -sum(count * math.log2(count / sum(counts)) for counts in seen for count in counts)


class Trigram:
    """p(t | u, v) = w0 / V + w1 c(t) / n + w2 c(v t) / c(v) + w3 c(u v t) / c(u v).

    The weights are those under which every tenth training document is likeliest, given the counts of the others
    (Jelinek-Mercer); of histories that were never seen they are given to the others in proportion. Counts are then those of
    all training documents. The first token of a document is a start token and is not predicted.
    """

    def __init__(self, documents: Sequence[Document], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        held_out = documents[::10]
        self._count([d for i, d in enumerate(documents) if i % 10])
        self.weights = [1 / (ORDER + 1)] * (ORDER + 1)
        terms = [p for d in held_out for p in self._terms(d)]
        for _ in range(ROUNDS):
            shares = [0.0] * (ORDER + 1)
            for p in terms:
                parts = [w * max(value, 0.0) for w, value in zip(self.weights, p, strict=True)]
                total = sum(parts)
                shares = [s + part / total for s, part in zip(shares, parts, strict=True)]
            self.weights = [s / sum(shares) for s in shares]
        self._count(documents)

    def bits(self, documents: Sequence[Document]) -> float:
        """The code length of documents, in bits."""
        total = 0.0
        for document in documents:
            for p in self._terms(document):
                known = sum(w for w, value in zip(self.weights, p, strict=True) if value >= 0.0)
                total -= math.log2(sum(w * value for w, value in zip(self.weights, p, strict=True) if value >= 0.0) / known)
        return total

    def _count(self, documents: Sequence[Document]) -> None:
        self.counts = counted(documents)
        self.totals = [{history: sum(seen.values()) for history, seen in counts.items()} for counts in self.counts]

    def _terms(self, document: Document) -> Iterator[list[float]]:
        """The estimates of each token by order, uniform first; `UNSEEN` after a history that no document has."""
        for i in range(1, len(document)):
            found = [1 / self.vocabulary]
            for n in range(ORDER):
                history = tuple(document[max(i - n, 0) : i]) if n <= i else None
                seen = self.counts[n].get(history) if history is not None else None
                found.append(seen.get(document[i], 0) / self.totals[n][history] if seen and history is not None else UNSEEN)
            yield found
