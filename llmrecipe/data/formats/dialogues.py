"""Answers that contain the whole dialogue: what precedes the answer becomes part of the prompt, once.

{"prompt": "Name a colour.", "chosen": [user "Name a colour.", assistant "Blue."], "rejected": [user ..., assistant "Seven."]}
means the prompt [user "Name a colour."] with the answers [assistant "Blue."] and [assistant "Seven."]. The leading turns that
the answers share are the prompt, as in TRL's `maybe_extract_prompt`; what the `prompt` column says must be found in them.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.messages import Message

REPEATED_WORDS = 3
"""Least number of words of a text prompt that is removed from the beginning of both answers of a pair."""


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


def without_prompt(prompt: str, answers: list[str]) -> list[str]:
    """Remove a text prompt from the beginning of the answers of a pair where both repeat it."""
    repeated = len(prompt.split()) >= REPEATED_WORDS and all(a.startswith(prompt) and a[len(prompt) :].strip() for a in answers)
    return [answer[len(prompt) :] for answer in answers] if repeated else answers


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
