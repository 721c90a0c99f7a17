"""YAML's oddities: what a scalar is, and that every key knows its line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmrecipe.recipe.yaml_file import read_yaml, write_yaml

ODDITIES = [
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    ("5e-05", 5e-5),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1.5e+3", -1500.0),
    ("1_000", 1000),
    ("0x10", 16),
    ("-7", -7),
    ("0", 0),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("true", True),
    ("False", False),
    ("yes", "yes"),
    ("no", "no"),
    ("on", "on"),
    ("Off", "Off"),
    ("y", "y"),
    ("010", "010"),
    ("1:30", "1:30"),
    ("2024-01-01", "2024-01-01"),
    ("null", None),
    ("~", None),
    ("", None),
    ("'1e-5'", "1e-5"),
    ('"true"', "true"),
    ("e5", "e5"),
    ("1e", "1e"),
    ("1.2.3", "1.2.3"),
    ("NaN", "NaN"),
    ("layers.0:4.attn.q|v", "layers.0:4.attn.q|v"),
]


@pytest.mark.parametrize(("text", "expected"), ODDITIES)
def test_a_scalar_means_what_it_looks_like(tmp_path: Path, text: str, expected: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"key: {text}\n", encoding="utf-8")
    value = read_yaml(path).value["key"]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(("text", "expected"), ODDITIES)
def test_what_is_written_reads_back(tmp_path: Path, text: str, expected: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(write_yaml({"key": expected, "list": [expected], "text": text}), encoding="utf-8")
    assert read_yaml(path).value == {"key": expected, "list": [expected], "text": text}


def test_keys_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("on: 1\n2: 2\nnull: 3\n", encoding="utf-8")
    assert read_yaml(path).value == {"on": 1, "2": 2, "null": 3}


def test_lines_are_those_of_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb:\n  c: [1,\n    2]\n\n  d: {e: 1}\n", encoding="utf-8")
    lines = read_yaml(path).lines
    assert lines[("a",)] == 1
    assert lines[("b", "c")] == 3
    assert lines[("b", "c", 1)] == 4
    assert lines[("b", "d", "e")] == 6


def test_merge_keys_give_way_to_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", encoding="utf-8")
    assert read_yaml(path).value["b"] == {"x": 1, "y": 3}
