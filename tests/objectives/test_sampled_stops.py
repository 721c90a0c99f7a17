"""Answers that a run samples for itself end before its stop texts: rollouts and on-policy distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.objectives.alignment.grpo import Grpo
from llmrecipe.objectives.alignment.ppo import Ppo
from llmrecipe.objectives.alignment.rloo import Rloo
from llmrecipe.objectives.finetuning.gkd import Gkd
from tests.objectives.harness import rows_of
from tests.objectives.rollouts import REWARD, ROWS, Numbers, setting
from tests.objectives.test_distill import two_models

TEXT = Numbers().decode


def cut(ids: list[int], stop: str) -> list[int]:
    """The tokens up to the first with which the text holds the stop text."""
    return next((ids[:n] for n in range(1, len(ids) + 1) if stop in TEXT(ids[:n])), ids)


def common(answers: list[list[int]]) -> str:
    """The second token of the longest answer as text, with the space before it: no number of other digits begins so."""
    return f" {max(answers, key=len)[1]}"


@pytest.mark.parametrize("kind", [Grpo, Rloo, Ppo])
def test_rollouts_end_before_a_stop_text_and_train_its_tokens(kind: Any) -> None:
    plain = kind(reward=REWARD, max_new_tokens=8)
    torch.manual_seed(4)
    whole = plain.live.draw(ROWS, setting(plain))
    stop = common([list(s.answer.ids) for s in whole])
    objective = kind(reward=REWARD, max_new_tokens=8, stop=[stop], missing_end=-3.0)
    torch.manual_seed(4)
    samples = objective.live.draw(ROWS, setting(objective))
    assert any(stop in s.answer.text for s in whole)
    for one, other in zip(samples, whole, strict=True):
        ids = list(other.answer.ids)
        stopped = stop in TEXT(ids)
        assert list(one.answer.ids) == cut(ids, stop), "its tokens are trained, so that the policy learns where to end"
        assert one.answer.text == TEXT(ids).partition(stop)[0].strip()
        assert one.answer.finished == (stopped or other.answer.finished)
        assert (one.score == -3.0) == (not one.answer.finished)


def test_the_student_s_and_the_teacher_s_answers_end_before_a_stop_text() -> None:
    for who in ({"on_policy": 1.0}, {"on_policy": 0.0, "seq_kd": True}):
        roles = two_models()
        roles.tokenizer = roles.others["teacher"].tokenizer = Numbers()
        rows = rows_of(Gkd())
        starts = [row["trained"].index(1) for row in rows]
        whole = [r["ids"][s:] for r, s in zip(Gkd(max_new_tokens=8, **who).written(rows, roles, 1), starts, strict=True)]
        stop = common(whole)
        found = Gkd(max_new_tokens=8, stop=[stop], **who).written(rows, roles, 1)
        assert [row["ids"][s:] for row, s in zip(found, starts, strict=True)] == [cut(ids, stop) for ids in whole] != whole
