"""Display of a search: its trials in order, and a plot where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrecipe.pipelines.search.study import Search
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.recipe.schema import RangeSection


def ranked(search: Search, trials: list[Trial]) -> list[Trial]:
    """Sort trials from the best to the worst; pruned ones after completed ones, failed ones last."""
    sign = 1.0 if search.mode == "min" else -1.0
    order = ("done", "pruned", "failed")
    return sorted(trials, key=lambda t: (order.index(t.state), sign * t.value if t.value is not None else 0.0))


def picture(search: Search, trials: list[Trial]) -> Path | None:
    """Draw `search.png`: values in the order they were tried with the best so far, then over each key of the space."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [t for t in trials if t.value is not None and t.state == "done"]
    keys = list(search.section.space)
    against = search.section.against
    count = len(keys) + 1 + len(against)
    figure, axes = pyplot.subplots(1, count, figsize=(4 * count, 3.2), squeeze=False, layout="constrained")
    choose = min if search.mode == "min" else max
    values: list[Any] = [t.value for t in done]
    axes[0][0].plot([t.number for t in done], values, "o")
    axes[0][0].step([t.number for t in done], [choose(values[: i + 1]) for i in range(len(values))], where="post")
    axes[0][0].set(xlabel="trial", ylabel=search.evaluation.monitor)
    front = search.front(trials)
    for axis, cost in zip(axes[0][1:], against, strict=False):
        axis.plot([t.costs[cost] for t in done], values, "o", alpha=0.4)
        axis.plot([t.costs[cost] for t in front], [t.value for t in front], "o-" if len(against) == 1 else "o")
        axis.set(xlabel=cost)
    for axis, key in zip(axes[0][1 + len(against) :], keys, strict=True):
        entry = search.section.space[key]
        numeric = isinstance(entry, RangeSection)
        axis.plot([t.point[key] if numeric else str(t.point[key]) for t in done], values, "o")
        axis.set(xlabel=key)
        if isinstance(entry, RangeSection) and entry.log:
            axis.set_xscale("log")
    path = search.folder / "search.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
