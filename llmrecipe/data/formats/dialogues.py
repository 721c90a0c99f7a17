"""Answers that contain the whole dialogue: what precedes the answer becomes part of the prompt, once.

{"prompt": "Name a colour.", "chosen": [user "Name a colour.", assistant "Blue."], "rejected": [user ..., assistant "Seven."]}
means the prompt [user "Name a colour."] with the answers [assistant "Blue."] and [assistant "Seven."]. The leading turns that
the answers share are the prompt, as in TRL's `maybe_extract_prompt`; what the `prompt` column says must be found in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.messages import Message, is_texts, is_transcript

REPEATED_WORDS = 3
"""Least number of words of a text prompt that is removed from the beginning of both answers of a pair by itself."""
REPEATED_PROMPTS = 4
"""Least number of different prompts that a source's answers must repeat for it to be the way its rows are written."""
REPEATED_SHARE = 0.9
"""Least share of the rows that repeat their prompts in such a source."""
TEXTS = ("prompt", "instruction", "input", "completion", "output", "chosen", "rejected")
"""Columns of prompts and answers that may be text."""


def shared_turns(dialogues: Sequence[Sequence[Message]]) -> int:
    """Count the leading turns that all dialogues share, leaving each at least one of its own."""
    limit = min(map(len, dialogues)) - 1
    first = dialogues[0]
    return next((i for i in range(limit) if any(d[i] != first[i] for d in dialogues)), max(limit, 0))


def separate(
    prompt: list[Message], answers: list[list[Message]], text: str | None = None
) -> tuple[list[Message], list[list[Message]]]:
    """Move turns that are not part of an answer into the prompt.

    Args:
        prompt: turns of the `prompt` column.
        answers: one or more answers, each as messages.
        text: the `prompt` column where it is text; it may then be any turn of the dialogues, or contain one.

    Raises:
        BadRow: an answer begins with a question that the others, or the prompt, do not have.
    """
    whole = [answer for answer in answers if not _answers(answer[0])]
    if all(_begins(answer, prompt) for answer in answers):
        cut = _before_answer(answers, len(prompt))
        prompt, answers = answers[0][:cut], [answer[cut:] for answer in answers]
    elif len(whole) < len(answers):
        answers = [answer[len(prompt) :] if _begins(answer, prompt) else answer for answer in answers]
    else:
        requested = (i for i, turn in enumerate(answers[0][:-1]) if turn["role"] == "user" and turn["content"] == text)
        cut = _before_answer(answers, max(requested, default=0))
        prompt, answers = _joined(prompt, answers[0][:cut], text), [answer[cut:] for answer in answers]
    if not all(_answers(answer[0]) for answer in answers):
        raise BadRow("an answer begins with a question of its own", f"{answers[0][0]!r:.80}")
    return prompt, answers


def is_text(row: Mapping[str, Any]) -> bool:
    """Return whether a row gives its prompt and its answers as plain text, neither as messages nor as a transcript."""
    given = [_first(row[name]) for name in TEXTS if row.get(name) is not None]
    return bool(given) and all(isinstance(value, str) and not is_transcript(value) for value in given)


def repeats_prompts(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a source is written with its text prompts at the beginning of the answers too, from some of its rows."""
    repeated: list[str] = []
    count = 0
    for row in rows:
        answers: list[Any] = [_first(row[name]) for name in ("completion", "chosen", "rejected") if row.get(name) is not None]
        if not answers or not row.get("prompt") or not is_text(row):
            continue
        count += 1
        if all(_after(row["prompt"], answer) is not None for answer in answers):
            repeated.append(row["prompt"])
    return len(set(repeated)) >= REPEATED_PROMPTS and len(repeated) >= REPEATED_SHARE * count


def _first(value: object) -> object:
    """Return the first of several right answers; any other value as it is."""
    return value[0] if is_texts(value) else value


def without_prompt(prompt: str, answers: list[str], repeats: bool = False) -> list[str]:
    """Remove a text prompt from the beginning of its answers.

    Args:
        repeats: the source is written that way, so that each answer loses it. Otherwise both answers of a pair do where they
            begin with a prompt that is too long for that to be chance.
    """
    if not prompt.strip():
        return answers
    rest = [_after(prompt, answer) for answer in answers]
    if repeats:
        return [answer if left is None else left for answer, left in zip(answers, rest, strict=True)]
    every = [left for left in rest if left is not None and left.strip()]
    long = len(prompt.split()) >= REPEATED_WORDS
    return every if long and len(answers) > 1 and len(every) == len(answers) else answers


def _after(prompt: str, answer: str) -> str | None:
    """Return what follows the prompt in an answer that begins with it; None where none does, or a word of it goes on."""
    for begin, text in ((prompt, answer), (prompt.strip(), answer.lstrip())):
        rest = text[len(begin) :]
        if text.startswith(begin) and not (begin[-1:].isalnum() and rest[:1].isalnum()):
            return rest
    return None


def _answers(turn: Message) -> bool:
    return turn["role"] in ("assistant", "tool")


def _begins(answer: list[Message], prompt: list[Message]) -> bool:
    return len(answer) > len(prompt) and answer[: len(prompt)] == prompt


def _before_answer(answers: list[list[Message]], start: int) -> int:
    """Return the number of turns before the answer: the shared ones, or in a single dialogue those up to the last answer."""
    if len(answers) > 1:
        return shared_turns(answers)
    return next((i for i, turn in enumerate(answers[0]) if i >= start and _answers(turn)), 0)


def _joined(prompt: list[Message], lead: list[Message], text: str | None) -> list[Message]:
    """Return the prompt, continued by those leading turns that it does not contain yet."""
    if text is not None:
        contents = [str(turn["content"]).strip() for turn in lead if turn["role"] == "user"]
        if text.strip() and not any(text.strip() in content or (content and content in text) for content in contents):
            raise BadRow("the prompt is not in the dialogues of the answers", f"{text!r:.80}")
        return lead
    if any(lead[i : i + len(prompt)] == prompt for i in range(len(lead))):
        return lead
    overlap = next((n for n in range(min(len(prompt), len(lead)), 0, -1) if prompt[-n:] == lead[:n]), 0)
    if lead and not overlap and prompt[-1]["role"] == lead[0]["role"] == "user":
        raise BadRow("the prompt is not in the dialogues of the answers", f"{prompt[-1]!r:.80}")
    return [*prompt, *lead[overlap:]]
