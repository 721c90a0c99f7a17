"""Packaged recipes learn the embedded tasks, and controls that have nothing to learn from do not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llmrecipe.recipe.recipe_paths import packaged, recipes_in
from tests.recipes.learning import LEARNING, Learns, ShownBy
from tests.trainings import events, train_recipe

ROOT = Path(__file__).resolve().parents[2]
MEASURED = {name: proof for name, proof in LEARNING.items() if isinstance(proof, Learns)}


def last(folder: Path, metric: str) -> float:
    """The metric of the last evaluation on the validation rows."""
    return float([e[metric] for e in events(folder, "evaluation") if metric in e][-1])


def words_of(node: ast.AST) -> set[str]:
    """Every text that stands in a piece of code."""
    return {str(n.value) for n in ast.walk(node) if isinstance(n, ast.Constant)}


def trains(path: Path, recipe: str) -> bool:
    """Whether a test of a file names a recipe and trains."""
    tests = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
    calls = [{n.id for n in ast.walk(t) if isinstance(n, ast.Name)} for t in tests]
    return any(recipe in words_of(t) and "train_recipe" in names for t, names in zip(tests, calls, strict=True))


def test_every_runnable_recipe_has_a_proof_that_it_learns() -> None:
    """In the table, or in a file of its own: tests/.../test_RECIPE.py trains it."""
    recipes = {path.stem for path in recipes_in(packaged()).values()} - {"base"}
    assert set(LEARNING) <= recipes
    for recipe in sorted(recipes - set(LEARNING)):
        files = [p for p in (ROOT / "tests").rglob("test_*.py") if recipe.startswith(p.stem.removeprefix("test_"))]
        assert any(trains(path, recipe) for path in files), f"no test of a file test_{recipe}.py trains the recipe {recipe}"


@pytest.mark.parametrize("recipe", [name for name, proof in LEARNING.items() if isinstance(proof, ShownBy)])
def test_a_proof_that_stands_elsewhere_is_a_test_that_runs_the_recipe(recipe: str) -> None:
    proof = LEARNING[recipe]
    assert isinstance(proof, ShownBy)
    file, _, name = proof.test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert words_of(function) & {recipe, f"recipe={recipe}"}


@pytest.mark.parametrize("recipe", MEASURED)
def test_bounds_leave_room_between_a_run_and_its_control(recipe: str) -> None:
    """No value holds for both; a loss differs by a tenth at least, a share of rows or pairs by ten points."""
    proof = MEASURED[recipe]
    assert not (proof.holds(proof.missed) or proof.fails(proof.reached))
    if proof.reached < proof.missed:
        assert proof.missed >= 1.1 * proof.reached
    else:
        assert round(proof.reached - proof.missed, 6) >= 0.1


@pytest.mark.parametrize("recipe", ["sft_lora", "parallel_adapter", "bitfit", "group_mask"])
def test_a_few_steps_halve_the_loss(recipe: str, tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", recipe, "steps=25", "eval.batches=2")
    losses = [e["eval/loss"] for e in events(tmp_path / "run", "evaluation") if "eval/loss" in e]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MEASURED)
def test_a_whole_run_learns(recipe: str, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    proof = MEASURED[recipe]
    train_recipe(tmp_path / "run", recipe, "eval.at_start=false", *proof.words)
    value = last(tmp_path / "run", proof.metric)
    record_property(proof.metric, value)
    assert proof.holds(value), f"{proof.metric} {value:.4g}; a run reaches {proof.reached}"
    for name, least, most in proof.within:
        assert least <= last(tmp_path / "run", name) <= most


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MEASURED)
def test_its_control_does_not(recipe: str, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    proof = MEASURED[recipe]
    words = proof.spoil(tmp_path / "data")
    train_recipe(tmp_path / "run", recipe, "eval.at_start=false", *proof.words, *words)
    value = last(tmp_path / "run", proof.metric)
    record_property(proof.metric, value)
    assert proof.fails(value), f"{proof.metric} {value:.4g}; a control stays at {proof.missed}"
