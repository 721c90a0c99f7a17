"""caclm: what the frozen model reads, what the hypermodel reads, and that the rest stays apart."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrecipe.objectives.pretraining.caclm import SHORTEST, Caclm, cut_points
from tests.objectives.harness import Case

SIZES = (8, 4, 5, 7)


@given(length=st.integers(SHORTEST, 200), seed=st.integers(0, 1000), sizes=st.tuples(*[st.integers(1, 40)] * 4))
def test_four_segments_follow_one_another_inside_the_text(length: int, seed: int, sizes: tuple[int, ...]) -> None:
    places = cut_points(length, sizes, np.random.default_rng(seed))
    assert len(places) == 5 and places[0] >= 0 and places[-1] <= length
    assert all(later > earlier for earlier, later in pairwise(places))
    assert places[-1] - places[0] <= max(sum(sizes), 4)


def test_long_texts_are_entered_anywhere_and_cut_about_as_asked() -> None:
    cuts = [cut_points(100, SIZES, np.random.default_rng(seed)) for seed in range(400)]
    assert {c[0] for c in cuts} == set(range(77))
    means = np.diff(np.array(cuts), axis=1).mean(0)
    assert means == pytest.approx([8, 4, 5, 7], rel=0.12)


def text(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "ids": [1, *(100 * row + i for i in range(3, length + 1)), 2]}


def test_the_model_reads_b_and_c_and_the_hypermodel_a_and_d() -> None:
    """Every token of the text is in one place, in order; the end token between A and D is the only one that is added."""
    case = Case("caclm")
    objective = Caclm(before=6, given=3, predicted=4, after=5)
    rows = [text(0, 18), text(1, 18)]
    batch = objective.collate(rows, case.roles)
    eos = case.roles.tokenizer.eos_token_id
    for row, segment in zip(rows, batch.layout.segments, strict=True):  # type: ignore[union-attr]
        shown = batch.input_ids[0, segment.start : segment.start + segment.length].tolist()
        targets = batch.target[batch.sequence == row["row"]].tolist()
        mask = batch.extra["example_mask"][row["row"]].bool()
        context = batch.extra["example_ids"][row["row"]][mask].tolist()
        b, c = shown[: segment.prompt], shown[segment.prompt :]
        assert c == targets and len(b) == segment.prompt
        start = row["ids"].index(context[0])
        middle = row["ids"].index(b[0])
        a = row["ids"][start:middle]
        d = context[len(a) + 1 :]
        assert context == [*a, eos, *d]
        whole = [*a, *b, *c, *d]
        assert row["ids"][start : start + len(whole)] == whole
    assert batch.task_ids is not None
    assert batch.task_ids[0].tolist() == [i for i, s in enumerate(batch.layout.segments) for _ in range(s.length)]  # type: ignore[union-attr]


def test_cuts_change_from_epoch_to_epoch_and_never_in_evaluation() -> None:
    case = Case("caclm")
    row = text(0, 60)
    seen = [case.objective.collate([{**row, "epoch": e}], case.roles).target.tolist() for e in (0, 0, 1)]
    assert seen[0] == seen[1] != seen[2]
    held = [case.objective.collate(case.objective.evaluation_rows([row, text(1, 60)], [0]), case.roles) for _ in range(2)]
    assert held[0].target.tolist() == held[1].target.tolist()
    assert set(held[0].extra["other_ids"].flatten().tolist()) & {100 + i for i in range(3, 61)}, "another text's context"


def test_a_short_text_has_no_loss() -> None:
    case = Case("caclm")
    batch = case.objective.collate([{"row": 0, "ids": [1, 5, 6, 2]}], case.roles)
    assert case.objective.weight(batch) == 0.0
