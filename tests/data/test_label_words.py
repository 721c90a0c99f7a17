"""Labels in words: rows of a text and a label are the questions somebody would have written, with the words to choose from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, prepare
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer

WORDS = {0: "terrible", 1: "great", 2: "okay"}
PROMPT = "{text} It was"


def file_of(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: str, rows: str = "choices", **data: Any) -> TokenData:
    found = prepare(DataSection(path=path, **data), byte_tokenizer(), rows, seed=0)
    assert isinstance(found, TokenData)
    return found


def tokens(data: TokenData) -> list[dict[str, Any]]:
    return [{k: v for k, v in data[i].items() if k not in ("row", "source_row")} for i in range(len(data))]


def test_labelled_rows_are_questions_with_the_words_of_all_labels(tmp_path: Path) -> None:
    labelled = [{"text": "A fine day. ", "label": 1}, {"text": "Rain.", "label": 0}, {"text": "So so.", "label": 2}]
    options = [" terrible", " great", " okay"]
    written = [
        {"prompt": f"{row['text'].strip()} It was", "completion": f" {WORDS[row['label']]}", "options": options}
        for row in labelled
    ]
    ours = read(file_of(tmp_path / "a.jsonl", labelled), label_words=WORDS, label_prompt=PROMPT)
    theirs = read(file_of(tmp_path / "b.jsonl", written))
    assert tokens(ours) == tokens(theirs) and len(ours) == 3
    assert [row["right"] for row in tokens(ours)] == [1, 0, 2]
    other = read(file_of(tmp_path / "a.jsonl", labelled), label_words=WORDS, label_prompt="{text} All in all:")
    assert tokens(other) != tokens(ours), "a table of another prompt is not taken from the cache"


def test_pairs_name_both_texts(tmp_path: Path) -> None:
    pairs = [{"premise": "It snows.", "hypothesis": "It is cold.", "label": "yes"}]
    path = file_of(tmp_path / "pairs.jsonl", pairs)
    (row,) = tokens(
        read(path, label_words={"yes": "Yes", "no": "No"}, label_prompt="{premise} Then: {hypothesis} True or not?")
    )
    assert byte_tokenizer().decode(row["prompt_ids"], skip_special_tokens=True) == "It snows. Then: It is cold. True or not?"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, r"data.label_words: rows of a text and a label are questions once each label has a word"),
        ({"label_words": {0: "bad", 1: "bad "}}, r"data.label_words: each label needs a word of its own"),
        ({"label_words": WORDS, "label_prompt": "{sentence} It was"}, r"data.label_prompt: rows have no column 'sentence'"),
        ({"label_words": {0: "bad"}}, "has no word in data.label_words"),
    ],
)
def test_words_that_do_not_fit_are_told(data: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.jsonl", [{"text": "A fine day.", "label": 1}, {"text": "Rain.", "label": 0}])
    with pytest.raises(DataError, match=told):
        read(path, **data)


def test_labels_are_numbers_or_text_in_files_and_on_the_command_line(tmp_path: Path) -> None:
    given = compose("choices", ["data.label_words={0: bad, 1: good}"]).recipe.data.label_words
    assert {str(label): word for label, word in given.items()} == {"0": "bad", "1": "good"}
    with pytest.raises(ValueError, match="labels that are all numbers, or all text"):
        DataSection(label_words={0: "bad", "good": "good"})


def test_as_labels_they_are_read_as_before(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.jsonl", [{"text": "A fine day.", "label": 1}, {"text": "Rain.", "label": 0}])
    assert read(path, "labelled").labels == ["0", "1"]
