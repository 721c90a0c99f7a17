"""The vocabulary of option types: everything an option of a component may be annotated with.

The registry evaluates annotations and defaults in this module's namespace without importing the component's own module,
so a component may only annotate its options with names found here (or builtins).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share from 0 to 1, both ends allowed."""

OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share from 0 up to, but not including, 1 (dropout rates, momenta)."""

PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
"""A share above 0, up to 1."""


def registered(group: str, *others: str, open: bool = False) -> dict[str, JsonValue]:
    """Return the mark of an option that names components of a group, for `Field(json_schema_extra=...)`.

    A recipe is checked against the group, with the nearest spelling, and `show` and `schema` list its names.

    Args:
        others: further words the option may have.
        open: it may have any other text too.
    """
    return {"registered": {"group": group, "others": list(others), "open": open}}


LossMaskName = Annotated[str, Field(json_schema_extra=registered("loss_mask"))]
"""The name of a loss mask."""

StopText = Annotated[str, Field(min_length=1)]
"""A text before which a generated answer ends."""

Rank = Annotated[int, Field(gt=0, le=65536)]
"""The inner width of an added module: a rank, a bottleneck, a number of virtual tokens."""


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
    "LossMaskName",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenFraction",
    "PositiveFloat",
    "PositiveFraction",
    "PositiveInt",
    "Rank",
    "RefSync",
    "StopText",
]
