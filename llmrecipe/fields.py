"""The vocabulary of option types: everything an option of a component may be annotated with.

The registry evaluates annotations and defaults in this module's namespace without importing the component's own module,
so a component may only annotate its options with names found here (or builtins).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share from 0 to 1, both ends allowed."""

OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share from 0 up to, but not including, 1 (dropout rates, momenta)."""

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
    "PositiveInt",
]
