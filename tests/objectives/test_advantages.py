"""The arithmetic of policy gradients: worked by hand, against an independent float64 version, and its invariants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from llmrecipe.objectives.alignment._engines.advantages import (
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    gae,
    group_relative,
    leave_one_out,
    moments,
    whiten,
)
from llmrecipe.objectives.alignment._engines.kl import KlController, kl_estimate
from llmrecipe.objectives.alignment.ppo import shaped_rewards

LENGTHS = [4, 6, 2]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_four_tokens_by_hand() -> None:
    """gamma 0.9, lambda 0.5, rewards only at the end: A_3 = 1 - 0.4, A_2 = 0.9*0.4 - 0.3 + 0.45 A_3, ..."""
    rewards, values = double(0.0, 0.0, 0.0, 1.0)[None], double(0.1, 0.2, 0.3, 0.4)[None]
    advantages, returns = gae(rewards, values, torch.tensor([4]), 0.9, 0.5)
    a3 = 1.0 - 0.4
    a2 = 0.9 * 0.4 - 0.3 + 0.45 * a3
    a1 = 0.9 * 0.3 - 0.2 + 0.45 * a2
    a0 = 0.9 * 0.2 - 0.1 + 0.45 * a1
    assert advantages[0].tolist() == pytest.approx([a0, a1, a2, a3], abs=1e-15)
    assert returns[0].tolist() == pytest.approx([a0 + 0.1, a1 + 0.2, a2 + 0.3, 1.0], abs=1e-15)


def test_an_answer_without_a_score_is_no_part_of_its_group() -> None:
    """Groups of three, two, one and no scores: mean and deviation are over those that are there, alone is 0."""
    nan = math.nan
    scores = torch.tensor([[1.0, 2.0, 6.0], [1.0, 3.0, nan], [5.0, nan, nan], [nan] * 3], dtype=torch.float64)
    near = {"abs": 1e-12, "nan_ok": True}
    assert leave_one_out(scores).flatten().tolist() == pytest.approx(
        [1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5, -2.0, 2.0, nan, 0.0, nan, nan, nan, nan, nan], **near
    )
    centred = [-2.0, -1.0, 3.0, -1.0, 1.0, nan, 0.0, nan, nan, nan, nan, nan]
    assert group_relative(scores, "none").flatten().tolist() == pytest.approx(centred, **near)
    by_group = [7.0**0.5] * 3 + [2.0**0.5] * 3 + [1.0] * 6
    wanted = [c / (s + 1e-4) if c else 0.0 for c, s in zip(centred, by_group, strict=True)]
    assert group_relative(scores, "group").flatten().tolist() == pytest.approx(wanted, **near)
    deviation = float(np.std([1, 2, 6, 1, 3, 5], ddof=1))
    wanted = [c / (deviation + 1e-4) for c in centred]
    assert group_relative(scores, "batch").flatten().tolist() == pytest.approx(wanted, **near)


def test_undiscounted_returns_are_the_rewards_to_go() -> None:
    rewards = double(0.5, -1.0, 2.0)[None]
    _, returns = gae(rewards, torch.randn(1, 3, dtype=torch.float64), torch.tensor([3]), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([1.5, 1.0, 2.0], abs=1e-14)


def numpy_ppo(data: dict[str, np.ndarray], beta: float, gamma: float, lam: float, clip: float, after: bool) -> dict[str, Any]:
    """One rollout in plain loops, row by row: shaped rewards, GAE, whitening, both losses."""
    flat: list[float] = []
    rows = []
    for i, n in enumerate(LENGTHS):
        slots = n + 1 if after and n < 6 else n
        r = [-beta * (data["old"][i, t] - data["ref"][i, t]) for t in range(n)] + [0.0] * (slots - n)
        r[slots - 1] += data["score"][i]
        v = [*data["values"][i, :slots], 0.0]
        adv = [0.0] * (slots + 1)
        for t in range(slots - 1, -1, -1):
            adv[t] = r[t] + gamma * v[t + 1] - v[t] + gamma * lam * adv[t + 1]
        rows.append((n, slots, adv, [adv[t] + v[t] for t in range(slots)], v))
        flat += adv[:n]
    mean = sum(flat) / len(flat)
    variance = sum((a - mean) ** 2 for a in flat) / (len(flat) - 1)
    policy = value = 0.0
    count = 0
    for i, (n, slots, adv, ret, v) in enumerate(rows):
        for t in range(n):
            a = (adv[t] - mean) / math.sqrt(variance + 1e-8)
            rho = math.exp(data["new"][i, t] - data["old"][i, t])
            policy += max(-a * rho, -a * min(max(rho, 1 - clip), 1 + clip))
        for t in range(slots):
            new = data["new_values"][i, t]
            near = v[t] + min(max(new - v[t], -clip), clip)
            value += 0.5 * max((new - ret[t]) ** 2, (near - ret[t]) ** 2)
            count += 1
    return {"policy": policy / sum(LENGTHS), "value": value / count, "flat": flat}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_rollout_equals_plain_loops(after: bool, padding: int) -> None:
    """(3, 6) slots, one answer fills the window; columns behind the end change nothing."""
    rng = np.random.default_rng(3)
    data = {k: rng.normal(size=(3, 7)) for k in ("old", "ref", "new", "values", "new_values")} | {"score": rng.normal(size=3)}
    data["new"] = data["old"] + 0.3 * rng.normal(size=(3, 7))
    beta, gamma, lam, clip = 0.07, 0.98, 0.9, 0.2
    wanted = numpy_ppo(data, beta, gamma, lam, clip, after)
    t = {k: torch.from_numpy(v) for k, v in data.items()}
    room = [after and n < 6 for n in LENGTHS]
    slots = torch.tensor([n + r for n, r in zip(LENGTHS, room, strict=True)])
    width = int(slots.max()) + padding
    rewards, values = torch.full((3, width), 99.0, dtype=torch.float64), torch.full((3, width), -99.0, dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        kl = kl_estimate(t["old"][i, :n], t["ref"][i, :n], "k1")
        rewards[i, : slots[i]] = shaped_rewards(kl, float(t["score"][i]), beta, bool(room[i]))
        values[i, : slots[i]] = t["values"][i, : slots[i]]
    advantages, returns = gae(rewards, values, slots, gamma, lam)
    flat = torch.cat([advantages[i, :n] for i, n in enumerate(LENGTHS)])
    assert flat.tolist() == pytest.approx(wanted["flat"], abs=1e-12)
    old, new = (torch.cat([t[k][i, :n] for i, n in enumerate(LENGTHS)]) for k in ("old", "new"))
    policy = clipped_policy_loss((new - old).exp(), whiten(flat), clip, clip).mean()
    assert float(policy) == pytest.approx(wanted["policy"], abs=1e-12)
    parts = [(t["new_values"][i, :s], values[i, :s], returns[i, :s]) for i, s in enumerate(slots)]
    value = clipped_value_loss(*(torch.cat(p) for p in zip(*parts, strict=True)), clip).mean()
    assert float(value) == pytest.approx(wanted["value"], abs=1e-12)


def test_the_score_is_earned_at_the_end_only() -> None:
    kl = double(0.1, -0.2, 0.4)
    assert shaped_rewards(kl, 2.0, 0.5, False).tolist() == pytest.approx([-0.05, 0.1, -0.2 + 2.0])
    assert shaped_rewards(kl, 2.0, 0.5, True).tolist() == pytest.approx([-0.05, 0.1, -0.2, 2.0])
    assert kl.tolist() == [0.1, -0.2, 0.4]


def test_groups_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    std = math.sqrt(1.0 / 3.0)
    got = group_relative(scores)
    assert got[0].tolist() == pytest.approx([sign * 0.5 / (std + 1e-4) for sign in (1, -1, -1, 1)])
    assert got[1].tolist() == [0.0] * 4
    assert group_relative(scores, "none")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    whole = float(scores.flatten().std())
    assert group_relative(scores, "batch")[0, 0].item() == pytest.approx(0.5 / (whole + 1e-4))
    assert leave_one_out(torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64))[0].tolist() == pytest.approx([3.0, -1.5, -1.5])


def test_whitening_is_over_all_processes() -> None:
    """Two processes that add up their sums whiten as one does."""
    one, other = torch.randn(5, dtype=torch.float64), torch.randn(9, dtype=torch.float64) + 2
    both = torch.cat([one, other])
    mean, variance = float(both.mean()), float(both.var())
    sums = iter([[float(both.sum()), 14.0], [float(((both - mean) ** 2).sum())]])
    got = whiten(one, lambda values: next(sums))
    torch.testing.assert_close(got, (one - mean) * (variance + 1e-8) ** -0.5)
    assert moments(both) == pytest.approx((mean, variance))
    torch.testing.assert_close(whiten(both, shift=False).mean(), both.mean())


def test_clipping_cuts_the_gradient_where_it_says() -> None:
    ratio = double(0.5, 0.5, 1.5, 1.5, 1.0).requires_grad_()
    advantages = double(1.0, -1.0, 1.0, -1.0, 1.0)
    clipped_policy_loss(ratio, advantages, 0.2, 0.3).sum().backward()
    cut = clipped_share(ratio.detach(), advantages, 0.2, 0.3)
    assert cut.tolist() == [False, True, True, False, False]
    assert ((ratio.grad == 0) == cut).all()


def test_a_value_that_moved_too_far_is_held() -> None:
    """V 0.9, old 0.5, R 1: the clipped value 0.7 is farther from R, so its square counts and V gets no gradient."""
    values = double(0.9).requires_grad_()
    loss = clipped_value_loss(values, double(0.5), double(1.0), 0.2)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.5 * 0.3**2)
    assert float(values.grad) == 0.0
    assert float(clipped_value_loss(double(0.9), double(0.5), double(1.0), None)) == pytest.approx(0.5 * 0.1**2)


@pytest.mark.parametrize(("kind", "factor"), [("k1", 0.0), ("k2", 1.0)])
def test_gradients_of_the_estimates_over_the_policys_own_samples(kind: str, factor: float) -> None:
    """sum_x p(x) d k(x): 0 for k1, the gradient of KL for k2; and the mean of k1 and k3 is KL itself."""
    logits, reference = (
        torch.randn(6, dtype=torch.float64, requires_grad=True),
        torch.randn(6, dtype=torch.float64).log_softmax(0),
    )
    logp = logits.log_softmax(0)
    p = logp.detach().exp()
    kl = (logp.exp() * (logp - reference)).sum()
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (got,) = torch.autograd.grad((p * kl_estimate(logp, reference, kind)).sum(), logits)
    torch.testing.assert_close(got, factor * wanted, atol=1e-12, rtol=1e-9)
    for unbiased in ("k1", "k3"):
        assert float((p * kl_estimate(logp.detach(), reference, unbiased)).sum()) == pytest.approx(kl.item(), abs=1e-12)


def test_the_leash_follows_its_target() -> None:
    adaptive = KlController(0.1, target=6.0, horizon=1000.0)
    adaptive.update(6.3, 100)
    assert adaptive.coef == pytest.approx(0.1 * (1 + 0.05 * 0.1))
    adaptive.update(600.0, 100)
    assert adaptive.coef == pytest.approx(0.1 * (1 + 0.05 * 0.1) * (1 + 0.2 * 0.1))
    adaptive.update(0.0, 1000)
    assert adaptive.coef == pytest.approx(0.1 * (1 + 0.05 * 0.1) * (1 + 0.2 * 0.1) * 0.8)
    fixed = KlController(0.1)
    fixed.update(50.0, 1000)
    assert fixed.coef == 0.1
