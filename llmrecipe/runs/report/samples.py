"""Generated answers before and after training, by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmrecipe.core.console import value_text

KNOWN = ("event", "step", "prompt", "answer", "reference")


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt and what the model answered."""

    prompt: str
    reference: str
    """The answer of the data; empty where it has none."""
    answers: list[tuple[int, str, list[tuple[str, str]]]]
    """Step, answer and further facts: the first and the newest evaluation, or the only one."""
    between: int
    """Answers of evaluations between the two, which are not shown."""


def sampled_prompts(events: Sequence[dict[str, Any]]) -> list[SampledPrompt]:
    """Return the prompts of a run's samples in order, each with its first and its newest answer.

    A prompt that occurs twice in one evaluation is two.
    """
    seen: Counter[tuple[int, str]] = Counter()
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for event in events:
        place = (event["step"], str(event["prompt"]))
        found.setdefault((place[1], seen[place]), []).append(event)
        seen[place] += 1
    made = []
    for (prompt, _), events_of in found.items():
        shown = [events_of[0], events_of[-1]] if len(events_of) > 1 else events_of
        reference = _text(events_of[-1].get("reference"))
        made.append(SampledPrompt(prompt, reference, [_answer(event) for event in shown], len(events_of) - len(shown)))
    return made


def _answer(event: dict[str, Any]) -> tuple[int, str, list[tuple[str, str]]]:
    return event["step"], _text(event["answer"]), [(k, value_text(v)) for k, v in event.items() if k not in KNOWN]


def _text(value: object) -> str:
    return "" if value is None else value_text(value)
