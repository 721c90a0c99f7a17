"""Built-in sets, and rewards that only know their sentences, go with a built-in `data.path` and with no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.provenance import leaves
from llmrecipe.recipe.recipe_paths import all_recipes

Project = Callable[..., Path]
OWN = "data.path=mine.jsonl"
SAY_IT_TO_A_STAGE = {
    "sft_dpo",
    "searched_dpo",
    "rlhf",
    "rlaif",
    "rlaif_dpo",
    "alignment_leaderboard",
    "forgetting_leaderboard",
    "dae_sft",
    "mmlm_caption",
    "mmlm_vqa",
    "nsp_qa",
    "pretraining_leaderboard",
}
"""Pipelines whose stages read rows of different kinds: one path cannot be for all of them."""


def builtin_values(mapping: dict[str, Any]) -> list[str]:
    """Every place in a composed recipe that names the built-in data or a rule for it."""
    found = [f"{key}: {value}" for key, value in leaves(mapping) if "builtin:" in str(value)]
    return found + [f"{key}: a rule" for key, value in leaves(mapping) if "rule" in key and value not in (None, False)]


LARGE = {"survey_leaderboard", "memory_leaderboard", "hybrid_leaderboard", "peft_leaderboard"}
"""Pipelines of tens or hundreds of stages, whose plans take long."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in all_recipes()])
def test_no_packaged_recipe_keeps_built_in_data_beside_a_path_of_ones_own(name: str) -> None:
    composition = compose(name, [OWN])
    if not composition.recipe.stages:
        assert not builtin_values(composition.mapping)
    elif name in SAY_IT_TO_A_STAGE:
        with pytest.raises(RecipeError, match="a pipeline has no data of its own; set it for a stage"):
            plan(composition)
    else:
        assert not [v for stage in plan(composition).stages for v in builtin_values(stage.mapping)]


def test_what_is_dropped_is_one_line_with_its_place() -> None:
    composition = compose("kto_lora", [OWN])
    assert composition.recipe.data.validation is None
    (note,) = composition.notes
    assert note.startswith("dropped data.validation (") and "kto.yaml:9" in note and f"override {OWN}" in note
    assert compose("kto_lora").recipe.data.validation == "builtin:preference" and not compose("kto_lora").notes


@pytest.mark.parametrize("path", ["builtin:comparisons", "[builtin:unpaired,builtin:preference]"])
def test_another_built_in_path_keeps_the_split(path: str) -> None:
    composition = compose("kto", [f"data.path={path}"])
    assert composition.recipe.data.validation == "builtin:preference" and not composition.notes


@pytest.mark.parametrize("path", ["[mine.jsonl,builtin:unpaired]", r"{mine.jsonl: 1.0, builtin\:unpaired: 2.0}", "org/rows"])
def test_a_mixture_with_rows_of_ones_own_does_not(path: str) -> None:
    assert compose("kto", [f"data.path={path}"]).recipe.data.validation is None


def test_a_split_or_reward_that_the_user_names_stays() -> None:
    given = compose("kto", [OWN, "data.validation=builtin:preference"])
    assert given.recipe.data.validation == "builtin:preference" and not given.notes
    rule = compose("grpo", [OWN, "objective.reward={rule: {rule: polite}}"])
    assert rule.recipe.objective["reward"] == {"rule": {"rule": "polite"}} and not rule.notes
    weighed = compose("grpo", [OWN, "objective.reward.rule.weight=0.5"])
    assert weighed.recipe.objective["reward"]["rule"] == {"rule": "manners", "weight": 0.5}


def test_the_file_that_knows_the_path_decides(project: Project) -> None:
    """A file that only names its rows loses the built-in split below it; one that names both keeps both."""
    project("recipes/rows.yaml", f"defaults: [/kto]\ndata: {{path: {OWN.split('=')[1]}}}\n")
    project("recipes/both.yaml", "defaults: [/kto]\ndata: {path: mine.jsonl, validation: builtin:preference}\n")
    project("recipes/held.yaml", "defaults: [/kto]\ndata: {test: builtin:preference}\n")
    project("recipes/lower.yaml", "defaults: [/rows]\ndata: {validation: builtin:preference}\n")
    project("recipes/data/mine.yaml", "path: mine.jsonl\n")
    assert compose("rows").recipe.data.validation is None and "rows.yaml:2" in compose("rows").notes[0]
    assert compose("both").recipe.data.validation == "builtin:preference"
    assert compose("both", [OWN]).recipe.data.validation == "builtin:preference"
    assert compose("held", [OWN]).recipe.data.test is None and compose("held").recipe.data.test == "builtin:preference"
    assert compose("lower").recipe.data.validation == "builtin:preference"
    assert compose("kto", ["data=mine"]).recipe.data.validation is None


def test_a_kept_recipe_composes_to_itself(project: Project, tmp_path: Path) -> None:
    from llmrecipe.recipe.compose import to_yaml

    kept = project("run/recipe.yaml", to_yaml(compose("kto", [OWN, "data.validation=builtin:preference"]).mapping))
    assert compose(kept).recipe.data.validation == "builtin:preference" and not compose(kept).notes


def test_a_reward_that_was_dropped_is_asked_for(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project("mine.jsonl", json.dumps({"prompt": "What is two and two?", "completion": "four"}) + "\n")
    assert app.run_command(["check", "recipe=grpo", OWN]) == 2
    told = capsys.readouterr().err
    assert "dropped objective.reward.rule" in told
    assert "objective.reward: no reward is given to score the answers" in told and "exact_match={}" in told


def test_stages_with_built_in_rows_beside_a_stage_with_ones_own_are_named() -> None:
    notes = plan(compose("rlhf", ["stages.reward.data.path=pairs.jsonl"])).notes
    assert notes == [
        "sft: reads builtin:sft, and reward reads pairs.jsonl; give it rows of your own with stages.sft.data.path",
        "ppo: reads builtin:prompts, and reward reads pairs.jsonl; give it rows of your own with stages.ppo.data.path",
    ]
    notes = plan(compose("rlaif_dpo", ["stages.drafts.prompts=red.jsonl"])).notes
    assert notes == [
        "pairs: reads builtin:preference, and drafts reads red.jsonl; give it rows of your own with stages.pairs.prompts"
    ]
    assert not plan(compose("rlhf")).notes and not plan(compose("distill_answers", [OWN])).notes
