"""The ways in which adapters are merged, and what each of them asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrecipe.core.errors import UserError, did_you_mean

Sign = Literal["total", "frequency"]
RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
WAYS = ("cat", *RULES, "svd", *(f"{rule}_svd" for rule in RULES[1:]))
SPARSE = tuple(way for way in WAYS if way not in ("cat", "linear", "svd"))
"""Ways that keep a share of the entries."""


@dataclass(frozen=True)
class How:
    """How changes are merged."""

    way: str = "cat"
    density: float | None = None
    """Share of the entries that is kept; needed by the ways of `SPARSE`."""
    sign: Sign = "total"
    """How TIES elects a sign: by the sum, or by the number of tensors."""
    seed: int = 0
    """Of the draws of DARE."""

    def check(self) -> None:
        """Refuse an unknown way and a share that is missing, useless or impossible.

        Raises:
            UserError: it says what is allowed.
        """
        if self.way not in WAYS:
            near = did_you_mean(self.way, WAYS)
            raise UserError(f"--combine: there is no '{self.way}'{near} (allowed: {', '.join(WAYS)})")
        if self.sign not in ("total", "frequency"):
            raise UserError(f"--sign: there is no '{self.sign}' (allowed: total, frequency)")
        if self.way in SPARSE and self.density is None:
            raise UserError(
                f"--combine {self.way} needs --density, the share of entries that is kept (TIES keeps 0.2; DARE 0.1 to 0.5)"
            )
        if self.way not in SPARSE and self.density is not None:
            raise UserError(f"--density: --combine {self.way} keeps every entry; it goes with {', '.join(SPARSE)}")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise UserError(f"--density: {self.density:g} is no share of the entries; give a number above 0 and up to 1")
