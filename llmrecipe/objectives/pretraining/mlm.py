"""Masked language modelling."""

from __future__ import annotations

from typing import Any, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Fraction, Literal, PositiveFraction, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.role_models import Roles
from llmrecipe.models.masked_heads import check_masked_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.pretraining._engines.masking import (
    KINDS,
    Hidden,
    Plan,
    generator,
    hide,
    mask_token,
    masked_targets,
    ordinary_tokens,
)
from llmrecipe.objectives.token_math import TOKEN_METRICS, negative_log_likelihood


@register
class Mlm(Objective):
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

    rows: ClassVar[str] = "words"
    head: ClassVar[str] = "masked"

    prob: PositiveFraction = 0.15
    """Share of a row's tokens that are hidden."""
    mask: Fraction = 0.8
    """Share of hidden tokens that become the mask token."""
    random: Fraction = 0.1
    """Share of hidden tokens that become a random token; the rest stay as they are."""
    select: Literal["exact", "bernoulli"] = "exact"
    """Hide round(prob * n) of a row's n tokens, at least one; or each token by itself, at least one of the row."""
    unit: Literal["token", "word", "span"] = "token"
    """What is hidden as a whole: a token, the tokens of a word, or a run of words (`select` counts tokens, exactly)."""
    max_predictions: PositiveInt | None = None
    """Most tokens that are hidden in a row."""
    dynamic: bool = True
    """Draw new masks in each epoch; otherwise those of the first are used throughout."""

    def check(self, recipe: Any, data: Any) -> None:
        """Refuse shares that exceed one."""
        if self.mask + self.random > 1.0:
            raise RecipeError(
                f"objective.mask: mask {self.mask} and random {self.random} exceed 1 together; the rest of the hidden tokens "
                "stays as it is"
            )

    def prepare_model(self, model: Any, seed: int) -> None:
        """Refuse a model whose head is not known as one of a masked language model."""
        check_masked_head(model)

    def measures(self) -> Measures:
        """Return the metrics of the hidden tokens, over all of them and by what stands in their place."""
        return {**TOKEN_METRICS, **{f"accuracy/{kind}": "max" for kind in KINDS}}

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Hide tokens and lay the rows out; targets are the hidden tokens, predicted at their own places."""
        hidden = [self._hide(row, roles) for row in rows]
        sequences = []
        for row, found in zip(rows, hidden, strict=True):
            ids = list(row["ids"])
            for place, shown in zip(found.places, found.shown, strict=True):
                ids[place] = shown
            sequences.append(Sequence(ids, [0] * len(ids), prompt=len(ids)))
        batch = roles.layout(sequences, [row["row"] for row in rows])
        return masked_targets(batch, rows, hidden)

    def _hide(self, row: dict[str, Any], roles: Roles) -> Hidden:
        plan = Plan(self.prob, self.mask, self.random, self.select == "exact", self.unit, self.max_predictions)
        epoch = row.get("epoch")
        draws = generator(roles.seed, 0 if epoch is not None and not self.dynamic else epoch, row["row"])
        return hide(plan, row["words"], row["ids"], draws, mask_token(roles.tokenizer), ordinary_tokens(roles.tokenizer))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood of the hidden tokens."""
        out = roles.policy(batch)
        logprobs, correct = out["logprobs"], out["correct"]
        metrics: dict[str, tuple[Any, float]] = {
            "nll": (-logprobs.detach().sum(), float(logprobs.numel())),
            "accuracy": (correct.sum(), float(logprobs.numel())),
        }
        for kind in KINDS:
            of_kind = batch.extra[kind]
            metrics[f"accuracy/{kind}"] = (correct[of_kind].sum(), float(of_kind.numel()))
        return Loss(negative_log_likelihood(logprobs), metrics)
