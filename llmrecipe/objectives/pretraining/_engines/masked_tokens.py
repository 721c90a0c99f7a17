"""Options and mathematics of objectives that predict hidden tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Fraction, Literal, PositiveFraction, PositiveInt
from llmrecipe.core.registry import options
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Measures
from llmrecipe.objectives.pretraining._engines.masking import KINDS, Hidden, MaskPlan, hide, mask_token, ordinary_tokens
from llmrecipe.objectives.row_draws import generator
from llmrecipe.objectives.token_math import TOKEN_METRICS

MASKED_METRICS: Measures = {**TOKEN_METRICS, **{f"accuracy/{kind}": "max" for kind in KINDS}}
"""Metrics of the hidden tokens, over all of them and by what stands in their place."""


@options
class MaskedTokens:
    """Mixin for an `Objective` that hides tokens of its rows and predicts them."""

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

    def check_shares(self) -> None:
        """Refuse shares that exceed one.

        Raises:
            RecipeError: `mask` and `random` together do.
        """
        if self.mask + self.random > 1.0:
            raise RecipeError(
                f"objective.mask: mask {self.mask} and random {self.random} exceed 1 together; the rest of the hidden tokens "
                "stays as it is"
            )

    def hide_tokens(self, ids: list[int], words: list[int], row: dict[str, Any], roles: Roles, number: int = 0) -> Hidden:
        """Choose the hidden tokens of a sequence.

        Args:
            ids: its tokens.
            words: the word of each, -1 for special tokens.
            row: the token row it was made from, with `row` and, in training, `epoch`.
            number: of the sequence among those of the row.
        """
        plan = MaskPlan(self.prob, self.mask, self.random, self.select == "exact", self.unit, self.max_predictions)
        epoch = row.get("epoch")
        draws = generator(roles.seed, 0 if epoch is not None and not self.dynamic else epoch, row["row"], number)
        return hide(plan, words, ids, draws, mask_token(roles.tokenizer), ordinary_tokens(roles.tokenizer))


def masked_metrics(logprobs: Tensor, correct: Tensor, kinds: dict[str, Tensor]) -> dict[str, tuple[Any, float]]:
    """Return `MASKED_METRICS` of a batch as (sum, count).

    Args:
        logprobs: (N,) of the hidden tokens.
        correct: (N,) whether each is the likeliest token.
        kinds: name -> which of the N are of that kind.
    """
    count = float(logprobs.numel())
    metrics: dict[str, tuple[Any, float]] = {"nll": (-logprobs.detach().sum(), count), "accuracy": (correct.sum(), count)}
    for kind in KINDS:
        of_kind = kinds[kind]
        metrics[f"accuracy/{kind}"] = (correct[of_kind].sum(), float(of_kind.numel()))
    return metrics
