"""Sequence classification and regression."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.option_types import Literal, OpenFraction
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.logprob import upcast
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective


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


@register
class Classification(Objective):
    """Sequence classification: L = -(1/n) sum_i log softmax(W h_i)[y_i] on one state of each sequence.

    Decoders pool the last real token (found by length, never by the padding id); encoders use the pooling of their family.
    The head is new, always trained and stored with any adapter. `problem: regression` uses the squared error,
    `multi_label` the binary cross-entropy. Metrics: accuracy and macro F1 over the whole set.

    Paper: BERT (arXiv 1810.04805); last-token pooling as in the transformers sequence-classification heads.
    """

    rows: ClassVar[str] = "labelled"
    head: ClassVar[str] = "classification"

    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    """Kind of labels: one class, several classes at once, or a number."""
    label_smoothing: OpenFraction = 0.0
    """Share of the target spread over all classes."""

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay sequences out with their labels, (S,), or (S, C) for several labels each."""
        sequences = [Sequence(r["ids"], [0] * len(r["ids"]), prompt=len(r["ids"])) for r in rows]
        kind = torch.long if self.problem == "single_label" else torch.float32
        labels = torch.tensor([r["label"] for r in rows], dtype=kind)
        extra = {"labels": labels}
        # Encoders pool inside their own head, which takes the first token of each row.
        packed = hasattr(roles.model, "score")
        batch = roles.layout(sequences, [r["row"] for r in rows], extra, packed)
        if rows and rows[0].get("type_ids") and batch.layout is None:
            types = torch.zeros_like(batch.input_ids)
            for i, row in enumerate(rows):
                types[i, : len(row["type_ids"])] = torch.tensor(row["type_ids"])
            batch = batch.with_extra(token_type_ids=types)
        return batch

    def measures(self) -> Measures:
        """Return the error or the accuracies, depending on the kind of labels."""
        if self.problem == "regression":
            return {"absolute_error": "min"}
        return {"accuracy": "max", "macro_f1": "max"} if self.problem == "single_label" else {"accuracy": "max"}

    def weight(self, batch: Batch) -> float:
        """Return the number of sequences, the loss denominator."""
        return float(batch.extra["labels"].shape[0])

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the labels."""
        scores = roles.policy(batch, want="scores")["scores"]
        labels = batch.extra["labels"]
        count = float(labels.shape[0])
        if not count:
            return Loss(scores.sum() * 0.0, {"accuracy": (0.0, 0.0)})
        if self.problem == "regression":
            total = ((scores.squeeze(-1) - labels) ** 2).sum()
            return Loss(total, {"absolute_error": ((scores.squeeze(-1) - labels).abs().sum(), count)})
        if self.problem == "multi_label":
            total = F.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(-1).sum()
            right = ((scores > 0) == (labels > 0.5)).all(-1).float().sum()
            return Loss(total, {"accuracy": (right, count)})
        total = cross_entropy(scores, labels, self.label_smoothing)
        return Loss(total, {"accuracy": ((scores.argmax(-1) == labels).float().sum(), count)})

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return predictions (S,) and gold labels (S,), for metrics of the whole set."""
        if self.problem != "single_label":
            return {}
        with torch.no_grad():
            scores = roles.policy(batch, want="scores")["scores"]
        return {"predicted": scores.argmax(-1).cpu(), "gold": batch.extra["labels"].cpu()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute macro F1 over the gathered predictions."""
        if "gold" not in tensors:
            return {}
        return {"macro_f1": macro_f1(tensors["predicted"], tensors["gold"])}
