"""The page of a leaderboard: who leads and by how much, the table, score over cost, what the columns mean."""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.core.console import number
from llmrecipe.evaluation.leaderboard_table import Column, LeaderboardRow, cells, spread_text
from llmrecipe.runs.report.dots import Dot, DotPlot, dot_plot
from llmrecipe.runs.report.render import render

LEADERBOARD_SECTIONS = [
    ("outcome", "Outcome"),
    ("ranking", "Ranking"),
    ("cost", "Score over cost"),
    ("columns", "Columns"),
]
"""Anchor and heading of each section, in order."""


def leaderboard_page(rows: Sequence[LeaderboardRow], columns: Sequence[Column], across: Sequence[Column]) -> str:
    """Return a leaderboard as one self-contained page.

    Args:
        rows: ranked, the best first; rows without a run last.
        columns: of the table; the first is the score.
        across: costs that the score is drawn over, a picture each.
    """
    made, score = [row for row in rows if row.seeds], columns[0]
    return render(
        "leaderboard.html", "Leaderboard", sections=LEADERBOARD_SECTIONS, outcome=_outcome(rows, score),
        ranking=cells(rows, columns), plots=[_plot(made, cost, score) for cost in across] if made else [],
        meanings=[(c.title, c.means) for c in columns if c.means],
    )  # fmt: skip


def _outcome(rows: Sequence[LeaderboardRow], score: Column) -> list[tuple[str, str]]:
    made, waiting = [row for row in rows if row.seeds], sum(not row.seeds for row in rows)
    facts = [("Score", score.title + (f": {score.means}" if score.means else ""))]
    if made:
        facts.append(("First", f"{made[0].label}, {_score(made[0], score)}"))
    if len(made) > 1:
        lead = abs(made[0].mean[score.key] - made[1].mean[score.key]) * score.scale
        facts.append(("Second", f"{made[1].label}, {_score(made[1], score)}, {number(lead)} behind"))
    if len(made) > 2:
        facts.append(("Last", f"{made[-1].label}, {_score(made[-1], score)}"))
    runs = sum(len(row.seeds) for row in made)
    return [*facts, ("Runs", f"{runs} in {len(made)} rows" + (f"; {waiting} rows have no run yet" if waiting else ""))]


def _score(row: LeaderboardRow, score: Column) -> str:
    spread = row.spread.get(score.key)
    text = spread_text(row.mean[score.key] * score.scale, None if spread is None else spread * score.scale)
    return f"{text} over {len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"


def _plot(rows: Sequence[LeaderboardRow], cost: Column, score: Column) -> DotPlot:
    dots = []
    for place, row in enumerate(rows, 1):
        x, y = row.mean[cost.key] * cost.scale, row.mean[score.key] * score.scale
        title = f"{place}. {row.label}: {cost.title} {number(x)}, {score.title} {_score(row, score)}"
        dots.append(Dot(str(place), title, row.family, x, y, (row.spread.get(score.key) or 0.0) * score.scale))
    return dot_plot(dots, cost.title, score.title)
