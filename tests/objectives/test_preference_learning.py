"""A few steps of every pair objective; what whole runs learn of held-out pairs stands in tests/recipes/learning.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainings import events, train_recipe


@pytest.mark.parametrize("recipe", ["dpo_lora", "ipo_lora", "kto_lora", "orpo_lora", "simpo_lora"])
def test_a_few_steps_lower_the_loss_of_their_own_batch(recipe: str, tmp_path: Path) -> None:
    """One batch again and again."""
    more = ["steps=8", "batch.size=4", "data.limit=4", "eval.batches=1", "optim.lr=3e-3", "schedule.warmup=0"]
    train_recipe(tmp_path / "run", recipe, *more)
    losses = [e["loss"] for e in events(tmp_path / "run")]
    assert sum(losses[-2:]) < sum(losses[:2])
