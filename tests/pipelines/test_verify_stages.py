"""`verify` on a pipeline: each training on the results of the stages before it, what fails named with its stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.pipelines import verify_stages as module
from llmrecipe.pipelines.subprocesses import command_of
from llmrecipe.pipelines.verify_stages import needed_stages, verify_stages
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.recipe_paths import all_recipes
from tests.training.test_first_update import NORM, after_step, nudge

PIPELINE = """
stages:
  sft:
    matrix: {seed: [0, 1]}
    recipe: sft_lora
    seed: "${matrix:seed}"
    data: {limit: 12, max_length: 64}
    batch: {size: 2}
  said: {kind: generate, model: "${stage:sft-0}", prompts: "builtin:sft", limit: 4, max_new_tokens: 4}
  last:
    recipe: sft_lora
    with: ["model.path=${stage:sft-1}", "data.path=${stage:said}"]
    stack: {lora: {r: 2}}
    batch: {size: 2}
  board: {kind: leaderboard, runs: ["${stage:sft}"], metric: test/loss, best: min}
"""
PACKAGED = sorted(name for name, path in all_recipes().items() if "\nstages:" in path.read_text(encoding="utf-8"))


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline in a working folder of its own, whose steps run inside this process."""
    monkeypatch.chdir(tmp_path)
    Path("pipe.yaml").write_text(PIPELINE, encoding="utf-8")

    def here(child: Any, planned: Any, continued: bool) -> int:
        return run_command(command_of(planned, continued))

    monkeypatch.setattr(module, "execute", here)
    return "pipe.yaml"


def test_every_training_is_verified_on_the_results_before_it(pipeline: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds alone make no other training, and a table that no training needs is not made."""
    assert run_command(["verify", f"recipe={pipeline}", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert {line["check"].partition(".")[0] for line in lines} == {"sft-0", "last"}
    results = {line["check"]: line["result"] for line in lines}
    assert results["last.merged_model"] == results["last.resumed_run"] == results["sft-0.template_tokens"] == "ok"
    assert [p.name for p in Path.cwd().iterdir()] == [pipeline]


@pytest.mark.slow
def test_a_rate_makes_no_other_training_and_what_nothing_reads_is_not_run(
    pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PIPELINE.replace("seed: [0, 1]", "rate: [1e-3, 1e-2]").replace(
        'seed: "${matrix:seed}"', 'optim: {lr: "${matrix:rate}"}'
    )
    Path(pipeline).write_text(text.replace("${stage:sft-0}", "tiny").replace("sft-1", "sft-0_001"), encoding="utf-8")
    ran: list[str] = []
    keep = module.keep_run
    monkeypatch.setattr(module, "keep_run", lambda run, planned: (ran.append(planned.name), keep(run, planned)))
    lines = list(verify_stages(compose(pipeline, [])))
    assert {line.check.partition(".")[0] for line in lines} == {"sft-0_001", "last"} and ran == ["sft-0_001", "last"]


def test_needed_stages(pipeline: str) -> None:
    made = plan(compose(pipeline, []))
    assert [s.name for s in needed_stages(made)] == ["sft-0", "sft-1", "said", "last"]
    without = plan(compose(pipeline, ["stages.last.with=[]"]))
    assert [s.name for s in needed_stages(without)] == ["sft-0", "sft-1", "last"]


def test_what_fails_is_named_with_its_stage(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after_step(monkeypatch, nudge)
    assert run_command(["verify", pipeline, "stages.last.with=[]", "--json"]) == 3
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert (line["check"], line["result"]) == ("sft-0.update_proof", "failed")
    assert f"frozen tensors moved: {NORM}" in line["reason"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe", PACKAGED)
def test_every_packaged_pipeline_passes(recipe: str) -> None:
    lines = list(verify_stages(compose(recipe, [])))
    assert lines and not [line for line in lines if line.result == "failed"]
    assert all(line.reason for line in lines if line.result == "not applicable")
