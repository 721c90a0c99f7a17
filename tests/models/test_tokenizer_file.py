"""Bounds of a tokenizer's files, each with a file that breaks it; loading one of them would take minutes or all memory."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import ModelError
from llmrecipe.core.paths import ASSETS
from llmrecipe.models.load import load_tokenizer
from llmrecipe.models.tokenizer_file import PATTERNS, check_tokenizer_folder
from llmrecipe.recipe.schema import ModelSection, TokenizerSection

TINY = ASSETS / "tiny"
Content = dict[str, Any]


def replaced(sought: dict[str, str], content: str) -> Content:
    return {"type": "Replace", "pattern": sought, "content": content}


def several(kind: str, parts: list[Content]) -> Content:
    return {"type": "Sequence", kind: parts}


def token(number: int, text: str, normalized: bool = False) -> Content:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": number, "content": text, "normalized": normalized, **plain}


def around(pieces: int, ids: int) -> Content:
    begin = {"id": "<bos>", "type_id": 0}
    single = [*[{"SpecialToken": begin}] * pieces, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<bos>": {"id": "<bos>", "ids": [1] * ids, "tokens": ["<bos>"] * ids}}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


LONG = {"Regex": r"\p{L}" * (PATTERNS // 5 + 1)}
SPLITS = [{"type": "Split", "pattern": {"Regex": r"\p{N}" * 500}, "behavior": "Isolated", "invert": False}] * 9
DOUBLED = [replaced({"String": "a"}, "aa")] * 10
SLOW = replaced({"Regex": "a.*a.*[!?]"}, "x")


Change = Callable[[Content], object]


def slow_token(content: Content) -> None:
    content["normalizer"] = SLOW
    content["added_tokens"].append(token(931, "a" * 65, normalized=True))


FAULTS: dict[str, tuple[Change, str]] = {
    "a long pattern": (lambda c: c.update(normalizer=replaced(LONG, "")), "have 20,005 characters, the longest 20,005"),
    "many patterns": (lambda c: c.update(pre_tokenizer=several("pretokenizers", SPLITS)), "22,500 characters, the longest 2,5"),
    "a pattern in a decoder": (lambda c: c.update(decoder=SLOW), "its decoder has a regular expression"),
    "a text that grows": (lambda c: c.update(normalizer=several("normalizers", DOUBLED)), "normalizer can make a text 1,024 "),
    "an answer that grows": (lambda c: c.update(decoder=several("decoders", DOUBLED)), "its decoder can make a text 1,024 t"),
    "a long insertion": (lambda c: c.update(normalizer={"type": "Prepend", "prepend": "a" * 5000}), "a text 5,000 times"),
    "many tokens around a text": (lambda c: c.update(post_processor=around(40, 40)), "post_processor can make a text 1,640 "),
    "a slow pattern on a token": (slow_token, "run on an added token of 65 characters; at most 64"),
    "an id far from the others": (lambda c: c["model"]["vocab"].update(zz=60_000_000), "the id 60,000,000 among 932 tokens"),
    "an added id far from all": (lambda c: c["added_tokens"].append(token(2_000_000_000, "zz")), "the id 2,000,000,000"),
}


def folder_with(place: Path, change: Change, settings: Content | None = None) -> Path:
    shutil.copytree(TINY, place)
    for name, edit in (("tokenizer.json", change), ("tokenizer_config.json", lambda c: c.update(settings or {}))):
        content = json.loads((place / name).read_text(encoding="utf-8"))
        edit(content)
        (place / name).write_text(json.dumps(content), encoding="utf-8")
    return place


def load(folder: Path) -> object:
    return load_tokenizer(ModelSection(path=str(folder)), TokenizerSection())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_out_of_bounds_is_not_read(fault: str, tmp_path: Path) -> None:
    change, said = FAULTS[fault]
    folder = folder_with(tmp_path / "folder", change)
    with pytest.raises(ModelError) as found:
        load(folder)
    assert said in str(found.value) and f"tokenizer.path: {folder / 'tokenizer.json'}: " in str(found.value)
    assert len(str(found.value)) < len(str(folder)) + 250


def test_settings_and_versions_are_bounded_too(tmp_path: Path) -> None:
    far = folder_with(tmp_path / "far", dict, {"added_tokens_decoder": {"300000000": token(0, "zz")}})
    with pytest.raises(ModelError, match=r"far/tokenizer_config.json: a token has the id 300,000,000 among 1 tokens"):
        load(far)
    versions = folder_with(tmp_path / "versions", dict, {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]})
    shutil.copy(
        folder_with(tmp_path / "long", FAULTS["a long pattern"][0]) / "tokenizer.json", versions / "tokenizer.4.0.0.json"
    )
    with pytest.raises(ModelError, match=r"versions/tokenizer.4.0.0.json: its regular expressions"):
        load(versions)


def test_a_repeated_key_hides_nothing(tmp_path: Path) -> None:
    """The library compiles the first of two values and keeps the last."""
    folder = folder_with(tmp_path / "folder", dict)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    first = json.dumps(replaced(LONG, ""))
    (folder / "tokenizer.json").write_text('{"normalizer": ' + first + "," + text.lstrip()[1:], encoding="utf-8")
    with pytest.raises(ModelError, match=r"the key 'normalizer' is there 2 times"):
        load(folder)


def tekken(**changes: Any) -> Content:
    """A vocabulary in Mistral's format: every byte, one merge, and two special tokens with a spare one."""
    words = [bytes([number]) for number in range(256)] + [b"ab"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None} for rank, word in enumerate(words)
    ]
    config = {"pattern": r"\p{L}+|\s+|.", "default_vocab_size": 260, "default_num_special_tokens": 3, "version": "v3"}
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(("<unk>", "<s>"))]
    content = {"config": config, "vocab": vocab, "special_tokens": special}
    for place, value in changes.items():
        (content if place in content else config)[place] = value
    return content


def tekken_folder(place: Path, content: Content) -> Path:
    place.mkdir()
    for name, value in (
        ("tekken.json", content),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}),
        ("config.json", {"model_type": "mistral"}),
    ):
        (place / name).write_text(json.dumps(value), encoding="utf-8")
    return place


def test_a_vocabulary_of_mistral_is_read(tmp_path: Path) -> None:
    tokenizer: Any = load(tekken_folder(tmp_path / "folder", tekken()))
    assert tokenizer("ab b", add_special_tokens=False)["input_ids"] == [259, 3 + ord(" "), 3 + ord("b")]


ABOUT_MISTRAL: dict[str, tuple[Content, str]] = {
    "a long pattern": ({"pattern": r"\p{L}" * (PATTERNS // 5 + 1)}, "its regular expression has 20,005 characters"),
    "many special tokens": ({"default_num_special_tokens": 2_000_000_000}, "it keeps 2,000,000,000 ids for special tokens"),
    "a long token": ({"vocab": [{"token_bytes": "YWFh" * 20_000}]}, "longest of its 1 tokens has 60,000 bytes"),
}


@pytest.mark.parametrize("fault", ABOUT_MISTRAL)
def test_a_vocabulary_of_mistral_is_bounded(fault: str, tmp_path: Path) -> None:
    changes, said = ABOUT_MISTRAL[fault]
    folder = tekken_folder(tmp_path / "folder", tekken(**changes))
    with pytest.raises(ModelError) as found:
        load(folder)
    assert said in str(found.value) and f"tokenizer.path: {folder / 'tekken.json'}: " in str(found.value)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model"])
def test_a_vocabulary_of_tiktoken_is_bounded(name: str, tmp_path: Path) -> None:
    """A SentencePiece model, which may have the same name and is no list of lines, is left to its library."""
    (tmp_path / name).write_bytes(b"YQ== 0\n" + b"YWFh" * 20_000 + b" 1\n")
    with pytest.raises(ModelError, match=rf"{name}: the longest of its 2 tokens has 60,000 bytes"):
        check_tokenizer_folder(tmp_path)
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>" + b"YWFh" * 20_000)
    check_tokenizer_folder(tmp_path)


@pytest.mark.parametrize("template", [5, {"a": 1}, [{"name": "default", "template": ["a"]}]])
def test_a_chat_template_that_is_no_text_is_said(template: object, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "folder", dict, {"chat_template": template})
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"tokenizer.path: .*folder: "):
        load(folder)


def test_what_known_tokenizers_have_is_read(tmp_path: Path) -> None:
    """Split patterns of a thousand characters, sentencepiece's spaces, reserved ids, a word that stands twice."""
    begin = {"type": "Prepend", "prepend": "▁"}
    spaces = several("normalizers", [replaced({"Regex": " {2,}"}, "▁"), begin, replaced({"String": " "}, "▁")])

    def change(content: Content) -> None:
        content |= {"normalizer": spaces, "pre_tokenizer": several("pretokenizers", SPLITS[:2]), "post_processor": around(2, 1)}
        content["added_tokens"] += [token(200_000, "<extra>" * 20), token(931, "<image>", normalized=True)]

    folder = folder_with(tmp_path / "folder", change)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab": {"zz": 1, "zz": 2, ', 1), encoding="utf-8")
    check_tokenizer_folder(folder)
