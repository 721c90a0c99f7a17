"""Which words and files of a composed recipe give the rights of `model`, and which only name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.cli.app import run_command as cli
from llmrecipe.core.errors import RecipeError
from llmrecipe.evaluation.eval_recipe import recipe_of
from llmrecipe.pipelines.search.study import Search
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.rights import RIGHTS, is_artefact, rights_of

BOTH = "model: {trust_remote_code: true, allow_pickle: true}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str = "") -> str:
    """A file with its folders."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return path


def planted(text: str, name: str = "run/recipe.yaml", mark: str = "run/status.json") -> str:
    """A recipe in the folder of a run (or of what else the mark says)."""
    write(mark, "{}")
    return write(name, text)


def given(recipe: str, *words: str) -> list[str]:
    """The rights a recipe has under some words."""
    return list(rights_of(compose(recipe, list(words)).recipe.model))


def test_a_recipe_of_the_person_gives_them() -> None:
    assert given(write("mine.yaml", BOTH)) == list(RIGHTS)
    assert given("sft_lora", "model.allow_pickle=true") == ["allow_pickle"]
    write("recipes/model/mine.yaml", "path: folder\ntrust_remote_code: true\n")
    assert given("sft_lora", "model=mine") == ["trust_remote_code"]
    assert given(write("chosen.yaml", "defaults: [/base, {override /model: mine}, _self_]\n")) == ["trust_remote_code"]


@pytest.mark.parametrize(
    "mark",
    ["status.json", "final/stack.yaml", "final/model/config.json", "stack.yaml", "adapter_config.json", "config.json",
     "trials.jsonl", "../status.json"],
)  # fmt: skip
def test_a_recipe_in_what_is_opened_gives_none_at_any_depth(mark: str) -> None:
    recipe = planted(BOTH, "top/run/recipe.yaml", f"top/run/{mark}")
    assert given(recipe) == [] and given("top/run") == []
    composition = compose(recipe, ["model.trust_remote_code=true"])
    assert list(rights_of(composition.recipe.model)) == ["trust_remote_code"]
    assert [note.partition(":")[0] for note in composition.notes] == ["model.allow_pickle"]


def test_a_folder_is_no_recipe_of_the_person() -> None:
    write("folder/recipe.yaml", BOTH)
    assert given("folder") == [] and given("folder/recipe.yaml") == list(RIGHTS)


def test_a_link_hides_nothing() -> None:
    planted(BOTH)
    Path("mine.yaml").symlink_to("run/recipe.yaml")
    Path("elsewhere").symlink_to("run", target_is_directory=True)
    assert given("mine.yaml") == [] and given("elsewhere/recipe.yaml") == []
    write("own.yaml", BOTH)
    Path("run/linked.yaml").symlink_to("../own.yaml")
    assert given("run/linked.yaml") == []


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [./further.yaml]\n",
        "defaults: [/base, {override /model: mine}, _self_]\n",
        "defaults: [/mine]\n",
        "roles: {a: {path: x, trust_remote_code: true}}\nmodel: ${roles.a}\n",
        "seed: 1\nmodel: {trust_remote_code: '${data.cache}'}\n",
        "<<: {model: {trust_remote_code: true}}\n",
    ],
)
def test_ways_round_are_closed(text: str) -> None:
    """A further file, a preset or a recipe of the person's that is named there, another value, a merged mapping."""
    write("further.yaml", BOTH)
    write("run/further.yaml", BOTH)
    write("recipes/model/mine.yaml", "trust_remote_code: true\n")
    write("recipes/mine.yaml", BOTH)
    recipe = planted(text)
    try:
        assert given(recipe) == []
    except RecipeError as error:
        assert "roles" in str(error) or "<<" in str(error)


def test_a_recipe_of_the_person_that_extends_a_stored_one_gives_its_own() -> None:
    planted(BOTH)
    assert given(write("mine.yaml", "defaults: [./run/recipe.yaml]\n")) == []
    own = "defaults: [./run/recipe.yaml]\nmodel: {allow_pickle: true}\n"
    assert given(write("mine.yaml", own)) == ["allow_pickle"]


def test_the_recipe_of_a_run_gives_none_whatever_lies_beside_it() -> None:
    write("run/recipe.yaml", BOTH)
    write("run/final/stack.yaml", "")
    assert rights_of(recipe_of("run", []).recipe.model) == rights_of(recipe_of("run/final", []).recipe.model) == {}
    assert list(rights_of(recipe_of("run", ["model.allow_pickle=true"]).recipe.model)) == ["allow_pickle"]


def test_stored_stages_are_refused_and_a_stored_space_gives_none(capsys: pytest.CaptureFixture[str]) -> None:
    stages = "stages: {a: {recipe: sft_lora, with: [model.trust_remote_code=true]}}\n"
    with pytest.raises(RecipeError, match="copy it elsewhere"):
        plan(compose(planted(stages)))
    assert cli(["check", "recipe=run/recipe.yaml"]) == 2 and "copy it elsewhere" in capsys.readouterr().err
    space = "defaults: [/sft_lora]\nsearch: {space: {model.trust_remote_code: [true, false]}}\n"
    recipe = planted(space)
    with pytest.raises(RecipeError, match="its space gives no rights"):
        Search(recipe, [], compose(recipe)).check()


def test_packaged_recipes_are_no_artefacts() -> None:
    assert not is_artefact(compose("sft_lora").path)
