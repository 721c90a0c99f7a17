"""`check` of a pipeline: few stages are shown whole, of many the axes, the first ones and every warning."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.pipelines import run_stages
from llmrecipe.recipe.pipeline_plan import Plan

BOARD = """
stages:
  method:
    matrix: {seed: [0, 1, 2, 3, 4], rate: [1e-3, 2e-3]}
    recipe: sft_lora
    seed: "${matrix:seed}"
    optim: {lr: "${matrix:rate}"}
  board: {kind: leaderboard, runs: ["${stage:method}"], metric: eval/loss}
"""


@pytest.fixture(autouse=True)
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline of eleven stages whose trainings are not built: seed 0 has finished."""
    monkeypatch.chdir(tmp_path)
    Path("board.yaml").write_text(BOARD, encoding="utf-8")
    training = SimpleNamespace(
        trained=40, parameters=400, steps=7, memory=SimpleNamespace(undecided=[]), seconds=2.0,
        warnings=["little data"], notes=[],
    )  # fmt: skip

    def found(made: Plan) -> dict[str, object]:
        names = [planned.name for planned in made.stages if not planned.name.startswith("method-0")]
        return {name: made[name].composition if name == "board" else training for name in names}

    monkeypatch.setattr(run_stages, "check_stages", found)
    monkeypatch.setattr("llmrecipe.cli.pipeline.show_findings", lambda facts: print(f"whole: {facts.steps} steps"))
    monkeypatch.setattr("llmrecipe.cli.pipeline._facts", lambda facts, planned: {"name": planned.name})


def test_many_stages_of_one_key_are_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "recipe=board.yaml"]) == 0
    out = capsys.readouterr().out
    assert "board: 11 stages in runs/board" in out and "[method] 10 stages of sft_lora" in out
    assert "seed: 5 (0, 1, 2, 3, 4)" in out and "rate: 2 (0.001, 0.002)" in out
    assert out.count("finished: will be reused") == 2 and out.count("7 steps, trained: 40 (10.00% of the base)") == 1
    assert "… and 7 more" in out and "finished: 2 of 10" in out and "about 16 s for 8 of them" in out
    assert "warning: little data (in 8 stages)" in out
    assert "after method-0-0_001, method-0-0_002, method-1-0_001, … and 7 more" in out
    assert "step leaderboard: " in out and max(map(len, out.splitlines())) < 400


def test_all_of_them_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "recipe=board.yaml", "-v"]) == 0
    assert capsys.readouterr().out.count("whole: 7 steps") == 8
    assert run_command(["check", "recipe=board.yaml", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 11


def test_few_stages_are_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "recipe=board.yaml", "stages.method.matrix.seed=[1,2]"]) == 0
    out = capsys.readouterr().out
    assert out.count("whole: 7 steps") == 4 and "more" not in out
