"""Rows longer than the learned positions of a model are refused before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.models import positions
from llmrecipe.models.vocabulary import position_offset
from llmrecipe.training.dry_run import check
from tests.models.configs import tiny
from tests.support import shared

ROOM = {"gpt2": 64, "opt": 64, "bert": 64, "bart": 64, "roberta": 63, "llama": None, "gpt_neox": None, "t5": None}


@pytest.mark.parametrize("family", ROOM)
def test_the_table_is_as_long_as_the_longest_row_that_runs(family: str) -> None:
    model = tiny(family)
    model.position_offset = position_offset(model)
    room = positions.learned(model)
    assert room == ROOM[family]
    if room is not None:
        extra = {"decoder_input_ids": torch.tensor([[3]])} if family == "bart" else {}
        model(torch.full((1, room), 3), **extra)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, room + 1), 3), **extra)


def folder_of(family: str, into: Path) -> Path:
    """A model of a family with the embedded tokenizer."""
    from transformers import AutoTokenizer

    from llmrecipe.models.tiny import FOLDER

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.save_pretrained(into)
    tiny(family, vocab_size=len(tokenizer)).config.save_pretrained(into)
    return into


def test_the_longest_row_decides_and_answers_to_be_sampled_count(tmp_path: Path) -> None:
    model = [f"model.path={folder_of('gpt2', tmp_path / 'gpt2')}", "model.init=random"]
    short = [{"text": "Snow fell."}] * 4
    path = tmp_path / "rows.jsonl"
    words = ["recipe=clm", f"data.path={path}", "data.max_length=65", "data.truncation=split"]
    path.write_text("".join(json.dumps(row) + "\n" for row in short))
    assert check("clm", [*words[1:], *model]).rows == 4
    path.write_text("".join(json.dumps(row) + "\n" for row in [*short, {"text": "Snow fell. " * 40}]))
    with pytest.raises(RecipeError, match=r"data.max_length: 65 is more than the 64 positions .* set data.max_length=64"):
        check("clm", [*words[1:], *model])
    asked = ["data.max_length=40", "data.max_dropped=0.9", "objective.max_new_tokens=48", "stack.lora.target=attn.q"]
    with pytest.raises(RecipeError, match=r"max_length: 40 .* less the 48 of objective.max_new_tokens.*set data.max_length=16"):
        check("rloo", [*asked, *model])


def test_max_length_over_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared("cases", "max-length-over-positions"))
    words = ["data.path=long.jsonl", "data.max_length=256", "data.truncation=split", "model.path=m_gpt2", "steps=1"]
    with pytest.raises(RecipeError, match=r"data.max_length: 256 is more than the 64 positions of the model"):
        check("clm", words)
