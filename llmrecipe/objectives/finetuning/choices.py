"""Fine-tuning on questions with answer choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, NonNegativeFloat
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.data.row_types.choices import SIZES
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.token_math import collate_tokens, log1mexp
from llmrecipe.runs.open_model import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.recipe.schema import Recipe


DIVISORS = {"tokens": "choice_tokens", "characters": "choice_chars", "bytes": "choice_bytes"}
"""What a summed log-probability is divided by -> the column with its size for each choice."""
ALONE = "alone"
"""Key of an evaluated row whose choices are also scored without the prompt: the token they follow instead."""


def unlikelihood(logprobs: Tensor, floor: float = 0.0) -> Tensor:
    """Return -log(1 - p + floor) of each token, (N,), from its log p, (N,)."""
    return -torch.log1p(floor - logprobs.exp()) if floor else -log1mexp(logprobs)


def choice_softmax(scores: Tensor, row: Tensor, right: Tensor, rows: int) -> Tensor:
    """Compute -log [e^b_right / sum over its row's choices e^b] of each row, (R,).

    Args:
        scores: (C,) b of each choice.
        row: (C,) which row a choice belongs to.
        right: (R,) places of the right choices, one a row.
        rows: R.
    """
    top = scores.new_full((rows,), float("-inf")).scatter_reduce(0, row, scores.detach(), "amax")
    total = scores.new_zeros(rows).index_add(0, row, (scores - top[row]).exp())
    return top + total.log() - scores.new_zeros(rows).index_add(0, row[right], scores[right])


def choice_scores(logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (summed log-probability, number of tokens) of each choice, both (C,), from token log-probabilities (N,)."""
    choices = batch.extra["choice"]
    return batch.sum_by_sequence(logprobs)[choices], batch.counts().to(logprobs.dtype)[choices]


def text_scores(logprobs: Tensor, batch: Batch, name: str = "choice") -> Tensor:
    """Return the summed log-probability of each choice's text, (C,), without the tokens that end it.

    Args:
        logprobs: (N,) of the targets.
        name: of the sequences: `choice`, or `choice_alone`.
    """
    sequences, counts = batch.extra[name], batch.counts().long()
    place = torch.arange(len(logprobs), device=logprobs.device) - (counts.cumsum(0) - counts)[batch.sequence]
    kept = counts.index_copy(0, sequences, batch.extra["choice_tokens"])
    return batch.sum_by_sequence(torch.where(place < kept[batch.sequence], logprobs, 0.0))[sequences]


def likeliest(scores: Tensor, row: Tensor, place: Tensor, rows: int) -> Tensor:
    """Return the place of the largest score of each row, (R,), the first of equal ones.

    Args:
        scores: (C,) of the choices.
        row: (C,) which row each belongs to.
        place: (C,) its place among the options of the row.
        rows: R.
    """
    best = scores.new_full((rows,), float("-inf")).scatter_reduce(0, row, scores, "amax")
    nowhere = len(place)
    top = torch.where(scores == best[row], place, nowhere)
    return place.new_full((rows,), nowhere).scatter_reduce(0, row, top, "amin")


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands for an empty prompt: the start token, or the end token where there is none.

    Raises:
        RecipeError: the tokenizer has neither.
    """
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise RecipeError(
            "objective.mutual_information: the tokenizer has no start and no end token to stand for no prompt; name one "
            "that has (tokenizer.path), or set objective.mutual_information=false"
        )
    return int(found)


def lay_out_choices(rows: list[dict[str, Any]], roles: Roles) -> Batch:
    """Lay out each prompt (once for decoders) and every choice that continues it.

    `extra` says which sequence is a choice, of which row, and which of its options in their order: `choice`, `choice_row`
    and `choice_place`, (C,) each; and which of the choices are right ones, `right_places`, and which are not, `wrong_places`.
    """
    sequences: list[Sequence] = []
    whole: list[dict[str, Any]] = []
    places: list[tuple[int, int, int, bool]] = []
    alone: list[int] = []
    for number, row in enumerate(rows):
        prompt, at = list(row["prompt_ids"]), len(sequences)
        task = int(row.get("task", 0))
        sequences.append(Sequence(prompt, [0] * len(prompt), prompt=len(prompt), task=task))
        start = 0
        for i, length in enumerate(row["choice_lengths"]):
            answer = list(row["choice_ids"][start : start + length])
            start += length
            listed = row["right"] if i == 0 else i - (i <= row["right"])
            places.append((len(whole) if roles.engine.is_pair_model else len(sequences), number, listed, i == 0))
            sequences.append(Sequence(answer, [1] * length, parent=at, task=task))
            joined = {"ids": prompt + answer, "trained": [0] * len(prompt) + [1] * length}
            whole.append({**joined, "row": row["row"], "task": task})
            if ALONE in row:
                alone.append(len(whole) if roles.engine.is_pair_model else len(sequences))
                ids, trained = [row[ALONE], *answer], [0, *[1] * length]
                sequences.append(Sequence(ids, trained, prompt=1, task=task))
                whole.append({"ids": ids, "trained": trained, "row": row["row"], "task": task})
    if roles.engine.is_pair_model:
        batch = collate_tokens(whole, roles)
    else:
        batch = roles.layout(sequences, [row["row"] for row in rows])
    columns = torch.tensor(places, dtype=torch.long).view(len(places), 4).unbind(1)
    right = columns[3].bool()
    found = {name: torch.tensor([size for row in rows for size in row[name]], dtype=torch.long) for name in SIZES}
    found |= {"right_places": right.nonzero().squeeze(1), "wrong_places": (~right).nonzero().squeeze(1)}
    if alone:
        found["choice_alone"] = torch.tensor(alone)
    return batch.with_extra(choice=columns[0], choice_row=columns[1], choice_place=columns[2], **found)


def ranked_texts(logprobs: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return the scores (C,) of the choices' texts by which each rank orders them, from token log-probabilities (N,)."""
    sums = text_scores(logprobs, batch)
    found = {"sum": sums, **{name: sums / batch.extra[column].clamp_min(1) for name, column in DIVISORS.items()}}
    if "choice_alone" in batch.extra:
        found["mutual_information"] = sums - text_scores(logprobs, batch, "choice_alone")
    return {f"rank_accuracy/{name}": values for name, values in found.items()}


@register
class Choices(Objective):
    """Answer choices (T-Few): L = L_LM + u L_UL + n L_LN, the mean over rows, for a right answer y and wrong ones y'.

    L_LM = -(1/T) sum_t log p(y_t | x, y_<t)                   the right answer is likely
    L_UL = -sum_y' sum_t log(1 - p(y'_t)) / sum_y' T'          no token of a wrong one is
    L_LN = -log [e^b(y) / (e^b(y) + sum_y' e^b(y'))]           and it ranks first, b(y) = (1/T) sum_t log p(y_t) = -L_LM

    Rows are a `prompt`, its `completion` and the `options` to choose from (a pair of a chosen and a rejected answer is one of
    two); a row without wrong options has L_LM alone. A packed batch reads each prompt once; encoder-decoder models read it
    once a choice. L_UL is meant for short labels: tokens that a right answer shares with a wrong one are pushed down with it,
    so whole sentences that differ in a word want `unlikelihood_weight: 0`. `rank_accuracy` is the share of the rows with a
    choice whose right answer has the largest b. The other ranks score an answer's text without the tokens that end it:
    `rank_accuracy/sum` by summed log-probability, `/tokens`, `/characters` and `/bytes` by that sum over the tokens,
    characters and UTF-8 bytes of the text, `/mutual_information` by log p(y | x) - log p(y), where nothing but the start
    token (or, without one, the end token) precedes y. The sum, characters, bytes and mutual information are acc, acc_norm,
    acc_bytes and acc_mutual_info of lm-evaluation-harness. Of equal scores the option listed first counts as chosen, and
    before a right answer that is not listed, or of a pair, the other one.

    `loss_type: error` has L = 1 - `rank_accuracy` instead, the share of the rows whose right answer does not rank first. It has
    no gradient: it needs an update rule that does without, such as `stack=[mezo]`, and batches large enough to tell weights
    apart, since L moves in steps of one row.

    Paper: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (arXiv 2205.05638). Its code
    adds 1e-2 inside the logarithm of L_UL: `unlikelihood_floor`.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "choices"
    headline: ClassVar[tuple[str, ...]] = ("rank_accuracy",)
    head: ClassVar[str] = "causal"
    encoder_decoders: ClassVar[bool] = True

    loss_type: Literal["likelihood", "error"] = "likelihood"
    """The three terms, or the share of rows that are answered wrongly."""
    unlikelihood_weight: NonNegativeFloat = 1.0
    """Factor u of the unlikelihood of wrong answers."""
    ranking_weight: NonNegativeFloat = 1.0
    """Factor n of the softmax over the choices."""
    unlikelihood_floor: NonNegativeFloat = 0.0
    """Added inside the logarithm of the unlikelihood, which bounds it."""
    mutual_information: bool = False
    """Whether evaluations also read every answer without its prompt, for `rank_accuracy/mutual_information`."""

    def has_gradient(self) -> bool:
        """Return whether likelihoods are trained."""
        return self.loss_type == "likelihood"

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse rows among which none has a wrong answer, and mutual information without a token for an empty prompt.

        Raises:
            RecipeError: naming what to do.
        """
        if self.mutual_information:
            prefix_token(tokenizer_of(recipe.model, recipe.tokenizer))
        lengths = data.column("choice_lengths")
        if lengths and max(map(len, lengths)) < 2:
            raise RecipeError(
                "objective: choices needs rows with a wrong answer, and none of the training rows has one: give them `options` "
                "(data.columns.options=COLUMN), or use objective=sft"
            )

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a split, marked where their choices are to be read without the prompt, too."""
        rows = super().evaluation_rows(data, indices)
        return [{**row, ALONE: True} for row in rows] if self.mutual_information else rows

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out each prompt (once for decoders) and every choice that continues it; `extra` says which is which."""
        return lay_out_choices([{**r, ALONE: prefix_token(roles.tokenizer)} if ALONE in r else r for r in rows], roles)

    def measures(self) -> Measures:
        """Return the parts of the loss, and how often the right answer ranks first."""
        alone = ("mutual_information",) if self.mutual_information else ()
        ranks = ("rank_accuracy", *(f"rank_accuracy/{name}" for name in ("sum", *DIVISORS, *alone)))
        return {"nll": "min", "unlikelihood": "min", "ranking": "min", **dict.fromkeys(ranks, "max")}

    def weight(self, batch: Batch) -> float:
        """Return the number of rows, the loss denominator."""
        return float(len(batch.extra["right_places"]))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the rows."""
        logprobs = roles.policy(batch)["logprobs"]
        row, right, wrong = (batch.extra[name] for name in ("choice_row", "right_places", "wrong_places"))
        count = int(self.weight(batch))
        sums, tokens = choice_scores(logprobs, batch)
        scores = sums / tokens.clamp_min(1.0)
        against = batch.sum_by_sequence(unlikelihood(logprobs, self.unlikelihood_floor))[batch.extra["choice"]]
        zeros = logprobs.new_zeros(count)
        likely = -zeros.index_add(0, row[right], scores[right])
        unlikely = zeros.index_add(0, row[wrong], against[wrong])
        unlikely = unlikely / zeros.index_add(0, row[wrong], tokens[wrong]).clamp_min(1.0)
        ranked = choice_softmax(scores, row, right, count)
        total = likely + self.unlikelihood_weight * unlikely + self.ranking_weight * ranked
        metrics: dict[str, tuple[Any, float]] = {
            "nll": (likely.detach().sum(), float(count)),
            "unlikelihood": (unlikely.detach().sum(), float(count)),
            "ranking": (ranked.detach().sum(), float(count)),
        }
        ranked_by = {"rank_accuracy": scores.detach(), **ranked_texts(logprobs.detach(), batch)}
        ranks = self._ranks(ranked_by, batch, count)
        missed = ranks["rank_accuracy"][1] - ranks["rank_accuracy"][0]
        return Loss(total.sum() if self.has_gradient() else missed.to(total.dtype), {**metrics, **ranks})

    def _ranks(self, ranked_by: dict[str, Tensor], batch: Batch, count: int) -> dict[str, tuple[Any, float]]:
        """Count how often the right answer is the likeliest one, of the rows that have a wrong one."""
        found = {}
        row, place, right, wrong = (batch.extra[n] for n in ("choice_row", "choice_place", "right_places", "wrong_places"))
        here = batch.here.extra
        of = float(here["choice_row"][here["wrong_places"]].unique().numel())
        compared = torch.zeros(count, dtype=torch.bool, device=row.device).index_fill(0, row[wrong], True)
        for name, values in ranked_by.items():
            own = place.new_zeros(count).index_copy(0, row[right], place[right])
            found[name] = (((likeliest(values, row, place, count) == own) & compared).sum(), of)
        return found
