"""The sampler's log-probabilities beside those of training: what is recorded, reported and corrected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.engine.continuous_batching import RunningBatch
from llmrecipe.engine.generation import generate, generate_scored
from llmrecipe.engine.sampling import Sampling
from llmrecipe.objectives.alignment._engines.sampler_mismatch import sampler_metrics, sampler_weights, weight_metrics
from llmrecipe.objectives.alignment.grpo import Grpo
from llmrecipe.objectives.alignment.ppo import Ppo
from llmrecipe.objectives.alignment.rloo import Rloo
from tests.objectives.rollouts import REWARD, ROWS, gradients, mean_loss, samples_of, setting, updates
from tests.tiny import Tokenizer, tiny_model
from tests.trainings import events, train_recipe

PROMPTS = [[5, 6, 7], [12], [20, 21, 22, 23, 24], [9, 9], [30, 31]]


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("way", ["continuous", "padded", "equal", "uncached"])
def test_recorded_log_probabilities_are_those_of_reading_the_text(way: str, top_k: int) -> None:
    """log softmax(logits / T) of each token, whichever decoder picked it, before anything is cut off."""
    model = tiny_model()
    others = [name for name in ("continuous", "padded", "equal", "uncached") if name != way]
    model.__dict__["decoders_tried"] = {**dict.fromkeys(others, False), way: True}
    sampling = Sampling(max_new_tokens=40, temperature=0.7, top_k=top_k, batch=2, seed=5)
    answers = generate_scored(model, Tokenizer(), PROMPTS, sampling)
    assert [a.tokens for a in answers] == generate(model, Tokenizer(), PROMPTS, sampling)
    assert len({len(a.tokens) for a in answers}) > 1
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer.tokens]])).logits[0, len(prompt) - 1 : -1]
        read = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(answer.tokens)[:, None]).squeeze(-1)
        assert answer.logprobs.shape == (len(answer.tokens),)
        torch.testing.assert_close(answer.logprobs, read, atol=2e-6, rtol=1e-5)


def test_greedy_answers_have_no_sampling_distribution() -> None:
    with pytest.raises(ValueError, match="temperature above 0"):
        generate_scored(tiny_model(), Tokenizer(), PROMPTS, Sampling(max_new_tokens=2))
    assert generate_scored(tiny_model(), Tokenizer(), [], Sampling(max_new_tokens=2, temperature=1.0)) == []


@pytest.mark.parametrize("objective", [
    Grpo(reward=REWARD, answers=2, max_new_tokens=6, temperature=0.8),
    Rloo(reward=REWARD, answers=2, max_new_tokens=6, temperature=0.8),
    Ppo(reward=REWARD, max_new_tokens=6, temperature=0.8, epochs=1),
])  # fmt: skip
def test_the_own_sampler_differs_by_rounding(objective: Any) -> None:
    roles = setting(objective)
    for micros in updates(objective, roles):
        for batch in micros:
            metrics = objective.loss(batch, roles).metrics
            total, count = metrics["sampler/logprob_diff"]
            assert count == batch.target.numel() and float(total) / count < 1e-5
            assert float(metrics["sampler/logprob_diff_max"].value) < 1e-4
            assert abs(float(metrics["sampler/kl"][0])) < 1e-6


def test_a_sampler_with_other_weights_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent fault this stands against: answers of a model that is not the one being trained."""
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=6)
    roles = setting(objective)
    plain = RunningBatch._forward

    def stale(self: RunningBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(self, *args, **kwargs) * 1.3

    monkeypatch.setattr(RunningBatch, "_forward", stale)
    roles.model.__dict__["decoders_tried"] = {"continuous": True}
    (batch,) = next(iter(updates(objective, roles)))
    metrics = objective.loss(batch, roles).metrics
    total, count = metrics["sampler/logprob_diff"]
    assert float(total) / count > 0.05
    assert float(metrics["sampler/kl"][0]) / count > 1e-3


def numbers(old: list[float], sampler: list[float], lengths: list[int]) -> Any:
    """A batch of answers with these log-probabilities."""
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=8)
    roles = setting(objective)
    samples = samples_of([[8] * n for n in lengths], [0] * len(lengths))
    objective.live.measure(samples, roles)
    objective.advantages(samples, roles)
    return objective.live.lay_out(samples, roles).with_extra(old=torch.tensor(old), sampler=torch.tensor(sampler))


def test_metrics_and_weights_by_hand() -> None:
    old, sampler = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5]
    batch = numbers(old, sampler, [2, 1])
    metrics = sampler_metrics(batch)
    assert float(metrics["sampler/logprob_diff"][0]) == pytest.approx(1.5) and metrics["sampler/logprob_diff"][1] == 3.0
    assert float(metrics["sampler/logprob_diff_max"].value) == pytest.approx(1.0)
    # log r = 0.5, -1, 0: sum of r - 1 - log r.
    wanted = (math.exp(0.5) - 1.5) + (math.exp(-1.0) - 1 + 1) + 0.0
    assert float(metrics["sampler/kl"][0]) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(sampler_weights(batch, "token", 1.5), torch.tensor([1.5, math.exp(-1.0), 1.0]))
    torch.testing.assert_close(sampler_weights(batch, "sequence", 1.5), torch.tensor([math.exp(-0.5), 1.0]))
    shown = weight_metrics(sampler_weights(batch, "token", 1.5), 1.5)
    assert float(shown["sampler/capped"][0]) == 1.0 and shown["sampler/weight"][1] == 3.0


@pytest.mark.parametrize("of", ["token", "sequence"])
@pytest.mark.parametrize("kind", [Grpo, Rloo, Ppo])
def test_a_sampler_that_agrees_is_not_corrected(kind: Any, of: str) -> None:
    if kind is Rloo and of == "token":
        pytest.skip("one ratio stands for a whole answer")
    found = []
    for correction in ("none", of):
        more = {} if kind is Ppo else {"answers": 2}
        objective = kind(reward=REWARD, max_new_tokens=6, sampler_correction=correction, **more)
        roles = setting(objective)
        torch.manual_seed(3)
        (batch, *_) = next(iter(updates(objective, roles)))
        mean_loss(objective, batch.with_extra(sampler=batch.extra["old"].clone()), roles).backward()
        found.append(gradients(roles))
    assert max(float(g.abs().max()) for g in found[0].values()) > 0
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name])


def test_the_corrected_gradient_is_that_of_the_policy_itself() -> None:
    """Over all answers of one token: sum over y of mu(y) (pi(y) / mu(y)) g(y) = sum over y of pi(y) g(y)."""
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=1, beta=0.0, sampler_correction="token", sampler_cap=1e6)
    roles = setting(objective)
    prompt = ROWS[0]["prompt_ids"]
    vocabulary = roles.model.config.vocab_size
    with torch.no_grad():
        logits = roles.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    mu = (logits * 1.4).log_softmax(-1)
    samples = samples_of([[v] for v in range(vocabulary)], [0] * vocabulary)
    objective.live.measure(samples, roles)
    for v, sample in enumerate(samples):
        sample.tokens |= {"sampler": mu[v][None], "advantages": torch.tensor([math.sin(v)])}
    batch = objective.live.lay_out(samples, roles)
    policy = batch.extra["old"].exp()
    # The mean over answers drawn from mu is the sum over all of them, weighted by mu: as advantages of size mu(y) A(y).
    drawn = {}
    for name, probability, sampler in (("mu", mu.exp(), mu), ("policy", policy, batch.extra["old"])):
        case = batch.with_extra(advantages=batch.extra["advantages"] * probability, sampler=sampler)
        roles.model.zero_grad()
        objective.loss(case, roles).total.backward()
        drawn[name] = gradients(roles)
    assert max(float(g.abs().max()) for g in drawn["policy"].values()) > 1e-3
    for name, grad in drawn["policy"].items():
        torch.testing.assert_close(grad, drawn["mu"][name], atol=1e-6, rtol=1e-4)


def test_both_are_reported_by_a_run(tmp_path: Path) -> None:
    train_recipe(tmp_path, "grpo", "steps=2", "objective.sampler_correction=token", "objective.max_new_tokens=8")
    steps = events(tmp_path, "step")
    assert len(steps) == 2
    for step in steps:
        assert 0 <= step["sampler/logprob_diff"] <= step["sampler/logprob_diff_max"] < 1e-3
        assert step["sampler/weight"] == pytest.approx(1.0, abs=1e-3)
