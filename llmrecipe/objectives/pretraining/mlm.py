"""Masked language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.models.masked_heads import check_masked_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.pretraining._engines.masked_tokens import MASKED_METRICS, MaskedTokens, masked_metrics
from llmrecipe.objectives.pretraining._engines.masking import corrupted, masked_targets
from llmrecipe.objectives.token_math import negative_log_likelihood

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


@register
class Mlm(MaskedTokens, Objective):
    """Masked language modelling: L = -(1/|M|) sum_{i in M} log P(x_i | x with M hidden), from both sides.

    M is a share `prob` of the tokens of a row, special tokens left out. In its place stands the mask token (0.8), a random
    token that is not special (0.1), or the token itself (0.1); all of M is predicted. Logits are computed at M alone. Masks
    follow from (seed, epoch, row): new in each epoch, the same on any number of processes and after a resume, fixed in
    evaluation. |M| is counted over the whole optimizer step.

    Departures: BERT fixes the masks of ten copies of the corpus beforehand and draws random tokens from the whole
    vocabulary; UNITER masks token 0 where Bernoulli draws choose none, here one token is drawn. `mask: 1.0, random: 0` is the
    objective as the survey writes it.

    Papers: BERT (arXiv 1810.04805); whole words and exact counts as in google-research/bert; dynamic masks: RoBERTa
    (arXiv 1907.11692); spans: SpanBERT (arXiv 1907.10529), without its boundary objective.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "words"
    head: ClassVar[str] = "masked"
    special_tokens: ClassVar[tuple[str, ...]] = ("mask",)

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse shares that exceed one."""
        self.check_shares()

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Refuse a model whose head is not known as one of a masked language model."""
        check_masked_head(model)

    def measures(self) -> Measures:
        """Return the metrics of the hidden tokens, over all of them and by what stands in their place."""
        return MASKED_METRICS

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Hide tokens and lay the rows out; targets are the hidden tokens, predicted at their own places."""
        hidden = [self.hide_tokens(row["ids"], row["words"], row, roles) for row in rows]
        sequences = [corrupted(row["ids"], found) for row, found in zip(rows, hidden, strict=True)]
        batch = roles.layout(sequences, [row["row"] for row in rows])
        return masked_targets(batch, [row["ids"] for row in rows], hidden)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood of the hidden tokens."""
        out = roles.policy(batch)
        logprobs, correct = out["logprobs"], out["correct"]
        metrics = masked_metrics(logprobs, correct, batch.extra)
        return Loss(negative_log_likelihood(logprobs), metrics)
