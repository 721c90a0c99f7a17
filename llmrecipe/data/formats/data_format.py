"""The interface of a data format: which columns a file has, and how its rows become canonical rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.core.registry import CONFIG
from llmrecipe.data.tokenize.row_type import row_type

Row = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """What the conversion of a row depends on in addition to the row."""

    rows: str
    """Requested row type."""
    wrap: bool = False
    """Plain strings become user and assistant messages (the recipe named a chat template)."""
    template: bool = False
    """The tokenizer has a chat template."""
    system: str | None = None
    base: Path | None = None
    """Folder that image paths refer to."""
    weighted: bool = False
    """Whether the row type takes weights of tokens."""
    spoken: bool = False
    """Instructions become messages without a named template, because who reads them renders them."""
    label_words: Mapping[int | str, str] = field(default_factory=dict)
    """Label -> the word that says it (`data.label_words`)."""
    label_prompt: str = ""
    """What such a word continues (`data.label_prompt`)."""
    repeats: bool = False
    """The source writes its text prompts at the beginning of the answers too (`dialogues.repeats_prompts`)."""


@pydantic_dataclass(config=CONFIG, kw_only=True)
class DataFormat:
    """One format of rows."""

    group: ClassVar[str] = "format"
    columns: ClassVar[tuple[tuple[str, ...], ...]]
    """Alternatives; each is a set of required columns."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Optional columns it also reads, under any of their names."""
    becomes: ClassVar[dict[str, int]]
    """Row type it can become -> place in detection: of several formats that fit a row, the one with the smallest is taken."""
    example: ClassVar[str]
    """A row, as a line of JSON."""
    file_is_task: ClassVar[bool] = False
    """Whether all rows of a file belong to one task, which has the file's name where no column names it."""
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Column -> names that other data sets have for it, besides those of `data.formats.aliases`."""

    @property
    def name(self) -> str:
        """Name the format is registered under."""
        return registry.name_of(type(self))

    @property
    def summary(self) -> str:
        """Say in one line what the format is, for messages."""
        text = (type(self).__doc__ or "").strip().split("\n")[0].rstrip(".")
        return text if text[1:2].isupper() else text[:1].lower() + text[1:]

    def matches(self, row: Row) -> tuple[str, ...] | None:
        """Return the first alternative of `columns` that the row has."""
        return next((names for names in self.columns if all(n in row for n in names)), None)

    def fits(self, row: Row) -> bool:
        """Tell whether a row with these columns is meant, where other formats have the same ones. By default it is."""
        return True

    def claims(self, row: Row) -> bool:
        """Tell whether a row is of this format beyond doubt, so that it must not be read as another type by fewer columns."""
        return False

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the canonical rows of a raw row; columns have their wanted names.

        Raises:
            BadRow: this row cannot be used.
            DataError: the recipe requests something that no row of this format has.
        """
        raise NotImplementedError


def formats_of(rows: str) -> dict[str, int]:
    """Return the formats that can become a row type with their places in detection, first ones first.

    Raises:
        DataError: there is no such row type, or a format says that it becomes a row type that does not exist.
    """
    known = registry.names("row_type")
    places = {name: place for name, place in row_type(rows).takes.items() if _format_exists(name, rows)}
    for name in registry.names("format"):
        becomes: dict[str, int] = registry.spec("format", name).facts.get("becomes") or {}
        if wrong := next((kind for kind in becomes if kind not in known), None):
            raise DataError(
                f"{registry.spec('format', name).path}: format {name} becomes '{wrong}'{did_you_mean(wrong, known)}, which is "
                f"no row type (known: {', '.join(known)})"
            )
        if rows in becomes:
            places[name] = becomes[rows]
    return dict(sorted(places.items(), key=lambda one: (one[1], one[0])))


def _format_exists(name: str, rows: str) -> bool:
    known = registry.names("format")
    if name not in known:
        raise DataError(f"row type {rows} takes '{name}'{did_you_mean(name, known)}, which is no format ({', '.join(known)})")
    return True


def data_format(name: str) -> DataFormat:
    """Return the format of that name.

    Raises:
        DataError: there is none; the message lists them.
    """
    known = registry.names("format")
    if name not in known:
        raise DataError(
            f"data.format: there is no format '{name}'{did_you_mean(name, known)} (known: auto, {', '.join(known)})"
        )
    found: DataFormat = registry.load_class("format", name)()
    return found
