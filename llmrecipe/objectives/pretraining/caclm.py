"""Context-augmented causal language modelling: hyperpretraining."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.examples import under_others, with_examples
from llmrecipe.objectives.row_draws import generator
from llmrecipe.objectives.token_math import TOKEN_METRICS, collate_tokens, token_loss

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.recipe.schema import Recipe

SHORTEST = 8
"""Tokens a row needs to be cut into four segments."""
OTHER = "other_ids"
"""Key of an evaluated row: the row whose context it is read with for comparison."""


def cut_points(length: int, sizes: Seq[int], draws: np.random.Generator) -> list[int]:
    """Return five places 0 <= p_0 < ... < p_4 <= length; the segments lie between them, in the order A, B, C, D.

    The segments have the ratios of `sizes`, each length times a random factor from 0.75 to 1.25, so that no position says which
    segment it belongs to. A longer row is entered at a random place.

    Args:
        length: tokens of the row, at least `SHORTEST`.
        sizes: most tokens of A, B, C and D.
    """
    shares = np.asarray(sizes, dtype=float) * draws.uniform(0.75, 1.25, len(sizes))
    room = min(length, sum(sizes))
    ends = np.floor(np.cumsum(shares) / shares.sum() * room).astype(int)
    for i in range(len(ends)):
        ends[i] = max(ends[i], 1 if i == 0 else ends[i - 1] + 1)
    ends = np.minimum(ends, [room - len(sizes) + 1 + i for i in range(len(sizes))])
    first = int(draws.integers(length - room + 1))
    return [first, *(first + int(end) for end in ends)]


@register
class Caclm(Objective):
    """Context-augmented causal language modelling: L = -(1/N) sum_t log P(C_t | B, C_<t; theta, phi = H(A, D)).

    A text is cut into segments A B C D. The hypermodel of `stack.hypertuning` reads A and D, joined by an end token, and writes
    phi; the frozen model reads B and predicts C. What A and D say can reach C through phi alone. Cuts follow from (seed, epoch,
    row), fixed in evaluation. Encoder-decoders read B in the encoder. Rows of fewer than 8 tokens have no segments and no loss.

    Evaluation also computes the loss with A and D of another text, `nll/other_context`, and `context_gain`, what the right ones
    are worth: nats a token, 0 where phi says nothing about its text.

    Paper: HyperTuning (arXiv 2211.12485), whose segment lengths are not public; those here are options.
    """

    rows: ClassVar[str] = "text"
    headline: ClassVar[tuple[str, ...]] = ("context_gain",)
    head: ClassVar[str] = "causal"
    encoder_decoders: ClassVar[bool] = True
    special_tokens: ClassVar[tuple[str, ...]] = ("eos",)
    gives_examples: ClassVar[bool] = True

    before: PositiveInt = 128
    """Most tokens of A."""
    given: PositiveInt = 96
    """Most tokens of B."""
    predicted: PositiveInt = 64
    """Most tokens of C."""
    after: PositiveInt = 128
    """Most tokens of D."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse rows none of which is long enough.

        Raises:
            RecipeError: naming the length.
        """
        if data.report.longest < SHORTEST:
            raise RecipeError(
                f"data: the longest of the training rows has {data.report.longest} tokens, and caclm cuts texts of at least "
                f"{SHORTEST} into four segments"
            )

    def measures(self) -> Measures:
        """Return the metrics of the predicted tokens, and what the context is worth."""
        return {**TOKEN_METRICS, "nll/other_context": "min", "context_gain": "max"}

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows, each with the text of the next one, whose context it is read with for comparison."""
        return [{**data[i], OTHER: data[(i + 1) % len(data)]["ids"]} for i in indices]

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Cut each row into segments; every row has an adapter of its own."""
        cuts = [self._segments(row, row["ids"], roles) for row in rows]
        read = [
            {"row": row["row"], "ids": [*b, *c], "trained": [0] * len(b) + [1] * len(c), "task": number}
            for number, (row, (_, b, c, _)) in enumerate(zip(rows, cuts, strict=True))
        ]
        others = [self._segments(row, row[OTHER], roles) for row in rows if OTHER in row]
        return with_examples(
            collate_tokens(read, roles),
            [self._joined(a, d, roles) for a, _, _, d in cuts],
            roles,
            [self._joined(a, d, roles) for a, _, _, d in others] or None,
        )

    def _segments(self, row: dict[str, Any], ids: list[int], roles: Roles) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return A, B, C and D of a text; B alone where it is too short."""
        if len(ids) < SHORTEST:
            return [], list(ids), [], []
        draws = generator(roles.seed, row.get("epoch"), row["row"])
        p = cut_points(len(ids), (self.before, self.given, self.predicted, self.after), draws)
        a, b, c, d = (list(ids[first:last]) for first, last in pairwise(p))
        return a, b, c, d

    def _joined(self, a: list[int], d: list[int], roles: Roles) -> list[int]:
        return [*a, int(roles.tokenizer.eos_token_id), *d]

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood of the predicted segments."""
        return token_loss(batch, roles)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return loss and token metrics, with the right context and with another text's."""
        loss = self.loss(batch, roles)
        found = {"loss": (loss.total, self.weight(batch)), **loss.metrics}
        if (other := under_others(batch)) is not None:
            found["nll/other_context"] = token_loss(other, roles).metrics["nll"]
        return found

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return what the right context is worth."""
        if "nll/other_context" not in sums:
            return {}
        return {"context_gain": sums["nll/other_context"] - sums["nll"]}
