"""Conversations: role names, message lists, parts of a message, transcripts, and the part two conversations share."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

from llmrecipe.core.foreign import DuplicateKey, parse_json
from llmrecipe.data.formats.bad_row import BadRow, spelled

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
"""Role as written -> role of chat templates."""

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


LIST_CELLS = (
    "messages", "conversations", "options", "input_ids", "labels", "weights", "label", "tools", "chat_template_kwargs",
    "answers", "tokens", "words", "tags", "ner_tags", "pos_tags", "attributes", "answer_choices", "Definition", "Instances",
    "targets",
)  # fmt: skip
"""Columns that contain lists or mappings wherever they contain more than one value."""
SIDES = ("prompt", "completion", "chosen", "rejected")
"""Columns that contain text or messages."""
CELLS = frozenset((*LIST_CELLS, *SIDES))


def read_cells(row: dict[str, Any], sample: bool = False) -> dict[str, Any]:
    """Parse lists and mappings given as JSON text, as in a CSV cell; other text stays as it is.

    Args:
        sample: the row only shows what a source holds: a fault of its own is left for the place where rows are counted.

    Raises:
        BadRow: an object in such a text repeats a key.
    """
    read: dict[str, Any] = {}
    for name, text in row.items():
        if name not in CELLS or not isinstance(text, str):
            continue
        value = parsed(text, name, unique=not sample)
        if value is not text and (name in LIST_CELLS or (value and all(map(_speaks, _listed(value))))):
            read[name] = value
    return {**row, **read} if read else row


def parsed(text: object, name: str, unique: bool = True) -> object:
    """Return the list or mapping that a value gives as JSON text; any other value as it is.

    Raises:
        BadRow: an object in the text repeats a key.
    """
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = parse_json(text, unique=unique)
    except DuplicateKey as error:
        raise BadRow(f"'{name}' is JSON text in which a key is repeated", str(error)) from error
    except ValueError:
        return text
    return value if isinstance(value, list | dict) else text


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _speaks(value: object) -> bool:
    """Return whether an object in JSON text is a message rather than an object that has a `role` or a `from` of its own."""
    if not isinstance(value, dict):
        return False
    said = any(name in value for name in ("content", "tool_calls", "function_call"))
    return ("role" in value and said) or ("from" in value and "value" in value)


def is_texts(value: object) -> TypeGuard[list[str]]:
    """Return whether an answer is given as a list of texts, each of which is right."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def messages_of(value: object, column: str) -> list[Message]:
    """Return a list of `{role, content}` from either spelling (`role`/`content` or `from`/`value`).

    Raises:
        BadRow: not a list of messages, or a role no template knows.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        raise BadRow(f"'{column}' is text that is no valid JSON", f"{value!r:.80}")
    if not isinstance(value, list) or not value:
        raise BadRow(f"'{column}' holds no messages", f"{value!r:.80}")
    return [_message(entry, column) for entry in value]


def _message(entry: object, column: str) -> Message:
    if not isinstance(entry, dict):
        raise BadRow(f"'{column}' holds something that is not a message", f"{entry!r:.80}")
    role = entry.get("role", entry.get("from"))
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"unknown role {role!r:.40}", f"known roles: {', '.join(ROLES)}")
    message = {k: v for k, v in entry.items() if k not in ("role", "from", "value") and v is not None}
    if isinstance(call := parsed(message.pop("function_call", None), "function_call"), dict):
        message["tool_calls"] = [{"type": "function", "function": call}]
    elif message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"])
    content = entry.get("content", entry.get("value"))
    if isinstance(content, list | dict):
        content, more = join_parts(_listed(content), column)
        message |= {k: v for k, v in more.items() if k not in message}
    return {**message, "role": known, "content": _said(content, f"the content of a message in '{column}'")}


def _said(value: object, what: str) -> str:
    return "" if value is None else spelled(value, what)


def _calls(value: object) -> list[Any]:
    """Return the tool calls of a message as a list of mappings, of which each may be given as JSON text.

    Raises:
        BadRow: one is no mapping.
    """
    calls: list[Any] = [parsed(call, "tool_calls") for call in _listed(parsed(value, "tool_calls"))]
    if (bad := next((call for call in calls if not isinstance(call, dict)), None)) is not None:
        raise BadRow("'tool_calls' holds something that is no mapping", f"{bad!r:.80}")
    return [{**call, "function": parsed(call["function"], "function")} if "function" in call else call for call in calls]


THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names under which data sets and templates hold what a model thought before it answered."""
FIELDS = ("tool_calls", *THOUGHTS, "refusal", "name", "images", "audio", "videos")
"""What a message may hold besides its role and content, and a template may leave out."""
MEDIA = frozenset(
    ("image", "images", "picture", "pictures", "photo", "photos", "img", "imgs", "screenshot", "screenshots", "pixel_values",
     "audio", "audios", "video", "videos")
)  # fmt: skip
"""Columns of what is no text, also with `_path` or `_file` after the name."""
PARTS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "thinking": "reasoning_content", "reasoning": "reasoning_content", "refusal": "refusal",
    "image": "images", "image_url": "images", "input_image": "images",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
    "video": "videos", "video_url": "videos",
    "tool_use": "tool_calls", "tool_call": "tool_calls", "function": "tool_calls",
}  # fmt: skip
"""Type of a part of a message -> the field of the message that it is."""


@functools.lru_cache(maxsize=1024)
def _names_media(name: str) -> bool:
    words = name.lower().replace("-", "_")
    return any(words.removesuffix(end) in MEDIA for end in ("_path", "_paths", "_file", "_files"))


def is_media(name: str, value: object) -> bool:
    """Tell whether a column holds pictures, sound or video: by its name, or because its cells are bytes.

    Examples:
        >>> is_media("image_path", "a.png"), is_media("pic", {"bytes": b"x", "path": None}), is_media("source", "a.png")
        (True, True, False)
    """
    if _names_media(name):
        return bool(value)
    one = value[0] if isinstance(value, list) and value else value
    return isinstance(one.get("bytes") if isinstance(one, dict) else one, bytes | bytearray)


def join_parts(parts: list[Any], column: str) -> tuple[str, dict[str, Any]]:
    """Read a content that is a list of parts: texts joined as they are, and the fields that all other parts become.

    Examples:
        >>> join_parts([{"type": "text", "text": "A harbour"}, {"type": "text", "text": " in snow."}], "messages")
        ('A harbour in snow.', {})
        >>> join_parts([{"type": "thinking", "thinking": "It is cold."}, "Snow."], "messages")
        ('Snow.', {'reasoning_content': 'It is cold.'})

    Raises:
        BadRow: a part of no known type.
    """
    texts: list[str] = []
    fields: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", next((key for key in PARTS if key in part), None)) if isinstance(part, dict) else None
        field = PARTS.get(kind) if isinstance(kind, str) else None
        if field is None:
            raise BadRow(f"'{column}' holds a part of a message of unknown type", f"{part!r:.80}; known: {', '.join(PARTS)}")
        if field == "text":
            text = part.get("text")
            if isinstance(text, dict) and "value" in text:  # text with annotations, as in the threads of assistants
                text = text["value"]
            texts.append(_said(text, f"the text of a part of a message in '{column}'"))
        elif field in ("reasoning_content", "refusal"):
            found = next((part[k] for k in (str(kind), "text", "content") if isinstance(part.get(k), str)), "")
            fields[field] = fields.get(field, "") + found
        else:
            fields.setdefault(field, []).append(_call_of(part) if field == "tool_calls" else part)
    return "".join(texts), fields


def _call_of(part: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call written as a part of a message in the form of templates."""
    if isinstance(part.get("function"), dict):
        return part
    arguments = part.get("arguments", part.get("input", {}))
    return {"type": "function", "function": {"name": part.get("name", ""), "arguments": arguments}}


def held_fields(messages: list[Message]) -> list[str]:
    """Return those of `FIELDS` that some message has."""
    if all(message.keys().isdisjoint(FIELDS) for message in messages):
        return []
    return [name for name in FIELDS if any(message.get(name) for message in messages)]


def without_field(messages: list[Message], name: str) -> list[Message]:
    """Return the messages without one of their fields."""
    return [{k: v for k, v in message.items() if k != name} for message in messages]


def drop_fields(row: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Return a raw row without some columns, and without these fields (or parts) in its messages."""
    if not fields:
        return row
    return {name: _without(value, fields) for name, value in row.items() if name not in fields}


def _without(value: object, fields: Sequence[str]) -> object:
    if isinstance(value, dict) and ("role" in value or "from" in value):
        kept = {k: v for k, v in value.items() if k not in fields}
        for name in ("content", "value"):
            if isinstance(parts := kept.get(name), list):
                kept[name] = [p for p in parts if not (isinstance(p, dict) and PARTS.get(str(p.get("type"))) in fields)]
        return kept
    return [_without(one, fields) for one in value] if is_messages(value) else value


def is_messages(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether a value looks like a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)


def has_senders(row: dict[str, Any]) -> bool:
    """Tell whether the first message of a row says `from` whom it is, rather than its `role`."""
    value = row.get("messages", row.get("conversations"))
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    return "from" in first


def says_nothing(message: Message) -> bool:
    """Return whether a message is an assistant turn without content, reasoning or tool call."""
    return not any(message.get(key) for key in ("content", *FIELDS) if key != "name")


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """Return the row's tool descriptions: a list of mappings, whole or in parts given as JSON text.

    Raises:
        BadRow: they are something else.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools, unique=True) if tools.strip() else None
        except ValueError as error:
            raise BadRow("'tools' is not valid JSON", str(error)) from error
    every: list[Any] = [parsed(tool, "tools") for tool in _listed(tools or [])]
    if (bad := next((tool for tool in every if not isinstance(tool, dict)), None)) is not None:
        raise BadRow("'tools' holds something that is no description of a tool", f"{bad!r:.80}")
    return [_described(tool) for tool in every] or None


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with those of its parts as mappings that are given as JSON text."""
    parts = {name: parsed(tool[name], "tools") for name in ("function", "parameters") if isinstance(tool.get(name), str)}
    found = {**tool, **parts} if parts else tool
    inner = found.get("function")
    return {**found, "function": _described(inner)} if isinstance(inner, dict) else found


def is_transcript(text: object) -> TypeGuard[str]:
    """Return whether a string is a `\\n\\nHuman: ... \\n\\nAssistant: ...` transcript."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def parse_transcript(text: str) -> list[Message]:
    """Return the messages of a transcript; each turn's content is stripped."""
    text = text.strip()
    marks = list(TURN.finditer(text))
    ends = [m.start() for m in marks[1:]] + [len(text)]
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[m[1]], "content": text[m.end() : end].strip()} for m, end in zip(marks, ends)]


def shared_text(chosen: str, rejected: str) -> int:
    """Return the length of the prompt two strings share: up to the first difference, without a space before it."""
    limit = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))
    return cut - 1 if cut and chosen[cut - 1] == " " else cut
