"""A composed recipe as a short file: it composes to the same recipe, and repeats no default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.extending import extending_yaml
from llmrecipe.recipe.yaml_file import read_yaml
from tests.recipes.learning import LEARNING

SOME = ("base", "noah_found", "mmlm", "dpo_lora", "grpo", "rlhf", "survey_leaderboard")


def again(path: Path, mapping: dict[str, Any]) -> dict[str, Any]:
    path.write_text(extending_yaml(mapping), encoding="utf-8")
    return compose(path).mapping


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(LEARNING) if name not in SOME)]
)
def test_a_recipe_composes_to_the_same(name: str, tmp_path: Path) -> None:
    mapping = compose(name).mapping
    found = again(tmp_path / f"{name}.yaml", mapping)
    assert found == mapping and list(found["stack"]) == list(mapping["stack"]), "wrappers keep their order"


def test_what_is_written_differs_from_the_defaults(tmp_path: Path) -> None:
    words = ["stack=[nf4,lora]", "stack.lora.r=4", "stack.nf4.double=true", "seed=3"]
    text = extending_yaml(compose("base", words).mapping)
    path = tmp_path / "short.yaml"
    path.write_text(text, encoding="utf-8")
    written = read_yaml(path).value
    choices = [
        "override /objective: sft",
        "override /stack: [nf4, lora]",
        "override /optim: adamw",
        "override /schedule: cosine",
    ]
    assert [line.removeprefix("  - ") for line in text.splitlines()[2:6]] == choices
    assert written["stack"] == {"lora": {"r": 4}} and written["seed"] == 3
    assert set(written) == {"defaults", "stack", "seed", "run"}


def test_a_dollar_stays_plain_text(tmp_path: Path) -> None:
    mapping = compose("base").mapping
    mapping["data"]["system"] = "pay ${5} to ${oc.env:HOME}"
    assert again(tmp_path / "base.yaml", mapping)["data"]["system"] == mapping["data"]["system"]


def test_a_mapping_that_lacks_a_key_of_its_default_is_written_whole(tmp_path: Path) -> None:
    mapping = compose("base").mapping
    del mapping["optim"]["beta1"]
    text = extending_yaml(mapping)
    assert not text.startswith("defaults:") and "beta2:" in text
