"""CSV as programs write it: line ends, delimiters, encodings, quotes, and which columns are numbers."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.readers import open_file

ROWS = [{"prompt": "Say, é.", "completion": "Ok"}, {"prompt": "Hi", "completion": ""}]


def rows(path: Path) -> list[dict[str, Any]]:
    reader = open_file(path)
    return reader.rows(range(len(reader)))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
@pytest.mark.parametrize("before", ["", "\n\n", "sep={}\n", "\ufeff"])
def test_every_dialect_gives_the_same_rows(name: str, end: str, mark: str, before: str, tmp_path: Path) -> None:
    lines = [mark.join(line) for line in (("prompt", "completion"), ('"Say, é."', "Ok"), ("Hi", ""))]
    text = before.format(mark) + "".join(line + "\n" for line in lines)
    (tmp_path / name).write_bytes(text.replace("\n", end).encode())
    assert rows(tmp_path / name) == ROWS


def test_values_keep_their_quotes_delimiters_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"Say ""hi""\nnow, please",6" of snow\n"",say "hi" twice\n')
    assert rows(tmp_path / "a.csv") == [
        {"prompt": 'Say "hi"\nnow, please', "completion": '6" of snow'}, {"prompt": "", "completion": 'say "hi" twice'}
    ]  # fmt: skip


@pytest.mark.parametrize("line", ['"Say \\"hi\\" now",Yes', '"He said "hi" ok",Yes', '"never closed,Yes'])
def test_quotes_that_a_lenient_reader_would_move_are_named_with_their_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'prompt,completion\n"One, two",Three\n{line}\n')
    with pytest.raises(DataError, match=r"a.csv:3: a value goes on after its closing quote.*write a quote.*twice"):
        open_file(tmp_path / "a.csv")


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,completion\nSay,Ok\nSay é,Ok\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv:3: not UTF-8 text \(byte 4: .*convert the file to UTF-8"):
        open_file(tmp_path / "a.csv")
    (tmp_path / "c.csv").write_bytes(codecs.BOM_UTF8 + b"a,b\n\xff,1\n")
    with pytest.raises(DataError, match=r"c.csv:2: not UTF-8 text \(byte 0: "):
        open_file(tmp_path / "c.csv")
    (tmp_path / "b.csv").write_bytes(codecs.BOM_UTF16_LE + "prompt,completion\nSay,Ok\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"b.csv:1: not UTF-8 text"):
        open_file(tmp_path / "b.csv")


def test_a_file_of_empty_lines_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n \n")
    with pytest.raises(DataError, match=r"a.csv: there are no rows"):
        open_file(tmp_path / "a.csv")


def test_columns_without_name_and_value_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,,\nSay,Ok,,\n")
    assert rows(tmp_path / "a.csv") == [{"prompt": "Say", "completion": "Ok"}]
    (tmp_path / "b.csv").write_text(",prompt\n0,Say\n")
    assert rows(tmp_path / "b.csv") == [{"": "0", "prompt": "Say"}]


@pytest.mark.parametrize(("cells", "labels"), [
    (["1", "-2", ""], [1, -2, None]), (["0.5", "2", "NA"], [0.5, 2.0, None]), (["true", "False"], [True, False]),
    (["2020-01-02", "2020-01-03"], ["2020-01-02", "2020-01-03"]), (["12:30", "8:05"], ["12:30", "8:05"]),
    (["007", "008"], ["007", "008"]), (["0", "0.25"], [0.0, 0.25]), (["NA", "FR", ""], ["NA", "FR", None]),
    (["1", "two"], ["1", "two"]), (["inf", "1"], [float("inf"), 1.0]),
])  # fmt: skip
def test_a_column_is_numbers_where_all_its_cells_are_and_names_stay_as_written(
    cells: list[str], labels: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"a,{cell}\n" for cell in cells))
    found = [row["label"] for row in rows(tmp_path / "a.csv")]
    assert found == labels and [type(value) for value in found] == [type(value) for value in labels]
