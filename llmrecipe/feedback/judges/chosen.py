"""A judge's choice among options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIN_MASS = 0.5
"""Least probability that must lie on the options, where nothing else is said."""


LEAST = -1e4
"""Log-probability of the impossible."""


@dataclass(frozen=True)
class Choice:
    """A judge's choice among options."""

    logprobs: list[float]
    """Log-probability of each option; not normalised, `LEAST` for an impossible one."""
    mass: float
    """Probability that lies on the options; for votes, the share that named one."""
    how: Literal["logprobs", "votes"] = "logprobs"
    """How it was obtained."""
    said: str = ""
    """A reply in words, where there is one."""
