"""What `llmrecipe new --from-data FILE` finds out about a file, as the parts of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrecipe.recipe.overrides import as_word

if TYPE_CHECKING:
    from llmrecipe.data.formats.guess import FormatGuess


@dataclass
class Fitted:
    """What was found out about a file."""

    name: str
    file: str
    parent: str
    objective: str
    reading: FormatGuess
    rows: int
    others: list[str]
    """Other objectives that read such rows."""
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Section -> its keys, as they stand in the recipe; or a key of no section -> its value."""
    remarks: list[str] = field(default_factory=list)
    """Lines of the comment."""
    question: str | None = None
    """Prompt of a training row, to ask the trained model."""
    choices: dict[str, str | list[str]] = field(default_factory=dict)
    """Group -> what is chosen of it instead of the parent's."""

    def words(self) -> list[str]:
        """Return the settings as overrides."""
        chosen = [as_word((group,), value) for group, value in self.choices.items()]
        paths = {(key,): value for key, value in self.settings.items() if not isinstance(value, dict)}
        sections = [(name, body) for name, body in self.settings.items() if isinstance(body, dict)]
        within = {(name, key): value for name, body in sections for key, value in body.items()}
        return [*chosen, *(as_word(path, value) for path, value in (paths | within).items())]
