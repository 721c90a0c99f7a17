"""The page of a board: its verdicts on numbers worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks import board
from tests.benchmarks.board import Order, page, verdicts


def runs(**rows: list[float]) -> list[dict[str, object]]:
    return [{"method": name, "seed": seed, "score": v} for name, row in rows.items() for seed, v in enumerate(row)]


def test_rows_are_compared_seed_by_seed() -> None:
    """a - b is 1, 2, 3: mean 2, standard deviation 1, s.e. 1 / sqrt(3); c differs from a by -1, 0, 1."""
    found = runs(a=[1.0, 2.0, 3.0], b=[2.0, 4.0, 6.0], c=[2.0, 2.0, 2.0])
    lines = verdicts([Order("a", "b", "p"), Order("b", "a", "p"), Order("a", "c", "p")], found, "test/loss").splitlines()[2:]
    assert [text.split(" | ")[3:] for text in lines] == [
        ["2 ± 0.5774", "3", "confirmed |"],
        ["-2 ± 0.5774", "3", "not reproduced |"],
        ["0 ± 0.5774", "3", "undecided |"],
    ]


def test_a_row_is_found_by_how_its_label_begins(tmp_path: Path) -> None:
    names = {c.better for c in board.CLAIMS["hybrid_leaderboard"]} | {c.worse for c in board.CLAIMS["hybrid_leaderboard"]}
    rows = {name + ("=['P'])" if name == board.REVERSED else ""): [float(i)] for i, name in enumerate(sorted(names))}
    (tmp_path / "leaderboard.json").write_text(json.dumps({"runs": runs(**rows)}))
    (tmp_path / "leaderboard.md").write_text("| table |\n")
    text = page("hybrid_leaderboard", tmp_path, "A note.")
    assert text.startswith("# `recipe=hybrid_leaderboard`\n\nA note.\n\n| table |\n")
    assert text.count("| undecided |") == len(board.CLAIMS["hybrid_leaderboard"]) and "| s4 | s4 reversed |" in text


def test_another_metric_and_rows_that_were_not_run(tmp_path: Path) -> None:
    """Accuracy counts upwards, and a claim about a row that was not run is no line of the table."""
    (tmp_path / "leaderboard.json").write_text(json.dumps({"runs": runs(unipelt=[0.9, 0.8, 0.7], lora=[0.6] * 3, other=[1.0])}))
    (tmp_path / "leaderboard.md").write_text("| table |\n")
    text = page("hybrid_leaderboard", tmp_path, "", "test/accuracy", "MiniLM on TREC")
    assert text.startswith("# `recipe=hybrid_leaderboard`: MiniLM on TREC\n\n| table |\n")
    assert "A difference of test/accuracy is positive" in text
    assert [row for row in text.splitlines() if row.startswith("| unipelt")] == [
        "| unipelt | lora | arXiv 2110.07577 | 0.2 ± 0.05774 | 3 | confirmed |"
    ]
