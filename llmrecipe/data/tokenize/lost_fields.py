"""Fields of a conversation that its template does not render: they would be lost to training without a word.

A conversation is rendered with and without each field it has (`data.formats.messages.FIELDS`, and the row's tools); equal texts
mean that the template has no place for the field. A template that renders a field in some turns only (the thoughts of the last
answer, say) does not lose it, and one that renders the calls of a row may leave out its list of tools (`UNLISTED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.messages import FIELDS, Message, held_fields, without_field
from llmrecipe.data.tokenize.chat_templates import Template

UNLISTED = "list of tools"
"""What is reported of a row whose tool calls are rendered and whose tools are not."""
ANSWERS = ("completion", "chosen", "rejected")
READ_FIELDS = ("role", "content", "instruction", "input", *FIELDS)
"""Fields of messages that are read, or whose loss stops a run; `instruction` and `input` are those of Alpaca rows."""


def conversations(row: dict[str, Any]) -> list[list[Message]]:
    """Return the conversations of a canonical row: its messages, or its prompt with each of its answers; none of plain text."""
    if "messages" in row:
        return [row["messages"]]
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return []
    answers = [row[name] for name in ANSWERS if name in row] + list(row.get("choices", ()))
    return [prompt + answer for answer in answers] or [prompt]


def lost_fields(template: Template | None, row: dict[str, Any]) -> list[str]:
    """Return the fields of a canonical row that the template does not render.

    Examples:
        >>> bare = Template("bare", "{% for m in messages %}{{ m.content }}{% endfor %}", named=True)
        >>> turn = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
        >>> lost_fields(bare, {"messages": [turn], "tools": [{"name": "add"}]})
        ['reasoning_content', 'tools']
    """
    talks, tools = conversations(row), row.get("tools")
    if not talks or template is None:
        return ["tools"] if tools else []
    kwargs = row.get("kwargs")
    held = dict.fromkeys(name for talk in talks for name in held_fields(talk))
    lost = [name for name in held if is_lost(template, row, name)]
    if tools and any(_equal(template, (talk, tools), (talk, None), kwargs) for talk in talks):
        called = any("tool_calls" in held_fields(talk) for talk in talks) and "tool_calls" not in lost
        lost.append(UNLISTED if called else "tools")
    return lost


def is_lost(template: Template | None, row: dict[str, Any], name: str) -> bool:
    """Return whether some conversation of a canonical row has a field of messages that the template does not render."""
    talks, tools = conversations(row), row.get("tools")
    return any(
        template is None or _equal(template, (talk, tools), (without_field(talk, name), tools), row.get("kwargs"))
        for talk in talks
        if any(message.get(name) for message in talk)
    )


def _equal(template: Template, first: tuple[Any, Any], second: tuple[Any, Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether two pairs of (messages, tools) give one text; a template that refuses one of them reads the field."""
    try:
        return template.render(first[0], False, first[1], kwargs) == template.render(second[0], False, second[1], kwargs)
    except BadRow:
        return False
