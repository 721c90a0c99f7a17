"""Options that only some choices of another option read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from llmrecipe.core.errors import RecipeError

if TYPE_CHECKING:
    from llmrecipe.objectives.base import Objective


def refuse_unused(objective: Objective, choice: str, readers: Mapping[str, Iterable[object]]) -> None:
    """Refuse options that differ from their defaults although nothing reads them.

    Args:
        choice: the option that decides.
        readers: option -> values of `choice` under which it is read.

    Raises:
        RecipeError: it names the option, and the values that would read it.
    """
    # Through `vars`, for a comparison is no use of an option (a run proves that every option of its recipe was used).
    options, plain = vars(objective), vars(type(objective)())
    chosen = options[choice]
    for name, values in readers.items():
        given = options[name]
        if chosen in values or given == plain[name]:
            continue
        able = " or ".join(_yaml(value) for value in values)
        raise RecipeError(
            f"objective.{name}: {_yaml(given)} is not read with objective.{choice}={_yaml(chosen)}; leave it out, or set "
            f"objective.{choice}={able}"
        )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
