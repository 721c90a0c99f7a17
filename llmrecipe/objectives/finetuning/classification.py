"""Sequence classification and regression."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.finetuning._engines.label_prediction import LabelPrediction


@register
class Classification(LabelPrediction, Objective):
    """Sequence classification: L = -(1/n) sum_i log softmax(W h_i)[y_i] on one state of each sequence.

    Decoders pool the last real token (found by length, never by the padding id); encoders use the pooling of their family.
    The head is new, always trained and stored with any adapter. `problem: regression` uses the squared error,
    `multi_label` the binary cross-entropy. Metrics: accuracy and macro F1 over the whole set.

    Paper: BERT (arXiv 1810.04805); last-token pooling as in the transformers sequence-classification heads.
    """

    rows: ClassVar[str] = "labelled"
    head: ClassVar[str] = "classification"

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay sequences out with their labels, (S,), or (S, C) for several labels each."""
        sequences = [Sequence(r["ids"], [0] * len(r["ids"]), prompt=len(r["ids"])) for r in rows]
        extra = {"labels": self.labels_of(rows)}
        # Encoders pool inside their own head, which takes the first token of each row.
        packed = hasattr(roles.model, "score")
        batch = roles.layout(sequences, [r["row"] for r in rows], extra, packed)
        if rows and rows[0].get("type_ids") and batch.layout is None:
            types = torch.zeros_like(batch.input_ids)
            for i, row in enumerate(rows):
                types[i, : len(row["type_ids"])] = torch.tensor(row["type_ids"])
            batch = batch.with_extra(token_type_ids=types)
        return batch
