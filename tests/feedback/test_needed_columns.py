"""Prompt rows that lack what a reward reads are told with their place, or dropped and counted, before anything is sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, prepare
from llmrecipe.data.formats.prompts import read_prompts
from llmrecipe.feedback.rewards.function import FUNCTIONS, reward_function
from llmrecipe.objectives.reward_interface import Answer, Rewards
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.training.dry_run import check
from tests.data.toys import byte_tokenizer
from tests.support import shared

NEEDS = {"answer": "objective.reward.exact_match"}
EXACT = ["~objective.reward.rule", "+objective.reward.exact_match={}", "data.cache=false"]


def write(folder: Path, count: int, **bad: dict[str, Any]) -> Path:
    """`count` prompts with answers; `bad` replaces what stands beside the prompt of row `_N`."""
    rows = [{"prompt": f"{i}?", **bad.get(f"_{i}", {"answer": str(i)})} for i in range(1, count + 1)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_few_rows_without_the_column_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, 60, _7={}, _20={"answer": None})
    data = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "prompt", seed=0, needs=NEEDS)
    assert isinstance(data, TokenData)
    assert len(data) == 58 and data.report.dropped.total() == 2
    first = [place for why, place in data.report.first.items() if why in data.report.dropped]
    assert sorted(first) == [f"{path}:20", f"{path}:7: it has only the prompt"]
    assert all(json.loads(text)["answer"] is not None for text in data.column("columns"))
    untouched = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "prompt", seed=0)
    assert isinstance(untouched, TokenData) and len(untouched) == 60


def test_the_token_cache_knows_what_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))
    section = DataSection(path=str(write(tmp_path, 60, _7={})))
    sizes = [len(prepare(section, byte_tokenizer(), "prompt", seed=0, needs=n) or ()) for n in (None, NEEDS, None)]
    assert sizes == [60, 59, 60]


def test_a_stream_never_hands_out_a_row_without_the_column(tmp_path: Path) -> None:
    path = write(tmp_path, 60, _7={}, _20={"answer": None})
    data = prepare(DataSection(path=str(path), streaming=True), byte_tokenizer(), "prompt", seed=0, needs=NEEDS)
    assert data is not None
    seen = {json.loads(data[i]["columns"])["answer"] for i in range(58)}
    assert seen == {str(i) for i in range(1, 61)} - {"7", "20"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "pr_mixed.jsonl",
            r"1 of 8 rows.*\n.*1 x objective.reward.exact_match: the row has no column 'answer', .*pr_mixed.jsonl:6",
        ),
        ("pr_null.jsonl", r"4 of 8 rows.*\n.*4 x objective.reward.exact_match: the column 'answer' is null, .*pr_null.jsonl:1"),
    ],
)
def test_many_such_rows_stop_before_training(name: str, told: str) -> None:
    path = shared("cases", "grpo-row-without-reward-column", name)
    with pytest.raises(DataError, match=told):
        check("grpo", [f"data.path={path}", *EXACT])


def test_the_gate_stops_a_training_of_own_rows(tmp_path: Path) -> None:
    path = write(tmp_path, 10, _3={"anser": "3"}, _9={"answer": None})
    with pytest.raises(DataError, match=r"2 of 10 rows.*\n.*rows.jsonl:3: it has anser.*\n.*rows.jsonl:9"):
        check("grpo", [f"data.path={path}", *EXACT])


def test_prompts_of_a_step_name_the_row(tmp_path: Path) -> None:
    path = write(tmp_path, 4, _3={"answer": None})
    assert len(read_prompts(str(path))) == 4
    with pytest.raises(DataError, match=r"rows.jsonl:3: objective.reward.exact_match: the column 'answer' is null"):
        read_prompts(str(path), needs=NEEDS)


def test_every_kind_of_reward_says_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrecipe.feedback.rewards.function.FUNCTIONS", dict(FUNCTIONS))

    @reward_function
    def near(text: str, wanted: float, prompt: str, answer: Answer, hint: str = "none", **others: Any) -> float:
        return float(len(hint))

    section = {
        "first": {"kind": "exact_match", "column": "gold"},
        "second": {"kind": "rule", "rule": "manners"},
        "third": {"kind": "function", "function": "near"},
        "fourth": {"kind": "length", "most": 3},
    }
    rewards = Rewards(section)
    found = {c: w.removeprefix("objective.reward.") for c, w in rewards.needs().items()}
    assert found == {"gold": "first", "topic": "second", "avoid": "second", "wanted": "third"}
    one = Rewards({"f": {"kind": "function", "function": "near"}})
    answers = [Answer("p", "t", columns, [1], [2], True) for columns in ({"wanted": 1}, {"wanted": 1, "hint": "ab"})]
    assert one.score(answers)[0] == [4.0, 2.0]
