"""Confidence intervals of scores: the rows of an evaluation are drawn again, with replacement, and scored each time.

Percentile bootstrap: from B samples of R rows the interval is what lies between the (1 - level) / 2 and the (1 + level) / 2
quantile of the B scores. Source: Efron 1979, Bootstrap methods: another look at the jackknife.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmrecipe.core.score_intervals import ENDS, LEVEL

Finish = Callable[[dict[str, float], dict[str, Tensor]], Mapping[str, float]]
"""Scores of a whole set from means and tensors, as `Objective.finish_evaluation` computes them."""


@dataclass
class RowScores:
    """What every row of an evaluation adds to each score."""

    samples: int
    """B, how often the rows are drawn again; none at 0."""
    seed: int = 0
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    """Score -> (R, K) numbers whose sums over rows `totals` reads; (sum, count) where it has no entry."""
    totals: dict[str, Callable[[Sequence[float]], float]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """(R, ...) what `finish` reads at once."""

    def counts(self, rows: int) -> np.ndarray:
        """Return how often each sample holds each row, (B, R): the same ones for every score of as many rows."""
        rng = np.random.default_rng([self.seed, rows])
        return rng.multinomial(rows, np.full(rows, 1.0 / rows), size=self.samples) if rows else np.zeros((self.samples, 0))

    def drawn(self, finish: Finish | None) -> dict[str, np.ndarray]:
        """Return each score of every sample, (B,).

        Args:
            finish: None where the scores it computes are left out.
        """
        found: dict[str, np.ndarray] = {}
        means: dict[str, np.ndarray] = {}
        for name, rows in self.statistics.items():
            sums = self.counts(len(rows)) @ rows
            total = self.totals.get(name)
            with np.errstate(invalid="ignore", divide="ignore"):
                values = sums[:, 0] / sums[:, 1] if total is None else np.array([total(one) for one in sums.tolist()])
            if total is None:
                means[name] = values
            found[name] = values
        sizes = {len(t) for t in self.tensors.values()}
        if finish is not None and len(sizes) == 1 and min(sizes) > 1:
            found |= self._of_sets(finish, means, min(sizes))
        return found

    def _of_sets(self, finish: Finish, means: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
        values: dict[str, list[float]] = {}
        for sample, counts in enumerate(self.counts(rows)):
            drawn = torch.from_numpy(np.repeat(np.arange(rows), counts))
            own = {name: float(v[sample]) for name, v in means.items()}
            for name, value in finish(own, {n: t[drawn] for n, t in self.tensors.items()}).items():
                values.setdefault(name, []).append(value)
        return {name: np.array(found) for name, found in values.items()}


def all_ends(drawn: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the ends of the interval of each score from its values in the samples."""
    return {key: end for name, values in drawn.items() for key, end in ends(name, values).items()}


def ends(name: str, values: np.ndarray, level: float = LEVEL) -> dict[str, float]:
    """Return `NAME/low` and `NAME/high` of the scores of the samples; none where a sample has no score."""
    if not len(values) or not np.isfinite(values).all():
        return {}
    quantiles = np.quantile(values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return {f"{name}/{end}": float(q) for end, q in zip(ENDS, quantiles, strict=True)}
