"""The interface of a truncation policy: what becomes of a row longer than `data.max_length`.

A preference row keeps one prompt for both answers, no policy leaves an answer empty, and the end of a prompt is never cut
off, because the answer follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.core.registry import CONFIG
from llmrecipe.data.formats.bad_row import BadRow

TOO_LONG = "longer than data.max_length"
NO_ROOM = "the prompt fills data.max_length"
CUT = "an answer to choose from would lose its end"
Piece = tuple[list[int], list[int]]
"""Token ids, and a 0 or 1 for each: whether it is a target."""


@dataclass(frozen=True)
class Limit:
    """The length a policy fits rows into."""

    length: int
    header: int = 0
    """Tokens of the assistant's header at the end of a prompt; 0 where the policy does not keep it."""
    bos: int | None = None
    stride: int | None = None
    """Tokens by which each row of a text that is cut up moves on, every token but the first predicted once; None: rows do not
    overlap, and the first token of each is no target. Windows of a passage move on by it, by half of their room where None."""

    def prompt(self, ids: Sequence[int], room: int) -> list[int]:
        """Return the end of a prompt in at most `room` tokens, BOS kept where it had one."""
        if len(ids) <= room:
            return list(ids)
        if room > 1 and self.bos is not None and ids[0] == self.bos:
            return [self.bos, *ids[len(ids) - room + 1 :]]
        return list(ids[len(ids) - room :])


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Truncation:
    """One policy, `data.truncation`. Its methods are called for rows that are too long; as they stand they leave them out."""

    group: ClassVar[str] = "truncation"
    keeps_header: ClassVar[bool] = False
    """Whether it needs to know how long the assistant's header is (`Limit.header`)."""

    @property
    def name(self) -> str:
        """Name the policy is registered under."""
        return registry.name_of(type(self))

    def refuse(self, found: int, limit: Limit, where: str) -> BadRow | DataError:
        """Return why a row of `found` tokens is left out, or the error that stops the run at it."""
        return BadRow(TOO_LONG, f"{found} tokens, limit {limit.length}", found)

    def sequence(self, ids: list[int], trained: list[int], limit: Limit, where: str, plain: bool) -> list[Piece]:
        """Return what is kept of one sequence.

        Args:
            plain: it is text, in which no prompt and no answer stands out.

        Raises:
            BadRow: the row is left out.
            DataError: the policy has no meaning for it.
        """
        raise self.refuse(len(ids), limit, where)

    def answers(
        self, prompt: list[int], answers: Sequence[list[int]], limit: Limit, where: str
    ) -> tuple[list[int], list[list[int]]]:
        """Return a prompt and its answers, each joined sequence within the limit.

        Raises:
            BadRow: the row is left out.
            DataError: the policy has no meaning for it.
        """
        raise self.refuse(len(prompt) + max(map(len, answers)), limit, where)

    def prompt(self, prompt: list[int], limit: Limit, where: str) -> list[int]:
        """Return a prompt within the limit; its end stays, because the answer follows it.

        Raises:
            BadRow: the row is left out.
            DataError: the policy has no meaning for it.
        """
        raise self.refuse(len(prompt), limit, where)

    def check_texts(self, where: str) -> None:
        """Refuse rows of texts with labels, which have neither prompt nor answer, where the policy needs those.

        Raises:
            DataError: the policy has no meaning for them.
        """

    def shortens_texts(self, found: int, limit: Limit, where: str) -> None:
        """Pass if the end of a text with a label, or of the longer one of two, may be cut off.

        Raises:
            BadRow: the row is left out.
            DataError: the policy has no meaning for it.
        """
        raise self.refuse(found, limit, where)

    def reads_windows(self, found: int, limit: Limit, where: str) -> None:
        """Pass if a passage that is too long may be read in overlapping windows.

        Raises:
            BadRow: the row is left out.
            DataError: the policy has no meaning for it.
        """
        raise self.refuse(found, limit, where)


def truncation(name: str) -> Truncation:
    """Return the policy of that name.

    Raises:
        RecipeError: there is none; the message lists them.
    """
    found: Truncation = registry.load_class("truncation", name, "data.truncation")()
    return found


def fit_sequence(
    ids: list[int], trained: list[int], policy: Truncation, limit: Limit, where: str, plain: bool = False
) -> list[Piece]:
    """Return one sequence within the limit; several where a policy cuts it up (see `Truncation.sequence`)."""
    return [(ids, trained)] if len(ids) <= limit.length else policy.sequence(ids, trained, limit, where, plain)


def fit_answers(
    prompt: list[int], answers: Sequence[list[int]], policy: Truncation, limit: Limit, where: str
) -> tuple[list[int], list[list[int]]]:
    """Return a prompt and its answers, each joined sequence within the limit (see `Truncation.answers`)."""
    if len(prompt) + max(map(len, answers)) <= limit.length:
        return prompt, list(answers)
    return policy.answers(prompt, answers, limit, where)


def fit_prompt(prompt: list[int], policy: Truncation, limit: Limit, where: str) -> list[int]:
    """Return a prompt within the limit (see `Truncation.prompt`)."""
    return prompt if len(prompt) <= limit.length else policy.prompt(prompt, limit, where)


def split_plain(ids: list[int], trained: list[int], limit: Limit) -> list[Piece]:
    """Return consecutive pieces of plain text.

    Without a stride pieces do not overlap; the first token of each is no target, and a piece of one token is left out. With
    one, pieces of `limit.length` tokens move on by `limit.stride`: what an earlier piece has predicted is context in the next,
    so that every target of the text is predicted once, after at least `length - stride` tokens.
    """
    length = limit.length
    if limit.stride is None:
        starts = range(0, len(ids), length)
        pieces = [(ids[s : s + length], [0, *trained[s + 1 : s + length]]) for s in starts]
        return [piece for piece in pieces if len(piece[0]) > 1]
    found = [(ids[:length], trained[:length])]
    for known in range(length, len(ids), limit.stride):
        end = min(known + limit.stride, len(ids))
        start = max(end - length, 0)
        found.append((ids[start:end], [0] * (known - start) + trained[known:end]))
    return found
