"""Scores with the ends of their confidence interval: how metrics hold them, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

LEVEL = 0.95
NORMAL = 1.959964
"""Standard errors of a normal distribution on each side of its mean within which `LEVEL` of it lies."""
ENDS = ("low", "high")
"""What the names of a score's interval end in: `accuracy/low`, `accuracy/high`."""
Ends = tuple[float, float]


def with_ends(metrics: Mapping[str, object]) -> dict[str, tuple[object, Ends | None]]:
    """Return each score with the ends of its interval, if it has one.

    Examples:
        >>> with_ends({"accuracy": 0.9, "accuracy/low": 0.8, "accuracy/high": 1.0, "rows": 20.0})
        {'accuracy': (0.9, (0.8, 1.0)), 'rows': (20.0, None)}
    """
    known: dict[str, Ends] = {}
    for name in metrics:
        low, high = (metrics.get(f"{name}/{end}") for end in ENDS)
        if isinstance(low, int | float) and isinstance(high, int | float):
            known[name] = (float(low), float(high))
    hidden = {f"{name}/{end}" for name in known for end in ENDS}
    return {name: (value, known.get(name)) for name, value in metrics.items() if name not in hidden}


def shown(metrics: Mapping[str, object], text: Callable[[object], str]) -> dict[str, str]:
    """Return each score as text, followed by the ends of its interval in brackets.

    Examples:
        >>> shown({"accuracy": 0.9, "accuracy/low": 0.8, "accuracy/high": 1.0}, str)
        {'accuracy': '0.9 [0.8, 1.0]'}
    """
    return {name: with_interval(value, ends, text) for name, (value, ends) in with_ends(metrics).items()}


def with_interval(value: object, ends: Ends | None, text: Callable[[object], str]) -> str:
    """Return a score as text, followed by the ends of its interval in brackets where it has one."""
    return text(value) if ends is None else f"{text(value)} [{text(ends[0])}, {text(ends[1])}]"


def normal_ends(name: str, value: float, error: float | None) -> dict[str, float]:
    """Return the ends of the interval of a score from its standard error; none where that is not known.

    Examples:
        >>> normal_ends("score", 0.0, 1.0)
        {'score/low': -1.959964, 'score/high': 1.959964}
    """
    if error is None or not math.isfinite(error):
        return {}
    return {f"{name}/{end}": value + sign * NORMAL * error for end, sign in zip(ENDS, (-1.0, 1.0), strict=True)}
