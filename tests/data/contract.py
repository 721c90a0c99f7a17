"""Every registered data format through the same promises: its example is a row of it, converts, and is found again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from llmrecipe.core import registry
from llmrecipe.data.formats.data_format import Conversion, data_format, formats_of
from llmrecipe.data.formats.detect import detect

CASES = [(name, rows) for rows in registry.names("row_type") for name in formats_of(rows)]


@pytest.mark.parametrize("name", registry.names("format"))
def test_the_example_has_the_columns_and_the_format_becomes_something(name: str) -> None:
    found = data_format(name)
    row = json.loads(found.example)
    assert found.matches(row) is not None and found.fits(row)
    assert name in {known for known, _ in CASES}


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_the_example_converts_and_survives_detection(name: str, rows: str, tmp_path: Path) -> None:
    found = data_format(name)
    row = json.loads(found.example)
    if isinstance(row.get("image"), str):  # a path beside the rows
        (tmp_path / row["image"]).parent.mkdir(parents=True)
        (tmp_path / row["image"]).touch()
    conversion = Conversion(rows, template=True, base=tmp_path)
    before = copy.deepcopy(row)
    made = found.convert(row, conversion)
    assert made and all(isinstance(one, dict) and one for one in made)
    assert row == before, "the raw row is left alone"
    assert json.loads(json.dumps(made)) == made, "canonical rows are JSON"
    layout = detect([row], rows, name, "example:1")
    assert layout.name == name and layout.convert(row, conversion) == made
    first = detect([row], rows, "auto", "example:1").name
    places = formats_of(rows)
    assert first == name or places[first] <= places[name], f"{first} is taken for it, and stands behind it"
