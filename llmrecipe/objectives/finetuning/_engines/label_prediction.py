"""Options and mathematics of objectives that predict the labels of whole rows."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.option_types import Field, Literal, NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.core.registry import options, spec
from llmrecipe.data.collate import Batch
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.logprob import upcast
from llmrecipe.engine.role_models import Roles
from llmrecipe.models.excluded import freeze_below_head
from llmrecipe.objectives.base import Loss, Measures
from llmrecipe.recipe.stack_rules import Declared

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


BINS = 15
"""Intervals of confidence in the expected calibration error."""


def cross_entropy(scores: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Compute -sum_i w[y_i] log softmax(scores_i)[y_i], a scalar, with label smoothing; scores (S, C), labels (S,).

    Args:
        weights: (C,) w of each class; default 1.
    """
    values = upcast(scores)
    known = None if weights is None else to_device(weights, values.device).to(values.dtype)
    return F.cross_entropy(values, labels, known, reduction="sum", label_smoothing=smoothing)


def focal_loss(scores: Tensor, labels: Tensor, gamma: float, weights: Tensor | None = None) -> Tensor:
    """Compute -sum_i w[y_i] (1 - p_i)^gamma log p_i, a scalar, p_i = softmax(scores_i)[y_i]; scores (S, C), labels (S,).

    Args:
        weights: (C,) w of each class; default 1.

    Source: Focal Loss for Dense Object Detection (arXiv 1708.02002).
    """
    likely = upcast(scores).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    losses = -(_missing(likely) ** gamma) * likely
    if weights is not None:
        losses = losses * to_device(weights, losses.device).to(losses.dtype)[labels]
    return losses.sum()


def binary_focal_loss(scores: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Compute sum_i (1/C) sum_c -(1 - p_ic)^gamma log p_ic, a scalar, p_ic the probability of the 0 or 1 that is right.

    Args:
        scores: (S, C) logits.
        labels: (S, C) 0 or 1.
    """
    likely = -F.binary_cross_entropy_with_logits(upcast(scores), labels.to(upcast(scores).dtype), reduction="none")
    return (-(_missing(likely) ** gamma) * likely).mean(-1).sum()


def _missing(likely: Tensor) -> Tensor:
    """Return 1 - p from log p; a power below 1 has no slope at 0, which is never reached."""
    return (-torch.expm1(likely)).clamp_min(torch.finfo(likely.dtype).eps)


def confusion(predicted: Tensor, gold: Tensor, classes: int) -> Tensor:
    """Count how often each class, a row, was predicted as each class, a column, (C, C); predicted and gold (S,)."""
    return torch.bincount(gold * classes + predicted, minlength=classes * classes).view(classes, classes)


def class_scores(hits: Tensor, found: Tensor, there: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 of each class, (C,) in float64; an undefined one counts as 0.

    Args:
        hits: (C,) rows of a class that are predicted as it.
        found: (C,) rows predicted as it.
        there: (C,) rows of it.
    """

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(whole > 0, part.double() / whole.clamp_min(1), 0.0)

    return {"precision": ratio(hits, found), "recall": ratio(hits, there), "f1": ratio(2 * hits, found + there)}


def mean_f1(hits: Tensor, found: Tensor, there: Tensor) -> dict[str, float]:
    """Return F1 averaged over classes, each alike and by its rows; arguments as in `class_scores`."""
    f1 = class_scores(hits, found, there)["f1"]
    weighted = float((f1 * there).sum() / max(1, int(there.sum())))
    return {"macro_f1": float(f1.mean()) if len(f1) else 0.0, "weighted_f1": weighted}


def single_label_scores(predicted: Tensor, gold: Tensor) -> dict[str, float]:
    """Return macro F1, weighted F1 and Matthews' correlation over the classes in gold or prediction.

    Args:
        predicted: (S,) class of each sequence.
        gold: (S,) its label.

    Matthews' correlation of C classes is that of Gorodkin 2004; 0 where one side has a single class.
    """
    if not len(gold):
        return {"macro_f1": 0.0, "weighted_f1": 0.0, "mcc": 0.0}
    table = confusion(predicted, gold, int(torch.maximum(predicted, gold).max()) + 1).double()
    seen = (table.sum(0) + table.sum(1)) > 0
    hits, found, there = (values[seen] for values in (table.diagonal(), table.sum(0), table.sum(1)))
    rows = table.sum()
    apart = (rows**2 - (found**2).sum()) * (rows**2 - (there**2).sum())
    mcc = float((hits.sum() * rows - (found * there).sum()) / apart.sqrt()) if apart > 0 else 0.0
    return {**mean_f1(hits, found, there), "mcc": mcc}


def expected_calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Return the expected calibration error, sum_b n_b / n |accuracy_b - mean confidence_b| over bins of equal width.

    Args:
        confidence: (S,) probability of the predicted class, in (0, 1].
        right: (S,) whether it is the label.

    Source: Guo et al. 2017 (arXiv 1706.04599).
    """
    if not len(confidence):
        return 0.0
    bins = (confidence.double() * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, right.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))


@options
class LabelPrediction:
    """Mixin for an `Objective` that predicts labels; its batches hold them under `labels`, its engine gives `scores`."""

    headline: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")

    problem: Literal["single_label", "multi_label"] = "single_label"
    """Kind of labels: one class, or several classes at once (numbers are for objective=regression)."""
    label_smoothing: OpenFraction = 0.0
    """Share of the target spread over all classes."""
    class_weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Weights of classes by name, 1 where none is given: the loss of a step is divided by the weights of its rows."""
    focal_gamma: NonNegativeFloat = 0.0
    """Exponent g of the focal loss: each label counts (1 - p)^g, little where it is already right; 0 is cross-entropy."""
    head_only: bool = False
    """Train the head alone (linear probing); everything below stays as it is."""

    @cached_property
    def row_weights(self) -> list[float]:
        """Hold the weight of each class in the order of its number, where some are given and the labels are known."""
        return []

    def labels_of(self, rows: list[dict[str, Any]], roles: Roles) -> Tensor:
        """Return the labels of rows, (S,), or a 0 or 1 for each class, (S, C)."""
        if self.problem == "single_label":
            return torch.tensor([r["label"] for r in rows], dtype=torch.long)
        labels = torch.zeros(len(rows), int(roles.model.config.num_labels))
        for i, row in enumerate(rows):
            labels[i, row["label"]] = 1.0
        return labels

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse labels of another kind than `problem` says, and to train the head alone under a stack that trains more."""
        kinds = {name: Declared.of_spec(name, spec("stack", str(mapping["kind"]))) for name, mapping in recipe.stack.items()}
        more = [name for name, declared in kinds.items() if not declared.is_rule]
        if self.head_only and more:
            raise RecipeError(
                f"objective.head_only: the stack [{', '.join(more)}] trains more than the head; leave one of the two out"
            )
        if data.labels is None:
            raise RecipeError(
                "objective: it needs classes, and the labels of the training rows are real numbers; "
                "objective=regression predicts numbers"
            )
        listed = any(text.startswith("[") for text in set(data.column("label")))
        if listed and self.problem == "single_label":
            raise RecipeError(
                "objective.problem: single_label is one class a row, and rows have lists of labels; set "
                "objective.problem=multi_label"
            )
        if self.focal_gamma and self.label_smoothing:
            raise RecipeError(
                "objective.focal_gamma: label smoothing spreads the target that the focal loss weighs by; leave one of "
                "objective.focal_gamma and objective.label_smoothing out"
            )
        self._check_weights(data.labels)

    def _check_weights(self, labels: list[str]) -> None:
        """Keep the weight of each class.

        Raises:
            RecipeError: a weight belongs to no class, or rows have several classes each.
        """
        if self.class_weights and self.problem == "multi_label":
            raise RecipeError("objective.class_weights: weigh rows of one class each; leave it out of multi_label")
        for name in self.class_weights:
            if name not in labels:
                raise RecipeError(
                    f"objective.class_weights.{name}: no training row has this label{did_you_mean(name, labels)} (they have "
                    f"{', '.join(labels[:12])})"
                )
        self.row_weights[:] = [self.class_weights.get(name, 1.0) for name in labels] if self.class_weights else []

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Keep all but the head as it is, where the head trains alone."""
        if self.head_only:
            freeze_below_head(model)

    def measures(self) -> Measures:
        """Return the accuracy and the scores of the whole set."""
        found: Measures = {"accuracy": "max", "macro_f1": "max", "weighted_f1": "max"}
        own: Measures = {"mcc": "max", "ece": "min"} if self.problem == "single_label" else {"micro_f1": "max"}
        return {**found, **own}

    def scores(self, batch: Batch, roles: Roles) -> Tensor:
        """Return the scores (S, C) of the rows of a batch."""
        return roles.policy(batch, want="scores")["scores"]

    def weight(self, batch: Batch) -> float:
        """Return the weight of the sequences, the loss denominator: their number where classes have no weights."""
        labels = batch.here.extra["labels"]
        return math.fsum(self.row_weights[i] for i in labels.tolist()) if self.row_weights else float(labels.shape[0])

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the labels."""
        weights = torch.tensor(self.row_weights) if self.row_weights else None
        return self._loss(batch, self.scores(batch, roles), weights)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return the loss without weights of classes, whatever they are in training, and the accuracy."""
        loss = self._loss(batch, self.scores(batch, roles), None)
        return {"loss": (loss.total, float(batch.extra["labels"].shape[0])), **loss.metrics}

    def _loss(self, batch: Batch, scores: Tensor, weights: Tensor | None) -> Loss:
        labels = batch.extra["labels"]
        count = float(labels.shape[0])
        if not count:
            return Loss(scores.sum() * 0.0, {"accuracy": (0.0, 0.0)})
        if self.problem == "multi_label":
            if self.focal_gamma:
                total = binary_focal_loss(scores, labels, self.focal_gamma)
            else:
                total = F.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(-1).sum()
            right = ((scores > 0) == (labels > 0.5)).all(-1).float().sum()
            return Loss(total, {"accuracy": (right, count)})
        if self.focal_gamma:
            total = focal_loss(scores, labels, self.focal_gamma, weights)
        else:
            total = cross_entropy(scores, labels, self.label_smoothing, weights)
        return Loss(total, {"accuracy": ((scores.argmax(-1) == labels).float().sum(), count)})

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return predictions and gold labels, both (S,), or a 0 or 1 for each class, (S, C), for metrics of the whole set.

        Of one class a row, `confidence`, (S,), is the probability of the predicted class.
        """
        labels = batch.extra["labels"]
        with torch.no_grad():
            scores = self.scores(batch, roles)[: labels.shape[0]]
        if self.problem == "multi_label":
            return {"predicted": (scores > 0).long().cpu(), "gold": labels.long().cpu()}
        top = upcast(scores).softmax(-1).max(-1)
        return {"predicted": top.indices.cpu(), "gold": labels.long().cpu(), "confidence": top.values.cpu()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute F1 of classes, Matthews' correlation and the calibration error over the gathered predictions."""
        predicted, gold = tensors["predicted"], tensors["gold"]
        if self.problem == "single_label":
            ece = expected_calibration_error(tensors["confidence"], predicted == gold)
            return {**single_label_scores(predicted, gold), "ece": ece}
        hits, found, there = (predicted & gold).sum(0), predicted.sum(0), gold.sum(0)
        micro = 2.0 * int(hits.sum()) / max(1, int(found.sum() + there.sum()))
        return {**mean_f1(hits, found, there), "micro_f1": micro}

    def breakdown(self, tensors: dict[str, Tensor], roles: Roles) -> dict[str, dict[str, Any]]:
        """Return precision, recall, F1 and rows of each label and, of one class a row, the confusion matrix."""
        predicted, gold = tensors["predicted"], tensors["gold"]
        names = {int(number): str(name) for number, name in (roles.model.config.id2label or {}).items()}
        table: dict[str, Any] = {"labels": [names[number] for number in sorted(names)]}
        if self.problem == "single_label":
            matrix = confusion(predicted, gold, len(names))
            table["confusion"] = matrix.tolist()
            counts = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
        else:
            counts = (predicted & gold).sum(0), predicted.sum(0), gold.sum(0)
        scores = {name: values.tolist() for name, values in class_scores(*counts).items()}
        return {"labels.json": {**table, **scores, "rows": counts[2].tolist()}}
