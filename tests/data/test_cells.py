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
from llmrecipe.data.formats.messages import messages_of, tools_of
from llmrecipe.data.formats.readers import open_file
from llmrecipe.data.token_data import TokenData
from llmrecipe.recipe.data_section import DataSection
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


@pytest.mark.parametrize(("rows", "row"), [
    ("passages", {"context": "Oslo is in Norway.", "question": "Why?", "answers": {"text": ["Norway"], "answer_start": [11]}}),
    ("tagged", {"tokens": ["Ann", "sings"], "ner_tags": ["B-PER", "O"]}), ("tagged", {"words": ["Ann"], "tags": [1]}),
    ("choices", {"inputs_pretokenized": "Is it?", "targets_pretokenized": "Yes", "answer_choices": ["Yes", "No"]}),
    ("dialogue", {"Definition": ["Name it."], "Instances": [{"id": "1", "input": "hot", "output": ["cold"]}]}),
    ("preference", {"prompt": "A colour?", "chosen": A, "rejected": {"from": "gpt", "value": "5"}}),
])  # fmt: skip
def test_lists_and_mappings_of_every_format_may_be_json_text(rows: str, row: dict[str, Any]) -> None:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
    assert map_columns(texts, {}) == row
    found = detect([map_columns(texts, {})], rows, "auto", "f")
    assert found.convert(map_columns(texts, {}), Conversion(rows)) == found.convert(row, Conversion(rows)) != []


def test_an_answer_that_is_an_object_with_a_role_of_its_own_stays_text() -> None:
    for text in ('{"role": "admin", "rights": []}', '[{"from": "Oslo", "to": "Rome"}]', "[]", "{}"):
        assert map_columns({"prompt": "p", "completion": text}, {})["completion"] == text


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("calls", [
    json.dumps([CALL]), [json.dumps(CALL)], CALL, json.dumps(CALL), [{**CALL, "function": json.dumps(CALL["function"])}],
])  # fmt: skip
def test_tool_calls_may_be_json_text_at_any_level(calls: Any) -> None:
    (message,) = messages_of([{"role": "assistant", "tool_calls": calls}], "messages")
    assert message["tool_calls"] == [CALL]


@pytest.mark.parametrize("tools", [
    json.dumps([TOOL]), [json.dumps(TOOL)], TOOL, json.dumps(TOOL), [{**TOOL, "function": json.dumps(TOOL["function"])}],
    [{**TOOL, "function": {**TOOL["function"], "parameters": json.dumps(TOOL["function"]["parameters"])}}],
])  # fmt: skip
def test_tools_may_be_json_text_at_any_level(tools: Any) -> None:
    assert tools_of({"tools": tools}) == [TOOL]


@pytest.mark.parametrize(("message", "reason"), [
    ({"role": "user", "content": True}, "the content of a message in 'messages' is not text"),
    ({"role": "user", "content": float("nan")}, "the content of a message in 'messages' is not text"),
    ({"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}, "the text of a part of a message in 'messages' is not"),
    ({"role": ["user"], "content": "a"}, "unknown role"), ({"role": "narrator", "content": "a"}, "unknown role 'narrator'"),
    ({"role": "assistant", "tool_calls": ["add(2)"]}, "'tool_calls' holds something that is no mapping"),
])  # fmt: skip
def test_content_that_is_no_text_is_not_spelled_out_as_python(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        messages_of([message], "messages")


def test_what_is_text_in_another_form_is_read_as_that_text() -> None:
    parts = [{"type": "text", "text": {"value": "Hi", "annotations": []}}, {"text": " there"}]
    given = [{"role": "User", "content": parts}, {"role": "ASSISTANT", "content": 7}]
    assert messages_of(given, "messages") == [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "7"}]
    (seen,) = messages_of([{"role": "user", "content": [{"image": "a.png"}, {"text": "What?"}]}], "messages")
    assert seen == {"role": "user", "content": "What?", "images": [{"image": "a.png"}]}


def test_a_number_that_no_float_holds_is_spelled_out() -> None:
    row, written = {"prompt": 10**400, "completion": "c"}, f"1{400 * '0'}"
    assert detect([row], "dialogue", "auto", "f").convert(row, Conversion("dialogue"))[0]["prompt"] == written
    assert messages_of([{"role": "user", "content": 10**400}], "messages")[0]["content"] == written


def test_a_null_of_a_table_of_numbers_is_no_text() -> None:
    nan = float("nan")
    with pytest.raises(BadRow, match="'prompt' is not text"):
        detect([{"prompt": "p", "completion": "c"}], "dialogue", "auto", "f").convert(
            {"prompt": nan, "completion": "c"}, Conversion("dialogue")
        )
    with_null, without = ({"instruction": "i", "input": v, "output": "o"} for v in (nan, ""))
    found = detect([without], "dialogue", "auto", "f")
    assert found.convert(with_null, Conversion("dialogue")) == found.convert(without, Conversion("dialogue"))
