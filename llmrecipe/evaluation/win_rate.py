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

Each has a 95 % interval from prompts (or pairs) that are drawn again with replacement, both models' answers to a prompt
together (`training.intervals`). It holds for these answers: what other draws of answers would change is not in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.collate import Batch
from llmrecipe.data.collate import Sequence as Tokens
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.generation import decode_ids, generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.evaluate_model import Subject
from llmrecipe.objectives.alignment._engines.kl import kl_estimate
from llmrecipe.objectives.alignment._engines.pairs import collate_pairs, policy_scores
from llmrecipe.objectives.reward_interface import Answer, Rewards
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.training.intervals import RowScores, all_ends

ROWS = 32
"""Answers or pairs in one scoring pass."""
SAMPLES = 1000
"""How often prompts and pairs are drawn again for the intervals."""


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
        return self._facts(self.answers, self.scores, torch.zeros(len(self.answers), dtype=torch.float64), None)

    def measure(self, subject: Subject) -> dict[str, float]:
        """Compute every quantity of the module docstring for one model, with `NAME/low` and `NAME/high` of each."""
        answers = self.answer(subject)
        margins = self._margins(subject) if self.pairs else None
        return self._facts(answers, self.score(answers), self._divergences(subject, answers), margins)

    def _facts(
        self, answers: Sequence[Answer], scores: Tensor, divergences: Tensor, margins: Tensor | None
    ) -> dict[str, float]:
        """Return every score with its interval.

        Args:
            scores: of the answers, (prompts, n).
            divergences: of each answer, (prompts * n).
            margins: of each pair, (pairs).
        """
        rows = RowScores(SAMPLES, self.config.seed)
        wins = outcomes(scores, self.scores).flatten(1)
        lengths = torch.tensor([float(len(a.ids)) for a in answers], dtype=torch.float64).view(-1, self.config.n)
        rows.statistics = {name: _sums(v) for name, v in (("win_rate", wins), ("reward", scores), ("length", lengths))}
        rows.statistics["gain"] = np.hstack([_sums(scores), _sums(self.scores)])
        rows.totals["gain"] = lambda sums: _ratio(*sums[:2]) - _ratio(*sums[2:])
        rows.statistics["kl"] = _sums(divergences.view(-1, self.config.n))
        if margins is not None:
            rows.statistics["margin"] = _sums(margins[:, None])
            rows.statistics["preferred"] = _sums((margins > 0).double()[:, None])
        found = {
            name: rows.totals.get(name, lambda sums: _ratio(*sums))(v.sum(0).tolist()) for name, v in rows.statistics.items()
        }
        return found | all_ends(rows.drawn(None))

    @torch.no_grad()
    def _divergences(self, subject: Subject, answers: Sequence[Answer]) -> Tensor:
        """Return the estimate of each answer, (answers,)."""
        parts = []
        for part in _parts(answers):
            (batch, own), (_, base) = (self._tokens(s, part) for s in (subject, self.base))
            estimates = kl_estimate(own.double(), base.double(), "k3")
            parts.append(batch.sum_by_sequence(estimates.to(subject.roles.device)).double().cpu())
        return torch.cat(parts)

    @staticmethod
    def _tokens(subject: Subject, answers: Sequence[Answer]) -> tuple[Batch, Tensor]:
        """Return the answers as a batch, and the log-probability of each of their tokens, (N,)."""
        sequences = [
            Tokens([*a.prompt_ids, *a.ids], [0] * len(a.prompt_ids) + [1] * len(a.ids), prompt=len(a.prompt_ids))
            for a in answers
        ]
        batch = subject.roles.layout(sequences)
        return batch, subject.roles.policy(batch)["logprobs"].float().cpu()

    @torch.no_grad()
    def _margins(self, subject: Subject) -> Tensor:
        parts = []
        for part in _parts(self.pairs):
            own, base = (policy_scores(collate_pairs(list(part), s.roles, soft=None), s.roles) for s in (subject, self.base))
            parts.append((own.chosen - base.chosen - own.rejected + base.rejected).double().cpu())
        return torch.cat(parts)


def outcomes(own: Tensor, other: Tensor) -> Tensor:
    """Return [own_i > other_j] + 1/2 [own_i = other_j] of every i and j of each prompt, (prompts, n, n); both are (prompts, n).

    NaN where one of both is.
    """
    a, b = own[:, :, None], other[:, None, :]
    return torch.where(a.isnan() | b.isnan(), math.nan, (a > b).double() + 0.5 * (a == b).double())


def win_rate(own: Tensor, other: Tensor) -> float:
    """Compute the mean over prompts, i and j of `outcomes`; NaN where none of them is known."""
    return float(outcomes(own, other).nanmean())


def _sums(values: Tensor) -> np.ndarray:
    """Return sum and number of the known values of each row, (rows, 2); the values are (rows, k)."""
    return torch.stack([values.nansum(1), (~values.isnan()).double().sum(1)], 1).double().numpy()


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), ROWS):
        yield items[start : start + ROWS]
