"""Reward modelling from comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import DataError
from llmrecipe.core.option_types import Literal, NonNegativeFloat
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.models.excluded import without_language_head
from llmrecipe.objectives.alignment._engines.pairs import collate_pairs, pair_count, split_pairs
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.correlations import correlation

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


SAMPLE = 512
"""Number of training rows whose scores determine the normalisation."""
BINS = 10


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, p: Tensor | float = 1.0, center: float = 0.0
) -> Tensor:
    """Compute the loss of each pair, (P,), from the scores of both answers, (P,) each.

    -[p log sigma(d) + (1 - p) log sigma(-d)] + center (chosen + rejected)^2,   d = chosen - rejected - margin,
    with p the probability that the chosen answer is the better one; margin and p are (P,) or numbers.
    """
    d = chosen - rejected - margin
    return -(p * F.logsigmoid(d) + (1.0 - p) * F.logsigmoid(-d)) + center * (chosen + rejected) ** 2


def calibration_error(d: Tensor, bins: int = BINS) -> float:
    """Compute the expected calibration error of sigma(|d|), d (P,) score differences, in bins from 1/2 to 1.

    sigma(|d|) is read as the probability that the answer with the higher score is the better one.
    """
    sure = torch.sigmoid(d.abs())
    right = (d > 0).double() + 0.5 * (d == 0).double()
    place = ((sure - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gaps = [float(abs(sure[place == b].mean() - right[place == b].mean()) * (place == b).sum()) for b in place.unique()]
    return sum(gaps) / max(d.numel(), 1)


@register
class Reward(Objective):
    """Reward model: L = -(1/P) sum log sigma(s_w - s_l - margin) + center (s_w + s_l)^2, s = w . h at the last token.

    A linear head without bias, in float32, on the policy's own backbone (`task_head.reward`), so reward, policy and value
    adapters can share one base. Only differences of scores are learned: `center` holds their mean near 0, and
    `normalise` stores a gain and a bias that the finished run applies (`zscore`: mean 0, deviation 1 over training answers;
    `demo_bias`: chosen answers score 0 on average). `margin` reads the rows' margins, which all rows have or none, and a row's
    `p` is the probability that its chosen answer is the better one (soft labels of `label_ai`; 1 where a row has none): the
    loss is then -(1/P) sum [p log sigma(d) + (1 - p) log sigma(-d)]. One pass over the data is usual.

    `pooling: last_non_pad_id` takes the last token that is not the padding token, which is the token before the end where
    one token serves as both; it is there for comparisons with models trained that way.

    Papers: Training language models to follow instructions (arXiv 2203.02155); Learning to summarize (arXiv 2009.01325);
    margin: Llama 2 (arXiv 2307.09288); centering: arXiv 2312.09244.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "preference"
    headline: ClassVar[tuple[str, ...]] = ("rewards/accuracies", "rewards/margins")
    head: ClassVar[str] = "causal"
    dropout: ClassVar[bool] = False

    margin: bool = True
    """Subtract the rows' margins, where the data have them: of all rows or of none."""
    center: NonNegativeFloat = 0.0
    """Weight of the squared sum of both scores."""
    pooling: Literal["last_token", "last_non_pad_id"] = "last_token"
    """Token whose hidden state is scored."""
    head_init: Literal["scaled", "small", "zero"] = "scaled"
    """Initialization of the head: normal with deviation 1/sqrt(D + 1), normal with deviation 0.02, or zero."""
    normalise: Literal["none", "zscore", "demo_bias"] = "zscore"
    """Gain and bias stored with the finished run; training itself uses raw scores."""

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add a reward head; the language-model head gets no gradient and is not trained."""
        task_heads.add_head(model, "reward", {"scaled": None, "small": 0.02, "zero": 0.0}[self.head_init], seed)
        without_language_head(model)

    def unread(self) -> Sequence[str]:
        """Return the margin where the option leaves it out."""
        return () if self.margin else ("margin",)

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse rows of which some have a margin and some have none.

        Raises:
            DataError: naming the first row without one.
        """
        if self.margin:
            margins_of([{"row": i, "margin": margin} for i, margin in enumerate(data.column("margin"))])

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out pairs that share their prompt; no token is a target.

        Raises:
            DataError: some of the rows have a margin and some have none.
        """
        batch = collate_pairs(rows, roles, soft=None)
        if self.margin and (margins := margins_of(rows)) is not None:
            batch = batch.with_extra(margin=torch.tensor(margins))
        lengths = [[len(r["chosen_ids"]), len(r["rejected_ids"])] for r in rows]
        extra = {"lengths": torch.tensor(lengths, dtype=torch.float32).reshape(-1, 2)}
        if self.pooling == "last_non_pad_id" and rows:
            extra["pool"] = _last_non_pad(batch, rows, roles.pad_id)
        none = torch.zeros(0, dtype=torch.long)
        untargeted = dataclasses.replace(batch.here, source=none, target=none, sequence=none)
        return untargeted.with_extra(**extra).to(roles.device)

    def measures(self) -> Measures:
        """Return metrics of how well the scores separate the answers; their level and spread are neither good nor bad."""
        levels = dict.fromkeys(f"rewards/{n}" for n in ("chosen", "rejected", "std", "min", "max", "length_correlation"))
        better: Measures = {"rewards/accuracies": "max", "rewards/margins": "max"}
        return {**levels, **better, "rewards/ties": "min", "calibration_error": "min"}

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs, the loss denominator."""
        return float(pair_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the pairs."""
        chosen, rejected = self._scores(batch, roles)
        total = self._losses(batch, chosen, rejected).sum()
        count = float(chosen.shape[0])
        d = (chosen - rejected).detach()
        metrics: dict[str, tuple[Any, float]] = {
            "rewards/chosen": (chosen.detach().sum(), count),
            "rewards/rejected": (rejected.detach().sum(), count),
            "rewards/margins": (d.sum(), count),
            "rewards/accuracies": ((d > 0).float().sum(), count),
            "rewards/ties": ((d == 0).float().sum(), count),
        }
        return Loss(total, metrics)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return nothing: `collect` has the scores of the whole split."""
        return {}

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return scores (P,), losses (P,) and answer lengths (P, 2) of every pair."""
        chosen, rejected = self._scores(batch, roles)
        found = {"chosen": chosen, "rejected": rejected, "losses": self._losses(batch, chosen, rejected)}
        return {k: v.detach().double().cpu() for k, v in {**found, "lengths": batch.extra["lengths"]}.items()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute accuracy (ties count as wrong), margin, spread, calibration and the correlation of score and length."""
        chosen, rejected = tensors["chosen"], tensors["rejected"]
        d, both = chosen - rejected, torch.cat((chosen, rejected))
        lengths = tensors["lengths"].reshape(-1, 2)
        return {
            "loss": float(tensors["losses"].mean()),
            "rewards/accuracies": float((d > 0).double().mean()),
            "rewards/ties": float((d == 0).double().mean()),
            "rewards/margins": float(d.mean()),
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "rewards/std": float(both.std(correction=0)),
            "rewards/min": float(both.min()),
            "rewards/max": float(both.max()),
            "rewards/length_correlation": correlation(both, torch.cat((lengths[:, 0], lengths[:, 1]))),
            "calibration_error": calibration_error(d),
        }

    def finish(self, roles: Roles) -> None:
        """Measure scores of training answers and store gain and bias in the head."""
        if self.normalise == "none" or roles.data is None or not len(roles.data):
            return
        rows = [roles.data[i] for i in range(min(SAMPLE, len(roles.data)))]
        with torch.no_grad(), roles.evaluating():
            parts = [self._scores(self.collate(part, roles), roles) for part in roles.split(rows)]
        chosen, rejected = (torch.cat(side).double() for side in zip(*parts, strict=True))
        gain, bias = normalisation(chosen, rejected, self.normalise)
        head: Any = roles.engine.head_of("reward")
        with torch.no_grad():
            head.gain.fill_(gain)
            head.bias.fill_(bias)

    def _scores(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor]:
        return split_pairs(roles.policy(batch, want="reward")["reward"])

    def _losses(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> Tensor:
        return reward_loss(chosen, rejected, batch.extra.get("margin", 0.0), batch.extra.get("p", 1.0), self.center)


def margins_of(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the margins of rows; None where none of them has one.

    Raises:
        DataError: some rows have one and some have none; the message names the first without.
    """
    given = [row.get("margin") for row in rows]
    if all(margin is None for margin in given):
        return None
    without = next((row["row"] for row, margin in zip(rows, given, strict=True) if margin is None), None)
    if without is not None:
        raise DataError(
            f"row {without} has no margin, and other rows have one: give every row its own (0 subtracts nothing), or set "
            "objective.margin=false"
        )
    return [float(margin) for margin in given if margin is not None]


def normalisation(chosen: Tensor, rejected: Tensor, kind: str) -> tuple[float, float]:
    """Return (gain, bias) from scores, (P,) each.

    gain * s + bias has mean 0 and standard deviation 1 over all answers (`zscore`), or mean 0 over the chosen ones
    (`demo_bias`, with a gain of 1).
    """
    if kind == "demo_bias":
        return 1.0, -float(chosen.mean())
    both = torch.cat((chosen, rejected))
    gain = 1.0 / max(float(both.std(correction=0)), 1e-6)
    return gain, -float(both.mean()) * gain


def _last_non_pad(batch: Batch, rows: list[dict[str, Any]], pad_id: int) -> Tensor:
    """Find the index of each sequence's last token that is not the padding token, (S,)."""
    found = batch.here.last.clone()
    for i, row in enumerate(rows):
        prompt = _trailing(row["prompt_ids"], pad_id)
        found[3 * i] -= prompt
        for k, side in ((1, "chosen_ids"), (2, "rejected_ids")):
            count = _trailing(row[side], pad_id)
            found[3 * i + k] = found[3 * i] if count == len(row[side]) else found[3 * i + k] - count
    return found


def _trailing(ids: list[int], token: int) -> int:
    """Count how many times a token is repeated at the end of ids."""
    count = 0
    while count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count
