"""A number for a text or a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.correlations import correlation, rank_correlation
from llmrecipe.objectives.finetuning._engines.pooled_scores import PooledScores

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel


@register
class Regression(PooledScores, Objective):
    """Regression: L = (1/n) sum_i (w . h_i + b - y_i)^2, y_i the number that belongs to a text or a pair of texts.

    The state h_i is pooled as in `classification`, from a head with one output, which is new, always trained and stored with
    any adapter. Over the whole set `pearson` is the correlation of predictions and numbers, `spearman` that of their ranks
    (equal numbers share their mean rank); both are 0 where one side is constant.

    Source: the semantic similarity of pairs in BERT (arXiv 1810.04805), as in the transformers heads with one label.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "scored"
    headline: ClassVar[tuple[str, ...]] = ("spearman", "pearson")
    resampled: ClassVar[bool] = True

    def label_names(self) -> list[str]:
        """Name the one output."""
        return ["score"]

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the output that reads pooled states, where states are pooled here."""
        self.add_label_head(model, 1, seed)

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay sequences out with their numbers, (S,)."""
        scores = torch.tensor([r["score"] for r in rows], dtype=torch.float32)
        return self.lay_out(rows, roles, {"scores": scores})

    def measures(self) -> Measures:
        """Return the mean absolute error and both correlations."""
        return {"absolute_error": "min", "pearson": "max", "spearman": "max"}

    def weight(self, batch: Batch) -> float:
        """Return the number of sequences, the loss denominator."""
        return float(batch.extra["scores"].shape[0])

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed squared errors."""
        found, wanted = self._predicted(batch, roles), batch.extra["scores"]
        apart = found - wanted
        return Loss((apart**2).sum(), {"absolute_error": (apart.detach().abs().sum(), float(wanted.shape[0]))})

    def _predicted(self, batch: Batch, roles: Roles) -> Tensor:
        """Return the predictions (S,); a micro-batch without rows has none, and still a graph."""
        return self.scores(batch, roles).squeeze(-1)[: batch.extra["scores"].shape[0]]

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return predictions (S,) and numbers (S,)."""
        with torch.no_grad():
            return {"predicted": self._predicted(batch, roles).cpu(), "gold": batch.extra["scores"].cpu()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute both correlations over the gathered predictions."""
        x, y = tensors["predicted"], tensors["gold"]
        return {"pearson": correlation(x, y), "spearman": rank_correlation(x, y)}
