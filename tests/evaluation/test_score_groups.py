"""Scores by group: those of the group's rows alone, and the gap between the best and the worst one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.core.errors import DataError, UserError
from llmrecipe.core.registry import PACKAGE
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.evaluation.score_groups import check_column, gap_ends, largest_gaps, score_by_group
from tests.trainings import train_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of remarks, whose validation rows come from two files and name whom the remark is from."""
    folder = tmp_path_factory.mktemp("groups")
    lines = (PACKAGE / "assets" / "data" / "classify" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:90]
    rows = [{**json.loads(line), "speaker": ["10", "9", None][i % 3]} for i, line in enumerate(lines)]
    for name, part in (("one", rows[:60]), ("two", rows[60:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    words = [f"data.path=[{folder / 'one.jsonl'},{folder / 'two.jsonl'}]", "data.validation=0.4", "steps=3", "batch.size=16"]
    train_recipe(folder / "run", "classify", *words, "eval.batches=1")
    return folder


WORDS = ["data.cache=false", "eval.bootstrap=0", "eval.batches=null"]


def test_a_group_is_scored_as_its_rows_alone_are(run: Path, tmp_path: Path) -> None:
    """Against an evaluation of files that hold the rows of one value; the validation rows are shares of two files."""
    scored = {row["group"]: row for row in score_by_group(str(run / "run"), WORDS, "validation", "speaker")}
    assert list(scored) == ["all", "speaker=9", "speaker=10", "speaker=None", "largest gap"]
    whole = evaluate_path(str(run / "run"), WORDS)
    assert {k: v for k, v in scored["all"].items() if k != "group"} == whole
    assert sum(scored[name]["rows"] for name in list(scored)[1:4]) == whole["rows"] > 20
    for value in ("9", "10", None):
        for name in ("one", "two"):
            lines = (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            own = [line for line in lines if json.loads(line)["speaker"] == value]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
        words = [*WORDS, f"data.path=[{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}]"]
        alone: dict[str, Any] = evaluate_path(str(run / "run"), words)
        group = scored[f"speaker={value}"]
        assert {k: v for k, v in group.items() if k != "group"} == pytest.approx(alone, rel=1e-5)
    losses = [scored[name]["loss"] for name in list(scored)[1:4]]
    assert scored["largest gap"]["loss"] == max(losses) - min(losses) > 0.0
    assert not {"rows", "loss/low"} & scored["largest gap"].keys()


def test_gaps_by_hand() -> None:
    groups = [
        {"group": "a", "rows": 5.0, "f1": 0.25, "f1/low": 0.0, "only": 1.0},
        {"group": "b", "rows": 2.0, "f1": 1.0, "f1/low": 0.5},
        {"group": "c", "rows": 2.0, "f1": float("nan"), "f1/low": 0.5},
    ]
    assert largest_gaps(groups) == {"f1": 0.75}


def test_intervals_of_gaps_by_hand() -> None:
    """Of one group every sample is 0, of the other half are 0.2 and half 0.6; a score of one group alone has no gap."""
    two = np.array([0.2, 0.6] * 50)
    found = gap_ends([{"f1": np.zeros(100), "own": two}, {"f1": two}], 3)
    assert found == {"f1/low": 0.2, "f1/high": 0.6}
    assert gap_ends([{}, {}], 3) == {}
    alike = gap_ends([{"f1": two}, {"f1": two}], 3)
    assert alike["f1/high"] == pytest.approx(0.4), "samples of groups are drawn apart, though both drew the same places"


def test_what_names_no_groups_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"--groups: .*one\.jsonl.* has no 'speakers' .*; did you mean 'speaker'\?"):
        check_column(str(run / "run"), WORDS, "validation", "speakers")
    assert run_command(["eval", str(run / "run"), str(run / "run"), "--groups", "speaker"]) == 2
    assert "--groups: the rows of one run or model" in capsys.readouterr().err
    words = [*WORDS, "eval.bootstrap=60"]
    assert run_command(["eval", str(run / "run"), "--groups", "speaker", "--json", *words]) == 0
    gap = json.loads(capsys.readouterr().out)[-1]
    assert gap["group"] == "largest gap" and 0.0 <= gap["loss/low"] <= gap["loss/high"]
    monkeypatch.setattr("llmrecipe.evaluation.score_groups.MOST", 3)
    with pytest.raises(UserError, match=r"--groups: 'text' has \d+ values, and at most 3 groups are scored"):
        score_by_group(str(run / "run"), WORDS, "validation", "text")
