"""What a run forgets of held-out general sets: by hand, against the models before and after, without an effect on training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmrecipe.core.errors import DataError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.training.dry_run import check
from llmrecipe.training.forgetting import forgotten
from tests.trainings import QUIET, events, learned, resumes_to_the_bit, train_recipe

TEXTS = ["The cat sat on the mat.", "A dog ran home.", "Birds sing in the morning, every day.", "It rained.", "We saw a fox."]


def words(folder: Path, *more: str) -> list[str]:
    """Two steps with a general set of a few texts."""
    path = folder / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return [
        "data.max_length=128", "steps=2", "batch.size=4", "schedule=constant", "eval.batches=1",
        f"+eval.forgetting.own={path}", *more,
    ]  # fmt: skip


def loss_per_token(model: Any, tokenizer: Any) -> float:
    """The summed loss of the texts over their tokens, from the model's own logits."""
    total, count = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor(
                [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
            )
            logprobs: Tensor = model.eval()(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(logprobs.gather(-1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    return total / count


def test_forgetting_is_the_rise_of_the_loss_per_token_and_its_interval_is_paired() -> None:
    before = {"a": np.array([[2.0, 1.0], [4.0, 3.0]]), "b": np.array([[1.0, 2.0]] * 4)}
    after = {"a": np.array([[6.0, 1.0], [4.0, 3.0]]), "b": np.array([[0.5, 2.0]] * 4)}
    found = forgotten(before, after, 400, 0)
    assert (found["forget/a"], found["forget/b"], found["forget/mean"]) == (1.0, -0.25, 0.375)
    # Of two rows a sample holds the first never, once or twice: 0, (6 - 2) / 4 or (12 - 4) / 2.
    assert (found["forget/a/low"], found["forget/a/high"]) == (0.0, 4.0)
    # All rows of b changed alike: paired samples agree, whatever rows they draw.
    assert (found["forget/b/low"], found["forget/b/high"]) == (-0.25, -0.25)
    assert (found["forget/mean/low"], found["forget/mean/high"]) == (-0.125, 1.875)
    assert set(forgotten(before, after, 0, 0)) == {"forget/a", "forget/b", "forget/mean"}


@pytest.mark.parametrize("recipe", ["sft_lora", "prompt_tuning"])
def test_scores_are_those_of_the_base_and_of_the_finished_model(recipe: str, tmp_path: Path) -> None:
    run = train_recipe(tmp_path / "run", recipe, *words(tmp_path, "optim.lr=0.01", "eval.load_best=false"))
    name = next(w.name for w in run.stack)
    with activate(Context(off=frozenset({name}))):
        base = loss_per_token(run.model, run.tokenizer)
    end = loss_per_token(run.model, run.tokenizer)
    found = {k: v for event in events(tmp_path / "run", "evaluation") for k, v in event.items() if k.startswith("forget/")}
    scores = [e["general/own"] for e in events(tmp_path / "run", "evaluation") if "general/own" in e]
    assert scores == [pytest.approx(base, rel=1e-5), pytest.approx(end, rel=1e-5)]
    assert found["forget/own"] == pytest.approx(end - base, rel=1e-3)
    assert abs(end - base) > 1e-2
    assert found["forget/own/low"] < found["forget/own"] < found["forget/own/high"]
    metrics = json.loads((tmp_path / "run" / "final" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["forget/mean"] == metrics["forget/own"] == found["forget/own"]


def test_measuring_changes_no_step_and_a_resumed_run_has_the_same_scores(tmp_path: Path) -> None:
    measured = words(tmp_path)
    resumes_to_the_bit(tmp_path / "measured", "sft", measured, 1)
    train_recipe(tmp_path / "plain", "sft", *(w for w in measured if "forgetting" not in w))
    assert all(torch.equal(t, learned(tmp_path / "plain")[n]) for n, t in learned(tmp_path / "measured" / "whole").items())
    whole, parts = (
        [e for e in events(tmp_path / "measured" / n, "evaluation") if "general/own" in e] for n in ("whole", "parts")
    )
    assert whole == parts
    assert len(whole) == 2


def test_a_set_that_cannot_be_scored_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"eval\.forgetting: it scores texts by their next tokens"):
        check("classify", [*QUIET, "+eval.forgetting.own=builtin:stories"])
    with pytest.raises(DataError, match="nowhere"):
        check("sft", [*QUIET, f"+eval.forgetting.own={tmp_path / 'nowhere.jsonl'}"])
