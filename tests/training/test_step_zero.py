"""Values that every comparison with a reference starts from: measured in each run, written down, a stop where they differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.engine.role_models import Roles
from tests.trainings import events, resume, stop_after, train_recipe

SMALL = ["steps=1", "batch.size=4", "eval.batches=1", "data.max_length=64"]


def test_a_run_writes_what_it_measured(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "dpo_lora", *SMALL, "objective.beta=0.3")
    (check,) = events(tmp_path / "run", "check")
    assert check["step"] == 0
    assert check["loss"] == pytest.approx(math.log(2), abs=1e-6) and check["loss/wanted"] == pytest.approx(math.log(2))
    # Reference scores may come from the cache, scored in other micro-batches: equal up to float32 rounding.
    assert check["kl"] == pytest.approx(0.0, abs=1e-4) and check["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    first = events(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("recipe", "wanted"), [("ipo_lora", {"loss": 25.0}), ("kto_lora", {"loss/unweighted": 0.5, "kl": 0.0})]
)
def test_other_objectives_have_values_of_their_own(recipe: str, wanted: dict[str, float], tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", recipe, *SMALL)
    (check,) = events(tmp_path / "run", "check")
    assert {k: check[k] for k in wanted} == pytest.approx(wanted, abs=1e-5)


def test_a_batch_without_rejected_answers_is_measured_without_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}", "label": True} for i in range(4)]
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    train_recipe(tmp_path / "run", "kto_lora", *SMALL, f"data.path={path}")
    (check,) = events(tmp_path / "run", "check")
    assert check["loss/unweighted"] == pytest.approx(0.5, abs=1e-5) and check["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert "rewards/rejected" not in check


def test_another_reference_stops_the_run_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Roles.reference_tokens

    def drifted(self: Roles, *arguments: Any, **more: Any) -> torch.Tensor:
        return original(self, *arguments, **more) + 0.01

    monkeypatch.setattr(Roles, "reference_tokens", drifted)
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))  # no scores of an earlier run
    with pytest.raises(RunError, match=r"kl is .* and must be 0"):
        train_recipe(tmp_path / "run", "dpo_lora", *SMALL)
    assert not events(tmp_path / "run"), "no step was made"


def test_dropout_in_the_policy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.objectives.alignment.dpo import Dpo

    monkeypatch.setattr(Dpo, "dropout", True)
    original = torch.nn.Embedding.forward

    def noisy(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(original(self, ids), 0.3, self.training)

    monkeypatch.setattr(torch.nn.Embedding, "forward", noisy)
    with pytest.raises(RunError, match="before the first step"):
        train_recipe(tmp_path / "run", "dpo_lora", *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo", "ipo", "kto"])
def test_all_weights_score_the_reference_beforehand_and_resume_to_the_bit(recipe: str, tmp_path: Path) -> None:
    """No second model: mismatched pairs of every step too are scored under the untouched policy."""
    more = ["steps=4", "batch.size=8", "eval.batches=1", "data.max_length=64", "save.every=2"]
    train_recipe(tmp_path / "whole", recipe, *more)
    assert events(tmp_path / "whole", "check")
    stop_after(2, tmp_path / "cut", recipe, *more)
    resume(tmp_path / "cut")
    losses = [[e["loss"] for e in events(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.slow
def test_the_reference_of_a_continued_run_is_its_policy_or_the_base(tmp_path: Path) -> None:
    """On an SFT run: `initial` starts at log 2, `base` sees what SFT changed; with all weights trained there is no base."""
    small = ["batch.size=4", "eval.batches=1", "data.max_length=64"]
    train_recipe(tmp_path / "sft", "sft_lora", "steps=12", *small)
    path = f"model.path={tmp_path / 'sft'}"
    for which in ("initial", "base"):
        train_recipe(tmp_path / which, "dpo_lora", path, "steps=1", f"objective.reference={which}", *small)
    first = {which: events(tmp_path / which)[0] for which in ("initial", "base")}
    assert first["initial"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["base"]["kl"]) > 1e-3
    assert first["initial"]["logps/chosen"] == pytest.approx(first["base"]["logps/chosen"], abs=1e-4), "the policy is the same"
    with pytest.raises(RecipeError, match="reference=initial"):
        train_recipe(tmp_path / "all", "dpo", path, "steps=1", "objective.reference=base", *small)
