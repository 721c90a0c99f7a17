"""Training on training and validation rows together: nothing of either is missing, nothing of the test split is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.splits import NoSplitError, has_split, open_split
from llmrecipe.recipe.data_section import DataSection

JOINED = "train+validation"


def written(path: Path, numbers: Sequence[int]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in numbers), encoding="utf-8")
    return str(path)


def texts(data: DataSection, split: str) -> list[str]:
    found = [row["text"] for part in open_split(data, split) for _, row in part.rows(range(len(part.reader)))]
    return sorted(found)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, DataSection]:
    whole = written(tmp_path / "whole.jsonl", range(60))
    for number, (name, count) in enumerate((("train", 9), ("valid", 4), ("test", 3))):
        written(tmp_path / "folder" / f"{name}.jsonl", range(100 * number, 100 * number + count))
    apart = written(tmp_path / "apart.jsonl", range(500, 505))
    plain = written(tmp_path / "plain.jsonl", range(600, 605))
    folder = str(tmp_path / "folder")
    return {
        "shares": DataSection(path=whole, validation=0.2, test=0.3),
        "folder": DataSection(path=folder),
        "folder and a file": DataSection(path=[plain, folder]),
        "weighted": DataSection(path={folder: 0.5, plain: 0.5}),
        "a file of its own": DataSection(path=whole, validation=apart, test=0.3),
    }


@pytest.mark.parametrize("name", ["shares", "folder", "folder and a file", "weighted", "a file of its own"])
def test_both_splits_train_and_none_validates(sources: dict[str, DataSection], name: str) -> None:
    data = sources[name]
    joined = data.model_copy(update={"train_on": JOINED})
    own, held = texts(data, "train"), texts(data, "validation")
    assert own and held and texts(joined, "train") == sorted([*own, *held])
    assert texts(joined, "test") == texts(data, "test") and not set(texts(joined, "train")) & set(texts(data, "test"))
    assert not has_split(joined, "validation")
    assert [part.weight for part in open_split(joined, "train")][: len(open_split(data, "train"))] == [
        part.weight for part in open_split(data, "train")
    ]


def test_messages_still_name_the_file_of_a_row(sources: dict[str, DataSection]) -> None:
    reader = open_split(sources["folder"].model_copy(update={"train_on": JOINED}), "train")[0].reader
    assert [Path(reader.source(i)).name for i in (0, 8, 9, 12)] == ["train.jsonl", "train.jsonl", "valid.jsonl", "valid.jsonl"]


def test_what_cannot_be_joined_is_told(sources: dict[str, DataSection], tmp_path: Path) -> None:
    data = sources["weighted"].model_copy(update={"train_on": JOINED, "validation": written(tmp_path / "v.jsonl", [1])})
    with pytest.raises(DataError, match=r"data.train_on: the sources of data.path have weights"):
        open_split(data, "train")
    with pytest.raises(DataError, match=r"data.train_on: .* a stream does not"):
        open_split(sources["shares"].model_copy(update={"train_on": JOINED, "streaming": True}), "train")
    with pytest.raises(NoSplitError, match="no validation split"):
        open_split(DataSection(path=str(tmp_path / "whole.jsonl"), train_on=JOINED), "train")
