"""What rows of a leaderboard differ from one of them by: mean over the seeds that both have, with its interval.

d_s = score of the row - score of the baseline at seed s; mean(d) +- t(0.975, n - 1) sd(d) / sqrt(n) over the n seeds. Runs with
one seed share their order of batches and what is drawn at the start, so their difference varies less than either of them does.
Source: Student 1908, The probable error of a mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.score_intervals import ENDS, NORMAL
from llmrecipe.evaluation.leaderboard_table import Column, LeaderboardEntry, LeaderboardRow

DIFFERENCE = "difference"
"""Key of the column."""
QUANTILES = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
)  # fmt: skip
"""0.975 quantile of Student's t with 1, 2, ... degrees of freedom."""


def t_quantile(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t, beyond the table to 1e-3 by the first terms of its expansion.

    Examples:
        >>> t_quantile(2), round(t_quantile(30), 3)
        (4.302653, 2.042)
    """
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def paired_interval(first: dict[int, float], second: dict[int, float]) -> tuple[float, float | None] | None:
    """Return mean and half width of first - second over their common seeds; no width for a single one, None without any.

    Examples:
        >>> mean, half = paired_interval({0: 0.5, 1: 0.75, 2: 1.0}, {0: 0.25, 1: 0.25, 2: 0.25})
        >>> mean, round(half, 3)
        (0.5, 0.621)
    """
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return None
    count = len(differences)
    if count == 1:
        return differences[0], None
    return statistics.fmean(differences), t_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)


def baseline_rows(rows: Sequence[LeaderboardRow], name: str, where: str) -> list[LeaderboardRow]:
    """Return the row of that name, or those whose name begins with it and goes on in parentheses.

    Raises:
        RecipeError: there is none.
    """
    found = [row for row in rows if row.label == name] or [row for row in rows if row.label.startswith(f"{name} (")]
    if found:
        return found
    names = [row.label for row in rows]
    short = [label.partition(" (")[0] for label in names]
    raise RecipeError(
        f"{where}: no row is called '{name}'{did_you_mean(name, [*names, *short])} (the rows are {'; '.join(names)})"
    )


def baseline_of(row: LeaderboardRow, found: Sequence[LeaderboardRow], first: Mapping[str, str], where: str) -> str:
    """Return the baseline of a row: the only one there is, or the one whose chain of runs began with the same model.

    Args:
        found: what the name of the baseline stands for.
        first: label -> the model that the first run of its chain started from.

    Raises:
        RecipeError: there are several, of the same model or of none.
    """
    alike = [other for other in found if first.get(other.label) == first.get(row.label)] if len(found) > 1 else found
    if len(alike) == 1:
        return alike[0].label
    kind = "with the model" if alike else "and none with the model"
    names = "; ".join(other.label for other in alike or found)
    raise RecipeError(
        f"{where}: {len(alike or found)} rows have that name, {kind} that {row.label} began with; name one of them ({names})"
    )


def compare_rows(rows: Sequence[LeaderboardRow], entries: Sequence[LeaderboardEntry], name: str, key: str, where: str) -> None:
    """Add to each row its difference from the baseline with the ends of its interval.

    Args:
        rows: of the table, changed in place.
        entries: the single runs.
        name: the baseline; where models of several shapes have one each, a row is compared with that of its own.
        key: the score.

    Raises:
        RecipeError: no row is the baseline, or which of several is not known.
    """
    found = baseline_rows(rows, name, where)
    first = {entry.label: entry.first for entry in entries}
    scores: dict[str, dict[int, list[float]]] = {}
    for entry in entries:
        scores.setdefault(entry.label, {}).setdefault(entry.seed, []).append(entry.facts[key])
    means = {label: {seed: statistics.fmean(v) for seed, v in seeds.items()} for label, seeds in scores.items()}
    for row in rows:
        if row in found or row.label not in means:
            continue
        apart = paired_interval(means[row.label], means.get(baseline_of(row, found, first, where), {}))
        if apart is None:
            continue
        mean, half = apart
        row.mean[DIFFERENCE] = mean
        if half is not None:
            row.mean |= dict(zip((f"{DIFFERENCE}/{end}" for end in ENDS), (mean - half, mean + half), strict=True))


def difference_column(name: str) -> Column:
    """Return the column of the differences from a row."""
    means = f"score minus that of {name}, mean over the seeds that both have, with the 95 % interval of Student's t"
    return Column(DIFFERENCE, f"against {name}", means=means)
