"""The interface of a verification: one comparison that a recipe or a run must pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core.registry import CONFIG

if TYPE_CHECKING:
    from llmrecipe.evaluation.verify.bench import Bench


class NotApplicable(Exception):
    """The comparison has no meaning for this recipe; the text says why."""


@dataclass(frozen=True)
class Measured:
    """What a verification compared."""

    compared: str
    difference: float
    """The largest difference found, as a share of the largest value; 0 where equality is to the bit."""
    bound: float
    """The largest difference that passes."""
    culprit: str = ""
    """Where the largest difference is: a tensor, a token, a layout."""

    @property
    def passes(self) -> bool:
        """Return whether the difference is within the bound (NaN is not)."""
        return self.difference <= self.bound


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Verification:
    """Base class of a verification. `llmrecipe verify` runs every registered one, in the order of `order`."""

    group: ClassVar[str] = "verification"
    order: ClassVar[int] = 50

    def measure(self, bench: Bench) -> Measured:
        """Compare what has to be the same.

        Raises:
            NotApplicable: the recipe has nothing to compare.
            ProofError: something is wrong that is no matter of size.
        """
        raise NotImplementedError
