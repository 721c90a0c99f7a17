"""Columns under the names people use: which one is taken, what is printed, and when it is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.formats.aliases import ALIASES, normal_name
from llmrecipe.data.formats.data_format import data_format
from llmrecipe.data.formats.detect import detect
from llmrecipe.data.token_data import TokenData
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn

Row = dict[str, Any]
TALK = [turn("user", "u"), turn("assistant", "a")]

PAIRS = [
    ("winning_response", "losing_response"), ("winner", "loser"), ("preferred", "dispreferred"), ("better", "worse"),
    ("response_chosen", "response_rejected"), ("chosen_response", "rejected_response"), ("response_j", "response_k"),
    ("y_w", "y_l"), ("Winning Response", "Losing-Response"), ("accepted_answer", "refused_answer"),
]  # fmt: skip


@pytest.mark.parametrize(("chosen", "rejected"), PAIRS)
def test_pairs_by_the_names_people_use(chosen: str, rejected: str, tmp_path: Path) -> None:
    """The same tokens as under the format's own names, whatever the order of the columns."""

    def ids(**row: str) -> list[Row]:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        found = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "preference", seed=0)
        assert isinstance(found, TokenData)
        return [{k: v for k, v in one.items() if k.endswith("_ids")} for one in found]

    plain = ids(prompt="Say it.", chosen="good", rejected="bad")
    assert ids(**{rejected: "bad", "prompt": "Say it.", chosen: "good"}) == plain
    assert ids(**{"question": "Say it.", chosen: "good", rejected: "bad"}) == plain


@pytest.mark.parametrize(
    ("rows", "row", "name", "mapping"),
    [
        ("dialogue", {"question": "q", "answer": "a"}, "prompt_completion", {"prompt": "question", "completion": "answer"}),
        ("dialogue", {"input": "q", "output": "a"}, "prompt_completion", {"prompt": "input", "completion": "output"}),
        ("dialogue", {"instruction": "q", "input": "", "response": "a"}, "alpaca", {"output": "response"}),
        ("dialogue", {"question": "q", "context": "c", "answer": "a"}, "alpaca",
         {"instruction": "question", "input": "context", "output": "answer"}),
        ("dialogue", {"dialogue": TALK}, "messages", {"messages": "dialogue"}),
        ("text", {"content": "t", "id": 3}, "text", {"text": "content"}),
        ("unpaired", {"question": "q", "answer": "a", "thumbs_up": 1}, "unpaired",
         {"prompt": "question", "completion": "answer", "label": "thumbs_up"}),
        ("choices", {"question": "q", "answer": "a", "choices": ["a", "b"]}, "choices",
         {"prompt": "question", "completion": "answer", "options": "choices"}),
        ("prompt", {"question": "q", "answer": "18"}, "prompt", {"prompt": "question"}),
        ("labelled", {"sentence": "t", "category": "x"}, "labelled", {"text": "sentence", "label": "category"}),
        ("pairs", {"sentence_A": "s", "sentence_B": "t", "relatedness_score": 3.1}, "pairs",
         {"sentence1": "sentence_A", "sentence2": "sentence_B", "score": "relatedness_score"}),
        ("pairs", {"query": "q", "pos": "d", "neg": "e"}, "triples", {"anchor": "query", "positive": "pos", "negative": "neg"}),
    ],
)  # fmt: skip
def test_each_format_has_names_of_its_own(rows: str, row: Row, name: str, mapping: dict[str, str]) -> None:
    found = detect([row], rows, "auto", "f.jsonl:1")
    assert (found.name, found.aliases) == (name, mapping)


@pytest.mark.parametrize(
    ("rows", "row"),
    [
        ("dialogue", {"prompt": "p", "completion": "c", "question": "q", "answer": "a"}),
        ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "winner": "w", "loser": "l"}),
        ("labelled", {"text": "t", "label": 1, "category": "x"}),
    ],
)
def test_a_formats_own_names_come_first(rows: str, row: Row) -> None:
    assert detect([row], rows, "auto", "f").aliases == {}


@pytest.mark.parametrize(
    ("rows", "row", "told"),
    [
        ("dialogue", {"question": "q", "answer": "a", "response": "r"},
         "f.jsonl: 'completion' could be any of the columns answer, response; say which: "
         "data.columns='{prompt: question, completion: answer}' or data.columns='{prompt: question, completion: response}'"),
        ("preference", {"prompt": "p", "winner": "a", "better": "b", "loser": "c"},
         "'chosen' could be any of the columns winner, better; say which: data.columns='{chosen: winner, rejected: loser}'"),
        ("labelled", {"text": "t", "category": "x", "class": 1}, "'label' could be any of the columns category, class"),
    ],
)  # fmt: skip
def test_several_columns_for_one_role_are_an_error_whose_proposal_works(rows: str, row: Row, told: str) -> None:
    with pytest.raises(DataError) as caught:
        detect([row], rows, "auto", "f.jsonl")
    assert told in str(caught.value)
    first = str(caught.value).split("data.columns='{")[1].split("}")[0]
    columns = dict(pair.split(": ") for pair in first.split(", "))
    renamed = {**row, **{wanted: row[column] for wanted, column in columns.items()}}
    assert detect([renamed], rows, "auto", "f.jsonl").aliases == {}


@pytest.mark.parametrize(
    ("rows", "row"),
    [
        ("choices", {"question": "q", "answer": 1, "choices": ["a", "b"]}),  # a number that points at a choice
        ("dialogue", {"question": "q", "answer": {"text": ["a"], "start": [3]}}),
        ("dialogue", {"conversation": "User: hi"}),
        ("preference", {"prompt": "p", "winner": 0, "loser": 1}),
    ],
)
def test_a_column_that_holds_something_else_is_not_taken(rows: str, row: Row) -> None:
    with pytest.raises(DataError, match="row can be made of the columns"):
        detect([row], rows, "auto", "f")


def test_a_null_in_the_first_row_is_looked_up_further_down() -> None:
    rows = [{"question": "q", "answer": None}, {"question": "q", "answer": "a"}]
    assert detect(rows, "dialogue", "auto", "f").name == "prompt_completion"


def test_the_table_is_in_one_spelling_and_serves_real_columns() -> None:
    formats = [data_format(name) for name in registry.names("format")]
    columns = {c for f in formats for names in (*f.columns, f.optional) for c in names}
    assert set(ALIASES) <= columns
    assert all(normal_name(alias) == alias and alias != role for role, names in ALIASES.items() for alias in names)
    assert not set(ALIASES["chosen"]) & set(ALIASES["rejected"])


def test_what_was_taken_is_printed_and_the_recipes_mapping_goes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"ask": "Say it.", "winning_response": "good", "losing_response": "bad"}) + "\n" * 2)
    words = [f"data.path={path}", "data.columns={prompt: ask}"]
    assert app.run_command(["data", "recipe=dpo", *words, "-n", "1"]) == 0
    told = capsys.readouterr().out
    assert "format: preference (columns: prompt <- ask, chosen <- winning_response, rejected <- losing_response)" in " ".join(
        told.split()
    )
