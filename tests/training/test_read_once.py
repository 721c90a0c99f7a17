"""What is slow to read is not read again: the tokenizer by whatever looks at it before weights, the tensors of a run below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs import delta, open_model
from llmrecipe.training.build_run import build_parts
from llmrecipe.training.dry_run import check
from llmrecipe.training.train import train

WORDS = ["data.limit=16", "data.cache=false", "batch.size=4", "steps=1"]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tokenizers read so far."""
    found: list[Any] = []
    load = open_model.load_tokenizer

    def counted(*sections: Any) -> Any:
        found.append(load(*sections))
        return found[-1]

    monkeypatch.setattr(open_model, "load_tokenizer", counted)
    return found


def test_check_reads_it_once(read: list[Any]) -> None:
    check("sft_lora", WORDS)
    assert len(read) == 1


def test_a_run_reads_it_once_for_the_checks_and_once_for_the_model(read: list[Any], tmp_path: Path) -> None:
    state = build_parts(compose("sft_lora", [*WORDS, f"run.dir={tmp_path / 'run'}"]), None)
    state.runtime.close()
    assert len(read) == 2
    assert state.loaded.tokenizer is read[1], "what a run changes and saves is no shared one"


def test_other_sections_are_other_tokenizers_and_nothing_is_shared_outside(read: list[Any]) -> None:
    model, plain = ModelSection(path="tiny"), TokenizerSection()
    with open_model.shared_tokenizers():
        first = open_model.tokenizer_of(model, plain)
        assert open_model.tokenizer_of(model, TokenizerSection()) is first
        named = open_model.tokenizer_of(model, TokenizerSection(chat_template="plain"))
        assert named is not first and named.chat_template != first.chat_template
        with open_model.shared_tokenizers():
            assert open_model.tokenizer_of(model, plain) is not first
        assert open_model.tokenizer_of(model, plain) is first
    assert open_model.tokenizer_of(model, plain) is not first
    assert len(read) == 4


def test_the_tensors_of_a_run_below_are_read_to_check_them_and_to_mount_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, "eval.at_start=false", "eval.batches=1"]
    train(compose("sft_lora", [*words, f"run.dir={tmp_path / 'below'}"]))
    read: list[str] = []
    load = delta.load_file

    def counted(path: str) -> Any:
        read.append(path)
        return load(path)

    monkeypatch.setattr(delta, "load_file", counted)
    state = build_parts(compose("sft_lora", [*words, f"model.path={tmp_path / 'below'}", f"run.dir={tmp_path / 'run'}"]), None)
    state.runtime.close()
    assert len(read) == 2 and len(set(read)) == 1
