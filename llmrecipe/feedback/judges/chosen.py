"""What an agent chose among options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIN_MASS = 0.5
"""Least probability that must lie on the options, where nothing else is said."""


LEAST = -1e4
"""Log-probability of what cannot be."""


@dataclass(frozen=True)
class Choice:
    """What an agent chose among options."""

    logprobs: list[float]
    """Of each option; not normalised, `LEAST` for what cannot be."""
    mass: float
    """Probability that lies on the options; of votes the share that named one."""
    how: Literal["logprobs", "votes"] = "logprobs"
    """What it was read from."""
    said: str = ""
    """A reply in words, where there is one."""
