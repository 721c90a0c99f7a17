"""The page of a leaderboard."""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.evaluation.leaderboard_table import Column, LeaderboardRow, cells
from llmrecipe.runs.report.render import render


def leaderboard_page(rows: Sequence[LeaderboardRow], columns: Sequence[Column]) -> str:
    """Return the table, and what its columns mean, as one self-contained page."""
    return render(
        "leaderboard.html", "Leaderboard", sections=[("ranking", "Ranking"), ("columns", "Columns")],
        ranking=cells(rows, columns), meanings=[(c.title, c.means) for c in columns if c.means],
    )  # fmt: skip
