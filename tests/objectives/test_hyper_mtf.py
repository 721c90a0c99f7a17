"""hyper_mtf: which rows are shown, which are answered, and its metrics by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from llmrecipe.cli.app import run_command
from llmrecipe.core.forward_context import Context
from llmrecipe.data import prepare
from llmrecipe.engine.generation import decode_ids, generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.evaluate_runs import TaskRows
from llmrecipe.feedback.directions import measured
from llmrecipe.feedback.generated_answers import answer_rows, score_answers
from llmrecipe.objectives.finetuning.hyper_mtf import HyperMtf, drawn, rows_by_task
from llmrecipe.recipe.compose import compose
from llmrecipe.runs.open_model import tokenizer_of
from tests.objectives.harness import Case, Held


def row(number: int, task: int) -> dict[str, Any]:
    """A row whose tokens name it: 1000 + its number, and 2000 + its number for the right answer."""
    choices = {"choice_ids": [2000 + number, 2, 3000, 2], "choice_lengths": [2, 2]}
    sizes = {"choice_tokens": [1, 1], "choice_chars": [4, 4], "choice_bytes": [4, 4], "right": 0}
    return {"row": number, "prompt_ids": [1, 1000 + number], **choices, **sizes, "task": task}


def shown(batch: Any, index: int) -> list[int]:
    return batch.extra["example_ids"][index][batch.extra["example_mask"][index].bool()].tolist()


def test_a_row_is_shown_others_of_its_task_with_their_answers_and_never_itself() -> None:
    case = Case("hyper_mtf")
    rows = [row(i, i % 3) for i in range(12)]
    case.roles.data = Held(rows)
    objective = HyperMtf(k_shot=[2, 3])
    counts = set()
    for epoch in range(30):
        batch = objective.collate([{**r, "epoch": epoch} for r in rows], case.roles)
        assert batch.target.tolist() == [t for r in rows for t in (2000 + r["row"], 2)], "wrong answers are not trained"
        for r in rows:
            tokens = shown(batch, r["row"])
            numbers = [t - 1000 for t in tokens if 1000 <= t < 2000]
            assert tokens == [t for n in numbers for t in (1, 1000 + n, 2000 + n, 2)]
            assert r["row"] not in numbers and len(set(numbers)) == len(numbers)
            assert {n % 3 for n in numbers} == {r["task"]}
            counts.add(len(numbers))
    assert counts == {2, 3}


def test_evaluated_rows_are_shown_rows_of_their_own_split() -> None:
    """The training rows hold other tokens; a second set of examples belongs to the next task."""
    case = Case("hyper_mtf")
    held = Held([row(500 + i, i % 2) | {"row": i} for i in range(8)])
    batch = HyperMtf(k_shot=[2, 2]).collate(HyperMtf().evaluation_rows(held, [0, 1]), case.roles)
    for index in (0, 1):
        assert {(t - 1500) % 2 for t in shown(batch, index) if 1500 <= t < 2000} == {index}
        other = batch.extra["other_ids"][index].tolist()
        assert {(t - 1500) % 2 for t in other if 1500 <= t < 2000} == {1 - index}
    assert batch.extra["choice"].shape == (4,), "and all answers are ranked"


def test_a_row_of_a_part_of_a_split_is_not_shown_to_itself() -> None:
    """Row 4 of a file is the second of three; its number in the file says nothing about its place among them."""
    case = Case("hyper_mtf")
    part = TaskRows(Held([row(i, 0) for i in range(6)]), [1, 4, 5], [0, 0, 0])
    objective = HyperMtf(k_shot=[2, 2])
    batch = objective.collate(objective.evaluation_rows(part, [0, 1, 2]), case.roles)
    for index, own in enumerate((1, 4, 5)):
        assert {t - 1000 for t in shown(batch, index) if 1000 <= t < 2000} == {1, 4, 5} - {own}


def test_examples_that_do_not_fit_are_left_out_and_a_single_one_is_cut() -> None:
    case = Case("hyper_mtf")
    case.roles.data = Held([row(i, 0) for i in range(6)])
    batch = HyperMtf(k_shot=[5, 5], shot_tokens=9).collate([row(0, 0)], case.roles)
    assert len(shown(batch, 0)) == 8
    batch = HyperMtf(k_shot=[5, 5], shot_tokens=3).collate([row(0, 0)], case.roles)
    assert len(shown(batch, 0)) == 3 and shown(batch, 0)[-1] == 2


def test_a_row_alone_in_its_task_has_no_examples_and_is_counted() -> None:
    case = Case("hyper_mtf")
    case.roles.data = Held([row(0, 0), row(1, 1), row(2, 1)])
    batch = HyperMtf().collate([row(0, 0), row(1, 1)], case.roles)
    assert shown(batch, 0) == [] and shown(batch, 1) == [1, 1002, 2002, 2]
    assert HyperMtf().facts(case.roles) == {"tasks": 2, "rows_without_examples": 1}


def test_draws_are_even() -> None:
    """Every other member is drawn about equally often."""
    counts = np.zeros(6)
    for seed in range(3000):
        for index in drawn(list(range(6)), 2, (1, 3), np.random.default_rng(seed)):
            counts[index] += 1
    assert counts[2] == 0
    assert counts[[0, 1, 3, 4, 5]] / counts.sum() == pytest.approx([0.2] * 5, abs=0.015)


def test_the_index_of_the_likeliest_choice_is_found_from_its_place_among_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are the right one and then the others; of equal scores the option listed first is chosen."""
    places = {
        "choice_row": [0, 0, 0, 1, 1, 1, 2, 3, 3],
        "choice_place": [1, 0, 2, 2, 0, 1, 0, 0, 1],
        "right_places": [0, 3, 6, 7],
    }
    batch: Any = SimpleNamespace(extra={name: torch.tensor(values) for name, values in places.items()})
    scores = torch.tensor([-1.0, -2.0, -1.0, -3.0, -3.0, -1.0, -9.0, float("nan"), -1.0])
    monkeypatch.setattr(HyperMtf, "_answers", lambda *_: (None, scores))
    assert HyperMtf()._ranked(batch, cast(Any, None))[1].tolist() == [0, 2, 0, 1]


def test_means_over_tasks_by_hand() -> None:
    """Task 0: gold a a b, chosen a b b; task 1: gold c, chosen c. Accuracy (2/3 + 1) / 2; F1 of a 2/3, of b 2/3."""
    tensors = {
        "task": torch.tensor([0, 0, 0, 1, 1]),
        "gold": torch.tensor([10, 10, 11, 12, 13]),
        "chosen": torch.tensor([10, 11, 11, 12, -1]),
    }
    found = HyperMtf().finish_evaluation({"nll": 1.0, "nll/other_task": 1.5}, tensors)
    assert found == {"task_gain": 0.5, "rank_accuracy/tasks": pytest.approx(5 / 6), "macro_f1": pytest.approx(5 / 6)}


def test_rows_by_task_are_read_once() -> None:
    class Counted(Held):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("the column of tasks says it")

        def task_numbers(self) -> list[int]:
            Counted.reads += 1
            return super().task_numbers()

    held = Counted([row(i, i % 2) for i in range(4)])
    assert rows_by_task(held) == {0: [0, 2], 1: [1, 3]}
    assert rows_by_task(held) is rows_by_task(held)
    assert Counted.reads == 1


def test_numbers_of_tasks_are_those_of_the_rows() -> None:
    recipe = compose("hypertuning", ["data.limit=60", "data.cache=false"]).recipe
    data: Any = prepare(recipe.data, tokenizer_of(recipe.model, recipe.tokenizer), "choices", seed=0, tasks=HyperMtf().tasks())
    assert data.task_numbers() == [row["task"] for row in data] and len(set(data.task_numbers())) > 1


def test_answers_are_generated_under_the_adapter_of_their_examples() -> None:
    """Each answer, decoded with all others, is that of a pass over its own row with the adapter of its own examples."""
    case = Case("hyper_mtf")
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if "hypertuning" in name:
                parameter.add_(torch.randn_like(parameter))
    rows = [row(i, i % 3) | {"prompt_ids": [1, 5 + i], "choice_ids": [9 + i, 2, 4, 2]} for i in range(6)]
    case.roles.data = Held(rows)
    objective, roles = HyperMtf(k_shot=[1, 1]), case.roles
    how, every = Sampling(max_new_tokens=3, batch=4), list(range(6))
    found = answer_rows(roles.data, roles, every, how, lambda part: objective.examples_of(roles.data, part, roles))
    alone = []
    for index in every:
        context = Context(examples=objective.examples_of(roles.data, [index], roles), computed={})
        answer = generate(roles.model, roles.tokenizer, [rows[index]["prompt_ids"]], how, context, [0])[0]
        alone.append(decode_ids(roles.tokenizer, answer))
    assert [one["answer"] for one in found] == alone
    plain = [one["answer"] for one in answer_rows(roles.data, roles, every, how)]
    assert plain != alone and len(set(alone)) > 2, "examples must matter for this test to say anything"


def test_a_text_metric_is_also_a_mean_over_tasks() -> None:
    """Two tasks: scores 1, 0.5 and 0.5 of one, 0 of the other."""
    answers = [("a b", "a b"), ("a c", "a b"), ("c a", "a b"), ("x", "y")]
    rows = [{"prompt": "", "answer": a, "references": [r]} for a, r in answers]
    (scored,) = score_answers(rows, ["rouge_l"]).values()
    assert scored.value == pytest.approx(0.5)
    assert scored.task_mean([3, 3, 3, 7]) == pytest.approx((2 / 3 + 0) / 2)
    assert "rouge_l/tasks" in measured(HyperMtf(), ["rouge_l"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stack=[lora]"], "add stack=[hypertuning]"),
        (["stack=[]"], "add stack=[hypertuning]"),
        (["objective.k_shot=[4,2]"], "the fewest examples come first"),
        (["data.path=builtin:sft"], "no row names its task"),
        (["data.limit=3"], "is the only one of its task"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(["check", "recipe=hypertuning", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
