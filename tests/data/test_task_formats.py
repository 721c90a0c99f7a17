"""Rows of many tasks as P3, MetaICL and Super-NaturalInstructions hold them: prompts, answers, choices, names of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.core.tasks import Tasks
from llmrecipe.data import prepare
from llmrecipe.data.formats.data_format import Conversion, data_format
from llmrecipe.data.formats.detect import detect
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer

P3 = {
    "inputs": [3, 1], "inputs_pretokenized": "Which section is it?\nRain again. ", "targets": [7, 1],
    "targets_pretokenized": "\nSports", "answer_choices": ["World", "Sports", "Business"],
}  # fmt: skip
METAICL = {"task": "ag_news", "input": "Rain again.", "output": "Sports", "options": ["World", "Sports"]}
INSTRUCTIONS = {
    "Contributors": ["A B"], "Source": ["own"], "Definition": ["Name the opposite of a word.", "Use one."],
    "Positive Examples": [{"input": "hot", "output": "cold", "explanation": "It is."}], "Negative Examples": [],
    "Instances": [{"id": "t-1", "input": "high ", "output": ["low", "deep"]}, {"id": "t-2", "input": "wet", "output": ["dry"]}],
}  # fmt: skip


def converted(row: dict[str, Any], rows: str = "choices") -> tuple[str, list[dict[str, Any]]]:
    """The format a row is found to have, and its canonical rows."""
    found = detect([row], rows, "auto", "f:1")
    return found.name, found.convert(row, Conversion(rows))


def test_p3() -> None:
    """The right answer stands first; `right` is its place among the options as they were listed."""
    prompt = "Which section is it?\nRain again."
    assert converted(P3) == ("p3", [{"prompt": prompt, "choices": [" Sports", " World", " Business"], "right": 1}])
    alone = converted({k: v for k, v in P3.items() if k != "answer_choices"})[1]
    assert alone == [{"prompt": prompt, "choices": [" Sports"], "right": 0}]
    assert converted(P3, "dialogue") == ("p3", [{"prompt": prompt, "completion": " Sports"}])


def test_metaicl() -> None:
    assert converted(METAICL) == ("choices", [{"prompt": "Rain again.", "choices": ["Sports", "World"], "right": 1}])
    assert converted({**METAICL, "options": []})[1] == [{"prompt": "Rain again.", "choices": ["Sports"], "right": 0}]


def test_super_natural_instructions() -> None:
    start = "Definition: Name the opposite of a word. Use one.\n\nNow complete the following example -\nInput: "
    assert converted(INSTRUCTIONS) == (
        "natural_instructions",
        [
            {"prompt": f"{start}high\nOutput:", "choices": [" low"], "right": 0},
            {"prompt": f"{start}wet\nOutput:", "choices": [" dry"], "right": 0},
        ],
    )
    flat = {"task_name": "task1", "definition": "Name it.", "inputs": "wet", "targets": "dry"}
    name, (row,) = converted(flat, "dialogue")
    assert name == "natural_instructions" and row["prompt"].startswith("Definition: Name it.\n\nNow")
    assert row["completion"] == " dry"
    _, (row,) = converted({**flat, "targets": ["dry", "arid ", "dry"]}, "dialogue")
    assert (row["completion"], row["references"]) == (" dry", [" arid"])


def tasks_of(path: Path, field: str = "task") -> tuple[list[str], tuple[str, ...] | None]:
    """The task of each token row, and the names of all."""
    data: Any = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "choices", seed=0, tasks=Tasks(None, field))
    names = data.tasks.names
    return [names[number] for number in data.task_numbers()], names


def test_a_file_is_a_task(tmp_path: Path) -> None:
    """Indented task files in a folder, and one folder a template; a column goes before the name of the file."""
    for name in ("task001_low", "task002_dry"):
        (tmp_path / f"{name}.json").write_text(json.dumps(INSTRUCTIONS, indent=4), encoding="utf-8")
    assert tasks_of(tmp_path) == (["task001_low"] * 2 + ["task002_dry"] * 2, ("task001_low", "task002_dry"))
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "train.jsonl").write_text(json.dumps(P3) + "\n", encoding="utf-8")
    assert tasks_of(tmp_path / "ag_news")[0] == ["ag_news"]
    named = tmp_path / "named.jsonl"
    named.write_text(json.dumps({**P3, "template": "own"}) + "\n", encoding="utf-8")
    assert tasks_of(named, "template")[0] == ["own"]
    rows = tmp_path / "metaicl.jsonl"
    rows.write_text(json.dumps(METAICL) + "\n", encoding="utf-8")
    assert tasks_of(rows)[0] == ["ag_news"]


def test_a_renamed_file_is_another_task_in_the_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))
    found = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(P3) + "\n", encoding="utf-8")
        data: Any = prepare(DataSection(path=str(path)), byte_tokenizer(), "choices", seed=0, tasks=Tasks())
        found.append(data.tasks.names)
    assert found == [("one",), ("two",)]


def test_files_of_other_formats_name_no_task(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no row names its task"):
        tasks_of(path)


def test_wrong_rows() -> None:
    for row, reason in (
        ({**INSTRUCTIONS, "Instances": []}, "the task has no instances"),
        ({**INSTRUCTIONS, "Instances": [{"input": "x", "output": []}]}, "no input or no output"),
    ):
        with pytest.raises(Exception, match=reason):
            data_format("natural_instructions").convert(row, Conversion("choices"))
