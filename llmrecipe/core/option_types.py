"""The vocabulary of option types: everything an option of a component may be annotated with.

The registry evaluates annotations and defaults in this module's namespace without importing the component's own module,
so a component may only annotate its options with names found here (or builtins).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share from 0 to 1, both ends allowed."""

OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share from 0 up to, but not including, 1 (dropout rates, momenta)."""

PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
"""A share above 0, up to 1."""


class RefSync(BaseModel):
    """How a reference follows the policy: after every `steps` updates, reference <- alpha policy + (1 - alpha) reference."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    alpha: PositiveFraction = 0.6
    """Share of the policy; 1 copies it."""
    steps: PositiveInt = 512
    """Updates between two moves."""


__all__ = [
    "Annotated",
    "Any",
    "ClassVar",
    "Field",
    "Fraction",
    "Literal",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenFraction",
    "PositiveFloat",
    "PositiveFraction",
    "PositiveInt",
    "RefSync",
]
