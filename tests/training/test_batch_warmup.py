"""Runs whose batches grow: what events, `check` and the end of a run say, and how they resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.training.dry_run import check
from tests.trainings import events, resumes_to_the_bit

WORDS = [
    "data.limit=40", "data.blocks=true", "data.max_length=16", "batch.size=6", "batch.warmup.start=2", "batch.warmup.batches=4",
    "batch.warmup.increment=2", "eval.at_start=false", "eval.batches=1", "steps=6",
]  # fmt: skip


def test_rows_and_tokens_are_counted_as_they_are_and_a_resume_keeps_them(tmp_path: Path) -> None:
    run = resumes_to_the_bit(tmp_path, "clm", [*WORDS, "model.init=random"], at=3)
    seen = events(tmp_path / "whole")
    assert [e["rows"] for e in seen] == [2, 2, 4, 4, 6, 6]  # floor(k 2 / 4) increments of 2
    lengths = run.data.lengths()
    drawn, wanted = run.order(0), []
    for end in (2, 4, 8, 12, 18, 24):
        wanted.append(int(sum(lengths[int(i)] for i in drawn[:end])))
    assert [e["tokens"] for e in seen] == wanted
    assert [e["rows"] for e in events(tmp_path / "parts")] == [2, 2, 4, 4, 6, 6]


def test_steps_of_passes_and_what_check_says() -> None:
    plain = [word for word in WORDS if not word.startswith(("batch.warmup", "steps"))]
    grown = [word for word in WORDS if not word.startswith("steps")]
    short, long = check("clm", ["epochs=1", *plain]), check("clm", ["epochs=1", *grown])
    rows = short.rows
    # The warm-up reads 12 rows in its four batches, and the rest comes in batches of six.
    assert short.steps == -(-rows // 6) and long.steps == 4 + -(-(rows - 12) // 6)
    assert "batches grow from 2 rows to 6 over the first 4" in long.notes


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("contrastive", ["objective.loss_type=infonce"]), ("clip", []), ("kto_lora", [])],
)
def test_objectives_that_compare_rows_refuse_a_first_batch_of_one(recipe: str, words: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"batch\.warmup"):
        check(recipe, [*words, "batch.size=4", "batch.warmup.start=1", "batch.warmup.batches=3"])
