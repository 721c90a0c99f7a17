"""Nested cells: lists as JSON text, and the nulls that Arrow puts into mappings."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from llmrecipe.data import prepare
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion
from llmrecipe.data.formats.detect import detect, map_columns
from llmrecipe.data.formats.messages import messages_of
from llmrecipe.data.formats.readers import open_file
from llmrecipe.data.token_data import TokenData
from llmrecipe.recipe.schema import DataSection
from tests.data.toys import byte_tokenizer, turn
from tests.support import shared

U, A, B = turn("user", "2+2?"), turn("assistant", "4"), turn("assistant", "5")


def tokens(path: Path, rows: str = "dialogue") -> list[dict[str, Any]]:
    found = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), rows, seed=0)
    assert isinstance(found, TokenData) and found.report.lost == 0
    return list(found)


@pytest.mark.parametrize(
    ("rows", "row"),
    [
        ("dialogue", {"messages": [U, A]}),
        ("dialogue", {"dialogue": [U, A]}),
        ("dialogue", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}),
        ("dialogue", {"prompt": [U], "completion": [A]}),
        ("dialogue", {"input_ids": [70, 71], "labels": [-100, 71]}),
        ("preference", {"prompt": "2+2?", "chosen": [U, A], "rejected": [U, B]}),
        ("unpaired", {"messages": [U, A], "label": "true"}),
        ("choices", {"prompt": "2+2?", "completion": "4", "options": ["4", "5"]}),
    ],
)
def test_a_csv_file_with_json_text_gives_the_tokens_of_the_jsonl_file(rows: str, row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(row)
        writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in row.values()])
    assert tokens(tmp_path / "a.csv", rows) == tokens(tmp_path / "a.jsonl", rows)


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_json_text_that_repeats_a_key_is_named(column: str, tmp_path: Path) -> None:
    """The last value would win: the row is dropped and counted with the key, the first row of a file as well as any other."""
    good = json.dumps([U, A] if column == "messages" else [U])
    bad = good.replace('"content": "2+2?"', '"content": "2+2?", "content": "3+3?"')
    assert bad != good
    more = {} if column == "messages" else {"completion": "4"}
    rows = [{column: text, **more} for text in (bad, good, good, good)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = prepare(DataSection(path=str(tmp_path), cache=False, max_dropped=0.5), byte_tokenizer(), "dialogue", seed=0)
    assert isinstance(found, TokenData) and len(found) == 3
    assert found.report.dropped == {f"'{column}' is JSON text in which a key is repeated": 1}


def test_text_that_only_looks_like_a_list_stays_text() -> None:
    for row in ({"prompt": "[1, 2]", "completion": '{"a": 1}'}, {"prompt": "[Ann] hi", "completion": "[]"}):
        assert map_columns(row, {}) == row
        assert detect([row], "dialogue", "auto", "f").convert(row, Conversion("dialogue")) == [row]


def test_a_list_that_was_written_by_another_program_is_named() -> None:
    with pytest.raises(BadRow, match="'messages' is text that is no valid JSON"):
        messages_of("[{'role': 'user', 'content': 'x'}]", "messages")


CALLS: list[dict[str, Any]] = [
    {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": n, "arguments": a}}]}]}
    for n, a in (("weather", {"city": "Oslo"}), ("alarm", {"hour": 7, "days": [{"name": "Mon"}, {"off": True}]}))
]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_mappings_keep_the_keys_they_were_written_with(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    table = pa.Table.from_pylist([*CALLS, {"messages": None}])
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        import datasets

        datasets.Dataset(table).save_to_disk(str(path))
    if kind != "saved":
        assert open_file(path).rows(range(3)) == [*CALLS, {"messages": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CALLS), encoding="utf-8")
    found = prepare(DataSection(path=str(path), cache=False, max_dropped=0.5), byte_tokenizer(), "dialogue", seed=0)
    assert isinstance(found, TokenData) and list(found) == tokens(tmp_path / "a.jsonl")


def test_messages_as_json_text() -> None:
    rows = tokens(shared("cases", "messages-as-json-text", "c17.jsonl"))
    wanted = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert [byte_tokenizer().decode(row["ids"]) for row in rows] == [wanted] * 4


def test_parquet_tool_args_null() -> None:
    folder = shared("cases", "parquet-tool-args-null")
    assert tokens(folder / "c03.parquet") == tokens(folder / "c03.jsonl")
    text = byte_tokenizer().decode(tokens(folder / "c03.parquet")[0]["ids"])
    assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in text
