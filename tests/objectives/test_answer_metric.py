"""SFT with a text metric of its answers as the loss: counted by hand, without a gradient, trained by MeZO, refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.feedback.metrics.token_f1 import TokenF1
from llmrecipe.objectives.finetuning._engines.answer_metric import answer_loss, with_answers
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.training.dry_run import check
from tests.objectives.parity import word_tokenizer
from tests.tiny import roles_for, tiny_model
from tests.trainings import events, resumes_to_the_bit

PROMPTS = ([1, 5, 20], [1, 6], [1, 7, 9, 11, 13])
LENGTH = 6
SHORT = ["objective.loss_type=metric", "objective.metric=token_f1", "objective.max_new_tokens=8", "stack=[lora,mezo]",
         "optim=sgd", "optim.lr=1e-2", "stack.mezo.eps=1e-1", "batch.size=4", "data.limit=8", "eval.batches=1"]  # fmt: skip


def case(packing: bool = True) -> tuple[Any, list[dict[str, Any]]]:
    """Three rows: the first answer is the model's own, the second has half of its words, the third none."""
    roles = roles_for(tiny_model(), packing=packing)
    roles.tokenizer = word_tokenizer()
    own = generate(roles.model, roles.tokenizer, PROMPTS, Sampling(max_new_tokens=LENGTH))
    assert all(len(set(answer)) > 1 for answer in own)
    others = [token for token in range(30, 60) if token not in {t for answer in own for t in answer}]
    answers = [own[0], [*own[1][: LENGTH // 2], *others[: LENGTH - LENGTH // 2]], others[:4]]
    rows = [
        {"row": i, "ids": [*prompt, *answer], "trained": [0] * len(prompt) + [1] * len(answer)}
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    return roles, rows


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_what_the_metric_of_greedy_answers_lacks(packing: bool) -> None:
    roles, rows = case(packing)
    objective = Sft(loss_type="metric", metric="token_f1", max_new_tokens=LENGTH)
    batch = objective.collate(rows, roles)
    loss = objective.loss(batch, roles)
    assert float(loss.total) == pytest.approx(0.0 + 0.5 + 1.0) and objective.weight(batch) == 3.0
    assert loss.metrics["token_f1"] == (pytest.approx(1.0 + 0.5 + 0.0), 3.0)
    assert not loss.total.requires_grad and not objective.has_gradient() and Sft().has_gradient()
    exact = Sft(loss_type="metric", max_new_tokens=LENGTH)
    assert float(exact.loss(exact.collate(rows, roles), roles).total) == 2.0
    nothing = objective.collate([], roles)
    assert float(objective.loss(nothing, roles).total) == objective.weight(nothing) == 0.0


def test_an_evaluation_is_the_likelihood_of_the_tokens_as_without_the_metric() -> None:
    roles, rows = case()
    objective, plain = Sft(loss_type="metric"), Sft()
    found, wanted = (o.evaluate(o.collate(rows, roles), roles)["loss"] for o in (objective, plain))
    assert (float(found[0].detach()), found[1]) == (float(wanted[0].detach()), wanted[1])


def test_the_better_bound_is_that_of_the_metrics_direction() -> None:
    """An error rate of up to 5 has its best at 0, a score of up to 100 at 100."""
    roles, rows = case()
    batch = with_answers(Sft().collate(rows, roles), rows, roles)

    def total(direction: str, bounds: tuple[float, float]) -> float:
        metric: Any = SimpleNamespace(direction=direction, bounds=bounds, best=TokenF1().best)
        return float(answer_loss(batch, roles, metric, "m", LENGTH).total)

    assert total("min", (0.0, 5.0)) == pytest.approx(1.5)
    assert total("max", (0.0, 100.0)) == pytest.approx(300 - 1.5)


def test_the_last_turn_is_what_is_answered() -> None:
    roles, rows = case()
    first = rows[0]
    earlier = {**first, "ids": [1, 40, 41, *first["ids"]], "trained": [0, 1, 1, *first["trained"]]}
    batch = Sft(loss_type="metric").collate([earlier], roles)
    assert batch.extra["answered"].tolist() == [1, 40, 41, *PROMPTS[0]]
    assert batch.texts == Sft(loss_type="metric").collate([first], roles).texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stack=[lora]"], "it has no gradient; add an update rule"),
        (["objective.metric=exact"], r"objective\.metric: there is no metric 'exact'; did you mean 'exact_match'"),
        (["objective.mask=all"], r"objective\.mask: all leaves no prompt to answer"),
        (["objective.neftune_alpha=5"], r"objective\.neftune_alpha: 5\.0 is not read with objective\.loss_type=metric"),
        (["objective.label_smoothing=0.1"], r"objective\.label_smoothing: belongs to loss_type=nll; with metric"),
        (["objective.loss_type=nll", "objective.metric=bleu"], r"objective\.metric: bleu is not read with .*loss_type=nll"),
        (["runtime=zero2", "runtime.processes=2"], r"objective\.loss_type: metric is refused under runtime\.shard=zero2"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check("sft", ["log.live=off", "data.limit=8", "stack=[mezo]", "objective.loss_type=metric", *words])


def test_the_memory_of_answers_is_said_to_be_unknown() -> None:
    found = check("sft", ["log.live=off", "data.limit=8", *SHORT[:4]]).memory
    assert found.unpredicted == "the model writes the answers that are scored" and "gradients" in found.predicted()


def test_mezo_trains_it_reports_it_and_resumes_to_the_bit(tmp_path: Path) -> None:
    resumes_to_the_bit(tmp_path, "sft", [*SHORT, "steps=4", "eval.metrics=[token_f1]"], at=2)
    made = events(tmp_path / "whole")
    assert [step["loss"] for step in made] == [pytest.approx(1.0 - step["token_f1"], abs=1e-6) for step in made]
    assert any(step["projected_grad"] for step in made), "no answer depends on the side of the weights"
    assert all("eval/token_f1" in e for e in events(tmp_path / "whole", "evaluation") if "eval/loss" in e)
    assert torch.tensor([step["token_f1"] for step in made]).max() > 0.0
