"""Multi-task fine-tuning of a hypermodel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Field, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.core.tasks import Tasks
from llmrecipe.data.collate import Batch
from llmrecipe.data.row_types.choices import SIZES
from llmrecipe.data.token_data import TokenData
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.examples import padded_texts, under_others, with_examples
from llmrecipe.objectives.finetuning.choices import choice_scores, lay_out_choices, likeliest
from llmrecipe.objectives.row_draws import generator
from llmrecipe.objectives.token_math import TOKEN_METRICS

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.recipe.schema import Recipe

SPLIT = "split"
"""Key of an evaluated row: the rows of its split, among which its examples are."""
PLACE = "place"
"""Key of an evaluated row: its index among them, which in a part of a split is not that in its file."""
FEWEST = 2
"""Rows of a task: one to answer and one to show."""
UNKNOWN = -1

_members: WeakKeyDictionary[Any, dict[int, list[int]]] = WeakKeyDictionary()


def rows_by_task(data: Any) -> Mapping[int, list[int]]:  # noqa: ANN401 (rows of a split, or of a part of one)
    """Return task -> the indices of its rows, tasks in order, from the column of tasks alone, once for each set of rows."""
    if data not in _members:
        found: dict[int, list[int]] = {}
        for index, task in enumerate(data.task_numbers()):
            found.setdefault(task, []).append(index)
        _members[data] = dict(sorted(found.items()))
    return _members[data]


def drawn(members: list[int], without: int | None, counts: tuple[int, int], draws: np.random.Generator) -> list[int]:
    """Return the rows of an episode: k of the members in random order, k uniform in `counts`, never the row to be answered."""
    others = [index for index in members if index != without]
    k = int(draws.integers(counts[0], counts[1] + 1))
    return [others[i] for i in draws.permutation(len(others))[:k]]


def right_answer(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a row's right answer."""
    return list(row["choice_ids"][: row["choice_lengths"][0]])


@register
class HyperMtf(Objective):
    """Multi-task fine-tuning of a hypermodel: L = -(1/N) sum_t log P(y_t | x, y_<t; theta, phi = H(S)), S k rows of x's task.

    Rows are a `prompt`, its `completion` (and the `options` to choose from) and the name of their `task`. In each step the
    hypermodel of `stack.hypertuning` reads, for every row, `k_shot` other rows of the same task with their answers, drawn
    from (seed, epoch, row); the row itself is never among them. The frozen model reads the prompt alone. N counts tokens of
    right answers over the whole optimizer step. Rows of another split may belong to tasks that were never trained: their
    examples come from that split. A row that is the only one of its task has no examples.

    Of rows with options `rank_accuracy` is the share whose right answer has the largest mean log-probability, and
    `rank_accuracy/tasks` and `macro_f1` are means over tasks. The loss is also computed with the examples of another task
    (`nll/other_task`): `task_gain` is what the right ones are worth, in nats a token; 0 where phi tells nothing. Text metrics
    (`eval.metrics`, rouge_l) score answers generated with the examples of each row, and NAME/tasks is their mean over tasks.

    Paper: HyperTuning (arXiv 2211.12485); rank classification as in T0 (arXiv 2110.08207), by the mean over tokens.
    """

    rows: ClassVar[str] = "choices"
    headline: ClassVar[tuple[str, ...]] = ("rank_accuracy", "task_gain")
    head: ClassVar[str] = "causal"
    encoder_decoders: ClassVar[bool] = True
    gives_examples: ClassVar[bool] = True

    k_shot: list[PositiveInt] = Field([2, 8], min_length=2, max_length=2)
    """Fewest and most examples of a task."""
    shot_tokens: PositiveInt = 512
    """Most tokens of all examples; those that do not fit are left out, and a single one is cut."""
    task_field: str = "task"
    """Column that names the task of a row."""

    def tasks(self) -> Tasks:
        """Return where a row names its task; other splits may have other tasks."""
        return Tasks(None, self.task_field, unseen=True)

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse streamed rows, tasks of a single row, and a range that is none.

        Raises:
            RecipeError: naming the key or the rows.
        """
        if not isinstance(data, TokenData):
            raise RecipeError("data.streaming: hyper_mtf draws examples from all rows of a task; set data.streaming=false")
        if self.k_shot[0] > self.k_shot[1]:
            raise RecipeError(f"objective.k_shot: {list(self.k_shot)} is no range; the fewest examples come first")
        if max(map(len, rows_by_task(data).values())) < FEWEST:
            raise RecipeError(
                f"{data.report.source}: each of the {len(data)} rows is the only one of its task, so none has an example; give "
                "several rows of each task, or raise data.limit"
            )

    def facts(self, roles: Roles) -> dict[str, Any]:
        """Return how many tasks there are, and how many rows are the only one of theirs and have no examples."""
        sizes = [len(members) for members in rows_by_task(roles.data).values()]
        return {"tasks": len(sizes), "rows_without_examples": sum(size < FEWEST for size in sizes)}

    def measures(self) -> Measures:
        """Return the metrics of answers, each also with the examples of another task."""
        own: Measures = {
            **TOKEN_METRICS,
            "rank_accuracy": "max",
            "nll/other_task": "min",
            "rank_accuracy/other_task": None,
            "task_gain": "max",
            "rank_accuracy/tasks": "max",
            "macro_f1": "max",
        }
        return own

    # --- episodes -------------------------------------------------------------------------------------------------

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows with the split they belong to, in which their examples are."""
        return [{**data[i], SPLIT: data, PLACE: i} for i in indices]

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out prompts with their answers, wrong ones only in evaluation; every row has an adapter of its own."""
        shown = [row if SPLIT in row else _without_options(row) for row in rows]
        batch = lay_out_choices([{**row, "task": number} for number, row in enumerate(shown)], roles)
        own = [self._examples(row, roles, 0) for row in rows]
        if not any(SPLIT in row for row in rows):
            return with_examples(batch, own, roles)
        answers = [_digests(row) for row in rows]
        return with_examples(batch, own, roles, [self._examples(row, roles, 1) for row in rows]).with_extra(
            task=torch.tensor([int(row["task"]) for row in rows]),
            answer=torch.tensor([d for own in answers for d in own]),
        )

    def examples_of(self, data: Rows, indices: list[int], roles: Roles) -> tuple[Tensor, Tensor]:
        """Return the examples of rows that are answered, those with which they are evaluated."""
        return padded_texts([self._examples(row, roles, 0) for row in self.evaluation_rows(data, indices)], roles)

    def _examples(self, row: dict[str, Any], roles: Roles, shift: int) -> list[int]:
        """Return the tokens of the examples of a row, or of another task's.

        Args:
            shift: 0 for the row's own task, 1 for the one after it.
        """
        data = row.get(SPLIT, roles.data)
        members = rows_by_task(data)
        tasks = list(members)
        task = tasks[(tasks.index(int(row["task"])) + shift) % len(tasks)]
        draws = generator(roles.seed, row.get("epoch"), row["row"], shift)
        found: list[int] = []
        for index in drawn(members[task], row.get(PLACE, row["row"]), (self.k_shot[0], self.k_shot[1]), draws):
            other = data[index]
            text = [*other["prompt_ids"], *right_answer(other)]
            if len(found) + len(text) <= self.shot_tokens:
                found += text
            elif not found:
                found = text[-self.shot_tokens :]
        return found

    # --- loss -----------------------------------------------------------------------------------------------------

    def weight(self, batch: Batch) -> float:
        """Return the number of tokens of right answers, the loss denominator."""
        here = batch.here
        return float(here.counts()[here.extra["choice"][here.extra["right_places"]]].sum())

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood of the right answers."""
        return self._answers(batch, roles)[0]

    def _answers(self, batch: Batch, roles: Roles) -> tuple[Loss, Tensor]:
        """Return the loss of the right answers, and the mean log-probability of a token of each choice, (C,)."""
        out = roles.policy(batch)
        sums, tokens = choice_scores(out["logprobs"], batch)
        right, count = batch.extra["right_places"], self.weight(batch)
        correct, _ = choice_scores(out["correct"].to(sums.dtype), batch)
        total = -sums[right].sum()
        loss = Loss(total, {"nll": (total.detach(), count), "accuracy": (correct[right].sum(), count)})
        return loss, (sums / tokens.clamp_min(1.0)).detach()

    def _ranked(self, batch: Batch, roles: Roles) -> tuple[Loss, Tensor]:
        """Return the loss of the right answers, and the index (R,) of each row's likeliest choice, 0 the right one."""
        loss, scores = self._answers(batch, roles)
        row, place, right = (batch.extra[name] for name in ("choice_row", "choice_place", "right_places"))
        best, own = likeliest(scores, row, place, len(right)), place[right]
        # The right answer stands before the options that are listed before it; scores that are no numbers choose the last.
        index = torch.where(best == own, 0, best + (best < own).long())
        return loss, index.minimum(torch.bincount(row, minlength=len(right)) - 1)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return loss and ranks, with the examples of the row's task and with those of another."""
        loss, best = self._ranked(batch, roles)
        ranked = _has_wrong(batch)
        share = float(ranked.sum())
        found = {"loss": (loss.total, self.weight(batch)), **loss.metrics}
        found["rank_accuracy"] = (((best == 0) & ranked).sum(), share)
        if (other := under_others(batch)) is not None:
            loss, best = self._ranked(other, roles)
            found["nll/other_task"] = loss.metrics["nll"]
            found["rank_accuracy/other_task"] = (((best == 0) & ranked).sum(), share)
        return found

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return the task, the right answer and the likeliest one of each row with a choice, as whole numbers, (R,) each."""
        if "answer" not in batch.extra:
            return {}
        _, best = self._ranked(batch, roles)
        first = _firsts(batch.extra["choice_row"], len(best))
        answers, ranked = batch.extra["answer"], _has_wrong(batch)
        chosen = torch.where(ranked, answers[first + best], UNKNOWN)
        return {"task": batch.extra["task"].cpu(), "gold": answers[first].cpu(), "chosen": chosen.cpu()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return what the right examples are worth, and means over tasks."""
        found = {"task_gain": sums["nll/other_task"] - sums["nll"]} if "nll/other_task" in sums else {}
        known = tensors["chosen"] != UNKNOWN if "chosen" in tensors else torch.zeros(0, dtype=torch.bool)
        if not bool(known.any()):
            return found
        from sklearn.metrics import f1_score  # noqa: PLC0415 (a second that only an evaluation needs)

        task, gold, chosen = (tensors[name][known].numpy() for name in ("task", "gold", "chosen"))
        each = [(gold[task == t], chosen[task == t]) for t in np.unique(task)]
        found["rank_accuracy/tasks"] = float(np.mean([np.mean(g == c) for g, c in each]))
        found["macro_f1"] = float(np.mean([f1_score(g, c, average="macro", zero_division=0.0) for g, c in each]))
        return found


def _firsts(row: Tensor, rows: int) -> Tensor:
    """Return the index of the first choice of each row, (R,)."""
    counts = torch.bincount(row, minlength=rows)
    return counts.cumsum(0) - counts


def _has_wrong(batch: Batch) -> Tensor:
    """Return whether a row has a wrong answer, (R,)."""
    return torch.bincount(batch.extra["choice_row"]) > 1


def _without_options(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose only choice is the right one."""
    sizes = {name: row[name][:1] for name in SIZES}
    return {**row, **sizes, "choice_ids": right_answer(row), "choice_lengths": row["choice_lengths"][:1], "right": 0}


def _digests(row: dict[str, Any]) -> list[int]:
    """Return a number for each choice of a row, equal for equal tokens, in every process."""
    found, start = [], 0
    for length in row["choice_lengths"]:
        tokens = np.asarray(row["choice_ids"][start : start + length], dtype=np.int64).tobytes()
        found.append(int.from_bytes(hashlib.sha256(tokens).digest()[:7], "big"))
        start += length
    return found
