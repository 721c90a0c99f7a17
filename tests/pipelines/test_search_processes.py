"""Trials of several processes: a search over two finds what one process finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.pipelines.search.study import Search
from llmrecipe.pipelines.subprocesses import command_of
from llmrecipe.recipe.compose import compose

WORDS = [
    "stack=[autopeft]", "stack.autopeft.hidden=8",
    "search.space={stack.autopeft.adapter: [3, 10], stack.autopeft.layers.0: [true, false]}",
    "search.sampler=random", "search.trials=2", "search.against=[parameters]", "steps=2", "batch.size=8", "data.limit=32",
    "eval.batches=1", "eval.at_start=false", "eval.bootstrap=0", "eval.load_best=false", "log.live=off",
]  # fmt: skip


def trials(folder: Path, processes: int) -> list[dict[str, Any]]:
    """What a search left in its journal."""
    given = [*WORDS, f"runtime.processes={processes}", f"run.dir={folder}"]
    assert app.run_command(["search", "recipe=sft", *given]) == 0
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()[1:]]


def test_a_trial_of_two_processes_is_launched_as_two() -> None:
    given = [*WORDS, "runtime.processes=2"]
    found = Search("sft", given, compose("sft", given))
    command = command_of(found.planned("0", found.trial_composition({"stack.autopeft.adapter": 3}, 0)), False)
    assert command[:3] == ["launch", "--nproc", "2"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_search_on_two_processes_finds_what_one_finds(tmp_path: Path) -> None:
    """The same points, scores up to the order of additions, and the same costs."""
    one, two = (trials(tmp_path / str(processes), processes) for processes in (1, 2))
    assert [t["state"] for t in one] == ["done", "done"]
    for alone, shared in zip(one, two, strict=True):
        assert (shared["point"], shared["state"], shared["costs"]) == (alone["point"], "done", alone["costs"])
        assert shared["values"] == pytest.approx(alone["values"], rel=1e-3)
        assert [compose(Path(t["dirs"][0]) / "recipe.yaml").recipe.runtime.processes for t in (alone, shared)] == [1, 2]
    assert compose(tmp_path / "2" / "searched.yaml").recipe.runtime.processes == 2
