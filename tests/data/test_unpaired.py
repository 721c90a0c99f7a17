"""Single answers liked or not, as conversations and as Alpaca rows with a label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.data import prepare
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion
from llmrecipe.data.formats.detect import detect
from llmrecipe.data.token_data import TokenData
from llmrecipe.data.tokenize.chat_templates import ALPACA_PROMPT, set_template
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn
from tests.support import shared

U, A, U2, B = turn("user", "hi"), turn("assistant", "yo"), turn("user", "more"), turn("assistant", "no")


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "liked"),
    [
        ({"messages": [U, A], "label": True}, [U], A, True),
        ({"conversations": [U, A, U2, B], "kto_tag": "false"}, [U, A, U2], B, False),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "label": 0}, [U], A, False),
        ({"instruction": "hi", "input": "", "output": "yo", "kto_tag": True},
         [{**U, "instruction": "hi", "input": ""}], A, True),
        ({"instruction": "hi", "output": "yo", "label": "bad"}, [{**U, "instruction": "hi", "input": ""}], A, False),
    ],
)  # fmt: skip
def test_the_last_turn_is_judged(row: dict[str, Any], prompt: Any, answer: Any, liked: bool) -> None:
    found = detect([row], "unpaired", "auto", "f").convert(row, Conversion("unpaired", wrap=True, template=True))
    assert found == [{"prompt": prompt, "completion": [answer], "label": liked}]


def test_a_conversation_without_a_last_answer_is_a_bad_row() -> None:
    for talk in ([U, A, U2], [A]):
        row = {"messages": talk, "label": True}
        with pytest.raises(BadRow, match="does not end with an answer to judge"):
            detect([row], "unpaired", "auto", "f").convert(row, Conversion("unpaired", template=True))


def tokens(path: Path, named: str | None = "own") -> list[tuple[str, str, bool]]:
    tokenizer = byte_tokenizer()
    set_template(tokenizer, named)
    found = prepare(DataSection(path=str(path), cache=False), tokenizer, "unpaired", seed=0)
    assert isinstance(found, TokenData)
    return [(tokenizer.decode(r["prompt_ids"]), tokenizer.decode(r["completion_ids"]), r["label"]) for r in found]


@pytest.mark.parametrize("name", ["c08.jsonl", "c08b.jsonl", "c08c.jsonl"])
def test_kto_messages_label(name: str) -> None:
    path = shared("cases", "kto-messages-label", name)
    found = tokens(path)
    assert len(found) == 16 and sum(liked for *_, liked in found) == 8
    for number, (prompt, answer, liked) in enumerate(found):
        assert prompt == f"<|im_start|>user\nCount to {number}<|im_end|>\n<|im_start|>assistant\n"
        assert answer == "one two three<|im_end|>\n" and liked == (number % 2 == 0)
    unnamed = [(prompt, answer.removesuffix("</s>"), liked) for prompt, answer, liked in tokens(path, None)]
    raw = [ALPACA_PROMPT.format(instruction=f"Count to {number}") for number in range(16)]
    assert unnamed == (found if name == "c08.jsonl" else [(p, "one two three", row[2]) for p, row in zip(raw, found)])


def test_conversations_and_alpaca_rows_give_the_tokens_of_prompt_and_completion(tmp_path: Path) -> None:
    """Alpaca rows are text, so they are conversations where the recipe names a template."""
    rows = {
        "messages": {"messages": [U, A], "label": True},
        "alpaca": {"instruction": "hi", "input": "", "output": "yo", "label": True},
        "plain": {"prompt": [U], "completion": [A], "label": True},
    }
    found = []
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        found.append(tokens(tmp_path / f"{name}.jsonl"))
    assert found[0] == found[1] == found[2]
