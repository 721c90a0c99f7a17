"""Files are told by their content, and the defaults serve a first run on one's own files."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, prepare
from llmrecipe.data.formats.readers import open_file
from llmrecipe.data.formats.splits import open_split
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer

ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table() -> pa.Table:
    return pa.table({"text": ["a", "b"], "label": [1, 2]})


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    parquet.write_table(table(), out)
    return out.getvalue()


def arrow_bytes(stream: bool) -> bytes:
    out = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table().schema) as writer:
        writer.write_table(table())
    return out.getvalue()


def zip_bytes(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(name, content)
        packed.writestr("README.md", "About these rows.")
    return out.getvalue()


CONTENTS = {
    "parquet": parquet_bytes(), "arrow": arrow_bytes(False), "stream": arrow_bytes(True), "gzip": gzip.compress(LINES),
    "gzipped parquet": gzip.compress(parquet_bytes()), "zip": zip_bytes("rows.jsonl", LINES),
    "zipped csv": zip_bytes("rows.csv", b"text,label\na,1\nb,2\n"), "array": json.dumps(ROWS, indent=1).encode(),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".gz", ".bin", ""])
def test_content_decides_whatever_the_name(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(CONTENTS[kind])
    reader = open_file(path)
    assert reader.rows(range(len(reader))) == ROWS and [row for _, row in reader.stream()] == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".txt", "", ".gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_lines_of_objects_are_rows_under_any_name_and_plain_text_stays_text(tmp_path: Path, suffix: str, packed: bool) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(LINES) if packed else LINES)
    reader = open_file(path)
    assert [row for _, row in reader.stream()] == ROWS
    (tmp_path / "play.txt").write_text("[Exit, pursued by a bear.]\n\n{sic}\n")
    assert len(open_file(tmp_path / "play.txt")) == 2


@pytest.mark.parametrize(("mark", "name"), [("\t", "a.csv"), (";", "a.csv"), (",", "a.csv"), ("\t", "a.tsv")])
def test_the_header_tells_the_delimiter(tmp_path: Path, mark: str, name: str) -> None:
    (tmp_path / name).write_text(f"text{mark}label\na{mark}1\nb{mark}2\n")
    assert open_file(tmp_path / name).rows([0, 1]) == ROWS


def test_columns_that_stand_twice_stop(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,text\na,1,b\n")
    parquet.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet"
    )
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(DataError, match=rf"{name}.*: the column 'text' is there 2 times"):
            open_file(tmp_path / name)


ONCE = '{"text": "a", "more": {"k": 1}}'
TWICE = ['{"text": "a", "text": "b"}', '{"text": "a", "more": [{"k": 1, "l": 2, "k": 3}]}']


@pytest.mark.parametrize(("row", "key"), zip(TWICE, ["text", "k"], strict=True))
def test_a_key_that_stands_twice_in_a_row_stops_with_its_line(row: str, key: str, tmp_path: Path) -> None:
    """JSON lines, also read as a stream, an array over several lines, and a packed file."""
    (tmp_path / "a.jsonl").write_text(f"{ONCE}\n\n{row}\n{ONCE}\n")
    (tmp_path / "a.json").write_text(f"[\n{ONCE},\n{row},\n{ONCE}]\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "a.json", "b.jsonl.gz"):
        message = rf"{name}:3: the key '{key}' is there 2 times in one object; keep one, or rename the others"
        with pytest.raises(DataError, match=message):
            open_file(tmp_path / name).rows(range(3))
        with pytest.raises(DataError, match=message):
            list(open_file(tmp_path / name).stream())


@pytest.mark.parametrize(("content", "message"), [
    (b"(\xb5/\xfd rest", "packed with zstd"), (zip_bytes("xl/workbook.xml", b"<x/>"), "a spreadsheet; save it as CSV"),
    (b"PK\x03\x04 rest", "the zip file is damaged"),
])  # fmt: skip
def test_what_cannot_be_read_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_file(tmp_path / "a.jsonl")


def read(path: Path, kind: str, **data: Any) -> TokenData:
    found = prepare(DataSection(path=str(path), **data), byte_tokenizer(), kind, seed=0)
    assert isinstance(found, TokenData)
    return found


def test_a_folder_is_read_without_what_is_no_data_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "part-1.jsonl").write_bytes(LINES)
    (tmp_path / "part-2").write_bytes(parquet_bytes())
    for name in ("README.md", "dataset_info.json", "requirements.txt", ".DS_Store"):
        (tmp_path / name).write_text("{}")
    for _ in range(2):  # read, then from the cache
        data = read(tmp_path, "labelled")
        assert len(data) == 4
        assert data.report.lines()[0] == f"source: {tmp_path} (not read: README.md, dataset_info.json, requirements.txt)"
    (tmp_path / "train.jsonl").write_bytes(LINES)
    (part,) = open_split(DataSection(path=str(tmp_path)), "train")
    assert len(part.reader) == 2 and "part-1.jsonl" in part.reader.ignored


@pytest.mark.parametrize("kind", ["text", "dialogue"])
def test_plain_text_is_split_by_default_and_answers_are_not(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij")
    data = read(tmp_path / "a.txt", kind, max_length=4)
    assert [len(row["ids"]) for row in data] == [4, 4, 3] and data.report.tokens_lost == 0
    (tmp_path / "b.jsonl").write_text('{"prompt": "abcdefgh", "completion": "ij"}\n')
    with pytest.raises(DataError, match=r"1 x longer than data.max_length"):
        read(tmp_path / "b.jsonl", "dialogue", max_length=4)


def test_a_length_that_drops_too_much_proposes_those_that_do_not(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c" * n} for n in [3] * 15 + [8, 8, 8, 10, 20]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"5 of 20 rows \(25.0%\)") as caught:
        read(path, "dialogue", max_length=6, max_dropped=0.1)
    assert "\n  data.max_length=10 would drop 2 of 20 rows for their length; data.max_length=22 none\n" in str(caught.value)
    assert len(read(path, "dialogue", max_length=10, max_dropped=0.1)) == 18
    with pytest.raises(DataError, match=r"\n  data.max_length=22 none\n"):
        read(path, "dialogue", max_length=6, max_dropped=0.04)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".txt", ""])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("before", [BOM, b"\n" * 100, BOM + b"\r\n"])
def test_a_byte_order_mark_or_empty_lines_before_an_array_change_nothing(
    tmp_path: Path, suffix: str, indent: int | None, before: bytes
) -> None:
    (tmp_path / f"a{suffix}").write_bytes(before + json.dumps(ROWS, indent=indent).encode())
    assert open_file(tmp_path / f"a{suffix}").rows([0, 1]) == ROWS


@pytest.mark.parametrize(
    "content",
    [gzip.compress(gzip.compress(LINES)), zip_bytes("rows.jsonl.gz", gzip.compress(LINES))],
    ids=["gzip in gzip", "gzip in zip"],
)
def test_a_file_packed_twice_is_unpacked_twice(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert open_file(tmp_path / "a.jsonl").rows([0, 1]) == ROWS


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a"])
def test_a_file_that_was_not_downloaded_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(DataError, match=r"a pointer of Git LFS, its content was not downloaded"):
        open_file(tmp_path / name)


def test_text_with_the_line_ends_of_old_systems_is_split_at_its_blank_lines(tmp_path: Path) -> None:
    for name, end in (("a.txt", "\r"), ("b.txt", "\r\n"), ("c.txt", "\n")):
        (tmp_path / name).write_bytes("a\nb\n\nc\n".replace("\n", end).encode())
        assert open_file(tmp_path / name).rows([0, 1]) == [{"text": "a\nb"}, {"text": "c"}]


def test_folders_inside_a_folder_are_not_read_and_said_so(tmp_path: Path) -> None:
    for place in ("one", "pictures", "two"):
        (tmp_path / place).mkdir()
    for name in ("a.jsonl", "_b.jsonl", "one/c.jsonl", "two/d.csv"):
        (tmp_path / name).write_bytes(LINES)
    for name in ("_SUCCESS", "pictures/e.png"):
        (tmp_path / name).write_bytes(b"\x89PNG")
    (part,) = open_split(DataSection(path=str(tmp_path)), "train")
    assert list(part.reader.ignored) == ["_b.jsonl", "one/", "two/"] and len(part.reader) == 2
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"no training file.* and rows in its folders one, two: name one of those"):
        open_split(DataSection(path=str(tmp_path)), "train")


def test_a_source_that_is_listed_twice_is_not_read_once_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"data.path: .*a.jsonl is listed 2 times; name it once, and give weights"):
        open_split(DataSection(path=[path, path]), "train")


def test_rows_inside_an_object_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    with pytest.raises(DataError, match=r"'data' holds a list of objects: if they are the rows, write that list to a file"):
        read(tmp_path / "a.json", "labelled")
