"""Form as a reward: tags in order, or JSON with keys."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.option_types import Field
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward


@register
class Format(Reward):
    """1 where the answer has the wanted form, else 0.

    `tags: [think, answer]` wants `<think>...</think><answer>...</answer>`, each once and in this order, with nothing but white
    space around them. `json_keys: [name]` wants one JSON object with these keys; `is_json: true` any JSON value.
    """

    tags: list[str] = Field(default_factory=list)
    """Tags in order."""
    is_json: bool = False
    """Whether the answer must be JSON."""
    json_keys: list[str] = Field(default_factory=list)
    """Keys a JSON object must have."""

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse anything but exactly one required format."""
        if bool(self.tags) == (self.is_json or bool(self.json_keys)):
            raise RecipeError(f"{where}: give tags, or is_json (or json_keys), one of the two")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return 1 for each answer with the required format, else 0."""
        return [float(self._tagged(a.text) if self.tags else self._parses(a.text)) for a in answers]

    def _tagged(self, text: str) -> bool:
        form = r"\s*".join(f"<{re.escape(t)}>.*?</{re.escape(t)}>" for t in self.tags)
        once = all(text.count(f"<{t}>") == 1 and text.count(f"</{t}>") == 1 for t in self.tags)
        return once and re.fullmatch(rf"\s*{form}\s*", text, re.DOTALL) is not None

    def _parses(self, text: str) -> bool:
        try:
            value = parse_json(text)
        except ValueError:
            return False
        return not self.json_keys or (isinstance(value, dict) and all(key in value for key in self.json_keys))
