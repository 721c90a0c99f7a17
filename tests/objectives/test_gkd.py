"""On-policy distillation: who writes the answers, what depends on what, parity with the reference trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.objectives.finetuning.gkd import Gkd
from tests.objectives.harness import rows_of
from tests.objectives.test_distill import loss_and_gradients, two_models


def gkd(**options: Any) -> Gkd:
    return Gkd(max_new_tokens=6, show=0, **options)


def test_the_student_writes_its_share_of_the_steps() -> None:
    always, never, some = gkd(on_policy=1.0), gkd(on_policy=0.0, seq_kd=True), gkd(on_policy=0.3)
    writers = [some.writer(step, 5) for step in range(1000)]
    assert {always.writer(s, 5) for s in range(50)} == {"student"} and {never.writer(s, 5) for s in range(50)} == {"teacher"}
    assert set(writers) == {"student", "rows"} and 0.25 < writers.count("student") / 1000 < 0.35
    assert writers != [some.writer(step, 6) for step in range(1000)], "another seed, other steps"


def test_answers_depend_on_seed_step_and_row_alone() -> None:
    """Rows split over processes, or written after others, get the same answers; another step gives other ones."""
    roles, objective = two_models(), gkd(on_policy=1.0)
    rows = rows_of(objective)
    whole = objective.written(rows, roles, 3)
    torch.manual_seed(99)
    parts = [row for first in (0, 3, 6) for row in objective.written(rows[first : first + 3], roles, 3)]
    assert parts == whole != objective.written(rows, roles, 4)
    for row, new in zip(rows, whole, strict=True):
        prompt = row["trained"].index(1)
        assert new["ids"][:prompt] == row["ids"][:prompt] and new["trained"] == [0] * prompt + [1] * (len(new["ids"]) - prompt)


def test_the_teacher_writes_with_its_own_weights() -> None:
    roles, objective = two_models(), gkd(on_policy=0.0, seq_kd=True)
    rows = rows_of(objective)
    prompts = [row["ids"][: row["trained"].index(1)] for row in rows]
    teacher = roles.others["teacher"]
    sampling = Sampling(6, 0.9, seed=roles.seed)
    wanted = generate(teacher.model, teacher.tokenizer, prompts, sampling, keys=[f"2/{row['row']}" for row in rows])
    found = objective.written(rows, roles, 2)
    assert [row["ids"][len(p) :] for row, p in zip(found, prompts, strict=True)] == wanted
    assert found != gkd(on_policy=1.0).written(rows, roles, 2), "the student writes otherwise"
    assert gkd(on_policy=0.0).written(rows, roles, 2) is rows


@pytest.mark.parity(method="gkd", reference="trl GKDTrainer")
@pytest.mark.parametrize("writer", [{"on_policy": 1.0}, {"on_policy": 0.0, "seq_kd": True}, {"on_policy": 0.0}], ids=str)
def test_loss_and_gradients_of_a_step_are_those_of_the_reference(writer: dict[str, Any]) -> None:
    """`GKDTrainer.compute_loss` on the sequences that were sampled, padded with its mask and labels."""
    pytest.importorskip("trl", reason="the reference is trl")
    from trl.experimental.gkd import GKDTrainer

    roles, objective = two_models(), gkd(beta=0.7, **writer)
    written = objective.written(rows_of(objective), roles, 0)
    loss, gradients = loss_and_gradients(objective, roles, written)
    batch = pad([Sequence(r["ids"], r["trained"]) for r in written], 0)
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.source + 1] = batch.target
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
    trainer: Any = SimpleNamespace(
        teacher_model=roles.others["teacher"].model, beta=0.7, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss
    )
    roles.model.zero_grad(set_to_none=True)
    wanted = GKDTrainer.compute_loss(trainer, roles.model, inputs)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-10, atol=1e-12)
    for name, parameter in roles.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_a_resumed_run_takes_up_the_next_step() -> None:
    objective, roles = gkd(), two_models()
    rows = rows_of(objective)
    steps = objective.batches(iter([rows, rows, rows]), roles)
    targets = [next(steps)[0].target.tolist() for _ in range(3)]
    later = gkd()
    later.load_state({"step": 2})
    assert objective.state() == {"step": 3}
    assert next(later.batches(iter([rows]), roles))[0].target.tolist() == targets[2]
