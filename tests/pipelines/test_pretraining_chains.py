"""Pipelines of a pretext and a task: the task goes on from the weights that the pretext left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from llmrecipe.core import registry
from llmrecipe.pipelines import run_stages
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan

PIPELINES = ("dae_sft", "mmlm_caption", "mmlm_vqa", "nsp_qa")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PIPELINES)
def test_fresh_weights_are_drawn_as_those_that_were_pretrained(recipe: str) -> None:
    models = {s.name: s.mapping["model"] for s in plan(compose(recipe)).stages if not s.stage.step}
    shapes = [json.dumps(models[n], sort_keys=True) for n in models if n.partition("-")[0] in ("pretext", "fresh")]
    assert len(shapes) >= 5 and len(set(shapes)) == 1


@pytest.mark.parametrize("recipe", PIPELINES)
def test_the_table_compares_with_fresh_weights_over_three_seeds(recipe: str) -> None:
    """Nothing but the rows of the pretext is another in a control, and each task goes on from the pretext of its name."""
    stages = plan(compose(recipe)).stages
    tasks = [s for s in stages if s.name.startswith("pretrained-")]
    controls = {s.name for s in stages if s.name.startswith("pretext-")}
    assert {f"pretext-{s.name.split('-')[1]}" for s in tasks} == controls and len(tasks) == 3 * len(controls) >= 6
    assert all(s.stage.inputs == (f"pretext-{s.name.split('-')[1]}",) for s in tasks)
    below, control = (s.mapping for s in stages if s.name in ("pretext-own", "pretext-shuffled"))
    assert {**control, "data": {**control["data"], "control": {}}} == below and control["data"]["control"]
    assert stages[-1].mapping["baseline"] == "fresh"


BOARD = "pretraining_leaderboard"


def test_every_objective_of_texts_is_on_the_board_with_one_budget() -> None:
    """From one shape of fresh weights of its kind, with a control, and the task of a row from its pretext alone."""
    assert all(compose(BOARD).recipe.stages[stage]["matrix"]["seed"] == [0, 1, 2] for stage in ("task", "fresh"))
    once = ["stages.task.matrix.seed=[0]", "stages.fresh.matrix.seed=[0]"]
    stages = {s.name: s for s in plan(compose(BOARD, once)).stages}
    pretexts = {name: s.mapping for name, s in stages.items() if name.startswith("pretext-")}
    known = {n for n in registry.names("objective") if registry.spec("objective", n).family == "pretraining"}
    assert {found["objective"]["kind"] for found in pretexts.values()} == known - {"caclm", "mmlm", "clip"}
    assert len({(found["steps"], found["batch"]["size"], found["data"]["path"]) for found in pretexts.values()}) == 1
    tasks = {name: s for name, s in stages.items() if name.startswith("task-")}
    assert len(tasks) == len(pretexts) == 12
    assert all(s.stage.inputs == (name.rpartition("-")[0].replace("task", "pretext"),) for name, s in tasks.items())
    fresh = {name: s.mapping for name, s in stages.items() if name.startswith("fresh-")}
    assert len({s.mapping["steps"] for s in tasks.values()} | {found["steps"] for found in fresh.values()}) == 1
    for kind, count in (("encoder", 10), ("decoder", 2)):
        shapes = [m["model"] for m in (*pretexts.values(), *fresh.values()) if m["model"]["config"]["kind"] == kind]
        assert len(shapes) == count + 1 and len({json.dumps(shape, sort_keys=True) for shape in shapes}) == 1
    for name, control in pretexts.items():
        if name.endswith("-shuffled"):
            own = pretexts[name.replace("-shuffled", "-own")]
            assert {**control, "data": {**control["data"], "control": {}}} == own and control["data"]["control"]


@pytest.mark.slow
def test_a_few_steps_of_the_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]) -> None:
    """An encoder and a decoder, each compared with fresh weights of its own kind."""
    monkeypatch.chdir(tmp_path)
    every = compose(BOARD).recipe.stages["task"]["matrix"]["pretext"]
    words = [f"~stages.pretext.matrix.pretext.{name}" for name in every if name not in ("mlm", "clm")]
    words += ["~stages.pretext.matrix.rows.shuffled", "stages.task.matrix.rows=[own]", "stages.task.matrix.pretext=[mlm,clm]"]
    words += [f"stages.{stage}.matrix.seed=[1]" for stage in ("task", "fresh")]
    words += [f"+stages.{stage}.data.limit=4" for stage in ("pretext", "task", "fresh")]
    words += [f"+stages.{stage}.eval.batches=1" for stage in ("pretext", "task", "fresh")]
    words += ["stages.pretext.batch.size=2", *(f"+stages.{stage}.batch.size=2" for stage in ("task", "fresh"))]
    words += ["stages.pretext.steps=1", "steps=1", "stages.board.plot=false", "stages.board.metric=test/loss"]
    made = run_stages.run_all_stages(compose(BOARD, words))
    board = json.loads((Path(made[-1].dir) / "leaderboard.json").read_text(encoding="utf-8"))
    score = {row["method"]: row["mean"] for row in board["rows"]}
    fresh = {kind: next(m["score"] for n, m in score.items() if f"kind={kind}" in n) for kind in ("encoder", "decoder")}
    assert len(score) == 4 and len(started) == 7
    for name, kind in (("mlm", "encoder"), ("clm", "decoder")):
        assert score[name]["difference"] == pytest.approx(score[name]["score"] - fresh[kind])


def weights(folder: str) -> dict[str, Tensor]:
    """What a finished training left of the model itself."""
    return load_file(Path(folder) / "final" / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PIPELINES)
def test_a_task_goes_on_from_what_was_pretrained(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step at a vanishing rate leaves every matrix where the pretext had it, far from where another seed draws it."""
    monkeypatch.chdir(tmp_path)
    words = [f"~stages.{stage}" for stage in ("fresh", "board")]
    others = [name for name in compose(recipe).recipe.stages["pretext"]["matrix"]["rows"] if name != "own"]
    words += [f"~stages.pretext.matrix.rows.{name}" for name in others] + ["stages.pretrained.matrix.rows=[own]"]
    words += ["stages.pretrained.matrix.seed=[1]", "steps=1", "optim.lr=1e-6"]
    words += ["~stages.pretext.epochs", "+stages.pretext.steps=1", "+stages.pretext.data.limit=8"]
    for stage in ("pretext", "pretrained"):
        words += [f"+stages.{stage}.{word}" for word in ("batch.size=4", "eval.at_start=false", "eval.test=false")]
    pretext, pretrained = (weights(made.dir) for made in run_stages.run_all_stages(compose(recipe, words)))
    shared = [name for name in pretext if name in pretrained and pretext[name].dim() == 2]
    assert len(shared) >= 10
    for name in shared:
        assert float((pretrained[name] - pretext[name]).abs().max()) < 1e-5 < float(pretext[name].std()), name
