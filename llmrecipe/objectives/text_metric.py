"""The interface of a text metric, as an objective and an evaluation know it, and the metric of a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.lazy import is_installed


class TextMetric(Protocol):
    """A score of one answer (see `feedback.metric.Metric`)."""

    @property
    def direction(self) -> Literal["min", "max"]:
        """Return whether a small or a large score is better."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest score."""

    def best(self, prediction: str, references: Sequence[str]) -> float:
        """Return the best of the scores against each reference."""


def metric_class(name: str, where: str) -> Any:  # noqa: ANN401 (a class of a package above this one)
    """Return the class of a text metric, a `feedback.metric.Metric`.

    Args:
        where: key path of the name.

    Raises:
        RecipeError: there is no such metric, or the library that computes it is not installed.
    """
    found = registry.load_class("metric", name, where)
    if found.library and not is_installed(found.library):
        raise RecipeError(
            f"{where}: {name} is computed by {found.library}, which is not installed; pip install 'llmrecipe[metrics]'"
        )
    return found
