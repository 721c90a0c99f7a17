"""Whether more or less of a metric is better: declared where the metric is computed, looked up here by everything that chooses.

An objective declares what its evaluations report (`Objective.measures`), a text metric its own `direction`. Early stopping, the
best checkpoint, a search and a leaderboard all use `direction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.feedback.metric import INVALID
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.text_metric import metric_class

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import EvalSection

Direction = Literal["min", "max"]
PREFIXES = ("eval/", "test/")


def measured(objective: Objective, metrics: Sequence[str] = ()) -> dict[str, Direction | None]:
    """Return every metric an evaluation may report with its better direction, None where that depends on what is wanted.

    Args:
        metrics: names of text metrics (`eval.metrics`).

    Raises:
        RecipeError: there is no such text metric, or the objective's rows have no prompt to answer.
    """
    from llmrecipe.data.tokenize.row_type import row_type

    found: dict[str, Direction | None] = {"loss": "min", **objective.measures()}
    if "nll" in found:
        found["perplexity"] = "min"
    for name in metrics:
        registry.spec("metric", name, "eval.metrics")
        if not row_type(objective.rows).prompted:
            raise RecipeError(
                f"eval.metrics: {name} scores generated answers, and rows of type {objective.rows} have no prompt to answer"
            )
        metric = metric_class(name, "eval.metrics")
        found[name] = metric.direction
        if metric.wants:
            found[f"{name}/{INVALID}"] = "min"
        if objective.tasks() is not None:
            found[f"{name}/tasks"] = metric.direction
    return found


def declares(objective: Objective) -> bool:
    """Return whether an objective declares its metrics; one that does not may report anything."""
    return type(objective).measures is not Objective.measures


def direction(section: EvalSection, objective: Objective) -> Direction:
    """Return whether `eval.monitor` should be small or large: `eval.mode`, or what is declared.

    Raises:
        RecipeError: no evaluation reports the metric, or nothing says what is better.
    """
    known = measured(objective, section.metrics)
    prefix, name = "eval/", section.monitor.removeprefix("eval/")
    if not section.monitor.startswith(prefix) or (name not in known and declares(objective)):
        names = [prefix + n for n in known]
        raise RecipeError(
            f"eval.monitor: no evaluation of this recipe reports '{section.monitor}'{did_you_mean(section.monitor, names)} "
            f"(they report {', '.join(names)}; eval.metrics adds others)"
        )
    better = section.mode or known.get(name)
    if better is None:
        raise RecipeError(
            f"eval.monitor: nothing says whether a large or a small {section.monitor} is better; "
            "set eval.mode=max or eval.mode=min"
        )
    return better


def direction_of(metric: str, objective: Objective, metrics: Sequence[str] = ()) -> Direction | None:
    """Return the declared direction of a metric of a finished run, with or without the prefix `eval/` or `test/`; else None."""
    name = next((metric.removeprefix(p) for p in PREFIXES if metric.startswith(p)), metric)
    return measured(objective, metrics).get(name)
