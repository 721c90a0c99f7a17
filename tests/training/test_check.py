"""`check` builds every packaged recipe without weights, and counts what training counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.cli.findings import show_findings
from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.models.native import NativeConfig
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.recipe_paths import all_recipes
from llmrecipe.training.dry_run import check
from tests.trainings import train_recipe

FEW = ("adalora", "classify", "clm", "kto_lora", "mezo", "ppo", "prefix_tuning", "qlora", "reward", "spt")
"""At least one recipe of each family; the bulk is slow."""
RUNNABLE = [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in all_recipes() if n != "base"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_recipe_can_be_built(name: str) -> None:
    recipe = compose(name).recipe
    if recipe.stages or recipe.search:
        pytest.skip("a pipeline or search: its stages are checked by their own tests")
    found = check(name, [])
    assert found.steps > 0 and found.rows > 0 and found.parameters > 0


@pytest.mark.parametrize("recipe", ["sft", "sft_lora", "dpo_lora", "classify"])
def test_the_dry_run_counts_what_training_trains(recipe: str, tmp_path: Path) -> None:
    found = check(recipe, [])
    run = train_recipe(tmp_path, recipe, "steps=1", "data.limit=40", "batch.size=2", "eval.at_start=false", "eval.batches=1")
    assert found.trained == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert found.parameters + found.added == sum(p.numel() for p in run.model.parameters())
    hooked = sum(p.numel() for n, p in run.model.named_parameters() if ".lora." in n)
    assert found.added >= hooked and (found.added > 0) == (recipe != "sft")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("clm", ["model=native"]),
        ("clm", ["model=native_moe"]),
        ("mlm", ["model=native", "model.config.kind=encoder", "model.config.num_experts=3"]),
    ],
)
def test_the_native_transformer_has_the_parameters_of_its_closed_form(recipe: str, words: list[str]) -> None:
    words = [*words, "model.config.vocab_size=1100", "data.limit=40"]
    config = compose(recipe, words).recipe.model.config
    assert check(recipe, words).parameters == NativeConfig(**config).parameter_count()


def test_a_target_that_matches_nothing_names_its_key_and_shows_the_anatomy() -> None:
    with pytest.raises(ModelError, match=r"stack\.lora: target 'attn\.z' matches nothing") as caught:
        check("sft_lora", ["stack.lora.target=attn.z"])
    assert "did you mean 'attn.q'" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.warmup=1000", "steps=10"], "schedule.warmup"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["model.path=no/such/folder"], "no/such/folder"),
        (["data.max_length=4"], "data.max_length"),
    ],
)
def test_impossible_recipes_are_one_message(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check("sft_lora", words)


@pytest.mark.parametrize("name", ["smt", "fishmask", "spt", "esft"])
def test_gradients_of_what_has_yet_to_be_chosen_are_unknown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(name, [])
    assert found.memory.undecided == (name,) and {"gradients", "optimizer"}.isdisjoint(found.memory.predicted())
    show_findings(found)
    out = capsys.readouterr().out
    assert "gradients unknown, optimizer unknown" in out and "trained: 0" not in out


def test_a_start_from_data_leaves_nothing_about_gradients_unknown() -> None:
    found = check("sft_lora", ["stack.lora.init=lora_ga"])
    assert found.memory.undecided == () and found.memory.gradients == 4 * found.trained
