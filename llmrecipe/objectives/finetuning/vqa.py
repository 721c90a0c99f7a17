"""Visual question answering."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.pooling import Pool
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.models.excluded import without_language_head
from llmrecipe.models.resolve_class import STATES, label_config
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.feature_inputs import OWN, VIEW, VIEWS, FeatureInputs, gains, measures_by_view
from llmrecipe.objectives.finetuning._engines.label_prediction import cross_entropy

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe

HEAD = "answer"
"""Role of the pooler and the outputs, one for each answer."""
POOL = Pool("last", HEAD)


@register
class Vqa(FeatureInputs, Objective):
    """Visual question answering: L = -(1/n) sum_i log softmax(W tanh(P h_i))[a_i], h_i the state of a question's last token.

    The picture (or regions, or frames) is read before the question, through the head that `mmlm` trains (see `features`), so a
    run of `mmlm` goes on as it is. Answers are classes, those of all training rows; pooler P and outputs W are new and always
    train. The model is an encoder or a decoder, whose language-model head is not used. An evaluation reads each row with its
    own picture, with none (`removed`: what the question alone gives away) and with that of another row (`shuffled`); `gain` is
    the loss an answer has more without its own picture, in nats.

    Papers: VisualBERT (arXiv 1908.03557), UNITER (arXiv 1909.11740); answers as classes as in VQA (arXiv 1505.00468).
    """

    rows: ClassVar[str] = "pictured_questions"
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "gain/removed")
    head: ClassVar[str] = STATES
    answers_labels: ClassVar[bool] = True

    @cached_property
    def answers(self) -> list[str]:
        """Hold the answers of the training rows, once they are known."""
        return []

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse features of another form."""
        self.check_features(data)
        self.answers[:] = data.labels or []

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the head that turns features into inputs, the pooler and one output for each answer, whose names are kept."""
        self.add_feature_head(model, seed)
        label_config(model.config, self.answers)
        task_heads.add_pooled_head(model, HEAD, len(self.answers), seed)
        without_language_head(model)

    def measures(self) -> Measures:
        """Return the metrics of the answers, by view."""
        return measures_by_view({"nll": "min", "accuracy": "max"})

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay questions out behind their features, with their answers (S,)."""
        length = [len(row["ids"]) for row in rows]
        sequences = [
            Sequence(row["ids"], [0] * n, prompt=n, features=self.vectors(row)) for row, n in zip(rows, length, strict=True)
        ]
        labels = torch.tensor([row["label"] for row in rows], dtype=torch.long)
        views = torch.tensor([VIEWS.index(row.get(VIEW, OWN)) for row in rows], dtype=torch.long)
        return self.lay_out(sequences, rows, roles).with_extra(labels=labels, **{VIEW: views})

    def weight(self, batch: Batch) -> float:
        """Return the number of questions, the loss denominator."""
        return float(batch.extra["labels"].numel())

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the answers."""
        labels = batch.extra["labels"]
        scores = roles.policy(batch, want="pooled", pool=POOL)["pooled"]
        count = float(labels.numel())
        # A process without rows still takes part in the backward pass.
        total = cross_entropy(scores, labels) if count else scores.sum() * 0.0
        right = (scores[: len(labels)].argmax(-1) == labels).float().sum()
        return Loss(total, {"nll": (total.detach(), count), "accuracy": (right, count)})

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return loss and accuracy of the rows with their own features, and those of the other views under their names."""
        labels, views = batch.extra["labels"], batch.extra[VIEW]
        scores = roles.policy(batch, want="pooled", pool=POOL)["pooled"][: len(labels)]
        right = (scores.argmax(-1) == labels).float()
        found: dict[str, tuple[Any, float]] = {}
        for number, view in enumerate(VIEWS):
            mine, name = views == number, "" if view == OWN else f"/{view}"
            count = float(mine.sum())
            found[f"nll{name}"] = (cross_entropy(scores[mine], labels[mine]), count)
            found[f"accuracy{name}"] = (right[mine].sum(), count)
        return {"loss": found["nll"], **found}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the loss that an answer has more without its own features."""
        return gains(sums)
