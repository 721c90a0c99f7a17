"""Rows of one length across documents: every token once, documents kept apart or not, nothing read but the row itself."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, order, prepare
from llmrecipe.data.overlap import HASHES, shared_rows
from llmrecipe.data.token_blocks import BlockData
from llmrecipe.objectives.pretraining.clm import Clm
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer
from tests.tiny import roles_for, tiny_model


def source(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def read(rows: str = "text", **data: Any) -> Any:
    return prepare(DataSection(**data), byte_tokenizer(adds_bos=True), rows, mask="all", split="train", seed=0)


def documents(texts: list[str]) -> list[list[int]]:
    tokenizer = byte_tokenizer(adds_bos=True)
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


def test_a_strip_cut_by_hand(tmp_path: Path) -> None:
    # <s> a b c </s> <s> d </s> <s> e f </s> in rows of 5: the first token of each is the last of the one before.
    data = read(path=source(tmp_path / "a.jsonl", ["abc", "d", "ef"]), max_length=5, blocks=True)
    assert isinstance(data, BlockData)
    (a, b, c), (start, end) = documents(["abc"])[0][1:4], (0, 1)
    d, e, f = (documents([letter])[0][1] for letter in "def")
    assert [row["ids"] for row in data] == [[start, a, b, c, end], [end, start, d, end, start], [start, e, f, end]]
    assert [row["trained"] for row in data] == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 1]]
    assert [row["documents"] for row in data] == [[5], [1, 3, 1], [4]]
    assert [row["source_row"] for row in data] == [0, 0, 2]
    assert data.lengths().tolist() == [5, 5, 4] and data.report.longest == 5 and data.report.blocks == 3


@pytest.mark.parametrize("seed", range(6))
def test_every_target_of_every_document_once(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = random.Random(seed)
    monkeypatch.setattr("llmrecipe.data.tokenize_split.BATCH", draws.randint(1, 5))  # rows reach over record batches
    sets = [["".join(draws.choices("abc é", k=draws.randint(1, 30))).strip() or "x" for _ in range(n)] for n in (7, 12)]
    paths = [source(tmp_path / f"{i}.jsonl", texts) for i, texts in enumerate(sets)]
    length = draws.randint(2, 40)
    data = read(path=paths, max_length=length, blocks=True, cache=bool(seed % 2))
    found = [t for row in data for t, one in zip(row["ids"], row["trained"], strict=True) if one]
    assert found == [t for texts in sets for ids in documents(texts) for t in ids[1:]]
    assert all(sum(row["documents"]) == len(row["ids"]) <= length for row in data)
    short = [i for i, row in enumerate(data) if len(row["ids"]) < length]
    assert set(short) <= {int(start) - 1 for start in data.starts[1:]}
    assert data.lengths().tolist() == [len(row["ids"]) for row in data]


def test_weights_count_tokens_and_the_order_is_that_of_the_seed(tmp_path: Path) -> None:
    # Few long documents against many short ones: weights hold for rows of one length, so for tokens.
    a, b = source(tmp_path / "a.jsonl", ["a" * 400] * 3), source(tmp_path / "b.jsonl", ["b"] * 300)
    data = read(path={a: 3.0, b: 1.0}, max_length=8, blocks=True)
    letter = documents(["a"])[0][1]
    for epoch in range(3):
        drawn = order(data, 0, epoch)
        assert abs(sum(letter in data[int(i)]["ids"] for i in drawn) - 0.75 * len(drawn)) < 2
    np.testing.assert_array_equal(order(data, 0, 3), order(data, 0, 3))


def test_one_table_serves_every_length(tmp_path: Path) -> None:
    path = source(tmp_path / "a.jsonl", ["abc" * 9] * 4)
    first, second = (read(path=path, max_length=n, blocks=True) for n in (5, 9))
    assert first.tables[0].folder == second.tables[0].folder and first.key != second.key


def test_loss_is_that_of_documents_apart_or_of_one_long_text(tmp_path: Path) -> None:
    texts = ["abcab", "ba", "cabcabca", "b"]
    data = read(path=source(tmp_path / "a.jsonl", texts), max_length=7, blocks=True)
    model, clm = tiny_model(vocab_size=261).double(), Clm()
    roles = roles_for(model)

    def nll(ids: list[int], trained: list[int]) -> float:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return -sum(float(logprobs[i - 1, t]) for i, t in enumerate(ids) if trained[i])

    apart = whole = 0.0
    for row in data:
        whole += nll(row["ids"], row["trained"])
        start = 0
        for length in row["documents"]:
            part = slice(start, start + length)
            apart += nll(row["ids"][part], [0, *row["trained"][part][1:]])
            start += length
    for packing, wanted in ((True, apart), (False, whole)):
        roles.packing = packing
        batch = clm.collate(list(data), roles)
        assert float(clm.loss(batch, roles).total.detach()) == pytest.approx(wanted, rel=1e-9)
    assert abs(apart - whole) > 1e-3


def test_a_row_costs_the_same_in_a_large_corpus(tmp_path: Path) -> None:
    peaks = []
    for copies in (1, 20):
        path = source(tmp_path / f"{copies}.jsonl", [f"some text {i} " * 20 for i in range(100 * copies)])
        read(path=path, max_length=64, blocks=True)  # makes the table
        tracemalloc.start()
        data = read(path=path, max_length=64, blocks=True)
        for i in range(0, len(data), len(data) // 50):
            _ = data[i]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_rows_in_both_splits_are_counted_from_kept_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i}" for i in range(9)]
    path, held_out = source(tmp_path / "a.jsonl", texts), source(tmp_path / "v.jsonl", ["text 3", "other", "text 3", "text 8"])
    data = read(path=path, max_length=16, blocks=True)
    section = DataSection(path=path, validation=held_out, max_length=16)
    second = prepare(section, byte_tokenizer(adds_bos=True), "text", mask="all", split="validation", seed=0)
    assert isinstance(second, TokenData)
    assert shared_rows(data, second) == 3
    folder = data.tables[0].folder
    assert folder is not None and (folder / HASHES).is_file()
    monkeypatch.setattr("llmrecipe.data.overlap._hashes", lambda table: pytest.fail("read again"))
    assert shared_rows(data, second) == 3


@pytest.mark.parametrize(
    ("words", "rows", "says"),
    [
        ({}, "dialogue", r"data\.blocks: .*this one reads dialogue rows; leave the key out"),
        ({"streaming": True}, "text", r"data\.blocks: .*data\.streaming does not keep"),
        ({"max_length": 1}, "text", r"data\.max_length must be at least 2"),
    ],
)
def test_refusals(words: dict[str, Any], rows: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read(rows, path=source(tmp_path / "a.jsonl", ["abc"]), blocks=True, **words)


def test_blocks_longer_than_the_training_rows_are_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "a.jsonl", ["abc", "d"])  # 5 + 3 tokens
    assert read(path=path, max_length=8, blocks=True).lengths().tolist() == [8]
    with pytest.raises(
        DataError, match=r"data\.max_length: blocks of 9 tokens .* of 8 tokens altogether; set data\.max_length=8"
    ):
        read(path=path, max_length=9, blocks=True)
