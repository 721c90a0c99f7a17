"""Every objective under every registered wrapper: it starts where it must, trains, saves, and goes on to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from tests.contract import IMAGES, KINDS
from tests.runtime.test_process_matrix import HYPERMODEL, LIMIT, OBJECTIVES, sampled, words_of
from tests.trainings import curve, events, resumes_to_the_bit

SHORT = ["steps=2", "batch.size=3", "batch.micro=2", "data.limit=6", "data.max_length=64", "eval.batches=1", "eval.every=null"]
START: dict[str, dict[str, float]] = {
    "dpo": {"loss": math.log(2), "rewards/margins": 0.0, "kl": 0.0},
    "ipo": {"loss": 25.0},
    "kto": {"loss/unweighted": 0.5, "kl": 0.0},
    "grpo": {"policy/ratio": 1.0, "objective/kl": 0.0},
    "ppo": {"policy/ratio": 1.0, "objective/kl": 0.0},
    "rloo": {"policy/ratio": 1.0},
}
"""Values before the first step that follow from the objective alone (IPO: 1 / (4 beta^2) at beta = 0.1)."""
SAMPLE = {"ppo-bitfit", "dpo-mezo", "grpo-mezo", "dpo-apt", "reward-dylora", "classification-adalora"}
"""Cells of the fast suite: gradients and none, pairs, a rule's reward, value heads and a task head, prompts and budgets."""
CELLS = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=() if f"{name}-{kind}" in SAMPLE else pytest.mark.slow)
    for name in OBJECTIVES
    for kind in KINDS
    if kind not in IMAGES or registry.spec("objective", name).facts.get("head") == "image"
    if name not in HYPERMODEL or kind == "hypertuning"
]


def options_of(name: str, kind: str) -> list[str]:
    """The overrides of a cell on the objective's own recipe."""
    return [*SHORT, *LIMIT.get(name, []), *sampled(name), *words_of(kind)[1:]]


def measured(folder: Path) -> dict[str, Any]:
    """What the run found before its first step."""
    return next(iter(events(folder, "check")), {})


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_it_starts_where_it_must_trains_and_resumes_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    recipe, words = OBJECTIVES[name][0], options_of(name, kind)
    resumes_to_the_bit(tmp_path, recipe, words, 1)
    check = measured(tmp_path / "whole")
    for key, value in START.get(name, {}).items():
        assert check[key] == pytest.approx(value, rel=2e-3, abs=2e-3), key
        assert check[f"{key}/wanted"] == pytest.approx(value, abs=1e-6)
    points = curve(tmp_path / "whole")
    assert [step for step, *_ in points] == [1, 2]
    assert all(math.isfinite(loss) for _, loss, *_ in points)
