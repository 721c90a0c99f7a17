"""Shared parts of conversation formats: prompts and answers in one form, all text or all messages."""

from __future__ import annotations

from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import filled_text, optional_text, text_of
from llmrecipe.data.formats.data_format import Conversion, Row
from llmrecipe.data.formats.dialogues import separate, without_prompt
from llmrecipe.data.formats.messages import Message, is_messages, is_texts, messages_of, says_nothing, tools_of
from llmrecipe.data.tokenize.chat_templates import ALPACA_PROMPT, ALPACA_PROMPT_INPUT


def _side(row: Row, column: str, role: str, wrap: bool) -> str | list[Message]:
    """Return a prompt or an answer: messages, or a string (with `wrap`, one message)."""
    value = row.get(column)
    if isinstance(value, dict) and is_spoken(value):
        value = [value]
    if isinstance(value, list):
        return messages_of(value, column)
    text = text_of(row, column)
    return [{"role": role, "content": text}] if wrap else text


def is_spoken(value: object) -> bool:
    """Return whether a prompt or an answer is given as messages, or as one message."""
    return is_messages([value] if isinstance(value, dict) else value)


def _answer(row: Row, column: str, wrap: bool) -> str | list[Message]:
    value = _side(row, column, "assistant", wrap)
    if (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and says_nothing(value[-1])):
        raise BadRow(f"'{column}' is empty")
    return value


def with_system(messages: list[Message], conversion: Conversion, row: Row) -> list[Message]:
    """Prepend the system message of the row's column `system`, else the recipe's, unless the conversation has one."""
    own = row.get("system")
    text = own if isinstance(own, str) and own.strip() else conversion.system
    if text is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": text}, *messages]


def prompt_answers(row: Row, answers: tuple[str, ...], conversion: Conversion) -> Row:
    """Return prompt and answers in one form: all strings, or all messages.

    Text answers lose the prompt where they repeat it; the row then has `repeated`.
    """
    texts = [text for name in ("prompt", *answers) if isinstance(text := row.get(name), str)]
    repeated = False
    if answers and len(texts) == 1 + len(answers):
        rest = without_prompt(texts[0], texts[1:], conversion.repeats)
        repeated = rest != texts[1:]
        row = {**row, **dict(zip(answers, rest))}
    spoken = conversion.wrap or any(is_spoken(row.get(c)) for c in ("prompt", *answers))
    prompt = _side(row, "prompt", "user", spoken)
    given: list[Any] = [_answer(row, name, spoken) for name in answers]
    if isinstance(prompt, list) and given:
        text = row["prompt"] if isinstance(row["prompt"], str) else None
        prompt, given = separate(prompt, given, text)
    out: Row = {"prompt": prompt, **dict(zip(answers, given))}
    if isinstance(prompt, list):
        out["prompt"] = with_system(prompt, conversion, row)
    elif conversion.system is not None:
        raise DataError(
            "data.system is set, but prompts here are plain text that no chat template renders; "
            "set tokenizer.chat_template=own (or a built-in one) or remove data.system"
        )
    return {**out, **template_extras(row), **({"repeated": True} if repeated else {})}


def right_answers(row: Row, given: object, conversion: Conversion) -> Row:
    """Return the prompt of a row with the answer that is trained: `given`, or the first of a list of texts.

    The others are the row's `references`, each once: what a generated answer is compared with besides the first.

    Raises:
        BadRow: an answer is empty.
    """
    if not is_texts(given):
        return prompt_answers({**row, "completion": given}, ("completion",), conversion)
    first, *others = dict.fromkeys(given)
    if not all(text.strip() for text in others):
        raise BadRow("one of the right answers is empty")
    found = prompt_answers({**row, "completion": first}, ("completion",), conversion)
    return {**found, "references": others} if others else found


def with_choices(row: Row, conversion: Conversion) -> Row:
    """Return the prompt of a row with its completion, and as a row of choices with its other options, each once.

    `right` is the place of the completion among the options as they are listed, after all of them where it is none of them.

    Raises:
        BadRow: the options are no list.
    """
    if conversion.rows != "choices":
        return prompt_answers(row, ("completion",), conversion)
    others = [] if row.get("options") is None else row["options"]
    if not isinstance(others, list):
        raise BadRow("'options' is not a list", f"{others!r:.80}")
    every = {"completion": row["completion"]}
    once = [(i, option) for i, option in enumerate(others) if option not in others[:i]]
    every |= {f"options[{i}]": option for i, option in once if option != row["completion"]}
    right = next((place for place, (_, option) in enumerate(once) if option == row["completion"]), len(once))
    found = prompt_answers({**row, **every}, tuple(every), conversion)
    return {**{k: v for k, v in found.items() if k not in every}, "choices": [found[name] for name in every], "right": right}


GIVEN = (
    "conversations",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "return_assistant_tokens_mask",
    "add_generation_prompt",
)
"""Variables of a chat template that a row cannot set by `chat_template_kwargs`."""


def template_extras(row: Row) -> Row:
    """Return what a chat template reads in addition to messages.

    Raises:
        BadRow: the further variables are no mapping, or one is what the template gets in another way.
    """
    tools, kwargs = tools_of(row), row.get("chat_template_kwargs")
    if kwargs and not isinstance(kwargs, dict):
        raise BadRow("'chat_template_kwargs' is no mapping", f"{kwargs!r:.80}")
    taken = [name for name in kwargs or () if name in GIVEN]
    if kwargs and taken:
        raise BadRow(
            "'chat_template_kwargs' gives what the template gets in another way", f"{taken[0]}: {kwargs[taken[0]]!r:.60}"
        )
    return {**({"tools": tools} if tools else {}), **({"kwargs": kwargs} if kwargs else {})}


def conversation_of(row: Row) -> tuple[str, list[Message]]:
    """Return the column of a row's conversation and its messages."""
    column = "messages" if "messages" in row else "conversations"
    return column, messages_of(row[column], column)


def from_messages(row: Row, conversion: Conversion) -> list[Row]:
    """Return the row of a conversation: its messages, or for rows of prompts what precedes the last answer.

    Raises:
        BadRow: there is nothing to answer, or an answer is empty.
    """
    column, messages = conversation_of(row)
    messages = with_system(messages, conversion, row)
    if conversion.rows == "prompt":
        last = max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
        if last < 0 or messages[last]["role"] == "system":
            raise BadRow("the conversation has no user turn")
        rest = {k: v for k, v in row.items() if k not in (column, "tools", "chat_template_kwargs")}
        if last + 1 < len(messages):
            rest.setdefault("completion", messages[last + 1]["content"])
        return [{"prompt": messages[: last + 1], "columns": rest, **template_extras(row)}]
    if any(m["role"] == "assistant" and says_nothing(m) for m in messages):
        raise BadRow("an assistant turn is empty")
    if conversion.weighted:
        _check_marks(messages)
    return [{"messages": messages, **template_extras(row)}]


UNTRAINED = "an answer is marked as one that is not to be trained, in a field that is not read"
MARKS = ("train", "training", "trainable", "loss")
"""Fields by which other trainers take a turn out of the loss."""


def _check_marks(messages: list[Message]) -> None:
    for message in messages:
        marked = next((name for name in MARKS if name in message and not message[name]), None)
        if marked is not None and message["role"] == "assistant" and message.get("weight") != 0:
            raise BadRow(UNTRAINED, f"{marked}: {message[marked]!r}")


def alpaca_prompt(row: Row, conversion: Conversion) -> str | list[Message]:
    """Return an instruction with its input as a prompt: messages, or text in the form of Stanford Alpaca.

    Raises:
        BadRow: the instruction is empty.
    """
    instruction, given = filled_text(row, "instruction"), optional_text(row, "input")
    if not (conversion.wrap or conversion.spoken):
        form = ALPACA_PROMPT_INPUT if given else ALPACA_PROMPT
        return form.format(instruction=instruction, input=given)
    content = f"{instruction}\n\n{given}" if given else instruction
    return with_system([{"role": "user", "content": content, "instruction": instruction, "input": given}], conversion, row)


def from_alpaca(row: Row, conversion: Conversion) -> list[Row]:
    """Return the prompt and the answer of an instruction with its input: messages, or text in the form of Stanford Alpaca.

    Raises:
        BadRow: the instruction or the answer is empty.
    """
    prompt, output = alpaca_prompt(row, conversion), row["output"]
    answer, *others = dict.fromkeys(output) if is_texts(output) else [text_of(row, "output")]
    if conversion.rows == "prompt":
        rest = {k: v for k, v in row.items() if k not in ("instruction", "input")}
        return [{"prompt": prompt, "columns": {"completion": output, **rest}}]
    if not all(text.strip() for text in (answer, *others)):
        raise BadRow("'output' is empty")
    made: Row = {"prompt": prompt, "completion": answer, **({"references": others} if others else {})}
    return [{**made, "completion": [{"role": "assistant", "content": answer}]} if isinstance(prompt, list) else made]
