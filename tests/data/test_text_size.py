"""Windows of long texts predict each token once, and what the targets stand for adds up to the text, whatever cuts it."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmrecipe.core.paths import ASSETS
from llmrecipe.data import TokenData, prepare
from llmrecipe.data.tokenize.text_size import TextSize
from llmrecipe.data.tokenize.truncation import Limit, fit_sequence, truncation
from llmrecipe.models.load import load_tokenizer
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer

TEXTS = ["One  day\nHana found a brown bag. " * 5, "我能吞下玻璃 🙂👩‍🚀 naïve  Žluťoučký " * 3, "a", " lead and trail \n\n"]


@functools.cache
def tokenizers() -> dict[str, Any]:
    made = {"bytes": byte_tokenizer(), "bytes with a start": byte_tokenizer(adds_bos=True)}
    made["tiny"] = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    for algorithm in ("unigram", "wordpiece"):
        words = ["model.init=random", "tokenizer.train.vocab_size=400", f"tokenizer.train.algorithm={algorithm}"]
        recipe = compose("clm", words).recipe
        made[algorithm] = load_tokenizer(recipe.model, recipe.tokenizer)
    return made


def rows_of(folder: Path, tokenizer: Any, split: str = "validation", **data: Any) -> TokenData:
    folder.mkdir(exist_ok=True)
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    found = prepare(DataSection(path=str(folder), **data), tokenizer, "text", mask="all", split=split, seed=0)
    assert isinstance(found, TokenData)
    return found


def test_windows_of_ten_tokens_that_move_on_by_four() -> None:
    ids = list(range(100, 119))
    pieces = fit_sequence(ids, [0] + [1] * 18, truncation("split"), Limit(10, stride=4), "here", plain=True)
    assert [(piece[0], len(piece), sum(trained)) for piece, trained in pieces] == [
        (100, 10, 9), (104, 10, 4), (108, 10, 4), (109, 10, 1),
    ]  # fmt: skip
    assert [t for piece, trained in pieces for t, one in zip(piece, trained) if one] == ids[1:]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_but_the_first_is_predicted_once_with_enough_context(seed: int) -> None:
    draws = random.Random(seed)
    length = draws.randint(2, 12)
    stride = draws.randint(1, length - 1)
    ids = list(range(draws.randint(1, 60)))
    pieces = fit_sequence(
        ids, [0, *[1] * (len(ids) - 1)], truncation("split"), Limit(length, stride=stride), "here", plain=True
    )
    assert [t for piece, trained in pieces for t, one in zip(piece, trained) if one] == ids[1:]
    assert all(len(piece) <= length for piece, _ in pieces)
    assert all(trained.index(1) >= min(length - stride, len(ids) - 1) for _, trained in pieces[1:])


@pytest.mark.parametrize(("length", "stride"), [(1000, None), (7, None), (7, 3), (16, 15), (16, 1)])
def test_the_rows_of_a_document_stand_for_all_of_it(length: int, stride: int | None, tmp_path: Path) -> None:
    for name, tokenizer in tokenizers().items():
        data = rows_of(tmp_path / name.replace(" ", "_"), tokenizer, max_length=length, stride=stride)
        assert (len(data) == len(TEXTS)) == (length == 1000)
        sums = [[0, 0, 0] for _ in TEXTS]
        for row in data:
            for i, value in enumerate((row["bytes"], row["words"], sum(row["trained"]))):
                sums[row["source_row"]][i] += value
        for text, (size, words, targets) in zip(TEXTS, sums, strict=True):
            # Without a start token the first token has nothing that predicts it: it is no target, and neither is its text.
            first = 0 if name != "bytes" else len(text[0].encode())
            assert size == len(text.encode()) - first, (name, text)
            assert words == len(text.split()) - bool(first and not text[0].isspace()), (name, text)
            assert targets == len(tokenizer(text)["input_ids"])  # one less for the first, one more for the end token


def test_training_rows_are_cut_without_overlap(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    data = rows_of(tmp_path / "data", tokenizer, split="train", max_length=7)
    assert all(row["trained"][0] == 0 and sum(row["trained"]) == len(row["ids"]) - 1 for row in data)
    assert sum(len(row["ids"]) for row in data) >= sum(len(t.encode()) for t in TEXTS)


def test_sizes_by_hand() -> None:
    class Places:
        def token_to_chars(self, place: int) -> tuple[int, int] | None:
            return [None, (0, 2), (3, 5), (5, 6), (6, 11)][place]

    # <s> "ab" " cd" "é", the end token; the second row starts inside the second word.
    size = TextSize("ab cdé", 5, Places(), framed=True)
    assert size.of([0, 1, 2], [0, 1, 1]) == {"bytes": 5, "words": 2}
    assert size.of([2, 3, 4], [0, 1, 1]) == {"bytes": 2, "words": 0}
    assert size.of([0, 1, 2, 3, 4], [0, 1, 1, 1, 1]) == {"bytes": 7, "words": 2}
    assert TextSize("ab cdé", 5, None, framed=True).of([0, 1, 2, 3, 4], [0, 1, 1, 1, 1]) == {"bytes": 7, "words": 2}
    assert TextSize("ab cdé", 5, None, framed=True).of([2, 3, 4], [0, 1, 1]) == {}
