"""Words with a newer name: recipes in old words compose as in new ones with a line for each, and an old run opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.renames import RENAMES

NEW = """
stages:
  a:
    matrix: {lr: [0.1, 0.2], size: {x: {steps: 2}, y: {}}}
    recipe: sft_lora
    optim: {lr: "${matrix:lr}"}
"""
CASES = {"each": (NEW, NEW.replace("matrix", "each"), ["stages.a.each is called stages.a.matrix"])}
"""Old word -> a recipe in new words, the same in the old one, and the lines it prints."""


def write(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def test_every_rename_has_a_case() -> None:
    assert {rename.old for rename in RENAMES} == set(CASES)


@pytest.mark.parametrize("word", CASES)
def test_old_words_compose_to_the_same_mapping_and_print_a_line(tmp_path: Path, word: str) -> None:
    new, old, lines = CASES[word]
    wanted = compose(write(tmp_path, new))
    assert wanted.notes == []
    made = compose(write(tmp_path, old))
    assert made.mapping == wanted.mapping
    assert list(made.origins) == list(wanted.origins)
    assert [str(o) for o in made.origins.values()] == [str(o) for o in wanted.origins.values()]
    assert [note for note in made.notes if "..." not in note] == lines


def test_keys_of_results_do_not_depend_on_the_word(tmp_path: Path) -> None:
    for new, old, _ in CASES.values():
        wanted = [stage.key for stage in plan(compose(write(tmp_path, new))).stages]
        assert [stage.key for stage in plan(compose(write(tmp_path, old))).stages] == wanted


def test_old_words_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, NEW)
    made = compose(path, ["stages.a.each.lr=[0.3]", "~stages.a.each.size"])
    assert made.recipe.stages is not None
    assert made.recipe.stages["a"]["matrix"] == {"lr": [0.3]}
    assert made.notes == [
        "stages.a.each.lr is called stages.a.matrix.lr",
        "stages.a.each.size is called stages.a.matrix.size",
    ]


def test_a_new_word_over_an_old_file_and_an_old_one_over_a_new_file(tmp_path: Path) -> None:
    for below, above in (("matrix", "each"), ("each", "matrix")):
        (tmp_path / "below.yaml").write_text(NEW.replace("matrix", below))
        path = write(tmp_path, f"defaults: [/below]\nstages: {{a: {{{above}: {{lr: [0.5]}}}}}}\n")
        stages = compose(path).recipe.stages
        assert stages is not None
        assert stages["a"]["matrix"] == {"lr": [0.5], "size": {"x": {"steps": 2}, "y": {}}}


def test_a_misspelt_new_word_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'matrix'"):
        plan(compose(write(tmp_path, "stages: {a: {recipe: sft_lora, matrx: {seed: [1]}}}")))


def test_a_column_of_that_name_stays() -> None:
    made = compose("sft_lora", ["data.columns={each: text, agent: x}"])
    assert made.mapping["data"]["columns"] == {"each": "text", "agent": "x"}
    assert made.notes == []
