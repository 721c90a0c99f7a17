"""Rollouts with a single update: its own pass measures the policy that sampled; answers that share a prompt count it once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.objectives.alignment.grpo import Grpo
from llmrecipe.objectives.alignment.ppo import Ppo
from llmrecipe.objectives.alignment.rloo import Rloo
from tests.objectives.rollouts import REWARD, ROWS, gradients, setting, updates


def passes_of(objective: Any, roles: Any, before: int = 1) -> tuple[list[Any], int]:
    """(the micro-batches of an update, passes of the engine before it), of a rollout that so many came before."""
    torch.manual_seed(7)
    objective.live.count = before
    seen: list[int] = []
    handle = roles.engine.register_forward_hook(lambda *_: seen.append(1))
    micros = next(iter(updates(objective, roles)))
    handle.remove()
    return micros, len(seen)


def measured(objective: Any, roles: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """(metrics of each micro-batch of the first update, its gradients)."""
    found = []
    for batch in passes_of(objective, roles)[0]:
        loss = objective.loss(batch, roles)
        loss.total.backward()
        own = {
            name: float(torch.as_tensor(getattr(v[0], "value", v[0])).detach())
            for name, v in loss.metrics.items()
            if isinstance(v, tuple)
        }
        found.append({"loss": float(loss.total.detach()), **own})
    return found, gradients(roles)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(Grpo, {"beta": 0.0}), (Grpo, {"beta": 0.1, "ratio": "sequence", "sampler_correction": "token"}), (Rloo, {"beta": 0.0})],
)
def test_the_update_measures_what_a_pass_of_its_own_would(kind: Any, options: dict[str, Any], packing: bool) -> None:
    found = []
    for training in (False, True):
        objective = kind(reward=REWARD, answers=3, max_new_tokens=6, **options)
        roles = setting(objective, packing)
        roles.micro_rows = 4
        roles.engine.train(training)
        assert ("old" in passes_of(objective, roles)[0][0].extra) is not training
        found.append(measured(objective, roles))
    (metrics, wanted), (others, grads) = found
    assert len(metrics) == len(others) > 1
    for one, other in zip(metrics, others, strict=True):
        one.pop("response/tokens_per_s"), other.pop("response/tokens_per_s")
        assert other == pytest.approx(one, abs=1e-5)
    assert any(g.abs().sum() > 0 for g in grads.values())
    for name, value in grads.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-4)


def test_it_spares_the_passes_of_the_policy() -> None:
    counts = {}
    for training in (False, True):
        objective = Grpo(reward=REWARD, answers=2, max_new_tokens=4, beta=0.0)
        roles = setting(objective)
        roles.micro_rows = 2
        roles.engine.train(training)
        counts[training] = passes_of(objective, roles)[1]
    assert counts == {False: len(ROWS), True: 0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Grpo, {"answers": 2, "epochs": 2}),
        (Grpo, {"answers": 2, "minibatches": 2}),
        (Rloo, {"answers": 2, "beta": 0.1}),
        (Ppo, {"epochs": 1, "minibatches": 1}),
    ],
)
def test_it_is_measured_apart_where_something_needs_it_earlier(kind: Any, options: dict[str, Any]) -> None:
    objective = kind(reward=REWARD, max_new_tokens=4, **options)
    roles = setting(objective)
    roles.engine.train()
    assert not objective.live.plan.old_from_update(roles)
    assert all("old" in batch.extra for batch in passes_of(objective, roles)[0])


def test_the_first_rollout_and_those_of_a_server_show_whether_the_sampler_agrees() -> None:
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=4)
    roles = setting(objective)
    roles.engine.train()
    assert all("old" in batch.extra for batch in passes_of(objective, roles, before=0)[0])
    assert not any("old" in batch.extra for batch in passes_of(objective, roles)[0])
    own = objective.live.draw
    objective.live.server = object()
    objective.live.draw = lambda rows, roles, server: own(rows, roles)
    assert all("old" in batch.extra for batch in passes_of(objective, roles)[0])


def test_it_is_measured_apart_where_the_loss_is_computed_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Grpo(reward=REWARD, answers=2).live.plan
    roles = setting(Grpo(reward=REWARD, answers=2))
    roles.engine.train()
    assert plan.old_from_update(roles)
    with torch.no_grad():
        assert not plan.old_from_update(roles)
    monkeypatch.setattr(roles.stack, "rule", lambda: object())
    assert not plan.old_from_update(roles)


def test_answers_that_share_a_prompt_count_it_once() -> None:
    roles = setting(Grpo(reward=REWARD))
    long, other = list(range(10)), list(range(10))
    rows = [{"prompt_ids": prompt, "answer_ids": [1] * 5} for prompt in (long, long, long, other, other)]
    roles.micro_tokens = 20
    assert [len(part) for part in roles.split(rows, "prompt_ids")] == [2, 1, 2]
    assert [len(part) for part in roles.split(rows)] == [1] * 5
    roles.packing = False
    assert [len(part) for part in roles.split(rows, "prompt_ids")] == [1] * 5
