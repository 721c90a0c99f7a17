"""Tool calls: arguments as JSON text and as objects are the same tokens under every template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.data import prepare
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.prompts import read_prompts
from llmrecipe.data.token_data import TokenData
from llmrecipe.data.tokenize.chat_templates import Template, prompt_ids
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn
from tests.support import shared

HEAD = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
TAIL = "{% endfor %}{% endfor %}"
WANTED = '{"city": "Århus", "days": [1, 2]}'
TEMPLATES = {
    **{name: (registry.load_class("chat_template", name).text, f'"arguments": {WANTED}') for name in ("chatml", "plain")},
    "formats": (HEAD + "{{ f.arguments | tojson }}" + TAIL, WANTED),
    "joins": (HEAD + "{{ '<' + f.arguments + '>' }}" + TAIL, f"<{WANTED}>"),
    "joins behind": (HEAD + "{{ f.arguments + '>' }}" + TAIL, f"{WANTED}>"),
    "prints": (HEAD + "{{ f.arguments }}" + TAIL, WANTED),
    "asks": (HEAD + "{{ f.arguments if f.arguments is string else f.arguments | tojson }}" + TAIL, WANTED),
    "walks": (HEAD + "{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}" + TAIL, "city=Århus;days=[1, 2];"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("nested", [True, False])
def test_text_and_object_render_alike(name: str, nested: bool) -> None:
    text, wanted = TEMPLATES[name]
    template = Template(name, text, named=True, variables={"bos_token": "", "eos_token": "</s>"})
    found = set()
    for arguments in (json.loads(WANTED), WANTED, WANTED.replace(" ", ""), json.dumps(json.loads(WANTED))):
        call: dict[str, Any] = {"name": "weather", "arguments": arguments}
        message = {**turn("assistant", ""), "tool_calls": [{"type": "function", "function": call} if nested else call]}
        found.add(template.render([turn("user", "?"), message]))
    (one,) = found
    assert wanted in one


def test_arguments_that_are_no_json_object_are_left_alone() -> None:
    template = Template("t", TEMPLATES["prints"][0], named=True)
    for given in ("Oslo", "[1]", '{"city": '):
        message = {**turn("assistant", ""), "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
        assert template.render([message]) == given


def test_arguments_that_repeat_a_key_are_refused() -> None:
    call = {"function": {"name": "f", "arguments": '{"city": "Oslo", "city": "Rome"}'}}
    template = Template("chatml", TEMPLATES["chatml"][0], named=True)
    with pytest.raises(BadRow, match="the arguments of a tool call repeat a key") as bad:
        template.render([turn("user", "a"), {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert "'city' is there 2 times" in bad.value.detail


def test_tool_args_json_text() -> None:
    folder: Path = shared("cases", "tool-args-json-text")
    tokenizer = byte_tokenizer(template=(folder / "qwenlike.jinja").read_text(encoding="utf-8"))

    def rows(name: str) -> list[Any]:
        found = prepare(DataSection(path=str(folder / name), cache=False), tokenizer, "dialogue", seed=0)
        assert isinstance(found, TokenData)
        return list(found)

    assert rows("c01.jsonl") == rows("c01d.jsonl") and len(rows("c01.jsonl")) == 4
    assert '"arguments": {"city": "Oslo"}}' in tokenizer.decode(rows("c01.jsonl")[0]["ids"])


def test_a_prompt_to_answer_has_the_tokens_of_training_tools_and_calls_included(tmp_path: Path) -> None:
    """What generation and evaluation ask a model is what training showed it: tools listed, arguments as JSON."""
    call = {"name": "weather", "arguments": WANTED}
    talk = [turn("user", "?"), {**turn("assistant", ""), "tool_calls": [call]}, turn("tool", "3"), turn("assistant", "Cold.")]
    row = {"messages": talk, "tools": json.dumps([{"name": "weather", "parameters": {}}])}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = byte_tokenizer()
    data = prepare(DataSection(path=str(tmp_path / "a.jsonl"), cache=False), tokenizer, "dialogue", mask="last", seed=0)
    assert isinstance(data, TokenData)
    trained = data[0]["ids"][: data[0]["trained"].index(1)]
    (prompt,) = read_prompts(str(tmp_path / "a.jsonl"))
    found = prompt_ids(tokenizer, prompt.turns, prompt.tools, prompt.kwargs)
    assert found == trained and WANTED in tokenizer.decode(found) and '"parameters"' in tokenizer.decode(found)
