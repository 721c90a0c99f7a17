"""The row type `words`: word of each token whatever the tokenizer, special tokens around every piece, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.recipe.data_section import DataSection

TEXTS = ["the harbour was frozen", "snowflakes fell", "the frozen snowflakes"] * 4
SPECIAL = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of one kind that writes [CLS] ... [SEP]."""
    names = list(SPECIAL.values())
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=40, special_tokens=names)
    elif kind == "bpe":
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=names)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=names, unk_token="[UNK]")
    made.train_from_iterator(TEXTS, trainer)
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def rows(found: Any, folder: Path, text: str, **data: Any) -> list[dict[str, Any]]:
    (folder / "train.txt").write_text(text, encoding="utf-8")
    section = DataSection(path=str(folder / "train.txt"), cache=False, **{"max_length": 64, "validation": 0, **data})
    return list(prepare(section, found, "words", mask="completion", split="train", seed=0))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_pieces_of_a_word_share_its_number(kind: str, tmp_path: Path) -> None:
    own = tokenizer(kind)
    text = "the snowflakes was frozen"
    (row,) = rows(own, tmp_path, text)
    assert row["words"][0] == row["words"][-1] == -1 and own.convert_ids_to_tokens([row["ids"][0], row["ids"][-1]]) == [
        "[CLS]",
        "[SEP]",
    ]
    assert len(row["ids"]) == len(row["words"]) > 6
    spelled: dict[int, str] = {}
    for token, word in zip(row["ids"][1:-1], row["words"][1:-1], strict=True):
        piece = own.convert_ids_to_tokens(token)
        spelled[word] = spelled.get(word, "") + piece.lstrip("Ġ▁").removeprefix("##")
    assert list(spelled.values()) == text.split()


def test_every_piece_of_a_split_document_has_its_own_special_tokens(tmp_path: Path) -> None:
    own = tokenizer("wordpiece")
    (whole,) = rows(own, tmp_path, "the frozen snowflakes fell the harbour")
    parts = rows(own, tmp_path, "the frozen snowflakes fell the harbour", max_length=8, truncation="split")
    assert len(parts) > 1 and all(len(p["ids"]) <= 8 for p in parts)
    assert all(p["ids"][0] == whole["ids"][0] and p["ids"][-1] == whole["ids"][-1] for p in parts)
    assert [i for p in parts for i in p["ids"][1:-1]] == whole["ids"][1:-1]
    assert [w for p in parts for w in p["words"][1:-1]] == whole["words"][1:-1]


def test_a_length_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.max_length: 2 leaves no room"):
        rows(tokenizer("bpe"), tmp_path, "the harbour", max_length=2)


def test_a_document_is_cut_into_its_sentences(tmp_path: Path) -> None:
    own = tokenizer("bpe")
    section = DataSection(path=str(tmp_path / "train.jsonl"), cache=False, max_length=8, validation=0)
    text = 'The harbour was frozen! "Snow fell." the frozen\nsnowflakes'
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    (row,) = prepare(section, own, "sentences", mask="completion", split="train", seed=0)
    assert sum(row["sentences"]) == len(row["ids"]) == len(row["words"]) > 8
    start, spelled = 0, []
    for length in row["sentences"]:
        spelled.append(own.decode(row["ids"][start : start + length]).replace("[UNK]", "").strip())
        start += length
    assert len(spelled) == 4 and spelled[2].endswith("the frozen") and spelled[3] == "snowflakes"
