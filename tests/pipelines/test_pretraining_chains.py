"""Pipelines of a pretext and a task: the task goes on from the weights that the pretext left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from llmrecipe.pipelines import run_stages
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan

PIPELINES = ("dae_sft", "mmlm_caption", "mmlm_vqa", "nsp_qa")


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
