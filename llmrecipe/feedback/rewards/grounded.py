"""Faithfulness to a source as a reward."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
QUOTE = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»")


def claims_of(text: str, numbers: bool = True, names: bool = True, quotes: bool = True) -> list[str]:
    """Return what a text states that a source can hold: its numbers, its names, its quotations.

    A name is a run of capitalised words that does not begin a sentence; a language without capitals has none.

    Examples:
        >>> claims_of('It is said that Ann Lee paid 1,200 for "a red hen". Bo sang.')
        ['1,200', 'Ann Lee', 'a red hen']
    """
    found: list[str] = []
    if numbers:
        found += NUMBER.findall(text)
    if names:
        found += _names(QUOTE.sub(" ", text))
    if quotes:
        found += [next(part for part in match if part) for match in QUOTE.findall(text)]
    return found


def _names(text: str) -> list[str]:
    names: list[list[str]] = []
    begins, joined = True, False
    for word in re.findall(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*|[.!?:\n]|[^\s]", text):
        if word[0].isupper():
            if not begins:
                names = [*names[:-1], [*names[-1], word]] if joined else [*names, [word]]
            joined = not begins
        else:
            joined = False
        begins = word in ".!?:\n"
    return [" ".join(name) for name in names]


@register
class Grounded(Reward):
    """Share of an answer's numbers, names and quotations that occur in the row's source; 1 where it has none.

    Compared without regard to case and runs of white space, numbers and names as whole ones: 12 does not occur in 312. Against
    hallucination; an answer that states nothing is not punished, so it is one reward among others.
    """

    column: str = "source"
    """Column of the prompt rows with the text that the answer may draw on."""
    prompt: bool = False
    """Count what occurs in the prompt too."""
    numbers: bool = True
    """Look for numbers."""
    names: bool = True
    """Look for runs of capitalised words within sentences."""
    quotes: bool = True
    """Look for what stands between quotation marks."""

    def needs(self) -> list[str]:
        """Name the column of the source."""
        return [self.column]

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse to look for nothing."""
        if not (self.numbers or self.names or self.quotes):
            raise RecipeError(f"{where}: it looks for nothing; leave numbers, names or quotes on")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return the shares, in [0, 1]."""
        return [self._share(a) for a in answers]

    def _share(self, answer: Answer) -> float:
        claims = claims_of(answer.text, self.numbers, self.names, self.quotes)
        source = _plain(str(answer.columns[self.column]) + (f"\n{answer.prompt}" if self.prompt else ""))
        held = [re.search(rf"(?<![\w.,]){re.escape(_plain(c))}(?![\w])(?![.,]\d)", source) is not None for c in claims]
        return sum(held) / len(held) if held else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
