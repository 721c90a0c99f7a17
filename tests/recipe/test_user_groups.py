"""Groups and presets next to a recipe, optional choices, a further folder of recipes: found, chosen, refused, never foreign."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.recipe_paths import CONFIG_DIR, all_recipes

MINE = """
defaults:
  - /sft_lora
  - experiment: fast
  - _self_
seed: 5
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe outside ./recipes, with presets and a group of its own next to it; the command is given elsewhere."""
    folder = tmp_path / "project"
    for name, text in {
        "mine.yaml": MINE,
        "experiment/fast.yaml": "steps: 7\nseed: 6\noptim: {lr: 0.5}\n",
        "experiment/slow.yaml": "defaults: [override /schedule: constant, _self_]\nsteps: 70\n",
        "model/small.yaml": "path: tiny\nattention: eager\n",
        "child.yaml": "defaults: [mine, override experiment: slow, _self_]\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def values(recipe: Path | str, *words: str) -> dict[str, Any]:
    mapping = compose(recipe, list(words)).mapping
    return {
        "steps": mapping["steps"],
        "seed": mapping["seed"],
        "lr": mapping["optim"]["lr"],
        "schedule": mapping["schedule"]["kind"],
    }


def test_an_option_of_a_users_group_is_extended_at_its_place(project: Path) -> None:
    """It comes after /sft_lora (lr 2e-3 there) and before the recipe's own body (seed 5)."""
    made = compose(project / "mine.yaml")
    assert values(project / "mine.yaml") == {"steps": 7, "seed": 5, "lr": 0.5, "schedule": "cosine"}
    assert made.origins[("steps",)].file == project / "experiment/fast.yaml" and "experiment" not in made.mapping


@pytest.mark.parametrize("word", ["experiment=slow", "+experiment=slow"])
def test_the_command_line_takes_another_option(project: Path, word: str) -> None:
    assert values(project / "mine.yaml", word) == {"steps": 70, "seed": 5, "lr": 0.002, "schedule": "constant"}
    assert values(project / "mine.yaml", word, "steps=3")["steps"] == 3
    assert values(project / "mine.yaml", "experiment=null")["steps"] is None


def test_a_recipe_that_extends_it_overrides_the_choice_and_the_command_line_that(project: Path) -> None:
    assert values(project / "child.yaml")["steps"] == 70 and values(project / "child.yaml", "experiment=fast")["steps"] == 7


def test_a_group_that_no_file_names_is_added_last(project: Path) -> None:
    (project / "bare.yaml").write_text("defaults: [/sft_lora, _self_]\nseed: 5\n")
    assert values(project / "bare.yaml", "experiment=fast") == {"steps": 7, "seed": 6, "lr": 0.5, "schedule": "cosine"}


def test_of_two_recipes_that_do_not_name_base_each_is_merged_once(project: Path) -> None:
    (project / "one.yaml").write_text("defaults: [override /optim: lion, _self_]\nsteps: 3\n")
    (project / "two.yaml").write_text("defaults: [override /schedule: constant, _self_]\nseed: 4\n")
    (project / "both.yaml").write_text("defaults: [one, two, _self_]\n")
    made = compose(project / "both.yaml").recipe
    assert (made.steps, made.seed, made.optim["kind"], made.schedule["kind"]) == (3, 4, "lion", "constant")


def test_presets_next_to_a_recipe_are_found(project: Path) -> None:
    (project / "mine.yaml").write_text("defaults: [/sft_lora, override /model: small, _self_]\n")
    assert compose(project / "mine.yaml").recipe.model.attention == "eager"
    assert compose(project / "mine.yaml", ["model=tiny"]).recipe.model.attention == "auto"
    with pytest.raises(RecipeError, match="there is no model preset 'small'"):
        compose("sft_lora", ["model=small"])


def test_presets_next_to_an_artefact_are_not_found(project: Path) -> None:
    """A run or a model folder must not say what `model=NAME` means: its files could give themselves rights."""
    (project / "status.json").write_text("{}")
    (project / "mine.yaml").write_text("defaults: [/sft_lora, _self_]\n")
    with pytest.raises(RecipeError, match="there is no model preset 'small'"):
        compose(project / "mine.yaml", ["model=small"])


def test_optional_choices_are_left_out_where_they_do_not_exist(project: Path) -> None:
    (project / "mine.yaml").write_text(
        "defaults:\n  - /sft_lora\n  - optional model: mine\n  - optional experiment: absent\n"
        "  - optional override /optim: lion\n"
    )
    made = compose(project / "mine.yaml")
    assert made.recipe.model.path == "tiny" and made.recipe.optim["kind"] == "lion"
    assert [note.partition(": ")[2] for note in made.notes if "optional" in note] == [
        "there is no model mine; it is optional and left out",
        "there is no experiment absent; it is optional and left out",
    ]
    (project / "model/mine.yaml").write_text("path: tiny\nattention: sdpa\n")
    assert compose(project / "mine.yaml").recipe.model.attention == "sdpa"


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ("experiment: fst", "there is no experiment 'fst'; did you mean 'fast'?"),
        ("modle: tiny", r"defaults has no group 'modle'; did you mean 'model'\?.*no folder modle/ next to"),
        ("optional modle: tiny", "defaults has no group 'modle'"),
        ("model: mine", "there is no model preset 'mine'"),
        ("optionl model: tiny", "defaults has no group 'optionl model'"),
    ],
)
def test_mistakes_are_named(project: Path, defaults: str, said: str) -> None:
    (project / "mine.yaml").write_text(f"defaults: [/sft_lora, {{{defaults}}}, _self_]\n")
    with pytest.raises(RecipeError, match=said.replace("?", r"\?") if "\\" not in said else said):
        compose(project / "mine.yaml")


def test_a_config_dir_comes_first_and_for_one_command(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CONFIG_DIR, raising=False)
    assert run_command(["explain", "recipe=mine", "--config-dir", str(project), "model=small", "--json"]) == 0
    assert '"eager"' in capsys.readouterr().out
    assert "mine" not in all_recipes()
    assert run_command(["explain", "recipe=mine"]) == 2
    assert run_command(["explain", "recipe=mine", "--config-dir", "nowhere"]) == 2
    assert "--config-dir nowhere: there is no such folder" in capsys.readouterr().err
