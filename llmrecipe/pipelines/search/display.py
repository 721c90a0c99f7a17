"""Display of a search: its trials in order, and a plot where matplotlib is installed."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from llmrecipe.core.figures import new_figure
from llmrecipe.core.lazy import is_installed
from llmrecipe.pipelines.search import space
from llmrecipe.pipelines.search.study import Search
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.recipe.search_section import RangeSection


def ranked(search: Search, trials: list[Trial]) -> list[Trial]:
    """Sort trials from the best to the worst; pruned ones after completed ones, failed ones last."""
    sign = 1.0 if search.mode == "min" else -1.0
    order = ("done", "pruned", "failed")
    return sorted(trials, key=lambda t: (order.index(t.state), sign * t.value if t.value is not None else 0.0))


FEWEST = 10
"""Completed trials from which importances are shown."""


def importances(search: Search, trials: list[Trial]) -> dict[str, float]:
    """Return how much each key of the space decides whether a trial is among the best tenth, as shares of one.

    PED-ANOVA on the completed trials (arXiv 2304.10255), by Optuna; empty for one key, or fewer than ten completed trials.
    """
    done = [t for t in trials if t.state == "done" and t.value is not None]
    if len(search.section.space) < 2 or len(done) < FEWEST:
        return {}
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes, sign = space.distributions(search.section), 1.0 if search.mode == "min" else -1.0
    losses = optuna.create_study()
    for trial in done:
        drawn = space.drawn_of(search.section, trial.point)
        value = sign * float(trial.value or 0.0)
        losses.add_trial(optuna.trial.create_trial(params=drawn, distributions=axes, value=value))
    found = get_param_importances(losses, evaluator=PedAnovaImportanceEvaluator())
    return {key: found[key] for key in search.section.space}


def picture(search: Search, trials: list[Trial]) -> Path | None:
    """Draw `search.png`: values in the order they were tried with the best so far, over each key, and importances."""
    if not is_installed("matplotlib"):
        return None
    done = [t for t in trials if t.value is not None and t.state == "done"]
    keys = list(search.section.space)
    against = search.section.against
    shares = importances(search, trials)
    count = len(keys) + 1 + len(against) + bool(shares)
    figure = new_figure(4 * count, 3.2)
    axes = figure.subplots(1, count, squeeze=False)
    choose = min if search.mode == "min" else max
    values: list[Any] = [t.value for t in done]
    axes[0][0].plot([t.number for t in done], values, "o")
    axes[0][0].step([t.number for t in done], list(accumulate(values, choose)), where="post")
    axes[0][0].set(xlabel="trial", ylabel=search.evaluation.monitor)
    front = search.front(trials)
    for axis, cost in zip(axes[0][1:], against, strict=False):
        axis.plot([t.costs[cost] for t in done], values, "o", alpha=0.4)
        axis.plot([t.costs[cost] for t in front], [t.value for t in front], "o-" if len(against) == 1 else "o")
        axis.set(xlabel=cost)
    for axis, key in zip(axes[0][1 + len(against) :], keys, strict=False):
        entry = search.section.space[key]
        numeric = isinstance(entry, RangeSection)
        axis.plot([t.point[key] if numeric else str(t.point[key]) for t in done], values, "o")
        axis.set(xlabel=key)
        if isinstance(entry, RangeSection) and entry.log:
            axis.set_xscale("log")
    if shares:
        axes[0][-1].barh(list(shares), list(shares.values()))
        axes[0][-1].set(xlabel="importance", xlim=(0, 1))
    path = search.folder / "search.png"
    figure.savefig(path, dpi=120)
    return path
