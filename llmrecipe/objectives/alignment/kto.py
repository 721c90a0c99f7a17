"""Kahneman-Tversky optimisation from single answers marked good or bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.option_types import Literal, PositiveFloat, RefSync
from llmrecipe.core.registry import register
from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.data.collate import Batch, Sequence, row_key
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.mismatched import (
    divergences,
    mismatched_batch,
    pairs_as_tensors,
    reference_point,
    with_others,
)
from llmrecipe.objectives.alignment._engines.references import check_reference, follow
from llmrecipe.objectives.base import Loss, Measures, Objective

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.recipe.schema import Recipe


BALANCED = (1.0, 4.0 / 3.0)
"""Range the paper advises for (weight x rows) of the desirable over that of the undesirable answers."""


def kto_loss(
    log_ratio: Tensor, desirable: Tensor, z: Tensor | float, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Compute the loss of each row, (S,), from its log-ratio r, its label and the reference point z.

    desirable    w_D (1 - sigma(beta (r - z)))
    undesirable  w_U (1 - sigma(beta (z - r)))

    Args:
        log_ratio: (S,) r = log pi(y|x) - log pi_ref(y|x).
        desirable: (S,) labels, bool.
        weights: (w_D, w_U).
    """
    good = weights[0] * torch.sigmoid(-beta * (log_ratio - z))
    bad = weights[1] * torch.sigmoid(-beta * (z - log_ratio))
    return torch.where(desirable, good, bad)


def balance(desirable: float, undesirable: float) -> tuple[float, float]:
    """Return weights that give both classes the same total, or 1 and 1 where they are balanced already or one is empty."""
    if not desirable or not undesirable or BALANCED[0] <= desirable / undesirable <= BALANCED[1]:
        return 1.0, 1.0
    return max(1.0, undesirable / desirable), max(1.0, desirable / undesirable)


@register
class Kto(Objective):
    """KTO: L = (1/n) sum w_y (1 - sigma(s beta (r - z))), s = +1 for desirable and -1 for undesirable answers.

    r = log pi(y|x) - log pi_ref(y|x), summed over answer tokens. z >= 0 is the policy's divergence from the reference, the mean
    of the same log-ratio over mismatched pairs: each prompt of the step, over all micro-batches and processes, with the answer
    of the row before it. It is computed once a step, before the step's gradient, and clamped at 0 after the mean. A step needs
    two rows at least; both kinds of answers should be mixed in it. `loss_type: apo_zero_unpaired` sets z = 0.

    At step 0 z is 0 and each row's loss is half its weight. Pairs of a chosen and a rejected answer are read as two rows.

    Papers: KTO (arXiv 2402.01306); apo_zero_unpaired: arXiv 2408.06266.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "unpaired"
    headline: ClassVar[tuple[str, ...]] = ("rewards/accuracies", "rewards/margins")
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("reference",)
    dropout: ClassVar[bool] = False
    pairs_rows: ClassVar[bool] = True

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """With the reference point, or with z = 0."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of good answers."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of bad answers."""
    weights: Literal["given", "auto"] = "given"
    """`auto` chooses the two weights from the numbers of good and bad training rows and reports them."""
    reference: Literal["initial", "base"] | str = "initial"
    """The policy of step 0, the model without any stack, or the folder of a model or finished run."""
    ref_sync: RefSync | None = None
    """{alpha, steps}: the reference follows the policy (TR-DPO); for stacks that train the base's own weights."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse steps of a single row, whose mismatched pair would be its own, and invalid references.

        Raises:
            RecipeError: naming the key to change.
        """
        check_reference(recipe, self.reference, self.ref_sync, ("initial", "base"))
        size = recipe.batch.size
        if self.loss_type != "kto" or BatchPlan.of(recipe.batch, len(data)).fewest() > 1:
            return
        if recipe.batch.warmup is not None:
            raise RecipeError(
                "batch.warmup: a batch of the warm-up, or the last of an epoch, has one row, and KTO compares with answers of "
                "other rows; use another batch.warmup.start or batch.warmup.batches"
            )
        why = "each step has one row" if size == 1 else f"{len(data)} rows leave one row for the last step of an epoch"
        better = next(s for s in range(max(size, 2), len(data) + 4) if len(data) % s != 1)
        raise RecipeError(f"batch.size: {size}: {why}, and KTO compares with answers of other rows; use batch.size={better}")

    def reference_of(self) -> str:
        """Return the `reference` option."""
        return self.reference

    def reference_moves(self) -> bool:
        """Return whether the reference follows the policy: with `ref_sync` it does."""
        return self.ref_sync is not None

    def after_step(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """Move the reference towards the policy every `ref_sync.steps` steps."""
        follow(self.ref_sync, step, roles)

    def weights_for(self, roles: Roles) -> tuple[float, float]:
        """Return the weights of desirable and undesirable answers."""
        if self.weights == "given":
            return self.desirable_weight, self.undesirable_weight
        return balance(*_counts(roles))

    def facts(self, roles: Roles) -> dict[str, Any]:
        """Return the number of rows of each class, the weights, and their balance with the range the paper advises."""
        good, bad = _counts(roles)
        weights = self.weights_for(roles)
        found: dict[str, Any] = {"rows/desirable": good, "rows/undesirable": bad}
        found |= {"weight/desirable": weights[0], "weight/undesirable": weights[1]}
        if bad:
            found |= {"balance": weights[0] * good / (weights[1] * bad), "balance/advised": list(BALANCED)}
        return found

    def step_zero(self) -> dict[str, float]:
        """Return the values of step 0: one half for each row before weighting, no reward and no divergence."""
        return {"loss/unweighted": 0.5, "kl": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out one sequence for each row, with its mismatched pair in `extra`."""
        if rows and "other_ids" not in rows[0]:
            rows = with_others(rows)
        sequences = []
        for row in rows:
            prompt, answer = row["prompt_ids"], row["completion_ids"]
            sequences.append(Sequence([*prompt, *answer], [0] * len(prompt) + [1] * len(answer), prompt=len(prompt)))
        extra = {"label": torch.tensor([bool(r["label"]) for r in rows], dtype=torch.bool), **pairs_as_tensors(rows)}
        extra["source"] = torch.tensor([int(r.get("source_row", r["row"])) for r in rows], dtype=torch.long)
        batch = roles.layout(sequences, [r["row"] for r in rows], extra)
        return dataclasses.replace(batch, keys=tuple(row_key(r["prompt_ids"], r["completion_ids"]) for r in rows))

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step with the step's reference point.

        Raises:
            RunError: a step of one row.
        """
        for rows in source:
            shares = roles.gather([{k: list(r[k]) for k in ("prompt_ids", "completion_ids")} for r in rows])
            if self.loss_type == "kto" and sum(map(len, shares)) == 1:
                raise RunError("a step of one row has no mismatched pair for KTO's reference point; use a batch.size above 1")
            paired = with_others(rows, shares, roles.rank)
            micros = [self.collate(part, roles) for part in roles.split(paired)]
            none = torch.zeros(())
            z, raw = reference_point(micros, roles) if self.loss_type == "kto" else (none, none)
            yield [m.with_extra(z=z.float(), z_raw=raw.float()) for m in micros]

    def reference_batches(self, rows: list[dict[str, Any]], roles: Roles) -> Iterator[Batch]:
        """Yield batches of the rows and of their mismatched pairs."""
        paired = rows if rows and "other_ids" in rows[0] else with_others(rows)
        for part in roles.split(paired):
            batch = self.collate(part, roles)
            yield batch
            pairs = mismatched_batch(batch, roles, keyed=True)
            if pairs is not None:
                yield pairs

    def measures(self) -> Measures:
        """Return the rewards of both labels and, where a prompt has answers of both, how often the better one scores higher."""
        levels = dict.fromkeys(("rewards/chosen", "rewards/rejected", "kl", "kl/raw"))
        return {**levels, "rewards/margins": "max", "rewards/accuracies": "max"}

    def weight(self, batch: Batch) -> float:
        """Return the number of rows, the loss denominator."""
        return float(batch.extra["label"].shape[0])

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the rows, under the step's reference point or, where it has none, the micro-batch's own."""
        z, raw = self._point(batch, roles)
        log_ratio = self._log_ratios(batch, roles)
        good, count = batch.extra["label"], float(log_ratio.shape[0])
        labels = batch.here.extra["label"]
        places = [to_device(of.nonzero().squeeze(1), good.device) for of in (labels, ~labels)]
        total = kto_loss(log_ratio, good, z, self.beta, self.weights_for(roles)).sum()
        with torch.no_grad():
            plain = kto_loss(log_ratio, good, z, self.beta).sum()
            rewards = self.beta * log_ratio.detach()
        chosen, rejected = (float(len(of)) for of in places)
        metrics: dict[str, tuple[Any, float]] = {
            "kl": (z * count, count),
            "kl/raw": (raw * count, count),
            "loss/unweighted": (plain, count),
            "rewards/chosen": (rewards[places[0]].sum(), chosen),
            "rewards/rejected": (rewards[places[1]].sum(), rejected),
            "share/desirable": (chosen, count),
        }
        return Loss(total, metrics)

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return rows with mismatched pairs from the whole split, so that no layout of the evaluation changes them."""
        paired = with_others([data[i] for i in range(len(data))])
        return [paired[i] for i in indices]

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return nothing: the reference point belongs to the whole split (see `finish_evaluation`)."""
        return {}

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return log-ratios (S,), labels (S,), weights (S, 2) and mismatched divergences (M,) of a batch."""
        log_ratio = self._log_ratios(batch, roles)
        weights = self.weights_for(roles)
        shared = torch.tensor(weights, dtype=torch.float64).expand(log_ratio.shape[0], 2)
        found = {"log_ratio": log_ratio.double(), "label": batch.extra["label"]}
        found |= {"source": batch.extra["source"], "weights": shared}
        if self.loss_type == "kto":
            found["kl"] = divergences(batch, roles).double()
        return {k: v.detach().cpu() for k, v in found.items()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute loss and rewards of the split; accuracy is over prompts that have answers of both kinds from one row."""
        log_ratio, good, kl = tensors["log_ratio"], tensors["label"].bool(), tensors.get("kl", torch.zeros(0))
        raw = float(kl.mean()) if kl.numel() else 0.0
        weights = tuple(tensors["weights"].reshape(-1, 2)[0].tolist())
        loss = kto_loss(log_ratio, good, max(raw, 0.0), self.beta, weights)
        metrics = {"loss": float(loss.mean()), "kl": max(raw, 0.0), "kl/raw": raw}
        if bool(good.any()):
            metrics["rewards/chosen"] = self.beta * float(log_ratio[good].mean())
        if bool((~good).any()):
            metrics["rewards/rejected"] = self.beta * float(log_ratio[~good].mean())
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        wins = _wins(log_ratio, good, tensors["source"])
        if wins:
            metrics["rewards/accuracies"] = sum(wins) / len(wins)
        return metrics

    def _log_ratios(self, batch: Batch, roles: Roles) -> Tensor:
        if not self.weight(batch):
            return roles.policy(batch)["logprobs"]
        with torch.no_grad():
            reference = roles.reference(batch)
        return batch.sum_by_sequence(roles.policy(batch)["logprobs"]) - reference

    def _point(self, batch: Batch, roles: Roles) -> tuple[Tensor | float, Tensor | float]:
        if "z" in batch.extra:
            return batch.extra["z"].double(), batch.extra["z_raw"].double()
        if self.loss_type != "kto":
            return 0.0, 0.0
        found = divergences(batch, roles)
        raw = (found.mean() if found.numel() else found.sum()).double()
        return raw.clamp_min(0.0), raw


def _wins(log_ratio: Tensor, good: Tensor, source: Tensor) -> list[float]:
    """Return, for each raw row that gave one good and one bad answer, whether the good one has the larger log-ratio."""
    sides: dict[int, dict[bool, float]] = {}
    for value, label, row in zip(log_ratio.tolist(), good.tolist(), source.tolist(), strict=True):
        sides.setdefault(int(row), {})[bool(label)] = value
    return [float(pair[True] > pair[False]) for pair in sides.values() if len(pair) == 2]


def _counts(roles: Roles) -> tuple[float, float]:
    """Return the numbers of desirable and undesirable training rows."""
    labels = getattr(getattr(roles.data, "report", None), "labels", {})
    return float(labels.get("true", 0)), float(labels.get("false", 0))
