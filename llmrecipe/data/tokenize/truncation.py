"""Truncation of rows longer than `max_length`.

| policy | what happens |
|---|---|
| drop | the row is left out and counted (default) |
| keep_start | the end is cut off: an answer may lose its end token, which the report counts |
| truncate_prompt_left | the prompt loses its beginning; BOS, the assistant's header and the answer stay |
| split | plain text only: consecutive rows of `max_length` tokens |
| error | the run stops at the row |

A preference row keeps one prompt for both answers, and no policy leaves an answer empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow

TOO_LONG = "longer than data.max_length"
NO_ROOM = "the prompt fills data.max_length"


@dataclass(frozen=True)
class Limit:
    """The length policy of a data set."""

    length: int
    policy: str = "drop"
    header: int = 0
    """Tokens of the assistant's header at the end of a prompt."""
    bos: int | None = None

    def refuse(self, found: int, where: str) -> None:
        """Drop the row or stop, for the policies that do not truncate.

        Raises:
            BadRow: policy drop.
            DataError: policy error.
        """
        if self.policy == "error":
            raise DataError(
                f"{where}: the row has {found} tokens, data.max_length is {self.length} and data.truncation is error; "
                "raise data.max_length or choose another data.truncation"
            )
        raise BadRow(TOO_LONG, f"{found} tokens, limit {self.length}", found)

    def prompt(self, ids: Sequence[int], room: int) -> list[int]:
        """Return the end of a prompt in at most `room` tokens, BOS kept where it had one."""
        if len(ids) <= room:
            return list(ids)
        if room > 1 and self.bos is not None and ids[0] == self.bos:
            return [self.bos, *ids[len(ids) - room + 1 :]]
        return list(ids[len(ids) - room :])


def fit_sequence(
    ids: list[int], trained: list[int], limit: Limit, where: str, plain: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Return one sequence within the limit; several where plain text is split.

    Raises:
        BadRow: the row is dropped.
        DataError: policy error, or split on rows that are not plain text.
    """
    if len(ids) <= limit.length:
        return [(ids, trained)]
    if limit.policy == "split" and plain:
        starts = range(0, len(ids), limit.length)
        pieces = [(ids[s : s + limit.length], [0, *trained[s + 1 : s + limit.length]]) for s in starts]
        return [piece for piece in pieces if len(piece[0]) > 1]
    if limit.policy == "keep_start":
        return [(ids[: limit.length], trained[: limit.length])]
    if limit.policy == "truncate_prompt_left" and not plain:
        return [_cut_left(ids, trained, limit)]
    if limit.policy == "truncate_prompt_left":
        return [(ids[: limit.length], trained[: limit.length])]
    if limit.policy == "split":
        raise DataError(f"{where}: data.truncation=split cuts plain text only; use drop, keep_start or truncate_prompt_left")
    limit.refuse(len(ids), where)
    raise AssertionError("refuse always raises")


def _cut_left(ids: list[int], trained: list[int], limit: Limit) -> tuple[list[int], list[int]]:
    """Keep the end; where the last answer alone is too long, keep its header and its beginning."""
    bos = int(limit.bos is not None and ids[0] == limit.bos)
    room = limit.length - bos
    last = len(ids) - 1
    while last > 0 and not trained[last]:
        last -= 1
    while last > 0 and trained[last - 1]:
        last -= 1
    start = min(len(ids) - room, max(last - max(limit.header, 1), bos))
    kept = slice(start, start + room)
    return ids[:bos] + ids[kept], [0] * (bos + 1) + trained[kept][1:]


def fit_answers(prompt: list[int], answers: Sequence[list[int]], limit: Limit, where: str) -> tuple[list[int], list[list[int]]]:
    """Return a prompt and its answers, each joined sequence within the limit.

    Raises:
        BadRow: the row is dropped.
        DataError: policy error, or split.
    """
    longest = max(len(a) for a in answers)
    if len(prompt) + longest <= limit.length:
        return prompt, list(answers)
    if limit.policy == "keep_start":
        if len(prompt) >= limit.length:
            raise BadRow(NO_ROOM, f"{len(prompt)} tokens, limit {limit.length}", len(prompt) + longest)
        return prompt, [a[: limit.length - len(prompt)] for a in answers]
    if limit.policy == "truncate_prompt_left":
        bos = int(limit.bos is not None and bool(prompt) and prompt[0] == limit.bos)
        least = min(len(prompt), bos + max(limit.header, 1))
        if least >= limit.length:
            raise BadRow(NO_ROOM, f"the header alone has {least} tokens, limit {limit.length}")
        kept = limit.prompt(prompt, max(limit.length - longest, least))
        return kept, [a[: limit.length - len(kept)] for a in answers]
    if limit.policy == "split":
        raise DataError(f"{where}: data.truncation=split cuts plain text only; use drop, keep_start or truncate_prompt_left")
    limit.refuse(len(prompt) + longest, where)
    raise AssertionError("refuse always raises")


def fit_prompt(prompt: list[int], limit: Limit, where: str) -> list[int]:
    """Return a prompt within the limit; its end is never cut off, because the answer follows it.

    Raises:
        BadRow: the row is dropped.
        DataError: policy error, or one that would cut the end.
    """
    if len(prompt) <= limit.length:
        return prompt
    if limit.policy == "truncate_prompt_left":
        return limit.prompt(prompt, limit.length)
    if limit.policy in ("keep_start", "split"):
        raise DataError(
            f"{where}: data.truncation={limit.policy} would cut the end of a prompt, where the answer starts; "
            "use truncate_prompt_left or drop"
        )
    limit.refuse(len(prompt), where)
    raise AssertionError("refuse always raises")
