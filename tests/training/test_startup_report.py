"""What `report.json` says of a run's recipe: which values it does not inherit, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llmrecipe.recipe.compose import compose, to_yaml
from llmrecipe.training.startup_report import half_text, recipe_facts

RECIPE = """
defaults:
  - /base
  - override /objective: dpo
  - override /stack: [lora]
  - _self_
data: {path: "builtin:preference"}
stack: {lora: {r: 4}}
"""


def facts(folder: Path, recipe: Path, words: list[str], first_step: int = 0) -> dict[str, Any]:
    run = SimpleNamespace(composition=compose(recipe, words), dir=SimpleNamespace(path=folder), first_step=first_step)
    return recipe_facts(run)  # type: ignore[arg-type]


def test_values_of_the_own_file_and_of_the_command_line_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    found = facts(tmp_path, tmp_path / "mine.yaml", ["optim.lr=0.5"])
    assert found["name"] == "mine" and found["set"]["optim.lr"] == "override optim.lr=0.5"
    assert found["set"]["stack.lora.r"].endswith("mine.yaml:8") and found["set"]["data.path"].endswith("mine.yaml:7")
    assert not {"stack.lora.alpha", "optim.beta1", "batch.size", "seed"} & set(found["set"]), "defaults, or of what it extends"

    (tmp_path / "report.json").write_text(json.dumps({"recipe": found}))
    (tmp_path / "recipe.yaml").write_text(to_yaml(compose(tmp_path / "mine.yaml", ["optim.lr=0.5"]).mapping))
    later = facts(tmp_path, tmp_path / "recipe.yaml", ["steps=9"], first_step=3)
    assert later == {"name": "mine", "set": {**found["set"], "steps": "override steps=9"}}
    again = facts(tmp_path, tmp_path / "recipe.yaml", [], first_step=0)
    assert "seed" in again["set"], "a run that starts from a whole recipe has set all of it"


def test_a_training_in_float16_is_warned_of() -> None:
    def text(dtype: torch.dtype, autocast: torch.dtype | None = None) -> str | None:
        return half_text(SimpleNamespace(autocast=autocast, model=SimpleNamespace(dtype=dtype)))  # type: ignore[arg-type]

    assert "no gradient below 6e-8" in str(text(torch.float16)) and text(torch.float32, torch.float16) is not None
    assert text(torch.bfloat16) is text(torch.float32) is text(torch.float32, torch.bfloat16) is None
    assert float(torch.tensor(6e-8, dtype=torch.float16)) > 0 and float(torch.tensor(2.9e-8, dtype=torch.float16)) == 0.0
