"""File formats: which one a file has, and how its rows become canonical rows (`data.formats.row_types` has the table).

Detection looks at the columns of the first rows, after the recipe's `columns` mapping, and takes the best format the
objective's row type accepts. What was found is part of the report; what cannot be placed is an error that prints the
row's columns and the nearest mapping.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.cache import keep_picture
from llmrecipe.data.formats.dialogues import separate, shared_turns, without_prompt
from llmrecipe.data.formats.messages import (
    Message,
    is_messages,
    is_transcript,
    messages_of,
    parse_transcript,
    says_nothing,
    shared_text,
    tools_of,
)
from llmrecipe.data.formats.row_types import BadRow
from llmrecipe.data.tokenize.chat_templates import ALPACA_PROMPT, ALPACA_PROMPT_INPUT

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What conversion depends on besides the row."""

    rows: str
    """Row type asked for."""
    wrap: bool = False
    """Plain strings become user and assistant messages (the recipe named a chat template)."""
    template: bool = False
    """The tokenizer has a chat template."""
    system: str | None = None
    base: Path | None = None
    """Folder that image paths refer to."""


@dataclass(frozen=True)
class Format:
    """One file format."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    """Alternatives; each is a set of columns that must be there."""
    doc: str
    convert: Callable[[Row, Options], list[Row]]

    def matches(self, row: Row) -> tuple[str, ...] | None:
        """The first alternative the row has."""
        return next((names for names in self.columns if all(n in row for n in names)), None)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is not text", f"{value!r:.80}")
    return value


def _filled(row: Row, column: str) -> str:
    value = _text(row, column)
    if not value.strip():
        raise BadRow(f"'{column}' is empty")
    return value


def _side(row: Row, column: str, role: str, wrap: bool) -> str | list[Message]:
    """A prompt or an answer: messages, or a string (wrapped into one message where asked)."""
    value = row.get(column)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list):
        return messages_of(value, column)
    text = _text(row, column)
    return [{"role": role, "content": text}] if wrap else text


def _answer(row: Row, column: str, wrap: bool) -> str | list[Message]:
    value = _side(row, column, "assistant", wrap)
    if (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and says_nothing(value[-1])):
        raise BadRow(f"'{column}' is empty")
    return value


def _with_system(messages: list[Message], options: Options) -> list[Message]:
    if options.system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": options.system}, *messages]


def _prompt_answers(row: Row, answers: tuple[str, ...], options: Options) -> Row:
    """Prompt and answers in one spelling: all strings, or all messages."""
    spoken = options.wrap or any(is_messages(row.get(c)) for c in ("prompt", *answers))
    prompt = _side(row, "prompt", "user", spoken)
    given: list[Any] = [_answer(row, name, spoken) for name in answers]
    if isinstance(prompt, list) and given:
        text = row["prompt"] if isinstance(row["prompt"], str) else None
        prompt, given = separate(prompt, given, text)
    out: Row = {"prompt": prompt, **dict(zip(answers, given))}
    if isinstance(prompt, list):
        out["prompt"] = _with_system(prompt, options)
    elif options.system is not None:
        raise DataError(
            "data.system is set, but prompts here are plain text that no chat template renders; "
            "set tokenizer.chat_template=own (or a built-in one) or remove data.system"
        )
    return {**out, **_extras(row)}


def _extras(row: Row) -> Row:
    """What a chat template reads besides messages."""
    tools, kwargs = tools_of(row), row.get("chat_template_kwargs")
    return {**({"tools": tools} if tools else {}), **({"kwargs": kwargs} if kwargs else {})}


def _from_text(row: Row, options: Options) -> list[Row]:
    return [{"text": _filled(row, "text")}]


def _from_tokens(row: Row, options: Options) -> list[Row]:
    ids, labels = row["input_ids"], row.get("labels")
    if isinstance(ids, str):
        ids = json.loads(ids)
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise BadRow("'input_ids' is not a list of token ids", f"{ids!r:.80}")
    if labels is not None and len(labels) != len(ids):
        raise BadRow("'labels' and 'input_ids' differ in length", f"{len(labels)} and {len(ids)}")
    return [{"input_ids": ids, "labels": labels}]


def _from_messages(row: Row, options: Options) -> list[Row]:
    column = "messages" if "messages" in row else "conversations"
    messages = messages_of(row[column], column)
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    messages = _with_system(messages, options)
    if options.rows == "prompt":
        last = max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
        if last < 0 or messages[last]["role"] == "system":
            raise BadRow("the conversation has no user turn")
        rest = {k: v for k, v in row.items() if k not in (column, "tools", "chat_template_kwargs")}
        if last + 1 < len(messages):
            rest.setdefault("completion", messages[last + 1]["content"])
        return [{"prompt": messages[: last + 1], "columns": rest, **_extras(row)}]
    if any(m["role"] == "assistant" and says_nothing(m) for m in messages):
        raise BadRow("an assistant turn is empty")
    return [{"messages": messages, **_extras(row)}]


def _from_prompt_completion(row: Row, options: Options) -> list[Row]:
    return [_prompt_answers(row, ("completion",), options)]


def _from_prompt(row: Row, options: Options) -> list[Row]:
    rest = {k: v for k, v in row.items() if k not in ("prompt", "tools", "chat_template_kwargs")}
    return [{**_prompt_answers(row, (), options), "columns": rest}]


def _from_alpaca(row: Row, options: Options) -> list[Row]:
    instruction, given = _filled(row, "instruction"), (row.get("input") or "")
    if options.wrap or options.template:
        content = f"{instruction}\n\n{given}" if given else instruction
        message = {"role": "user", "content": content, "instruction": instruction, "input": given}
        prompt: Any = _with_system([message], options)
        answer: Any = [{"role": "assistant", "content": _text(row, "output")}]
    else:
        form = ALPACA_PROMPT_INPUT if given else ALPACA_PROMPT
        prompt, answer = form.format(instruction=instruction, input=given), _text(row, "output")
    if options.rows == "prompt":
        rest = {k: v for k, v in row.items() if k not in ("instruction", "input")}
        return [{"prompt": prompt, "columns": {"completion": row["output"], **rest}}]
    if not str(row["output"]).strip():
        raise BadRow("'output' is empty")
    return [{"prompt": prompt, "completion": answer}]


def _paired(prompt_row: Row, row: Row, options: Options) -> list[Row]:
    if options.rows == "prompt":
        rest = {k: v for k, v in row.items() if k != "prompt"}
        return [{**_prompt_answers(prompt_row, (), options), "columns": rest}]
    sides = ("chosen", "rejected")
    if all(isinstance(prompt_row.get(name), str) for name in ("prompt", *sides)):
        rest = without_prompt(prompt_row["prompt"], [prompt_row[name] for name in sides])
        prompt_row = {**prompt_row, **dict(zip(sides, rest))}
    pair = _prompt_answers(prompt_row, sides, options)
    soft = row.get("p")
    if options.rows in ("unpaired", "choices"):
        if soft not in (None, 1):
            raise DataError(
                f"'p' is {soft!r:.40}: how likely the chosen answer is the better one says nothing of an answer by itself, "
                "which is liked or not, right or wrong; write labels without it (label_ai: hard: true), or use pairs (dpo, "
                "reward)"
            )
        shared = {k: v for k, v in pair.items() if k not in ("chosen", "rejected")}
        if options.rows == "choices":
            return [{**shared, "choices": [pair["chosen"], pair["rejected"]]}]
        return [
            {**shared, "completion": pair["chosen"], "label": True},
            {**shared, "completion": pair["rejected"], "label": False},
        ]
    if row.get("margin") is not None:
        pair["margin"] = float(row["margin"])
    if soft is not None:
        pair["p"] = float(soft)
        if not 0.0 <= pair["p"] <= 1.0:
            raise BadRow("'p' is no probability that the chosen answer is the better one", f"{soft!r:.80}")
    return [pair]


def _from_preference(row: Row, options: Options) -> list[Row]:
    """A pair beside its prompt, or one whose dialogues hold it; a file may mix them."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is None or (is_transcript(chosen) and is_transcript(rejected)):
        return _from_dialogues(row, chosen, rejected, options)
    return _paired(row, row, options)


def _from_dialogues(row: Row, chosen: Any, rejected: Any, options: Options) -> list[Row]:
    if is_transcript(chosen) and is_transcript(rejected):
        if options.template:
            chosen, rejected = parse_transcript(chosen), parse_transcript(rejected)
        else:
            cut = shared_text(chosen, rejected)
            cut = chosen.rfind("Assistant:", 0, cut + 1) + len("Assistant:")
            return _paired({**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}, row, options)
    if is_messages(chosen) and is_messages(rejected):
        chosen, rejected = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        cut = shared_turns([chosen, rejected])
        if not cut:
            raise BadRow("chosen and rejected share no prompt")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        cut = shared_text(chosen, rejected)
    else:
        raise BadRow("chosen and rejected are of different kinds", f"{type(chosen).__name__}, {type(rejected).__name__}")
    return _paired({**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}, row, options)


def _from_choices(row: Row, options: Options) -> list[Row]:
    """The right answer and the other options, each once; a row without options has one choice."""
    others = row.get("options")
    if others is None:
        others = []
    if not isinstance(others, list):
        raise BadRow("'options' is not a list", f"{others!r:.80}")
    every = {"completion": row["completion"]}
    every |= {f"options[{i}]": o for i, o in enumerate(others) if o != row["completion"] and o not in others[:i]}
    found = _prompt_answers({**row, **every}, tuple(every), options)
    return [{**{k: v for k, v in found.items() if k not in every}, "choices": [found[name] for name in every]}]


TRUTHS: dict[Any, bool] = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False, "good": True, "bad": False}


def _liked(row: Row) -> bool:
    label = row["label"]
    label = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(label, bool | int | str) or label not in TRUTHS:
        raise BadRow("'label' is neither true nor false", f"{row['label']!r:.80}")
    return TRUTHS[label]


def _from_unpaired(row: Row, options: Options) -> list[Row]:
    return [{**_prompt_answers(row, ("completion",), options), "label": _liked(row)}]


def _from_unpaired_messages(row: Row, options: Options) -> list[Row]:
    """The last turn is the answer that was liked or not."""
    (talk,) = _from_messages(row, options)
    *prompt, answer = talk.pop("messages")
    if answer["role"] != "assistant" or not prompt:
        raise BadRow("the conversation does not end with an answer to judge")
    return [{"prompt": prompt, "completion": [answer], "label": _liked(row), **talk}]


def _from_unpaired_alpaca(row: Row, options: Options) -> list[Row]:
    return [{**found, "label": _liked(row)} for found in _from_alpaca(row, options)]


def _label(row: Row) -> Any:
    label = row["label"]
    if label is None or not isinstance(label, bool | int | float | str | list):
        raise BadRow("'label' is missing", f"{label!r:.80}")
    return int(label) if isinstance(label, bool) else label


PAIR_COLUMNS = (("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))


def _pair_names(row: Row) -> tuple[str, str]:
    return next(names for names in PAIR_COLUMNS if all(n in row for n in names))


def _from_labelled(row: Row, options: Options) -> list[Row]:
    return [{"text": _filled(row, "text"), "label": _label(row)}]


def _from_labelled_pair(row: Row, options: Options) -> list[Row]:
    first, second = _pair_names(row)
    value = _label(row) if "label" in row else float(row["score"])
    return [{"text": _filled(row, first), "text_b": _filled(row, second), "label": value}]


def _from_pairs(row: Row, options: Options) -> list[Row]:
    names = ("anchor", "positive") if "anchor" in row else _pair_names(row)
    score = row.get("score")
    label = _label(row) if row.get("label") is not None else None
    return [{"texts": [_filled(row, n) for n in names], "score": None if score is None else float(score), "label": label}]


def _from_triples(row: Row, options: Options) -> list[Row]:
    return [{"texts": [_filled(row, n) for n in ("anchor", "positive", "negative")], "score": None, "label": None}]


def _from_image(row: Row, options: Options) -> list[Row]:
    image = row["image"]
    if isinstance(image, dict):
        if image.get("bytes"):
            return [{"image": str(keep_picture(image["bytes"])), "text": _filled(row, "text")}]
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise BadRow("'image' is not a path", f"{image!r:.80}")
    path = Path(image) if options.base is None else options.base / image
    if not path.is_file():
        raise BadRow("the image file does not exist", str(path))
    return [{"image": str(path.resolve()), "text": _filled(row, "text")}]


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("text", (("text",),), "plain text", _from_text),
        Format("tokens", (("input_ids",),), "token ids, with or without labels", _from_tokens),
        Format("messages", (("messages",), ("conversations",)), "a list of {role, content}", _from_messages),
        Format("sharegpt", (("conversations",),), "a list of {from, value}", _from_messages),
        Format("prompt_completion", (("prompt", "completion"),), "a prompt and its answer", _from_prompt_completion),
        Format(
            "choices",
            (("prompt", "completion", "options"), ("prompt", "completion")),
            "a prompt, its answer, and the answers to choose from",
            _from_choices,
        ),
        Format("prompt", (("prompt",),), "a prompt; other columns are kept", _from_prompt),
        Format("alpaca", (("instruction", "output"),), "instruction, input, output", _from_alpaca),
        Format("preference", (("prompt", "chosen", "rejected"),), "a prompt, a better and a worse answer", _from_preference),
        Format("preference_implicit", (("chosen", "rejected"),), "two dialogues that share their start", _from_preference),
        Format("unpaired", (("prompt", "completion", "label"),), "a prompt, an answer, liked or not", _from_unpaired),
        Format(
            "unpaired_messages",
            (("messages", "label"), ("conversations", "label")),
            "a conversation whose last turn is liked or not",
            _from_unpaired_messages,
        ),
        Format(
            "unpaired_alpaca",
            (("instruction", "output", "label"),),
            "instruction, input, output, liked or not",
            _from_unpaired_alpaca,
        ),
        Format("labelled", (("text", "label"),), "a text and its label", _from_labelled),
        Format(
            "labelled_pair",
            tuple((*names, last) for last in ("label", "score") for names in PAIR_COLUMNS),
            "two texts and their label",
            _from_labelled_pair,
        ),
        Format("pairs", ((*PAIR_COLUMNS, ("anchor", "positive"))), "two texts, with a score or label if any", _from_pairs),
        Format("triples", (("anchor", "positive", "negative"),), "an anchor, a match and a mismatch", _from_triples),
        Format("image_text", (("image", "text"),), "a picture and its text", _from_image),
    )
}
"""Every format by name."""
