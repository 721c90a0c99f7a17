"""Canonical rows to token rows, a batch at a time.

Tokenizing is batched: all texts of a batch go through the tokenizer in one call. Rows that cannot be used are dropped and
counted by reason in the report; what is wrong with the recipe or the template rather than with a row stops at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow, need_columns
from llmrecipe.data.formats.data_format import Conversion, data_format
from llmrecipe.data.formats.detect import map_columns
from llmrecipe.data.formats.dialogues import is_text, repeats_prompts
from llmrecipe.data.formats.messages import drop_fields, held_fields, is_media
from llmrecipe.data.formats.sources import task_of_source
from llmrecipe.data.token_report import HIGHEST, Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.lost_fields import READ_FIELDS, UNLISTED, conversations, is_lost, lost_fields
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.data.tokenize.truncation import TOO_LONG
from llmrecipe.data.tokenize.turn_weights import KEY as WEIGHT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.data.formats.readers import Reader
    from llmrecipe.recipe.data_section import DataSection

DECIDING = ("formats", "masks", "row_formats", "row_types", "templates", "tokenize", "truncations")
"""Folders of the modules that decide token ids and masks."""


class RowEncoder(Encoder):
    """Everything the encoding of one data set depends on.

    Args:
        tokenizer: with its chat template.
        rows: row type the objective needs.
        mask: name of the loss mask: which tokens are trained.
        data: the recipe's section; only `columns`, `drop_fields`, `max_length`, `truncation`, `system`, `label_words` and
            `label_prompt` are read.
        format_name: format of the source.
        base: folder image paths refer to.
        task_field: column that names the task of a row; None where no method needs it.
        aliases: columns recognised by their names (`data.formats.aliases`), in addition to the recipe's own mapping.
        needs: column that every prompt row must have -> key path of what reads it.
        stride: tokens by which rows of a text that is cut up move on (see `Limit.stride`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: str,
        mask: str,
        data: DataSection,
        format_name: str,
        base: Path | None = None,
        task_field: str | None = None,
        aliases: Mapping[str, str] | None = None,
        needs: Mapping[str, str] | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__(tokenizer, mask, data, stride)
        self.kind = row_type(rows)
        self.columns = {**data.columns, **(aliases or {})}
        self.task_field = task_field
        self.needs = dict(needs or {})
        self.known: set[str] = set()
        """Columns that the first rows have: of others it is found out when they come whether they are read."""
        self.dropped = data.drop_fields
        template = self.tokens.template
        self.conversion = Conversion(
            rows, bool(template and template.named), template is not None, data.system, base, bool(self.kind.weights),
            label_words=data.label_words, label_prompt=data.label_prompt,
        )  # fmt: skip
        self.format = data_format(format_name)

    def encode(self, raw: Iterable[tuple[int, dict[str, Any], str]]) -> tuple[dict[str, list[Any]], Report]:
        """Encode raw rows given as (index in the source, row, place).

        Returns:
            Columns of token rows (see `data.tokenize.row_type`) with `source_row`, and the report over these rows.
        """
        report = Report()
        items: list[Item] = []
        late: dict[str, dict[str, Any]] = {}
        for index, row, where in raw:
            report.read += 1
            if not self.known.issuperset(row):
                late |= {name: row for name in row if name not in self.known and name not in late and row[name] is not None}
            try:
                for name in self._media(row):
                    report.media += [name] if name not in report.media else []
                    report.unrendered[name] += 1
                    report.first.setdefault(f"unrendered {name}", where)
                named = drop_fields(map_columns(row, self.columns), self.dropped)
                task = self._task(named, row)
                made = [Item(index, where, one, task=task) for one in self.format.convert(named, self.conversion)]
                report.repeated += sum(item.row.pop("repeated", False) for item in made) > 0
                report.given_as_text += is_text(named) and any("prompt" in item.row for item in made)
                for item in made:
                    need_columns(item.row.get("columns", {}), self.needs)
                items += made
            except BadRow as bad:
                report.drop(bad.reason, where, bad.detail)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                found = f"{type(error).__name__}: {error}"
                if isinstance(error, KeyError):
                    found = f"it has no column {error}, but {', '.join(row)}"
                report.drop(f"not a {self.format.name} row", where, found)
        report.unused += [name for name, row in late.items() if self._is_unused(name, [row])]
        if items:
            self.kind.encode(self, items, report)
        names = [*self.kind.lists, *self.kind.masks, *self.kind.weights, *(n for n, _ in self.kind.scalars), "source_row"]
        counted = [name for name in self.kind.lists if name not in self.kind.uncounted]
        columns: dict[str, list[Any]] = {name: [] for name in names}
        lost: set[int] = set()
        for item in items:
            if item.bad is not None:
                if item.index not in lost:
                    report.drop(item.bad.reason, item.where, item.bad.detail, item.bad.tokens)
                    if item.bad.reason == TOO_LONG:
                        report.too_long[item.bad.tokens] += 1
                lost.add(item.index)
                continue
            self._note_fields(item, report)
            references = item.row.get("references")
            for done in item.done:
                report.kept += 1
                done |= {"source_row": item.index, "task": item.task}
                if references:
                    done["references"] = json.dumps(references, ensure_ascii=False)
                most = max((max(done[name]) for name in counted if done.get(name)), default=-1)
                if most > report.highest:
                    report.highest, report.first[HIGHEST] = most, item.where
                for name in names:
                    columns[name].append(done.get(name))
        return columns, report

    def look_for_repeats(self, sample: Iterable[dict[str, Any]]) -> None:
        """Find out from some raw rows whether the source writes its prompts at the beginning of the answers too."""
        named = (map_columns(row, self.columns, sample=True) for row in sample)
        self.conversion = dataclasses.replace(self.conversion, repeats=repeats_prompts(named))

    def unused(self, sample: Iterable[dict[str, Any]]) -> list[str]:
        """Return the columns of the first raw rows that change nothing in their canonical rows, and such fields of messages."""
        rows = list(sample)
        self.known = {name for row in rows for name in row}
        columns = list(dict.fromkeys(name for row in rows for name in row))
        return [name for name in columns if self._is_unused(name, rows)] + self._unused_fields(rows)

    def _is_unused(self, name: str, rows: Sequence[dict[str, Any]]) -> bool:
        """Return whether a column is in some of these rows and changes nothing in the canonical rows of any."""
        if self.kind.keeps_columns or name in {*self.columns.values(), *self.dropped, *self.needs, self.task_field}:
            return False
        found = False
        for row in (row for row in rows if name in row):
            named = drop_fields(map_columns(row, self.columns, sample=True), self.dropped)
            whole = self._converted(named)
            if whole is not None:
                found = True
                if self._converted({k: v for k, v in named.items() if k != name}) != whole:
                    return False
        return found

    def _unused_fields(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Return the fields of messages that neither the template renders nor the loss reads, as `messages[].NAME`."""
        read = {*READ_FIELDS, *self.dropped, *([WEIGHT] if self.conversion.weighted else [])}
        unread: dict[str, bool] = {}
        for row in rows:
            named = drop_fields(map_columns(row, self.columns, sample=True), self.dropped)
            for made in self._converted(named) or ():
                for name in {n for talk in conversations(made) for turn in talk for n in turn} - read:
                    unread[name] = unread.get(name, True) and is_lost(self.tokens.template, made, name)
        return [f"messages[].{name}" for name in sorted(unread) if unread[name]]

    def _converted(self, named: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return the canonical rows of a row, or None where it has none."""
        try:
            return self.format.convert(named, self.conversion)
        except (BadRow, DataError, KeyError, TypeError, AttributeError, ValueError, StopIteration):
            return None

    def _media(self, row: dict[str, Any]) -> list[str]:
        """Return the columns of pictures, sound or video that a row fills and its row type does not read."""
        if self.kind.reads_files:
            return []
        known = {*self.columns.values(), *self.dropped}
        return [name for name, value in row.items() if name not in known and is_media(name, value)]

    def _note_fields(self, item: Item, report: Report) -> None:
        """Count the fields that the template does not render, and answers of nothing but an end token in rows that have any."""
        if not item.row.get("tools") and not any(map(held_fields, conversations(item.row))):
            return
        for name in lost_fields(self.tokens.template, item.row):
            if name == UNLISTED:
                report.unlisted += 1
                continue
            report.unrendered[name] += 1
            report.first.setdefault(f"unrendered {name}", item.where)
        if any(self.only_ends(answer) for done in item.done for answer in _answers(done)):
            report.silent += 1
            report.first.setdefault("silent", item.where)

    def with_task(self, row: dict[str, Any], reader: Reader, index: int) -> dict[str, Any]:
        """Return a row that names its task, where its format says that a file is one."""
        if self.task_field is None or not self.format.file_is_task or self.task_field in row:
            return row
        return {**row, self.task_field: task_of_source(reader.source(index))}

    def _task(self, named: dict[str, Any], row: dict[str, Any]) -> str | None:
        """Return the name (or number) of a row's task; None where it has none or no method needs it."""
        if self.task_field is None:
            return None
        value = named.get(self.task_field, row.get(self.task_field))
        return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def _answers(done: dict[str, Any]) -> list[list[int]]:
    """Return the trained sequences of a token row: runs of targets, or its answers."""
    found = [done[name] for name in ("completion_ids", "chosen_ids", "rejected_ids") if done.get(name)]
    if "trained" in done:
        runs = groupby(zip(done["ids"], done["trained"]), key=lambda pair: pair[1])
        found += [[token for token, _ in run] for flag, run in runs if flag]
    return found


@functools.cache
def code_version() -> str:
    """Return a hash of the modules that determine token ids and masks, and of the versions of the libraries that do."""
    import tokenizers
    import transformers

    folder = Path(__file__).parent.parent
    digest = hashlib.sha256(f"{tokenizers.__version__} {transformers.__version__}".encode())
    for path in sorted(path for name in DECIDING for path in folder.glob(f"{name}/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
