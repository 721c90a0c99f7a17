"""Options and mathematics of objectives that predict the labels of whole rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, OpenFraction
from llmrecipe.core.registry import options, spec
from llmrecipe.data.collate import Batch
from llmrecipe.engine.logprob import upcast
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.objectives.base import Loss, Measures
from llmrecipe.recipe.stack_rules import Declared

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


def cross_entropy(scores: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Compute -sum_i log softmax(scores_i)[y_i], a scalar, with label smoothing; scores (S, C), labels (S,)."""
    return F.cross_entropy(upcast(scores), labels, reduction="sum", label_smoothing=smoothing)


def macro_f1(predicted: Tensor, gold: Tensor) -> float:
    """Return the unweighted mean of per-class F1 over the classes in gold or prediction; an undefined F1 counts as 0.

    Args:
        predicted: (S,) class of each sequence.
        gold: (S,) its label.
    """
    scores: list[float] = []
    for label in torch.cat((predicted, gold)).unique().tolist():
        hit = int(((predicted == label) & (gold == label)).sum())
        wrong = int((predicted == label).sum()) + int((gold == label).sum())
        scores.append(2.0 * hit / wrong if wrong else 0.0)
    return sum(scores) / len(scores) if scores else 0.0


@options
class LabelPrediction:
    """Mixin for an `Objective` that predicts labels; its batches hold them under `labels`, its engine gives `scores`."""

    problem: Literal["single_label", "multi_label"] = "single_label"
    """Kind of labels: one class, or several classes at once (numbers are for objective=regression)."""
    label_smoothing: OpenFraction = 0.0
    """Share of the target spread over all classes."""
    head_only: bool = False
    """Train the head alone (linear probing); everything below stays as it is."""

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

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Keep all but the head as it is, where the head trains alone."""
        if self.head_only:
            task_heads.freeze_below_head(model)

    def measures(self) -> Measures:
        """Return the accuracy and macro F1."""
        return {"accuracy": "max", "macro_f1": "max"}

    def scores(self, batch: Batch, roles: Roles) -> Tensor:
        """Return the scores (S, C) of the rows of a batch."""
        return roles.policy(batch, want="scores")["scores"]

    def weight(self, batch: Batch) -> float:
        """Return the number of sequences, the loss denominator."""
        return float(batch.extra["labels"].shape[0])

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the labels."""
        scores = self.scores(batch, roles)
        labels = batch.extra["labels"]
        count = float(labels.shape[0])
        if not count:
            return Loss(scores.sum() * 0.0, {"accuracy": (0.0, 0.0)})
        if self.problem == "multi_label":
            total = F.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(-1).sum()
            right = ((scores > 0) == (labels > 0.5)).all(-1).float().sum()
            return Loss(total, {"accuracy": (right, count)})
        total = cross_entropy(scores, labels, self.label_smoothing)
        return Loss(total, {"accuracy": ((scores.argmax(-1) == labels).float().sum(), count)})

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return predictions and gold labels, both (S,), or a 0 or 1 for each class, (S, C), for metrics of the whole set."""
        labels = batch.extra["labels"]
        with torch.no_grad():
            scores = self.scores(batch, roles)[: labels.shape[0]]
        predicted = scores.argmax(-1) if self.problem == "single_label" else (scores > 0).long()
        return {"predicted": predicted.cpu(), "gold": labels.long().cpu()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute macro F1 over the gathered predictions."""
        predicted, gold = tensors["predicted"], tensors["gold"]
        if self.problem == "single_label":
            return {"macro_f1": macro_f1(predicted, gold)}
        hits, wrong = (predicted & gold).sum(0), predicted.sum(0) + gold.sum(0)
        return {"macro_f1": float(torch.where(wrong > 0, 2.0 * hits / wrong.clamp_min(1), 0.0).mean())}
