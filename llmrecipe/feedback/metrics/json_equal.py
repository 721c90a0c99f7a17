"""JSON equality."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.foreign import parse_json
from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric


def is_json(text: str) -> bool:
    """Return whether a text is one JSON value with nothing but white space around it."""
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def equal_values(one: object, other: object) -> bool:
    """Return whether two JSON values are equal: keys in any order, lists in theirs, true is not 1 and 1.0 is 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal_values(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(equal_values(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@register
class JsonEqual(Metric):
    """JSON equality: 1 where prediction and reference are the same JSON value, whatever the order of keys and spaces, else 0.

    Lists keep their order, and numbers are compared as numbers (1.0 equals 1, true does not). A prediction that is no JSON
    scores 0; where the reference is none, the texts without white space at their ends are compared.
    """

    wants: ClassVar[str] = "JSON"
    example: ClassVar[tuple[str, str, float]] = ('{"b": [1, 2], "a": 1.0}', '{"a":1,"b":[1,2]}', 1.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where both are the same value."""
        try:
            wanted = parse_json(reference)
        except ValueError:
            return float(prediction.strip() == reference.strip())
        try:
            return float(equal_values(parse_json(prediction), wanted))
        except ValueError:
            return 0.0

    def readable(self, prediction: str, reference: str) -> bool:
        """Return whether the prediction is JSON; where the reference is none, every text can be compared with it."""
        return is_json(prediction) or not is_json(reference)
