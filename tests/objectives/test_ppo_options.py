"""PPO's further options and what it reports, worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.engine.logprob import Post, token_logprobs
from llmrecipe.methods._base.late_values import Largest, MetricSums, Smallest
from llmrecipe.objectives.alignment._engines.advantages import clipped_values
from llmrecipe.objectives.alignment.ppo import Ppo
from tests.objectives.rollouts import mean_loss, setting, updates
from tests.objectives.test_ppo import ANSWERS, SHORT, known, options
from tests.trainings import curve, learned, resume, stop_after, train_recipe

SCORES = [1.0, -0.5, 0.3, 0.8]


def mean(metric: tuple[Any, float]) -> float:
    return float(metric[0]) / metric[1]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("post", [Post(), Post(cap=4.0, temperature=0.6)])
def test_the_entropy_has_its_gradient_when_asked(trained: bool, post: Post) -> None:
    """Against float64 logits, under a temperature and a soft cap; log-probabilities keep theirs."""
    torch.manual_seed(0)
    head = nn.Linear(8, 20, bias=False).requires_grad_(trained)
    target = torch.randint(20, (7,))
    hidden = torch.randn(7, 8, requires_grad=True)
    out = token_logprobs(hidden, target, head, post, entropy=True, entropy_graph=True)
    (out["entropy"].sum() + 0.3 * out["logprobs"].sum()).backward()
    other = hidden.detach().double().requires_grad_(True)
    logs = post(other @ head.weight.detach().double().T).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    (entropy.sum() + 0.3 * logs.gather(-1, target[:, None]).sum()).backward()
    torch.testing.assert_close(out["entropy"].double(), entropy, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), other.grad, atol=1e-6, rtol=1e-5)
    assert not token_logprobs(hidden, target, head, post, entropy=True)["entropy"].requires_grad


def test_the_entropy_is_rewarded() -> None:
    """Without advantages and value loss the loss is minus the coefficient times the mean entropy."""
    objective = Ppo(**options(entropy_coef=0.3, value_coef=0.0))
    roles, batch = known(objective)
    batch = batch.with_extra(advantages=torch.zeros_like(batch.extra["advantages"]))
    wanted = -0.3 * float(roles.engine(batch, entropy=True, temperature=objective.temperature)["entropy"].mean())
    loss = mean_loss(objective, batch, roles)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in roles.model.parameters() if p.grad is not None) > 1e-4


def test_scores_are_normalised_over_the_rollout_before_they_are_clipped() -> None:
    """Mean 0.4, variance (0.36 + 0.81 + 0.01 + 0.16) / 3; with gamma = lam = 1 and no leash each return is its score."""
    deviation = math.sqrt(1.34 / 3)
    objective = Ppo(**options(score_norm=True, score_clip=1.2, beta=0.0, gamma=1.0, lam=1.0))
    _, batch = known(objective)
    returns = [float(part[0]) for part in batch.extra["returns"].split([len(a) for a in ANSWERS])]
    assert returns == pytest.approx([0.6 / deviation, -1.2, -0.1 / deviation, 0.4 / deviation], rel=1e-5)
    assert -0.9 / deviation < -1.2, "the second was clipped"
    assert batch.extra["score"].tolist() == pytest.approx(SCORES), "what is reported stays as it was"


def test_values_that_are_held_are_counted() -> None:
    """V = 0.5 from 0 with clip 0.2: held where the return is 1 (0.64 > 0.25), free where it is -1 (1.44 < 2.25)."""
    values, old = torch.tensor([0.5, 0.5, 0.1]), torch.zeros(3)
    assert clipped_values(values, old, torch.tensor([1.0, -1.0, 1.0]), 0.2).tolist() == [1.0, 0.0, 0.0]
    assert clipped_values(values, old, torch.ones(3), None).tolist() == [0.0, 0.0, 0.0]


def test_what_a_step_reports_by_hand() -> None:
    objective = Ppo(**options(beta=0.2, gamma=1.0, lam=1.0))
    objective.live.pace = 0.01
    roles, batch = known(objective)
    metrics = objective.loss(batch, roles).metrics
    lengths, kl = [float(len(a)) for a in ANSWERS], batch.extra["kl"]
    assert mean(metrics["objective/non_score_reward"]) == pytest.approx(-0.2 * float(kl.mean()), rel=1e-5)
    assert mean(metrics["objective/rlhf_reward"]) == pytest.approx(sum(SCORES) / 4 - 0.2 * float(kl.mean()), rel=1e-5)
    assert mean(metrics["response/length"]) == pytest.approx(sum(lengths) / 4)
    assert (float(metrics["response/length_min"][0]), float(metrics["response/length_max"][0])) == (2.0, 6.0)
    assert mean(metrics["response/tokens_per_s"]) == pytest.approx(100.0, rel=1e-4)
    t = roles.engine(batch, temperature=objective.temperature)["logprobs"].double()
    ratio = (t - batch.extra["old"].double()).exp().detach()
    assert mean(metrics["policy/ratio_var"]) == pytest.approx(float(((ratio - 1) ** 2).mean()), rel=1e-4)
    assert float(metrics["policy/ratio_max"][0].detach()) == pytest.approx(float(ratio.max()), rel=1e-5)
    returns = batch.extra["returns"].double()
    assert mean(metrics["value/returns_std"]) == pytest.approx(float(returns.std()), rel=1e-4)
    out = roles.engine(batch, critic=objective.critic(roles), temperature=objective.temperature)
    held = clipped_values(out["values"], batch.extra["values"], batch.extra["returns"], 0.2)
    assert mean(metrics["value/clipfrac"]) == pytest.approx(float(held.mean()))


def test_extremes_are_kept_over_micro_batches_and_processes() -> None:
    """Of 3, 5 here and 4 there the largest is 5 and the smallest -1, found there; a mean is one whatever its name."""

    class Two:
        """The other process saw a largest value of 4, a smallest of -1 and (2, 2) of the mean."""

        world = 2

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.tensor([2.0, 2.0], dtype=torch.float64)

        def maximum(self, values: torch.Tensor) -> torch.Tensor:
            return torch.maximum(values, torch.tensor([4.0, 1.0], dtype=torch.float64))

    sums = MetricSums()
    for value in (3.0, 5.0):
        sums.add({"longest": Largest(torch.tensor(value)), "shortest": Smallest(value), "b_max": (value, 1.0)})
    sums.add({"longest": Largest(9.0, 0.0), "shortest": Smallest(-9.0, 0.0), "b_max": (0.0, 0.0)})
    assert sums.mean(Two()) == {"longest": 5.0, "shortest": -1.0, "b_max": 2.5}  # type: ignore[arg-type]


def test_a_policy_that_moved_far_enough_ends_its_rollout() -> None:
    """Four updates a rollout; a second update above the bound leaves out the last two, one below leaves out none."""
    for measured, wanted in ((0.5, [False, True] * 2), (0.01, [False, False, False, True] * 2)):
        objective = Ppo(**options(epochs=4, target_kl_stop=0.1))
        roles, seen = setting(objective), []
        for step, _ in enumerate(updates(objective, roles, rollouts=2), 1):
            objective.after_step(step, {"policy/approxkl": 0.0 if not seen or seen[-1] else measured}, roles)
            seen.append(objective.at_boundary())
        assert seen == wanted
        assert objective.state()["rollouts"] == 2


def test_a_run_stopped_where_rollouts_end_early_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Any movement is too much: two updates of four a rollout, the first of which sees none."""
    more = [*SHORT[:2], "objective.epochs=4", *SHORT[3:], "objective.target_kl_stop=1e-12", "steps=4"]
    run = train_recipe(tmp_path / "whole", "ppo", *more)
    assert run.objective.live.count == 2
    stop_after(1, tmp_path / "cut", "ppo", *more)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    resume(tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    one, other = learned(tmp_path / "whole"), learned(tmp_path / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
