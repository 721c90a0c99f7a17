"""Rollouts: the policy answers prompts, rewards score the answers, and several updates are made from them.

One rollout is one batch of prompts. Its answers are split into minibatches, one optimizer step each, `epochs` times in a new
order. Log-probabilities of the sampling policy are measured by the training forward pass in the same micro-batches as in the
first epoch, so the first ratio of a rollout is exactly 1; a single update of a rollout measures them itself (see
`rollout_metrics.with_old`). Those of the sampler itself, whose cache and padding round differently, are kept as `sampler`:
their difference is reported with every update, and a correction for it can be switched on (see `sampler_weights`).
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.core.foreign import stored_count
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.forward import Critic
from llmrecipe.engine.generation import ScoredAnswer, decode_ids, generate, generate_scored
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.sampling import Sampling
from llmrecipe.models.random_state import random_state_kept
from llmrecipe.objectives.alignment._engines.sampler_mismatch import KEY as SAMPLER
from llmrecipe.objectives.alignment._engines.sampler_mismatch import warn_of_mismatch
from llmrecipe.objectives.reward_interface import Answer, Rewards
from llmrecipe.objectives.token_math import collate_tokens

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.objectives.alignment._engines.policy_server import PolicyServer


HELD_OUT = "held_out"
"""Key that marks rows of an evaluation, whose answers are sampled at another temperature and from a fixed seed."""
EVALUATION_SEED = 20_250_101


@dataclass
class Sample:
    """One sampled answer of a rollout."""

    row: int
    answer: Answer
    score: float | None = 0.0
    """None where no reward has an opinion of the answer."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """name -> (n,) one number for each token of the answer: old and reference log-probabilities, advantages, ..."""
    numbers: dict[str, float] = field(default_factory=dict)
    """name -> one number for the whole answer."""
    place: int = 0
    """Place of its prompt in the rollout, which may hold one row twice."""

    @property
    def length(self) -> int:
        """Return n, the number of tokens of the answer."""
        return len(self.answer.ids)


@dataclass(frozen=True)
class RolloutPlan:
    """How a rollout is sampled and used."""

    temperature: float
    """Temperature of the sampling and of every log-probability."""
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    answers: int = 1
    """Answers sampled for each prompt."""
    epochs: int = 1
    minibatches: int = 1
    """Optimizer steps per epoch."""
    reference: bool = True
    """Whether log-probabilities under the policy of step 0 are needed."""
    missing_end: float | None = None
    """Score of an answer that did not end by itself; None keeps its own score."""
    held_out_temperature: float | None = None
    """Temperature of the answers to held-out prompts; None takes `temperature`."""
    generation_batch: int = 64
    show: int = 2
    """Answers of each rollout written to the events."""
    token_names: tuple[str, ...] = ("advantages",)
    """Names of the per-token numbers the objective adds to an answer."""
    number_names: tuple[str, ...] = ()
    """Names of the numbers it adds to each answer."""
    critic: Callable[[Roles], Critic] | None = None
    """Returns the value function to evaluate as well, where there is one."""
    old_in_advantages: bool = True
    """Whether the advantages depend on the log-probabilities of the sampling policy."""

    @property
    def updates(self) -> int:
        """Return the number of optimizer steps per rollout."""
        return self.epochs * self.minibatches

    def old_from_update(self, roles: Roles) -> bool:
        """Return whether the update itself measures the sampling policy.

        It does where it is the only one of the rollout and computes the loss once, before the weights move. Checks, which
        compare passes of an unchanged policy, measure it apart.
        """
        alone = self.updates == 1 and self.critic is None and not self.old_in_advantages
        return alone and torch.is_grad_enabled() and roles.model.training and roles.stack.rule() is None


class Rollouts:
    """Running state of an objective that samples: its rewards, its progress, and how batches are split."""

    def __init__(self, plan: RolloutPlan, reward: dict[str, Any]):
        self.plan = plan
        self.rewards = Rewards(reward)
        self.boundary = True
        """Whether the last rollout is over: all its updates have been made, or the rest is skipped."""
        self.count = 0
        """Number of rollouts sampled."""
        self.no_opinion = 0.0
        """Share of the last rollout's answers, over all processes, that were left out: no reward has an opinion of them."""
        self.pace = 0.0
        """Seconds per token that sampling and scoring the last rollout took on this process."""
        self.server: PolicyServer | None = None
        """Samples what is trained on; None where the model that trains does."""

    # --- sampling -------------------------------------------------------------------------------------------------

    def draw(self, rows: list[dict[str, Any]], roles: Roles, server: PolicyServer | None = None) -> list[Sample]:
        """Sample and score answers to the rows' prompts; answers to one prompt are adjacent.

        Args:
            server: samples them; None lets the model do it.
        """
        plan = self.plan
        held_out = bool(rows) and bool(rows[0].get(HELD_OUT))
        repeats = 1 if held_out else plan.answers
        prompts = [row["prompt_ids"] for row in rows for _ in range(repeats)]
        # Held-out answers depend on their rows alone: any number of processes and any batching samples the same ones.
        keys = [row["row"] for row in rows] if held_out else None
        sampling = self._sampling(held_out, roles)
        scored: list[ScoredAnswer] = []
        if held_out:
            answers = generate(roles.model, roles.tokenizer, prompts, sampling, keys=keys)
        elif server is None:
            scored = generate_scored(roles.model, roles.tokenizer, prompts, sampling)
        else:
            server.hand_over(prompts, roles)
            scored = server.answers(prompts, sampling, roles)
        answers = answers if held_out else [answer.tokens for answer in scored]
        ends = answer_ends(roles.model, roles.tokenizer, sampling)
        samples = []
        for index, (prompt, ids) in enumerate(zip(prompts, answers, strict=True)):
            row = rows[index // repeats]
            columns = json.loads(row.get("columns") or "{}")
            texts = decode_ids(roles.tokenizer, prompt), ends.text(ids)
            answer = Answer(*texts, columns, prompt, ids, ends.finished(ids))
            sampler = {} if held_out else {SAMPLER: scored[index].logprobs}
            samples.append(Sample(row["row"], answer, tokens=sampler, place=index // repeats))
        self._score(samples, roles)
        if not held_out:
            self._show(samples, roles)
        return samples

    def _sampling(self, held_out: bool, roles: Roles) -> Sampling:
        plan = self.plan
        if held_out:
            other = plan.held_out_temperature
            temperature = plan.temperature if other is None else other
            return Sampling(plan.max_new_tokens, temperature, batch=plan.generation_batch, seed=EVALUATION_SEED, stop=plan.stop)
        # One number of the run's random state per rollout; each process samples from its own stream.
        seed = int(torch.randint(2**31, (1,))) + (roles.runtime.rank if roles.runtime is not None else 0)
        return Sampling(plan.max_new_tokens, plan.temperature, batch=plan.generation_batch, seed=seed, stop=plan.stop)

    def _score(self, samples: list[Sample], roles: Roles) -> None:
        with random_state_kept(roles.device):
            # Building a reward model draws random numbers; the run's own stream must not depend on when that happens.
            self.rewards.open(roles)
        scores, own = self.rewards.score([s.answer for s in samples])
        for index, sample in enumerate(samples):
            missing = self.plan.missing_end is not None and not sample.answer.finished
            sample.score = self.plan.missing_end if missing else scores[index]
            sample.numbers = {f"rewards/{name}": _or_nan(values[index]) for name, values in own.items()}

    def _show(self, samples: list[Sample], roles: Roles) -> None:
        if roles.events is None or not torch.is_grad_enabled():
            return
        for s in samples[: self.plan.show]:
            own = {name: value for name, value in s.numbers.items() if len(self.rewards.parts) > 1 and value == value}
            roles.events.sample(step=roles.events.last_step, prompt=s.answer.prompt, answer=s.answer.text, score=s.score, **own)

    # --- updates --------------------------------------------------------------------------------------------------

    def updates(self, rows: list[dict[str, Any]], roles: Roles, value: Callable[[list[Sample]], None]) -> Iterator[list[Batch]]:
        """Sample one rollout and yield the micro-batches of each of its optimizer steps.

        Args:
            value: sets the advantages of every sample, once old and reference log-probabilities are known.
        """
        self.boundary = False
        started = time.perf_counter()
        samples = self.draw(rows, roles, self.server)
        self.pace = (time.perf_counter() - started) / max(sum(s.length for s in samples), 1)
        self.count += 1
        samples = self._scored(samples, roles)
        parts = self.deal(samples, roles)
        # The first rollout, and all of a server's, show before any update whether the sampler agrees with training.
        later = self.count > 1 and self.server is None and self.plan.old_from_update(roles)
        for micro in itertools.chain.from_iterable(parts):
            self.measure(micro, roles, old=not later)
        if not later:
            warn_of_mismatch([s.tokens for s in samples], roles)
        value(samples)
        left = self.plan.updates
        for epoch in range(self.plan.epochs):
            for part in parts if epoch == 0 else self.deal(samples, roles):
                left -= 1
                self.boundary = left == 0
                yield [self.lay_out(micro, roles, old=not later) for micro in part]
                # Return before drawing random numbers for the skipped updates: a run resumed here draws none either.
                if self.boundary:
                    return

    def _scored(self, samples: list[Sample], roles: Roles) -> list[Sample]:
        """Return the answers that have a score; the others take no part in the updates.

        Raises:
            RunError: no answer of any process has one.
        """
        kept = [s for s in samples if s.score is not None]
        left_out, total = roles.sum([float(len(samples) - len(kept)), float(len(samples))])
        if total and left_out == total:
            raise self.rewards.without_opinion([s.answer for s in samples])
        self.no_opinion = left_out / total if total else 0.0
        return kept

    def stop(self) -> None:
        """Skip the rest of the rollout's updates."""
        self.boundary = True

    def whole(self, rows: list[dict[str, Any]], roles: Roles, value: Callable[[list[Sample]], None]) -> Batch:
        """Sample fresh answers to the rows as one batch: for evaluation, and for methods that use gradients before step 0."""
        held_out = bool(rows) and bool(rows[0].get(HELD_OUT))
        samples = [s for s in self.draw(rows, roles) if held_out or s.score is not None]
        self.measure(samples, roles)
        if not held_out:
            value(samples)
        return self.lay_out(samples, roles)

    def deal(self, samples: list[Sample], roles: Roles) -> list[list[list[Sample]]]:
        """Split samples into minibatches of micro-batches, prompts in a new order; answers to one prompt stay together."""
        groups = [list(g) for _, g in itertools.groupby(samples, key=lambda s: s.row)]
        order = torch.randperm(len(groups)).tolist()
        parts = []
        for first in range(self.plan.minibatches):
            picked = [s for i in order[first :: self.plan.minibatches] for s in groups[i]]
            rows = [{"prompt_ids": s.answer.prompt_ids, "answer_ids": s.answer.ids, "sample": s} for s in picked]
            parts.append([[row["sample"] for row in micro] for micro in roles.split(rows, "prompt_ids")])
        return parts

    @torch.no_grad()
    def measure(self, samples: list[Sample], roles: Roles, old: bool = True) -> None:
        """Measure log-probabilities under the sampling policy and the reference, by the forward pass that training uses.

        Each sample gets `tokens["old"]`, `["reference"]` and `["values"]`, (n,) each, where they apply.

        Args:
            old: False where the update itself measures the sampling policy.
        """
        if not samples or not (old or self.plan.reference):
            return
        batch = self.lay_out(samples, roles, old)
        lengths = [s.length for s in samples]
        critic = self.plan.critic(roles) if self.plan.critic is not None else None
        found: dict[str, Tensor] = {}
        if old:
            out = roles.engine(batch, temperature=self.plan.temperature, critic=critic)
            found = {"old": out["logprobs"], **({"values": out["values"]} if critic is not None else {})}
        if self.plan.reference:
            found["reference"] = roles.reference_tokens(batch, self.plan.temperature)
        for name, values in found.items():
            for sample, own in zip(samples, values.split(lengths), strict=True):
                sample.tokens[name] = own.cpu()
        for index, s in enumerate(samples if old else ()):
            if critic is not None:
                s.numbers["value_end"] = float(out["values_end"][index])
            s.numbers["kl"] = float((s.tokens["old"] - s.tokens["reference"]).sum()) if self.plan.reference else 0.0

    def lay_out(self, samples: list[Sample], roles: Roles, old: bool = True) -> Batch:
        """Lay samples out as a batch whose targets are the answers' N tokens, in order; `extra` holds the samples' numbers.

        Per token, (N,): the entries of `Sample.tokens`, and `answer`, the index of the token's answer. Per answer, (B,):
        `score` (NaN where no reward has an opinion), `length`, `finished` and the entries of `Sample.numbers`. Answers to one
        prompt share it where rows are packed.
        A batch without answers has the same names, so that every process reports the same metrics.

        Args:
            old: whether the sampling policy has been measured.
        """
        lengths = torch.tensor([s.length for s in samples], dtype=torch.long)
        extra: dict[str, Tensor] = {
            "answer": torch.repeat_interleave(torch.arange(len(samples)), lengths),
            "score": torch.tensor([_or_nan(s.score) for s in samples]),
            "length": lengths.float(),
            "finished": torch.tensor([float(s.answer.finished) for s in samples]),
            "pace": torch.tensor(self.pace),
            "no_opinion": torch.tensor(self.no_opinion),
        }
        plan = self.plan
        of_old = ["old"] if old else []
        measured = (SAMPLER, *of_old, *(("reference",) if plan.reference else ()), *plan.token_names)
        tokens = list(samples[0].tokens if samples else measured)
        numbers = list(samples[0].numbers if samples else (*self.reward_names, *(["kl"] if old else []), *plan.number_names))
        extra |= {name: torch.cat([s.tokens[name] for s in samples]) if samples else torch.zeros(0) for name in tokens}
        extra |= {name: torch.tensor([s.numbers[name] for s in samples]) for name in numbers}
        rows = [s.row for s in samples]
        if roles.engine.is_pair_model:
            whole = [{"row": s.row, "ids": [*s.answer.prompt_ids, *s.answer.ids], "trained": _trained(s)} for s in samples]
            return collate_tokens(whole, roles).with_extra(**extra)
        return roles.layout(_sequences(samples), rows, extra)

    @property
    def reward_names(self) -> list[str]:
        """Return the names of the rewards in batches and metrics."""
        return [f"rewards/{name}" for name in self.rewards.names]

    # --- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the JSON state for a checkpoint, which is only written at a boundary."""
        return {"rollouts": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state, to continue after the last whole rollout."""
        self.count, self.boundary = stored_count(state["rollouts"], "rollouts"), True


def _or_nan(score: float | None) -> float:
    return math.nan if score is None else score


def held_out(data: Rows, indices: list[int]) -> list[dict[str, Any]]:
    """Return rows of an evaluation, marked as such."""
    return [{**data[i], HELD_OUT: True} for i in indices]


def check_rewards(rewards: Rewards, data: SplitRows) -> None:
    """Refuse rows that the rewards cannot score.

    Raises:
        RecipeError: naming the column that is missing.
    """
    rewards.check(sorted(json.loads(data[0].get("columns") or "{}")) if len(data) else [])


def by_prompt(samples: list[Sample], values: list[float], answers: int) -> Tensor:
    """Return numbers of answers in float64, (P, G), one row per prompt, with NaN at its end for answers that were left out.

    The other entries are, row by row, those of `samples` in order.
    """
    rows: list[list[float]] = []
    pairs = zip(samples, values, strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: (pair[0].place, pair[0].row)):
        own = [value for _, value in group]
        rows.append(own + [math.nan] * (answers - len(own)))
    return torch.tensor(rows, dtype=torch.float64).view(-1, answers)


def scores_of(samples: list[Sample]) -> list[float]:
    """Return the scores of answers that have one."""
    return [s.score for s in samples if s.score is not None]


def _trained(sample: Sample) -> list[int]:
    return [0] * len(sample.answer.prompt_ids) + [1] * sample.length


def _sequences(samples: list[Sample]) -> list[Sequence]:
    found: list[Sequence] = []
    for _, group in itertools.groupby(samples, key=lambda s: s.row):
        answers = list(group)
        prompt = answers[0].answer.prompt_ids
        if len(answers) == 1:
            found.append(Sequence([*prompt, *answers[0].answer.ids], _trained(answers[0]), prompt=len(prompt)))
            continue
        at = len(found)
        found.append(Sequence(prompt, [0] * len(prompt), prompt=len(prompt)))
        found += [Sequence(s.answer.ids, [1] * s.length, parent=at) for s in answers]
    return found
