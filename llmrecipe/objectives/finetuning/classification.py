"""Sequence classification."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.models.resolve_class import label_config
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.finetuning._engines.label_prediction import LabelPrediction
from llmrecipe.objectives.finetuning._engines.pooled_scores import PooledScores

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


@register
class Classification(PooledScores, LabelPrediction, Objective):
    """Sequence classification: L = -(1/n) sum_i log softmax(W h_i)[y_i] on one state of each sequence.

    Decoders pool the last real token (found by length, never by the padding id); encoders use the pooling of their family.
    With `pooling` h_i is the mean of the last states, the first or the last one, and W one new linear layer, which
    `export --to sentence_transformers` writes with it. The head is new, always trained and stored with any adapter. With
    `problem: multi_label` a row has a list of labels, and the loss is the binary cross-entropy,
    (1/n) sum_i (1/C) sum_c -[y_ic log p_ic + (1 - y_ic) log(1 - p_ic)]. `class_weights` make the loss of a step
    -sum_i w[y_i] log p_i[y_i] / sum_i w[y_i]; evaluations are without them.
    With `focal_gamma` g each term -log p is multiplied by (1 - p)^g, p the probability of the right label.

    Metrics of the whole set: accuracy (of all labels of a row at once), F1 averaged over classes (`macro_f1`) and over their
    rows (`weighted_f1`), Matthews' correlation (`mcc`) and the expected calibration error in 15 bins (`ece`); of several labels
    a row `micro_f1` of all of them together. `final/test_labels.json` has the confusion matrix and precision, recall and F1 of
    each label on the test rows.

    Papers: BERT (arXiv 1810.04805); last-token pooling as in the transformers sequence-classification heads; On Calibration of
    Modern Neural Networks (arXiv 1706.04599); Focal Loss for Dense Object Detection (arXiv 1708.02002), without its class
    balance a, which is `class_weights`.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "labelled"
    resampled: ClassVar[bool] = True

    @cached_property
    def classes(self) -> list[str]:
        """Hold the labels of the training rows, in the order of their ids, once they are known."""
        return []

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse what no prediction of labels can be; keep the names of the labels."""
        super().check(recipe, data)
        self.classes[:] = data.labels or []

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add a head on pooled states, whose outputs the config names, where states are pooled here."""
        if self.pooled is not None:
            label_config(model.config, self.classes)
        self.add_label_head(model, len(self.classes), seed)
        super().prepare_model(model, seed)

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay sequences out with their labels, (S,), or a 0 or 1 for each class, (S, C)."""
        return self.lay_out(rows, roles, {"labels": self.labels_of(rows, roles)})
