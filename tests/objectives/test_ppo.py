"""PPO: the first pass, roles that do not touch each other, the slot after the end, resume, a bandit, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.forward_context import checkpoint_contexts
from llmrecipe.feedback.rewards.function import reward_function
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.objectives.alignment._engines.advantages import clipped_value_loss
from llmrecipe.objectives.alignment.ppo import Ppo, share_slots
from llmrecipe.objectives.reward_interface import Answer
from tests.objectives.rollouts import REWARD, ROWS, gradients, mean_loss, samples_of, setting, updates
from tests.trainings import curve, events, learned, resume, stop_after, train_recipe

ANSWERS = [[8, 9, 10, 2], [11, 2], [13, 14, 15, 16, 17, 18], [25, 2]]


def known(objective: Ppo, packing: bool = True) -> tuple[Any, Any]:
    """(roles, batch): known answers, measured and judged as a rollout's are, with a value head that is not zero."""
    roles = setting(objective, packing)
    torch.nn.init.normal_(roles.model.task_head["value"].weight, generator=torch.Generator().manual_seed(7))
    samples = samples_of(ANSWERS, scores=[1.0, -0.5, 0.3, 0.8])
    objective.live.measure(samples, roles)
    objective.advantages(samples, roles)
    (batch,) = share_slots([objective.live.lay_out(samples, roles)])
    generator = torch.Generator().manual_seed(1)
    old = batch.extra["old"]
    return roles, batch.with_extra(old=old + 0.2 * torch.randn(old.shape, generator=generator))


def options(**more: Any) -> dict[str, Any]:
    return {"reward": REWARD, "max_new_tokens": 6, **more}


@pytest.mark.parametrize("value", ["adapter", "shared", "head"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_first_pass_has_ratio_one_to_the_bit(packing: bool, value: Any) -> None:
    objective = Ppo(**options(epochs=2, minibatches=2, value=value))
    roles = setting(objective, packing)
    roles.micro_rows = 1
    steps = list(updates(objective, roles))
    assert len(steps) == objective.updates() == 4
    for batch in (b for micros in steps[:2] for b in micros):
        metrics = objective.loss(batch, roles).metrics
        assert float(metrics["policy/ratio"][0]) == metrics["policy/ratio"][1]
        assert float(metrics["policy/approxkl"][0]) == float(metrics["policy/clipfrac"][0]) == 0.0
        torch.testing.assert_close(batch.extra["values"], torch.zeros_like(batch.extra["values"]))


@pytest.mark.parametrize("score_at", ["last", "after_eos"])
def test_packed_and_padded_rows_agree(score_at: Any) -> None:
    results = []
    for packing in (True, False):
        objective = Ppo(**options(score_at=score_at, value_coef=0.7))
        roles, batch = known(objective, packing)
        loss = mean_loss(objective, batch, roles)
        loss.backward()
        results.append((loss.detach(), gradients(roles)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_policy_and_value_in_one_backward_stay_apart(recompute: bool) -> None:
    """The policy's adapter has the gradient of the policy loss alone, the critic's that of the value loss alone."""

    def run(**more: Any) -> dict[str, torch.Tensor]:
        objective = Ppo(**options(**more))
        roles, batch = known(objective)
        if recompute:
            roles.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
            roles.engine.train()
        mean_loss(objective, batch, roles).backward()
        return gradients(roles)

    both, policy = run(value_coef=0.5), run(value_coef=0.0)
    critic = [n for n in both if ".critic." in n or n.startswith("task_head.value")]
    own = [n for n in both if ".lora." in n]
    assert critic and own and set(critic) | set(own) == set(both)
    for name in own:
        assert torch.equal(both[name], policy[name])
        assert both[name].abs().max() > 0
    for name in critic:
        assert both[name].abs().max() > 0 and policy[name].abs().max() == 0
    objective = Ppo(**options())
    roles, batch = known(objective)
    e = batch.extra
    out = roles.engine(batch, "values", role="value", off=frozenset({"lora"}))
    (0.5 * clipped_value_loss(out["values"], e["values"], e["returns"], 0.2).mean()).backward()
    for name, grad in gradients(roles).items():
        wanted = grad if name in critic else torch.zeros_like(grad)
        torch.testing.assert_close(both[name] if name in critic else torch.zeros_like(grad), wanted, atol=1e-6, rtol=1e-4)


def test_a_detached_head_leaves_the_policy_alone_and_a_shared_one_does_not() -> None:
    found = {}
    for value in ("head", "shared"):
        objective = Ppo(**options(value=value, value_coef=1.0))
        roles, batch = known(objective)
        mean_loss(objective, batch.with_extra(advantages=torch.zeros_like(batch.extra["advantages"])), roles).backward()
        found[value] = max(float(g.abs().max()) for n, g in gradients(roles).items() if ".lora." in n)
    assert found["head"] == 0.0 and found["shared"] > 1e-4


def test_an_answer_with_room_earns_its_score_in_the_slot_after_its_end() -> None:
    """Answers of 4, 2, 6 and 2 tokens in a window of 6: all but the third have a slot more."""
    objective = Ppo(**options(score_at="after_eos", beta=0.0, gamma=1.0, lam=1.0))
    roles, batch = known(objective)
    assert batch.extra["extended"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert batch.extra["return_end"].tolist() == pytest.approx([1.0, -0.5, 0.0, 0.8])
    returns = batch.extra["returns"].split([4, 2, 6, 2])
    for values, score in zip(returns, (1.0, -0.5, 0.3, 0.8), strict=True):
        assert values.tolist() == pytest.approx([score] * len(values), abs=1e-6)
    tokens, slots = 14.0, 17.0
    assert float(batch.extra["slots"]) == pytest.approx(tokens / slots)
    out = roles.engine(batch, critic=objective.critic(roles))
    assert out["values_end"].shape == (4,) and out["values_end"].abs().min() > 0


def test_the_value_function_is_asked_before_the_token() -> None:
    """V_0 is the value of the prompt alone: it does not depend on the answer's first token."""
    objective = Ppo(**options())
    roles, _ = known(objective)
    for samples in (samples_of([[8, 9, 2]]), samples_of([[30, 9, 2]])):
        objective.live.measure(samples, roles)
        found = samples[0].tokens["values"]
        if samples[0].answer.ids[0] == 8:
            first = found
    assert found[0] == pytest.approx(float(first[0]), abs=1e-6)
    assert abs(float(found[1] - first[1])) > 1e-3


def test_an_adapter_of_its_own_needs_a_frozen_base() -> None:
    for stack in ([], [Bitfit(name="bitfit")]):
        with pytest.raises(RecipeError, match=r"objective.value: .*shared or head"):
            Ppo(**options(value="adapter")).role_wrappers(stack)
        assert Ppo(**options()).role_wrappers(stack) == []
    (critic,) = Ppo(**options(value_rank=3)).role_wrappers([Lora(name="lora")])
    assert (critic.name, critic.role, critic.r) == ("critic", "value", 3)


def test_an_estimate_without_gradient_is_no_loss() -> None:
    with pytest.raises(RecipeError, match=r"objective.kl_estimator"):
        Ppo(**options(kl_in="loss", kl_estimator="k1")).check(None, [{"columns": "{}"}])


def test_the_leash_moves_between_rollouts_and_is_saved() -> None:
    objective = Ppo(**options(beta=0.1, kl_target=0.5, kl_horizon=10.0, epochs=2))
    steps = list(updates(objective, setting(objective), rollouts=2))
    betas = [float(micros[0].extra["beta"][0]) for micros in steps]
    assert betas[:2] == pytest.approx([0.1, 0.1]) and betas[2] == betas[3] != betas[0]
    other = Ppo(**options(beta=0.1, kl_target=0.5, kl_horizon=10.0))
    other.load_state(objective.state())
    assert other.controller.coef == objective.controller.coef and other.at_boundary()


def test_an_empty_share_reports_the_same_metrics() -> None:
    objective = Ppo(**options())
    roles = setting(objective)
    full = objective.loss(next(iter(updates(objective, roles)))[0], roles)
    (empty,) = next(iter(updates(objective, roles, rows=[])))
    nothing = objective.loss(empty, roles)
    assert set(nothing.metrics) == set(full.metrics) and nothing.total.item() == 0.0
    nothing.total.backward()


@reward_function
def seventeen(text: str, answer: Answer) -> float:
    return float(list(answer.ids) == [17])


@pytest.mark.parametrize("value", ["adapter", "shared"])
def test_a_bandit_with_one_right_token_is_solved(value: Any) -> None:
    """One token, one right one of 64: the policy that always gives it is the optimum."""
    section = {"arm": {"kind": "function", "function": "seventeen"}}
    objective = Ppo(reward=section, max_new_tokens=1, missing_end=None, beta=0.0, temperature=1.0, epochs=4, value=value)
    # A frozen random head cannot tell one token from the rest, whatever the states are.
    roles = setting(objective, filled=False, target="all-linear + head")
    rows = [{**ROWS[i % 4], "row": i} for i in range(96)]
    trained = [p for p in roles.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    scores: list[float] = []
    for micros in updates(objective, roles, rows, rollouts=20):
        for batch in micros:
            mean_loss(objective, batch, roles).backward()
            scores.append(float(batch.extra["score"].mean()))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scores[-1] > 0.98:
            break
    assert scores[0] < 0.2
    assert scores[-1] > 0.98


SHORT = ["batch.size=4", "objective.max_new_tokens=10", "objective.epochs=2", "eval.batches=1", "objective.kl_target=1.0"]


def test_a_run_stopped_inside_a_rollout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Value adapter, value head and beta come back with the policy; the finished model is the policy alone."""
    train_recipe(tmp_path / "whole", "ppo", *SHORT, "steps=6")
    stop_after(1, tmp_path / "cut", "ppo", *SHORT, "steps=6")
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    resume(tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    betas = [[e["objective/kl_coef"] for e in events(tmp_path / name)] for name in ("cut", "whole")]
    assert betas[0] == betas[1]
    one, other = learned(tmp_path / "whole"), learned(tmp_path / "cut")
    assert all(torch.equal(one[k], other[k]) for k in one) and one.keys() == other.keys()
    assert not [name for name in one if "critic" in name or "task_head" in name]


@pytest.mark.slow
def test_a_heavy_leash_holds_the_policy(tmp_path: Path) -> None:
    train_recipe(tmp_path, "ppo", "objective.show=0", "steps=40", "objective.beta=10.0")
    first, *_, last = events(tmp_path, "evaluation")
    assert last["eval/kl"] < 0.3 and abs(last["eval/score"] - first["eval/score"]) < 0.15
