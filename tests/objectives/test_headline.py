"""The few metrics that the screen shows of a training are metrics of its objective."""

from __future__ import annotations

import pytest

from llmrecipe.core import registry
from tests.trainings import events, train_recipe

SAMPLED = ("grpo", "ppo", "rloo")
"""Objectives whose metrics depend on rewards, so that a run alone shows them."""


@pytest.mark.parametrize("name", [n for n in registry.names("objective") if n not in SAMPLED])
def test_an_objectives_headline_is_among_its_metrics(name: str) -> None:
    objective = registry.load_class("objective", name)()
    optional = {"accuracy"} if name == "nsp" else set()
    assert objective.headline and set(objective.headline) <= {*objective.measures(), *optional}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_headline_of_sampled_answers_is_among_the_metrics_of_a_run(name: str, tmp_path) -> None:
    small = ["steps=1", "batch.size=2", "data.limit=8", "eval.batches=1", "eval.test=false", "objective.max_new_tokens=3"]
    train_recipe(tmp_path / "run", name, *small)
    seen = {
        key.removeprefix("eval/")
        for kind in ("step", "evaluation")
        for event in events(tmp_path / "run", kind)
        for key in event
    }
    assert set(registry.load_class("objective", name).headline) <= seen
