"""What a run forgets of held-out general sets: by hand, against the models before and after, without an effect on training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmrecipe.core.errors import DataError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.core.registry import PACKAGE
from llmrecipe.methods._base.stack import Stack
from llmrecipe.training.dry_run import check
from llmrecipe.training.forgetting import forgotten, row_divergences, row_losses
from tests.contract import MIXTURES
from tests.methods.additive.harness import fill, model_of
from tests.methods.kinds import CHANGES, STAGES, cell, put, wrapper_of
from tests.tiny import roles_for
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
    assert set(forgotten(before, after, 0, 0)) == {"forget/a", "forget/b", "forget/mean", "forget/relative"}
    # 1 of a loss of 6/4 before, and -0.25 of one of 1/2.
    assert found["forget/relative"] == pytest.approx((1 / 1.5 - 0.25 / 0.5) / 2)


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
    assert metrics["forget/kl"] == found["forget/kl"] > 0.0


SOURCES = [[3, 5, 6, 7, 8, 9, 2], [3, 12, 13, 2], [3, 20, 21, 22, 23, 24, 25, 26, 2]]


ROWS: Any = [{"row": i, "ids": ids, "trained": [0, 0] + [1] * (len(ids) - 2)} for i, ids in enumerate(SOURCES)]


def run_of(model: Any, stack: Stack) -> Any:
    """What scoring reads of a run."""
    runtime = SimpleNamespace(rank=0, world=1, gather_json=lambda own: [own])
    return SimpleNamespace(runtime=runtime, stack=stack, roles=roles_for(model, stack))


def losses(model: Any, stack: Stack, base: bool) -> list[list[float]]:
    """What `row_losses` finds for a model under a stack."""
    return row_losses(run_of(model, stack), ROWS, base=base)


@pytest.mark.parametrize("kind", [k for k in CHANGES if k not in MIXTURES and k != "hypertuning"])
def test_a_model_that_made_no_step_has_forgotten_nothing(kind: str) -> None:
    """Exactly 0, and without what an injected method learned the scores are those of the base, to the bit."""
    untouched = np.array(losses(model_of("llama"), Stack([]), base=False))
    made = cell(kind, "llama")
    before, after = (losses(made.model, made.stack, base=base) for base in (True, False))
    np.testing.assert_allclose(np.array(before), untouched, rtol=1e-6)
    assert (after == before) is all(wrapper.starts_at_base() for wrapper in made.stack)
    if STAGES[kind] == "INJECT":
        moved = cell(kind, "llama", moved=True)
        assert losses(moved.model, moved.stack, base=True) == before != losses(moved.model, moved.stack, base=False)


def test_the_baseline_of_a_quantized_run_is_its_quantized_base() -> None:
    pytest.importorskip("bitsandbytes")
    bare = model_of("llama")
    quantized = put(model_of("llama"), wrapper_of("nf4"))
    made = put(model_of("llama"), wrapper_of("nf4"), wrapper_of("lora"))
    before = losses(made.model, made.stack, base=True)
    assert before == losses(quantized.model, quantized.stack, base=False) != losses(bare, Stack([]), base=False)
    assert losses(made.model, made.stack, base=False) == before
    fill(made.model)
    assert losses(made.model, made.stack, base=True) == before != losses(made.model, made.stack, base=False)


@pytest.mark.parametrize("kept", [64, 5])
def test_the_divergence_from_the_base_is_that_of_the_logits(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all 64 tokens it is KL(before || after); of fewer it is that of them and one class of all others."""
    monkeypatch.setattr("llmrecipe.training.forgetting.KEPT", kept)
    made = cell("lora", "llama", moved=True)
    found = row_divergences(run_of(made.model, made.stack), ROWS)
    for (total, count), ids in zip(found, SOURCES, strict=True):
        logits = {}
        for off in (frozenset(), frozenset({"lora"})):
            with torch.no_grad(), activate(Context(off=off)):
                logits[bool(off)] = made.model(torch.tensor([ids])).logits[0, 1:-1].double().softmax(-1)
        p, q = logits[True], logits[False]
        top = p.topk(kept, -1).indices
        p, q = ([x.gather(-1, top), (1 - x.gather(-1, top).sum(-1, keepdim=True))] for x in (p, q))
        terms = [(a * (a / b).log()).sum() for a, b in zip(p[: 1 + (kept < 64)], q, strict=False)]
        assert (total, count) == (pytest.approx(float(sum(terms)), rel=1e-4), len(ids) - 2) and total > 0.01
    fresh = cell("lora", "llama")
    assert sum(total for total, _ in row_divergences(run_of(fresh.model, fresh.stack), ROWS)) == pytest.approx(0.0, abs=1e-5)


def test_rows_that_training_has_too_are_reported(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (PACKAGE / "assets/data/stories/train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [rows[0]["text"], "Once upon a time " + rows[1]["text"][:200], *TEXTS]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = [
        "steps=1",
        "batch.size=2",
        "eval.batches=1",
        f"+eval.forgetting.own={tmp_path / 'general.jsonl'}",
    ]
    train_recipe(tmp_path / "run", "clm", "data.max_length=512", *words)
    (said,) = [e["message"] for e in events(tmp_path / "run", "warning") if "eval.forgetting" in e["message"]]
    assert said.startswith("eval.forgetting.own: of its 7 rows 2 have 13 tokens in a row in common with a training row")
    assert [e["general/own/overlap"] for e in events(tmp_path / "run", "check") if "general/own/overlap" in e] == [2]


@pytest.mark.slow
def test_measuring_changes_no_step_and_a_resumed_run_has_the_same_scores(tmp_path: Path) -> None:
    measured = words(tmp_path)
    resumes_to_the_bit(tmp_path / "measured", "sft", measured, 1)
    train_recipe(tmp_path / "plain", "sft", *(w for w in measured if "forgetting" not in w))
    assert all(torch.equal(t, learned(tmp_path / "plain")[n]) for n, t in learned(tmp_path / "measured" / "whole").items())
    whole, parts = (
        [e for e in events(tmp_path / "measured" / n, "evaluation") if "general/own" in e] for n in ("whole", "parts")
    )
    assert whole == parts
    assert len(whole) == 2 and "forget/kl" not in whole[-1], "the weights of the base are gone"


def test_the_limit_ends_the_training_at_the_evaluation_that_passes_it(tmp_path: Path) -> None:
    """The curve of a whole run tells where a run with a limit just below one of its points has to stop."""
    rows = (PACKAGE / "assets/data/chat/valid.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "known.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    given = words(tmp_path, "optim.lr=0.01", "eval.load_best=false", "eval.every=1")
    measured = [
        *(w for w in given if w != "steps=2" and "forgetting" not in w),
        f"+eval.forgetting.own={tmp_path / 'known.jsonl'}",
    ]
    train_recipe(tmp_path / "whole", "sft_lora", *measured, "steps=4", "eval.forgetting_curve=true")
    every = [e for e in events(tmp_path / "whole", "evaluation") if "forget/mean" in e]
    assert [e["step"] for e in every] == [1, 2, 3, 4, 4] and every[-2]["forget/mean"] == every[-1]["forget/mean"]
    lost = {e["step"]: e["forget/mean"] for e in every}
    losses = {e["step"]: e["eval/loss"] for e in events(tmp_path / "whole", "evaluation") if "eval/loss" in e}
    metrics = json.loads((tmp_path / "whole" / "final" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["gain"] == losses[0] - losses[4]
    first = next(step for step in lost if lost[step] > lost[1] > 0 or step == 4)
    assert lost[first] > lost[1] > 0 and 1 < first < 4, "what is forgotten grows"
    limit = (lost[1] + lost[first]) / 2
    train_recipe(tmp_path / "cut", "sft_lora", *measured, "steps=4", f"eval.forgetting_limit={limit}")
    metrics = json.loads((tmp_path / "cut" / "final" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == first and metrics["forget/mean"] == lost[first]
    (said,) = [e["message"] for e in events(tmp_path / "cut", "warning") if "forgetting_limit" in e["message"]]
    assert said.endswith(f"at step {first}; training ends")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["eval.forgetting_limit=0.1"], "eval.forgetting_limit: there is no general set"),
        (["eval.forgetting_curve=true", "+eval.forgetting.own=builtin:stories"], "there are none; set eval.every=STEPS"),
    ],
)
def test_forgetting_that_is_never_measured_during_training_is_refused(given: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check("sft", [*QUIET, *given])


def test_a_set_that_cannot_be_scored_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"eval\.forgetting: it scores texts by their next tokens"):
        check("classify", [*QUIET, "+eval.forgetting.own=builtin:stories"])
    with pytest.raises(DataError, match="nowhere"):
        check("sft", [*QUIET, f"+eval.forgetting.own={tmp_path / 'nowhere.jsonl'}"])
