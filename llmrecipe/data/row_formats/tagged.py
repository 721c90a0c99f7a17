"""Data format: words with their tags."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Tagged(DataFormat):
    """Words with a tag each: named entities, parts of speech."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("tokens", "tags"),
        ("tokens", "ner_tags"),
        ("words", "tags"),
        ("words", "ner_tags"),
        ("tokens", "pos_tags"),
    )
    becomes: ClassVar[dict[str, int]] = {"tagged": 10}
    example: ClassVar[str] = '{"tokens": ["Ann", "Lee", "sings"], "ner_tags": ["B-PER", "I-PER", "O"]}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the words and their tags."""
        names = self.matches(row)
        if names is None:
            raise BadRow("there are no words with tags", f"columns: {', '.join(row)}")
        words, tags = (row[name] for name in names)
        for name, values, kinds in ((names[0], words, (str,)), (names[1], tags, (str, int))):
            if not isinstance(values, list):
                raise BadRow(f"'{name}' is not a list", f"{values!r:.80}")
            if not values:
                raise BadRow(f"'{name}' is empty")
            if (bad := next((v for v in values if isinstance(v, bool) or not isinstance(v, kinds)), None)) is not None:
                raise BadRow(f"'{name}' has an entry of another kind", f"{bad!r:.80}")
        if len(words) != len(tags):
            raise BadRow(f"'{names[0]}' and '{names[1]}' differ in length", f"{len(words)} and {len(tags)}")
        if (empty := next((i for i, word in enumerate(words) if not word.strip()), None)) is not None:
            raise BadRow(f"'{names[0]}' has an empty word", f"at {empty}")
        return [{"words": [word.strip() for word in words], "tags": tags}]
