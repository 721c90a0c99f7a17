"""JSON validity."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric
from llmrecipe.feedback.metrics.json_equal import is_json


@register
class JsonValid(Metric):
    """JSON validity: 1 where the prediction is one JSON value with nothing but white space around it, else 0."""

    example: ClassVar[tuple[str, str, float]] = ('{"a": [1, 2]}', '{"b": null}', 1.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where the prediction parses; the reference is not read."""
        return float(is_json(prediction))
