"""Sequence classification."""

from __future__ import annotations

from typing import Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.finetuning._engines.label_prediction import LabelPrediction
from llmrecipe.objectives.finetuning._engines.text_rows import text_batch


@register
class Classification(LabelPrediction, Objective):
    """Sequence classification: L = -(1/n) sum_i log softmax(W h_i)[y_i] on one state of each sequence.

    Decoders pool the last real token (found by length, never by the padding id); encoders use the pooling of their family.
    The head is new, always trained and stored with any adapter. With `problem: multi_label` a row has a list of labels, and the
    loss is the binary cross-entropy, (1/n) sum_i (1/C) sum_c -[y_ic log p_ic + (1 - y_ic) log(1 - p_ic)]. Metrics: accuracy
    (of all labels of a row at once) and macro F1 over the whole set.

    Paper: BERT (arXiv 1810.04805); last-token pooling as in the transformers sequence-classification heads.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "labelled"
    head: ClassVar[str] = "classification"
    resampled: ClassVar[bool] = True

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay sequences out with their labels, (S,), or a 0 or 1 for each class, (S, C)."""
        # Encoders pool inside their own head, which takes the first token of each row.
        return text_batch(rows, roles, {"labels": self.labels_of(rows, roles)}, packed=hasattr(roles.model, "score"))
