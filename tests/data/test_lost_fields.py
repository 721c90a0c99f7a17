"""What a row holds besides text is in its tokens, or the run stops: tools, tool calls, thoughts, names, pictures, parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, prepare
from llmrecipe.data.tokenize.chat_templates import set_template
from llmrecipe.data.validation import warnings
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, trained_text, turn
from tests.support import shared

BARE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
BARE += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
ASKED = turn("user", "What is 1 + 1?")


def read(tmp_path: Path, rows: list[dict[str, Any]], kind: str = "dialogue", template: str | None = BARE, **data: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer(template=None)
    if template is not None:
        set_template(tokenizer, template)
    found = prepare(DataSection(path=str(path), **data), tokenizer, kind, mask="completion", seed=0)
    assert isinstance(found, TokenData)
    return found, tokenizer


def answer(**fields: Any) -> dict[str, Any]:
    return {**turn("assistant", "2"), **fields}


ROWS: dict[str, dict[str, Any]] = {
    "tool_calls": {"messages": [ASKED, answer(tool_calls=[CALL])]},
    "reasoning_content": {"messages": [ASKED, answer(reasoning_content="one and one")]},
    "thinking": {"messages": [ASKED, answer(thinking="one and one")]},
    "name": {"messages": [{**ASKED, "name": "Ida"}, answer()]},
    "images": {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "?"}]},
                            answer()]},
    "tools": {"messages": [ASKED, answer()], "tools": [TOOL]},
}  # fmt: skip


@pytest.mark.parametrize("field", ROWS)
@pytest.mark.parametrize("kind", ["dialogue", "preference", "unpaired", "prompt"])
def test_a_field_without_a_place_stops_with_counts_and_is_dropped_on_purpose(tmp_path: Path, field: str, kind: str) -> None:
    *prompt, last = ROWS[field]["messages"]
    tools = {"tools": ROWS[field]["tools"]} if field == "tools" else {}
    row: dict[str, Any] = {
        "dialogue": {"messages": [*prompt, last]},
        "preference": {"prompt": prompt, "chosen": [last], "rejected": [turn("assistant", "3")]},
        "unpaired": {"prompt": prompt, "completion": [last], "label": True},
        "prompt": {"prompt": [*prompt, last, turn("user", "And 2 + 2?")]},
    }[kind]
    plain = {"prompt": [ASKED], "chosen": [turn("assistant", "2")], "rejected": [turn("assistant", "3")], "label": True,
             "completion": [turn("assistant", "2")]}  # fmt: skip
    other = {k: plain[k] for k in row if k in plain} or {"messages": [ASKED, turn("assistant", "2")]}
    rows = [other, {**row, **tools}, {**row, **tools}]
    stop = r"rows.jsonl:2: 2 of 3 rows have something under 'images'" if field == "images" else (
        rf"rows.jsonl:2: the chat template 'text' has no place for '{field}', so 2 of 3 rows"
    )  # fmt: skip
    with pytest.raises(DataError, match=stop) as caught:
        read(tmp_path, rows, kind)
    assert f"data.drop_fields=[{field}]" in str(caught.value)
    data, tokenizer = read(tmp_path, rows, kind, drop_fields=[field])
    assert len(data) == 3 and "one and one" not in tokenizer.decode(data[1].get("ids") or data[1]["prompt_ids"])


@pytest.mark.parametrize("name", registry.names("chat_template"))
def test_built_in_templates_train_tools_calls_and_thoughts(tmp_path: Path, name: str) -> None:
    turns = [ASKED, answer(content="", thinking="one and one", tool_calls=[CALL]), turn("tool", "2"), answer()]
    data, tokenizer = read(tmp_path, [{"messages": turns, "tools": [TOOL]}], template=name)
    end = "<|im_end|>" if name == "chatml" else "</s>"
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert trained_text(tokenizer, data[0]["ids"], data[0]["trained"]) == (
        f"<think>\none and one\n</think>\n\n{call}{end}2{end}"
    )
    assert '"parameters": {}' in tokenizer.decode(data[0]["ids"])


def test_a_template_reads_thoughts_under_the_name_it_knows(tmp_path: Path) -> None:
    for known in ("reasoning_content", "thinking", "reasoning"):
        template = BARE.replace("m['content']", f"(m.{known} or '') + m['content']")
        for given in ("reasoning_content", "thinking", "reasoning"):
            data, tokenizer = read(tmp_path, [{"messages": [ASKED, answer(**{given: "so: "})]}], template=template)
            assert trained_text(tokenizer, data[0]["ids"], data[0]["trained"]).startswith("so: 2<|im_end|>")


def test_thoughts_of_an_earlier_turn_alone_must_not_leave_an_empty_answer(tmp_path: Path) -> None:
    """The template renders thoughts of the last turn, so the field is not lost, but the first answer is nothing."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% generation %}"
        "{{ (m.thinking or '' if loop.last else '') + m['content'] + '<|im_end|>' }}{% endgeneration %}{% endfor %}"
    )
    turns = [ASKED, answer(content="", thinking="first"), turn("user", "?"), answer(thinking="second")]
    with pytest.raises(DataError, match=r"rows.jsonl:1: in 1 of 1 rows an answer would be trained that is nothing but its end"):
        read(tmp_path, [{"messages": turns}], template=template)


def test_tools_beside_plain_text_are_lost(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"plain text, which no template renders, has no place for 'tools', so 1 of 1 rows"):
        read(tmp_path, [{"prompt": "p", "completion": "c", "tools": [TOOL]}], template=None)


def test_a_template_that_renders_calls_may_leave_out_the_list_of_tools(tmp_path: Path) -> None:
    calls = BARE.replace("m['content'] +", "m['content'] + (m.tool_calls[0].function.name if m.tool_calls else '') +")
    data, _ = read(tmp_path, [{"messages": [ASKED, answer(tool_calls=[CALL])], "tools": [TOOL]}] * 2, template=calls)
    assert warnings(data.report) == [
        "the chat template renders the tool calls of 2 rows but not their list of tools, so the model sees none when it answers"
    ]


def test_content_in_parts_is_the_same_conversation(tmp_path: Path) -> None:
    def texts(value: Any) -> list[Any]:
        return [{"type": "text", "text": value[:1]}, {"type": "text", "text": value[1:]}]

    whole = {"messages": [ASKED, answer(thinking="t", tool_calls=[CALL])]}
    called = {"type": "tool_use", "id": "x", "name": "add", "input": {"a": 1}}
    said = [{"type": "thinking", "thinking": "t"}, *texts("2"), called]
    asked = {"role": "user", "content": texts(ASKED["content"])}
    parts = {"messages": [asked, {"role": "assistant", "content": said}]}
    reply = {"from": "gpt", "value": ["2"], "thinking": "t", "function_call": CALL["function"]}
    sharegpt = {"conversations": [{"from": "human", "value": ASKED["content"]}, reply]}
    expected = read(tmp_path, [whole], template="chatml")[0][0]["ids"]
    for row in (parts, sharegpt):
        assert read(tmp_path, [row], template="chatml")[0][0]["ids"] == expected
    odd = {"messages": [ASKED, {"role": "assistant", "content": [{"type": "hologram"}]}]}
    with pytest.raises(DataError, match=r"1 x 'messages' holds a part of a message of unknown type, first at .*hologram"):
        read(tmp_path, [odd])


@pytest.mark.parametrize("file", ["c15.jsonl", "c15b.jsonl"])
@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_reasoning_content_dropped(file: str, name: str) -> None:
    path = shared("cases", "reasoning-content-dropped", file)
    tokenizer = byte_tokenizer(template=None)
    set_template(tokenizer, name)
    data = prepare(DataSection(path=str(path), cache=False), tokenizer, "dialogue", seed=0)
    assert isinstance(data, TokenData) and len(data) == 4
    text = trained_text(tokenizer, data[0]["ids"], data[0]["trained"])
    assert text.startswith("<think>\ntwo and two make four\n</think>\n\n")


def test_a_refusal_is_a_field_of_its_own(tmp_path: Path) -> None:
    """A template that has no place for it would train an empty answer, or none of its words."""
    for content in (None, [{"type": "refusal", "refusal": "I cannot."}]):
        talk = [turn("user", "Do it."), {"role": "assistant", "content": content}]
        talk[1] |= {} if content else {"refusal": "I cannot."}
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
        data = DataSection(path=str(tmp_path / "a.jsonl"), cache=False)
        with pytest.raises(DataError, match=r"has no place for 'refusal', so 1 of 1 rows would lose it"):
            prepare(data, byte_tokenizer(), "dialogue", seed=0)
        reads = byte_tokenizer(template="{% for m in messages %}{{ m.content }}{{ m.refusal }}{{ eos_token }}{% endfor %}")
        assert prepare(data, reads, "dialogue", mask="all", seed=0) is not None
