"""How much the tokens of a row count in its loss, where the row says so: weights of messages, or of given token ids."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.tokenize.loss_mask import Span

KEY = "weight"
"""Field of a message."""


def checked_weight(value: object, where: str, what: str) -> float:
    """Return a weight as a number.

    Args:
        where: file and line of the row.
        what: what has it, such as `messages[2].weight`.

    Raises:
        DataError: it is no finite number from 0 up.
    """
    with contextlib.suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            return float(value)
    raise DataError(f"{where}: {what} is {value!r}; a weight is a finite number from 0 up (0: the tokens are no targets)")


def turn_weights(messages: Sequence[Mapping[str, Any]], where: str) -> list[float] | None:
    """Return the weight of each assistant message, 1 where it has none of its own; None where no message has one.

    Raises:
        DataError: a weight is no finite number from 0 up, or one above 0 belongs to a turn that no mask of turns selects.
    """
    given = [m for m in messages if m.get(KEY) is not None]
    if not given:
        return None
    found: list[float] = []
    for place, message in enumerate(messages):
        value = checked_weight(message[KEY], where, f"messages[{place}].{KEY}") if message.get(KEY) is not None else 1.0
        if message["role"] == "assistant":
            found.append(value)
        elif message.get(KEY) is not None and value:
            raise DataError(
                f"{where}: messages[{place}].{KEY} is {message[KEY]!r} for a turn of the {message['role']}; weights belong to "
                "assistant turns, others take 0 or no weight"
            )
    return found


def weights_of_spans(length: int, spans: Sequence[Span], weights: Sequence[float]) -> list[float]:
    """Return a weight for each of the tokens of a conversation.

    Args:
        length: number of tokens.
        spans: assistant turns in order.
        weights: of the assistant messages in order.

    Raises:
        BadRow: the template does not give each message a turn of its own.
    """
    if len(spans) != len(weights):
        raise BadRow(
            "messages have weights, and not each of them is a turn of its own",
            f"{len(weights)} assistant messages, {len(spans)} turns in the rendered text",
        )
    found = [1.0] * length
    for (start, end), weight in zip(spans, weights, strict=True):
        found[start:end] = [weight] * (end - start)
    return found
