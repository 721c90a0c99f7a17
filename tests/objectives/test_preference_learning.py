"""The embedded preferences are learned: held-out accuracy of the shipped recipes, and chance where the labels are shuffled."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.runs import events, train_recipe

BETTER = "eval/rewards/accuracies"


def accuracy(folder: Path) -> float:
    """Share of held-out pairs whose better answer has the larger reward after the last step."""
    return float([e[BETTER] for e in events(folder, "evaluation") if BETTER in e][-1])


def shuffled(folder: Path, name: str = "preference") -> Path:
    """Embedded pairs with chosen and rejected swapped in a random half."""
    from importlib.resources import files

    source = files("llmrecipe") / "assets" / "data" / name
    chance = random.Random(0)
    folder.mkdir()
    for split in ("train", "valid"):
        lines = []
        for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if split == "train" and chance.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("recipe", ["dpo_lora", "ipo_lora", "kto_lora", "orpo_lora", "simpo_lora"])
def test_a_few_steps_lower_the_loss_of_their_own_batch(recipe: str, tmp_path: Path) -> None:
    """One batch again and again."""
    more = ["steps=8", "batch.size=4", "data.limit=4", "eval.batches=1", "optim.lr=3e-3", "schedule.warmup=0"]
    train_recipe(tmp_path / "run", recipe, *more)
    losses = [e["loss"] for e in events(tmp_path / "run")]
    assert sum(losses[-2:]) < sum(losses[:2])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo_lora", "ipo_lora", "kto_lora", "orpo_lora", "simpo_lora"])
def test_shipped_recipes_learn_the_preferences(recipe: str, tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", recipe)
    assert accuracy(tmp_path / "run") >= 0.95


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(tmp_path: Path) -> None:
    """The control: the same recipe on labels without meaning stays far from the bar."""
    data = shuffled(tmp_path / "data")
    train_recipe(tmp_path / "run", "dpo_lora", f"data.path={data}")
    assert accuracy(tmp_path / "run") < 0.75
