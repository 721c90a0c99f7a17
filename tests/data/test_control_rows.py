"""`data.control`: training rows whose columns say nothing about each other, in every way they are read, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.splits import open_split
from llmrecipe.data.prepare import prepare
from llmrecipe.data.token_data import TokenData
from llmrecipe.models.tiny import FOLDER
from llmrecipe.recipe.data_section import DataSection

TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
Row = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty rows with a text and a label of their own, four of each other split."""
    for split, count in (("train", 40), ("valid", 4), ("test", 4)):
        rows = [{"text": f"{split} number{i} word{i} and{i}", "label": f"{split}-{i}"} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def read(folder: Path, split: str = "train", **options: Any) -> list[Row]:
    """The rows of a split as they are encoded."""
    (part,) = open_split(DataSection(path=str(folder), **options), split)
    return [row for _, row in part.rows(range(len(part.reader)))]


def test_each_row_has_the_value_of_another_and_each_value_comes_once(folder: Path) -> None:
    own, made = read(folder), read(folder, control={"label": "rows"})
    assert [row["text"] for row in made] == [row["text"] for row in own]
    assert sorted(row["label"] for row in made) == sorted(row["label"] for row in own)
    assert all(a["label"] != b["label"] for a, b in zip(own, made, strict=True))
    assert made == read(folder, control={"label": "rows"}), "the same in every run"
    (part,) = open_split(DataSection(path=str(folder), control={"label": "rows"}), "train")
    assert [row for _, row in part.rows([7, 3])] == [made[7], made[3]], "whatever is read together"


def test_columns_that_move_move_apart(folder: Path) -> None:
    made = read(folder, control={"label": "rows", "text": "rows"})
    assert sum(row["label"].partition("-")[2] == row["text"].split()[1].removeprefix("number") for row in made) <= 5


def test_words_come_from_rows_all_over(folder: Path) -> None:
    """As many words as before; whose they are is as good as drawn from the forty rows."""
    made = read(folder, control={"text": "words"})
    assert [row["label"] for row in made] == [row["label"] for row in read(folder)]
    words = Counter(word for row in made for word in row["text"].split())
    assert all(len(row["text"].split()) == 4 for row in made) and set(words) <= {
        word for row in read(folder) for word in row["text"].split()
    }
    together = sum(len({w.lstrip("numberwoda") for w in row["text"].split() if w != "train"}) == 1 for row in made)
    assert together <= 8 and words["train"] < 80


def test_other_splits_stay_as_they_are(folder: Path) -> None:
    for split in ("validation", "test"):
        assert read(folder, split, control={"label": "rows", "text": "words"}) == read(folder, split)


@pytest.mark.parametrize("how", ["rows", "words"])
def test_rows_of_a_share_get_nothing_from_the_rows_it_leaves_out(folder: Path, how: str) -> None:
    held_out = read(folder, "validation", validation=0.3)
    trained = read(folder, validation=0.3, control={"text": how})
    assert trained and len(trained) + len(held_out) == 40
    kept = {word for row in read(folder, validation=0.3) for word in row["text"].split()}
    assert {word for row in trained for word in row["text"].split()} <= kept
    assert read(folder, "validation", validation=0.3, control={"text": how}) == held_out


def ids(folder: Path, **options: Any) -> list[list[int]]:
    made = prepare(DataSection(path=str(folder), **options), TOKENIZER, "text", seed=0)
    assert isinstance(made, TokenData)
    return [made[i]["ids"] for i in range(len(made))]


def test_the_cache_keeps_a_control_and_its_rows_apart(folder: Path) -> None:
    plain, control = ids(folder), ids(folder, control={"text": "words"})
    assert plain != control and ids(folder) == plain and ids(folder, control={"text": "words"}) == control
    some = ids(folder, control={"text": "words"}, limit=5)
    assert len(some) == 5 and all(row in control for row in some)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"control": {"txt": "words"}},
            r"data.control.txt: .* has no column 'txt'; did you mean 'text'\? \(columns: text, label\)",
        ),
        ({"control": {"text": "rows"}, "streaming": True}, "data.control: the other rows of a stream are not known"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ids(folder, **options)


def test_words_of_what_is_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "text": "b"}\n')
    with pytest.raises(DataError, match=r"data.control.messages=words: the column is no text in .* set it to rows"):
        ids(tmp_path, control={"messages": "words"})
