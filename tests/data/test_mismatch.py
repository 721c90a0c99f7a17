"""Rows that an objective cannot take are named for what they are, with the objective that takes them and the right mapping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.formats.data_format import data_format, formats_of
from llmrecipe.data.formats.detect import detect
from llmrecipe.recipe.schema import DataSection
from tests.data.toys import byte_tokenizer

NEEDS = {name: str(registry.spec("objective", name).facts["rows"]) for name in registry.names("objective")}
REGISTERED = registry.names("format")
IMPOSSIBLE = [
    (objective, name) for objective, rows in NEEDS.items() for name in registry.names("format") if name not in formats_of(rows)
]


@pytest.mark.parametrize(("objective", "name"), IMPOSSIBLE)
def test_every_impossible_pair_says_what_the_rows_are_or_makes_what_they_also_hold(objective: str, name: str) -> None:
    """Rows that also hold those of another format (a label beside a text) may be read as that; else the message names both."""
    row = json.loads(data_format(name).example)
    try:
        found = detect([row], NEEDS[objective], "auto", "f.jsonl:1")
    except DataError as error:
        said = str(error)
        # A row may have the columns of several formats: it is called one of them, with who takes that.
        fits = {f: {o for o, rows in NEEDS.items() if f in formats_of(rows)} for f in REGISTERED if data_format(f).matches(row)}
        named = [takers for f, takers in fits.items() if f"{data_format(f).summary}; objective=" in said]
        assert said.startswith("f.jsonl:1: ")
        if "could be any of the columns" in said:
            return
        assert not fits[name] or any(takers and all(taker in said for taker in takers) for takers in named)
    else:
        assert found.name != name and set(found.format.matches({**row, **found.aliases}) or ()) - set(found.aliases) <= set(row)


def read(tmp_path: Path, row: dict[str, Any], kind: str = "dialogue", **data: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    return prepare(DataSection(path=str(path), **data), byte_tokenizer(), kind, seed=0)


@pytest.mark.parametrize("row", [
    {"prompt": "p", "completion": "c", "label": False}, {"instruction": "p", "output": "c", "kto_tag": True},
    {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}], "label": False},
])  # fmt: skip
def test_disliked_answers_are_not_learned_unless_their_format_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"these are not dialogue rows.* liked or not; objective=kto takes such rows.*data.format="
    ) as e:
        read(tmp_path, row)
    named = str(e.value).rpartition("data.format=")[2]
    assert len(read(tmp_path, row, format=named)) == 3
    assert len(read(tmp_path, {**row, "label": "a class", "kto_tag": None})) == 3


@pytest.mark.parametrize(("columns", "hint"), [
    ({"question": "prompt", "answer": "completion"}, r"way round.*data.columns='\{prompt: question, completion: answer\}'"),
    ({"prompt": "answer"}, r"data.columns='\{prompt: question, completion: answer\}' fits"),
    ({"promt": "question"}, r"data.columns='\{prompt: question, completion: answer\}' fits"),
    ({"prompt": "nothing"}, r"has no column 'nothing'.*data.columns='\{prompt: question, completion: answer\}' fits"),
])  # fmt: skip
def test_a_wrong_mapping_gets_the_right_one(tmp_path: Path, columns: dict[str, str], hint: str) -> None:
    with pytest.raises(DataError, match=f"(?s){hint}"):
        read(tmp_path, {"question": "q", "answer": "a"}, columns=columns)


def test_a_mapping_that_is_not_needed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the columns fit as they are: leave data.columns out"):
        read(tmp_path, {"prompt": "q", "completion": "a"}, columns={"completion": "prompts"})
