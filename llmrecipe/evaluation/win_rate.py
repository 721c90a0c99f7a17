"""A model against the one it was trained from: which answers better by a reward, and how far apart they are.

For prompts x with answers y_1..y_n ~ pi(. | x) and z_1..z_n ~ pi_0(. | x), r the reward:

    win rate    mean over x, i, j of [r(y_i) > r(z_j)] + 1/2 [r(y_i) = r(z_j)]
    reward      mean r(y)
    gain        mean r(y) - mean r(z)
    KL          mean over y of sum_t (e^-l_t - 1 + l_t), l_t = log pi(y_t) - log pi_0(y_t): an estimate of KL(pi || pi_0)
                of whole answers at temperature 1, unbiased and never negative
    length      mean tokens of y, its end included

An answer of which no reward has an opinion is no part of the first three. On held-out pairs of a chosen answer c and a rejected
one d:

    margin      mean [log pi(c) - log pi_0(c)] - [log pi(d) - log pi_0(d)], the implicit reward's margin without its factor beta
    preferred   share of pairs whose margin is positive
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.collate import Sequence as Tokens
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.generation import decode_ids, generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.evaluate_model import Subject
from llmrecipe.objectives.alignment._engines.kl import kl_estimate
from llmrecipe.objectives.alignment._engines.pairs import collate_pairs, policy_scores
from llmrecipe.objectives.reward_interface import Answer, Rewards
from llmrecipe.recipe.schema import DataSection

ROWS = 32
"""Answers or pairs in one scoring pass."""


@dataclass(frozen=True)
class HeadToHeadConfig:
    """The prompts, pairs and settings of a comparison."""

    prompts: str
    pairs: str | None
    reward: dict[str, Any]
    n: int
    max_new_tokens: int
    max_length: int
    split: str
    limit: int | None
    seed: int
    where: str = "reward"
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""


class HeadToHead:
    """pi_0 with its answers and scores, against which models are measured one by one.

    Raises:
        DataError: the prompts or pairs have no such split.
        DataError: rows lack what the reward reads.
    """

    def __init__(self, base: Subject, config: HeadToHeadConfig):
        self.base, self.config = base, config
        self.rewards = Rewards(config.reward, config.where)
        self.prompts = self._rows(config.prompts, "prompt", self.rewards.needs())
        self.pairs = self._rows(config.pairs, "preference") if config.pairs else []
        self.rewards.check(sorted({key for row in self.prompts for key in json.loads(row.get("columns") or "{}")}))
        self.rewards.open(base.roles)
        self.answers = self.answer(base)
        self.scores = self.score(self.answers)

    def _rows(self, path: str, kind: str, needs: dict[str, str] | None = None) -> list[dict[str, Any]]:
        a = self.config
        section = DataSection(path=path, max_length=a.max_length)
        data = prepare(section, self.base.loaded.tokenizer, kind, split=a.split, seed=0, unseal=True, needs=needs)
        if data is None:
            raise DataError(f"{path} has no {a.split} split")
        return [data[i] for i in range(min(len(data), a.limit or len(data)))]

    def answer(self, subject: Subject) -> list[Answer]:
        """Sample n answers to each prompt, adjacent, at temperature 1."""
        model, tokenizer = subject.roles.model, subject.loaded.tokenizer
        requested = [row for row in self.prompts for _ in range(self.config.n)]
        sampling = Sampling(self.config.max_new_tokens, temperature=1.0, batch=64, seed=self.config.seed, stop=self.config.stop)
        ends = answer_ends(model, tokenizer, sampling)
        new = generate(model, tokenizer, [row["prompt_ids"] for row in requested], sampling)
        return [
            Answer(
                decode_ids(tokenizer, row["prompt_ids"]), ends.text(ids), json.loads(row.get("columns") or "{}"),
                row["prompt_ids"], ids, ends.finished(ids),
            )
            for row, ids in zip(requested, new, strict=True)
        ]  # fmt: skip

    def score(self, answers: Sequence[Answer]) -> Tensor:
        """Compute the rewards, (prompts, n), NaN where no reward has an opinion of an answer.

        Raises:
            RunError: no reward has an opinion of any of them.
        """
        scores = self.rewards.score(answers)[0]
        if all(score is None for score in scores):
            raise self.rewards.without_opinion(answers)
        known = [math.nan if score is None else score for score in scores]
        return torch.tensor(known, dtype=torch.float64).view(-1, self.config.n)

    def baseline(self) -> dict[str, float]:
        """Return the scores of pi_0 against itself."""
        return {"win_rate": win_rate(self.scores, self.scores), **self._own(self.answers, self.scores), "kl": 0.0}

    def measure(self, subject: Subject) -> dict[str, float]:
        """Compute every quantity of the module docstring for one model."""
        answers = self.answer(subject)
        scores = self.score(answers)
        facts = {"win_rate": win_rate(scores, self.scores), **self._own(answers, scores), "kl": self._kl(subject, answers)}
        if self.pairs:
            margins = self._margins(subject)
            facts |= {"margin": float(margins.mean()), "preferred": float((margins > 0).double().mean())}
        return facts

    def _own(self, answers: Sequence[Answer], scores: Tensor) -> dict[str, float]:
        length = sum(len(a.ids) for a in answers) / len(answers)
        reward = float(scores.nanmean())
        return {"reward": reward, "gain": reward - float(self.scores.nanmean()), "length": length}

    @torch.no_grad()
    def _kl(self, subject: Subject, answers: Sequence[Answer]) -> float:
        total = 0.0
        for part in _parts(answers):
            own, base = (self._tokens(s, part) for s in (subject, self.base))
            total += float(kl_estimate(own, base, "k3").double().sum())
        return total / len(answers)

    @staticmethod
    def _tokens(subject: Subject, answers: Sequence[Answer]) -> Tensor:
        sequences = [
            Tokens([*a.prompt_ids, *a.ids], [0] * len(a.prompt_ids) + [1] * len(a.ids), prompt=len(a.prompt_ids))
            for a in answers
        ]
        return subject.roles.policy(subject.roles.layout(sequences))["logprobs"].float().cpu()

    @torch.no_grad()
    def _margins(self, subject: Subject) -> Tensor:
        parts = []
        for part in _parts(self.pairs):
            own, base = (policy_scores(collate_pairs(list(part), s.roles, soft=None), s.roles) for s in (subject, self.base))
            parts.append((own.chosen - base.chosen - own.rejected + base.rejected).double().cpu())
        return torch.cat(parts)


def win_rate(own: Tensor, other: Tensor) -> float:
    """Compute the mean over prompts, i and j of [own_i > other_j] + 1/2 [own_i = other_j]; both (prompts, n).

    Pairs with a NaN are no part of it; NaN where no others are left.
    """
    a, b = own[:, :, None], other[:, None, :]
    known = ~(a.isnan() | b.isnan())
    return float(((a > b).double() + 0.5 * (a == b).double())[known].mean())


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), ROWS):
        yield items[start : start + ROWS]
