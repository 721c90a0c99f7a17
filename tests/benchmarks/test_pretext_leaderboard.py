"""Tables and rows of the benchmarks of pretraining, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.picture_chains import recall_table, rows_of
from tests.benchmarks.pretext_leaderboard import questions, table

CONTROL = "start.data.control"


def runs(name: str, *scores: float) -> list[dict[str, Any]]:
    return [{"method": name, "seed": seed, "score": score} for seed, score in enumerate(scores)]


def test_a_row_stands_next_to_its_own_control() -> None:
    """Minus the control of the same form: 0.25, 0.5 and 0, so 0.25 +- 4.3027 * 0.25 / sqrt(3); one of two forms has none."""
    bart, spoiled = "dae (start.objective.form=bart)", "dae (start.data.control.text=words, start.objective.form=bart)"
    other = "dae (start.objective.form=mse)"
    found = {bart: (0.5, 0.75, 0.5), spoiled: (0.25, 0.25, 0.5), other: (0.25, 0.25, 0.25), "fresh": (0.5, 0.5, 0.5)}
    own = {"score": 7 / 12, "difference": 0.125, "difference/low": 0.0, "difference/high": 0.25}
    rows = [
        {"method": bart, "seeds": [0, 1, 2], "mean": own, "spread": {"score": 0.125}},
        {"method": spoiled, "seeds": [0, 1, 2], "mean": {"score": 1 / 3}, "spread": {"score": 0.1}},
        {"method": other, "seeds": [0, 1, 2], "mean": {"score": 0.25}, "spread": {"score": 0.0}},
        {"method": "fresh", "seeds": [0, 1, 2], "mean": {"score": 0.5}, "spread": {"score": 0.0}},
    ]
    board = {"rows": rows, "runs": [run for name, scores in found.items() for run in runs(name, *scores)]}
    lines = table(board, "accuracy", CONTROL)[2:]
    assert lines == [
        f"| {bart} | 0.583 ± 0.125 | +0.125 [+0.000, +0.250] | 0.333 | +0.250 [-0.371, +0.871] | 3 |",
        f"| {other} | 0.250 ± 0.000 |  |  |  | 3 |",
        "| fresh | 0.500 ± 0.000 |  |  |  | 3 |",
    ]


def test_recall_is_told_next_to_chance() -> None:
    own, other = ([{f"test/recall@{k}": v for k in (1, 5, 10)} for v in values] for values in ((0.5, 0.75), (0.25, 0.5)))
    assert recall_table(own, other, 40)[3] == "| first 5 | 0.625 ± 0.177 | 0.125 | 0.375 | +0.250 [+0.250, +0.250] |"


def test_questions_are_of_slots_that_the_text_has_once(tmp_path: Path) -> None:
    rows = [
        {"prompt": "name : The Mill | food : Thai | near : The Mill", "completion": "The Mill has Thai food ."},
        {"prompt": "name : Thai | food : Thai", "completion": "Thai is Thai ."},
    ]
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, asked = (Path(name, "test.jsonl").read_text().splitlines() for name in questions(tmp_path, tmp_path / "made"))
    assert [json.loads(text)["text"] for text in texts] == [row["completion"] for row in rows]
    assert [json.loads(text) for text in asked] == [
        {
            "context": "The Mill has Thai food .",
            "question": "What is it called?",
            "answers": {"text": ["The Mill"], "answer_start": [0]},
        }
    ]


def test_rows_of_pictures_name_the_kind_and_where_asked_the_thing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    row = {"image": "images/a.png", "text": "a drawing of lion", "label": "Animals & Nature"}
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    kinds, names = (
        json.loads(Path(rows_of(tmp_path, tmp_path / str(named), named), "test.jsonl").read_text()) for named in (False, True)
    )
    assert kinds["text"] == "a drawing of animals" and kinds["answer"] == "animals" and kinds["attributes"] == ["animals"]
    assert names == {"image": "images/a.png", "text": "animals: lion"}
