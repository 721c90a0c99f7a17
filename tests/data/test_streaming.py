"""Streaming: the same rows, a seeded shuffle, and a position that can be taken up again."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data import StreamedRows, TokenStream, order, prepare
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer


def texts(path: Path, prefix: str, count: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{prefix}{i:04d}"}) + "\n" for i in range(count)))
    return str(path)


def stream(path: Any, seed: int = 0, buffer: int = 50, **data: Any) -> TokenStream:
    return TokenStream(DataSection(path=path, streaming=True, **data), byte_tokenizer(), "text", seed=seed, buffer=buffer)


def test_one_pass_gives_the_rows_of_prepare(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "a", 300)
    whole = prepare(DataSection(path=path), byte_tokenizer(), "text", seed=0)
    assert whole is not None
    one = list(islice(stream(path), 300))
    assert Counter(tuple(r["ids"]) for r in one) == Counter(tuple(r["ids"]) for r in whole)
    assert [r["row"] for r in one] == list(range(300))
    in_order = [r["source_row"] for r in islice(stream(path, buffer=1), 299)]
    assert in_order == sorted(in_order)
    assert [r["source_row"] for r in one] != sorted(r["source_row"] for r in one)


def test_passes_and_seeds_differ(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "a", 100)
    reader = stream(path)
    first, second = ([r["source_row"] for r in islice(reader, 100)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(100)) and first != second and reader.epoch == 1
    assert [r["source_row"] for r in islice(stream(path, seed=1), 100)] != first


@pytest.mark.parametrize("taken", [0, 1, 63, 64, 65, 130, 199, 200, 201, 333])
def test_continues_behind_any_row(tmp_path: Path, taken: int) -> None:
    a = tmp_path / "a.jsonl"
    a.write_text("".join(json.dumps({"text": "x" * (40 if i % 3 == 0 else 4) + str(i)}) + "\n" for i in range(200)))
    setting: dict[str, Any] = {"max_length": 20, "max_dropped": 0.9}
    whole = list(islice(stream(str(a), **setting), 400))
    one = stream(str(a), **setting)
    list(islice(one, taken))
    state = json.loads(json.dumps(one.state()))
    two = stream(str(a), **setting)
    two.load_state(state)
    assert list(islice(two, 400 - taken)) == whole[taken:]


def test_weighted_mixture_and_its_resume(tmp_path: Path) -> None:
    path = {texts(tmp_path / "a.jsonl", "a", 400): 1.0, texts(tmp_path / "b.jsonl", "b", 400): 3.0}
    letter = byte_tokenizer().convert_tokens_to_ids("b")
    rows = list(islice(stream(path), 500))
    # Rows are encoded 64 at a time; without a buffer each such batch ends a stretch that has its exact share.
    plain = [r["ids"][0] == letter for r in islice(stream(path, buffer=1), 384)]
    assert all(abs(sum(plain[:end]) - 0.75 * end) < 2 for end in range(64, 385, 64))
    one, two = stream(path), stream(path)
    list(islice(one, 123))
    two.load_state(one.state())
    assert list(islice(two, 200)) == rows[123:323]


def test_a_share_held_out_never_streams(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "a", 200)
    held = prepare(DataSection(path=path, validation=0.3), byte_tokenizer(), "text", split="validation", seed=0)
    assert held is not None
    streamed = {tuple(r["ids"]) for r in islice(stream(path, validation=0.3), 200 - len(held))}
    assert not streamed & {tuple(r["ids"]) for r in held} and len(streamed) == 200 - len(held)


def test_the_gate_stops_streams_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 1500)
    with pytest.raises(DataError, match="'text' is empty"):
        next(stream(str(path)))
    with pytest.raises(DataError, match="labels are numbered over all training rows"):
        TokenStream(DataSection(path=str(path), streaming=True), byte_tokenizer(), "labelled", seed=0)


def test_gzip_lines_are_read_as_they_come(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(10)).encode()))
    assert len(list(islice(stream(str(path)), 10))) == 10


def test_streamed_rows_are_indexed_forwards_like_any_data(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "a", 100)
    rows = prepare(DataSection(path=path, streaming=True), byte_tokenizer(), "text", seed=0)
    assert isinstance(rows, StreamedRows) and len(rows) == 100
    expected = list(islice(stream(path, buffer=1000), 250))
    indices = [i for epoch in range(2) for i in order(rows, 0, epoch)]
    assert indices == list(range(200))
    assert [rows[i] for i in indices[:90]] == expected[:90]
    assert [rows[i] for i in indices[101::2]] == expected[101:200:2], "a rank takes every other row"
    assert rows[40] == expected[40] and rows[41] == expected[41]
    assert rows.report.format == "text" and rows.report.read > 0
