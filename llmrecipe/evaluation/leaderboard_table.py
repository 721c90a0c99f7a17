"""A leaderboard of finished runs: one row for each training configuration, mean and spread over seeds.

Everything is read from run directories: `recipe.yaml` (what was trained), `report.json` (trained parameters), `events.jsonl`
(memory and time of the steps), `final/` (bytes and metrics).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmrecipe.core.console import number
from llmrecipe.core.errors import RecipeError, RunError, did_you_mean
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.core.score_intervals import ENDS
from llmrecipe.evaluation.leaderboard_labels import first_model, labels_of, recipe_below
from llmrecipe.feedback.directions import Direction, direction_of
from llmrecipe.recipe.validate import build_object
from llmrecipe.runs.run_dir import read_metrics
from llmrecipe.runs.run_record import Record, flat, read_run, seconds_of


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    key: str
    title: str
    scale: float = 1.0
    """Factor by which a value is multiplied for display."""
    means: str = ""
    spread: bool = False
    """Whether the table shows the standard deviation over seeds."""


REQUESTED = (
    Column("win_rate", "win rate %", 100.0, "answers better than those of the model it started from, ties half", True),
    Column("reward", "reward", means="mean reward of its answers", spread=True),
    Column("gain", "gain", means="reward over that of the model it started from", spread=True),
    Column(
        "margin",
        "margin",
        means="nats by which training moved the better answer of a held-out pair over the worse",
        spread=True,
    ),
    Column("preferred", "preferred %", 100.0, "held-out pairs with a positive margin", True),
    Column("kl", "KL", means="nats of an answer, from the model it started from", spread=True),
    Column("length", "tokens", means="mean length of its answers", spread=True),
)
PARTS = {
    "weights": "weights and buffers as they are stored",
    "gradients": "gradients of what trains",
    "optimizer": "the optimizer's state",
    "activations": "kept for the backward pass of the largest micro-batch",
    "logits": "of what is kept, tensors of the width of the vocabulary",
}
"""Parts of a run's memory that are counted in tensors."""
MEMORY = "memory/"
"""How the columns of the parts begin."""
PLAIN = (
    Column("trained", "trained", means="parameters that train"),
    Column("share", "% of all", 100.0, "of all parameters"),
    Column("stored", "stored kB", 1e-3, "tensors on disk: what was learned, or the whole model where every weight was trained"),
    Column("memory", "peak MB", means="most memory of the process (CPU) or of the device while training"),
    Column("seconds", "s", means="time of the training steps, sampling included, evaluation not", spread=True),
)


@dataclass(frozen=True)
class Tuned:
    """A key whose value is chosen for each row by what its runs score on the validation split."""

    key: str
    by: str
    """A name in the runs' final/metrics.json."""


@dataclass
class LeaderboardEntry:
    """One finished run."""

    label: str
    family: str
    seed: int
    facts: dict[str, float]
    """Column -> value."""
    first: str = field(default="", compare=False)
    """The model that the first run of its chain started from, as text."""


@dataclass
class LeaderboardRow:
    """One training configuration, over its seeds."""

    label: str
    family: str
    seeds: list[int]
    mean: dict[str, float]
    spread: dict[str, float | None] = field(default_factory=dict)
    """Sample standard deviation over seeds; None for a single one."""


def memory_column(name: str) -> Column:
    """Return the column of a part of the memory."""
    part = name.removeprefix(MEMORY)
    means = {**PARTS, "held": "sum of these parts", "peak": "most memory of the process besides what is no tensor"}
    return Column(name, f"{part} MB", 2.0**-20, means=means.get(part, ""))


def read_entries(
    paths: Sequence[str],
    metric: str | None,
    where: str = "runs",
    more: Sequence[str] = (),
    tuned: Tuned | None = None,
    labels: Mapping[str, tuple[str, str]] | None = None,
) -> list[LeaderboardEntry]:
    """Read finished runs and name each by its distinguishing part: its stack, or its objective where that differs.

    Args:
        paths: run directories.
        metric: a name in their `final/metrics.json`, such as test/accuracy; None reads no score.
        more: further names there, each a column of its own.
        tuned: the key in which runs of one row may differ.
        labels: path -> (name, family), where these are known.

    Raises:
        RunError: a run is not finished, or has no such metric.
    """
    records = [read_run(path) for path in paths]
    for record in records:
        if record.status.get("status") != "done":
            raise RunError(f"{where}: {record.path} is {record.status.get('status')}; a leaderboard compares finished runs")
    starts = [recipe_below(record.recipe) for record in records]
    tuned_keys = () if tuned is None else (tuned.key,)
    found = (
        labels_of([record.recipe for record in records], starts, tuned_keys) if labels is None else [labels[p] for p in paths]
    )
    entries = []
    for record, (label, family) in zip(records, found, strict=True):
        facts = cost_facts(record)
        if metric is not None:
            facts |= _measured(record, metric, "score", where)
        for name in more:
            if name not in facts:
                facts |= _measured(record, name, name, "columns")
        if tuned is not None:
            facts |= {"tuned": flat(record.recipe)[tuned.key], "by": _measured(record, tuned.by, "by", "by")["by"]}
        seed = int(record.recipe.get("seed", 0))
        entries.append(LeaderboardEntry(label, family, seed, facts, first_model(record.recipe)))
    return entries


def chosen_values(entries: Sequence[LeaderboardEntry], best: Direction) -> list[LeaderboardEntry]:
    """Return the entries of each row that have the value of the tuned key which is best on the validation split.

    Values are compared by the mean of `by` over the seeds that all of them have, so that none wins by the seeds it was given;
    while they have none in common, by the mean over their own. Test scores are not looked at.

    The fact `tuned/edge` of an entry is 1 where its value is the largest of several that were tried, -1 where it is the
    smallest, and 0 between them: beyond an edge lies what was not tried.
    """
    sign = -1.0 if best == "max" else 1.0
    found: dict[str, dict[float, dict[int, float]]] = {}
    for entry in entries:
        found.setdefault(entry.label, {}).setdefault(entry.facts["tuned"], {})[entry.seed] = entry.facts["by"]
    winners = {}
    for label, values in found.items():
        common = set.intersection(*(set(seeds) for seeds in values.values()))
        means = {v: statistics.fmean(by for s, by in seeds.items() if s in common or not common) for v, seeds in values.items()}
        winners[label] = min(means, key=lambda value: _place(sign * means[value]))
    chosen = [entry for entry in entries if entry.facts["tuned"] == winners[entry.label]]
    return [replace(e, facts={**e.facts, "tuned/edge": _edge(e.facts["tuned"], list(found[e.label]))}) for e in chosen]


def _edge(value: float, tried: Sequence[float]) -> float:
    return float((value == max(tried)) - (value == min(tried)))


def cost_facts(record: Record) -> dict[str, float]:
    """Collect trained parameters, bytes on disk, memory and time of one run."""
    place = record.path / "report.json"
    report = read_json(place)
    final = record.path / "final"
    delta = final / "delta.safetensors"
    stored = [delta] if delta.is_file() else sorted((final / "model").glob("*.safetensors"))
    with reading(str(place), "train the run again"):
        trained, every = float(report["trained"]["parameters"]), float(report["parameters"])
        parts = {name: float(size) for name, size in report.get("memory", {}).items()}
        if parts:
            parts["held"] = sum(parts[name] for name in PARTS)
    return {
        "trained": trained,
        "share": trained / every,
        "stored": float(sum(file.stat().st_size for file in stored)),
        "memory": max((v for _, v in record.curve("peak_mem_mb")), default=0.0),
        "seconds": seconds_of(record.steps),
        **{f"{MEMORY}{name}": size for name, size in parts.items()},
    }


def _measured(record: Record, metric: str, name: str, where: str) -> dict[str, float]:
    """Return a metric of a run under another name, with the ends of its interval where it has one."""
    metrics = read_metrics(record.path)
    if not isinstance(metrics.get(metric), int | float):
        near = did_you_mean(metric, metrics)
        raise RunError(f"{where}: {record.path} has no metric '{metric}'{near} (it has {', '.join(metrics) or 'none'})")
    ends = {f"{name}/{end}": float(metrics[f"{metric}/{end}"]) for end in ENDS if f"{metric}/{end}" in metrics}
    return {name: float(metrics[metric]), **ends}


def better_of(metric: str, paths: Sequence[str], where: str) -> Direction:
    """Return whether a large or a small value of a metric is better, as the runs' objectives declare.

    Args:
        where: the key to set where nothing is declared, for the message.

    Raises:
        RecipeError: nothing is declared, or the runs' objectives disagree.
    """
    recipes = [read_run(path).recipe for path in paths]
    named = [r.get("eval", {}).get("metrics", ()) for r in recipes]
    found = {
        direction_of(metric, build_object("objective", r["objective"], "objective"), names)
        for r, names in zip(recipes, named, strict=True)
    }
    better = found.pop() if len(found) == 1 else None
    if better is None:
        raise RecipeError(
            f"{where}: nothing says whether a large or a small {metric} is better; set {where}: max or {where}: min"
        )
    return better


def rank(
    entries: Sequence[LeaderboardEntry], best: str = "max", by: str = "score", empty: Sequence[tuple[str, str]] = ()
) -> list[LeaderboardRow]:
    """Rank rows over seeds, the best mean first and those without a number last; rows of equal mean keep the order of the runs.

    Args:
        empty: (name, family) of rows that have no run yet; they come last.
    """
    groups: dict[str, list[LeaderboardEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.label, []).append(entry)
    rows = []
    for label, group in groups.items():
        row = LeaderboardRow(label, group[0].family, [e.seed for e in group], {})
        for key in group[0].facts:
            # The interval of a run is over its rows; that of several runs is seen in their deviation.
            if len(group) > 1 and key.rpartition("/")[2] in ENDS:
                continue
            values = [e.facts[key] for e in group]
            row.mean[key] = statistics.fmean(values)
            row.spread[key] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    sign = -1.0 if best == "max" else 1.0
    waiting = [LeaderboardRow(label, family, [], {}) for label, family in dict.fromkeys(empty) if label not in groups]
    return [*sorted(rows, key=lambda row: _place(sign * row.mean[by])), *waiting]


def _place(loss: float) -> tuple[bool, float]:
    """Return a sort key under which what is not a number comes last."""
    return math.isnan(loss), loss


def cells(rows: Sequence[LeaderboardRow], columns: Sequence[Column]) -> list[list[str]]:
    """Format head and body of the table as text: mean ± standard deviation over several seeds, where a column has one.

    A score of a single run is followed by its interval.
    """
    head = ["", "method", "family", *(c.title for c in columns), "seeds"]
    body = [
        [str(place) if row.seeds else "", row.label, row.family, *(_cell(row, c) for c in columns), str(len(row.seeds))]
        for place, row in enumerate(rows, 1)
    ]
    return [head, *body]


def markdown(rows: Sequence[LeaderboardRow], columns: Sequence[Column]) -> tuple[str, str]:
    """Return the table, and a list of what its columns mean, as Markdown."""
    head, *body = ["| " + " | ".join(line) + " |" for line in cells(rows, columns)]
    table = "\n".join([head, "|" + " --- |" * (len(columns) + 4), *body])
    return table, "\n".join(f"- {c.title}: {c.means}." for c in columns if c.means)


def _cell(row: LeaderboardRow, column: Column) -> str:
    if column.key not in row.mean:
        return "-" if row.seeds else ""
    mean, sd = _rounded(row.mean[column.key] * column.scale), row.spread.get(column.key)
    if column.spread and sd is not None:
        return spread_text(mean, sd * column.scale)
    if edge := row.mean.get(f"{column.key}/edge"):
        return f"{number(mean)} ({'largest' if edge > 0 else 'smallest'} tried)"
    ends = [row.mean[key] * column.scale for key in (f"{column.key}/{end}" for end in ENDS) if key in row.mean]
    return f"{number(mean)} [{', '.join(map(number, ends))}]" if ends else number(mean)


def spread_text(mean: float, spread: float | None) -> str:
    """Return a mean with its standard deviation, if there is one.

    Examples:
        >>> spread_text(0.625, 0.1768), spread_text(0.875, None)
        ('0.625 ± 0.18', '0.875')
    """
    return number(mean) if spread is None else f"{number(mean)} ± {spread:.2g}"


def _rounded(value: float) -> float | int:
    return round(value) if abs(value) >= 1000 else value


def as_json(rows: Sequence[LeaderboardRow], entries: Sequence[LeaderboardEntry]) -> dict[str, Any]:
    """Return rows, and the single runs they come from, as JSON values."""
    return {
        "rows": [{"method": r.label, "family": r.family, "seeds": r.seeds, "mean": r.mean, "spread": r.spread} for r in rows],
        "runs": [{"method": e.label, "seed": e.seed, **e.facts} for e in entries],
    }
