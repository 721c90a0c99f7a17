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

PIPELINES = ("dae_sft", "mmlm_caption", "mmlm_vqa")


@pytest.mark.parametrize("recipe", PIPELINES)
def test_fresh_weights_are_drawn_as_those_that_were_pretrained(recipe: str) -> None:
    models = {s.name: s.mapping["model"] for s in plan(compose(recipe)).stages if not s.stage.step}
    shapes = [json.dumps(models[n], sort_keys=True) for n in models if n.partition("-")[0] in ("pretext", "fresh")]
    assert len(shapes) == 4 and len(set(shapes)) == 1


def weights(folder: str) -> dict[str, Tensor]:
    """What a finished training left of the model itself."""
    return load_file(Path(folder) / "final" / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PIPELINES)
def test_a_task_goes_on_from_what_was_pretrained(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step at a vanishing rate leaves every matrix where the pretext had it, far from where another seed draws it."""
    monkeypatch.chdir(tmp_path)
    words = [f"~stages.{stage}" for stage in ("fresh", "after_pretext", "from_scratch")]
    words += ["stages.pretrained.matrix.seed=[1]", "steps=1", "optim.lr=1e-6"]
    words += ["~stages.pretext.epochs", "+stages.pretext.steps=1", "+stages.pretext.data.limit=8"]
    for stage in ("pretext", "pretrained"):
        words += [f"+stages.{stage}.{word}" for word in ("batch.size=4", "eval.at_start=false", "eval.test=false")]
    pretext, pretrained = (weights(made.dir) for made in run_stages.run_all_stages(compose(recipe, words)))
    shared = [name for name in pretext if name in pretrained and pretext[name].dim() == 2]
    assert len(shared) >= 10
    for name in shared:
        assert float((pretrained[name] - pretext[name]).abs().max()) < 1e-5 < float(pretext[name].std()), name
