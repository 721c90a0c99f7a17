"""Canonical rows to token rows, a batch at a time.

Tokenizing is batched: all texts of a batch go through the tokenizer in one call. Rows that cannot be used are dropped and
counted by reason in the report; what is wrong with the recipe or the template rather than with a row stops at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.data.formats.convert import FORMATS, Options
from llmrecipe.data.formats.detect import rename
from llmrecipe.data.formats.row_types import BadRow, RowType, row_type
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize import labelled_rows, preference, sequences
from llmrecipe.data.tokenize.loss_masks import MASKS
from llmrecipe.data.tokenize.special_tokens import Tokens
from llmrecipe.data.tokenize.truncation import Limit

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from llmrecipe.recipe.schema import DataSection

TWO_BOS = "two leading BOS tokens"


@dataclass
class Item:
    """One canonical row on its way."""

    index: int
    where: str
    row: dict[str, Any]
    done: list[dict[str, Any]] = field(default_factory=list)
    """Its token rows."""
    bad: BadRow | None = None
    task: str | None = None
    """Name of its task, for batches that mix tasks."""


class Encoder:
    """Everything one data set's encoding depends on.

    Args:
        tokenizer: carries the chat template.
        rows: row type the objective asks for.
        mask: which tokens are trained (`data.tokenize.loss_masks`).
        data: the recipe's section; only `columns`, `max_length`, `truncation` and `system` are read.
        format_name: format of the source.
        base: folder image paths refer to.
        task_field: column that names the task of a row; None where nothing asks for it.
        aliases: columns recognised by their names (`data.formats.aliases`), besides the recipe's own mapping.
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
    ) -> None:
        if mask not in MASKS:
            raise DataError(f"objective.mask: '{mask}' is unknown{did_you_mean(mask, MASKS)} (known: {', '.join(MASKS)})")
        self.tokens = Tokens(tokenizer)
        self.kind: RowType = row_type(rows)
        self.mask = mask
        self.columns = {**data.columns, **(aliases or {})}
        self.task_field = task_field
        template = self.tokens.template
        self.options = Options(rows, bool(template and template.named), template is not None, data.system, base)
        self.format = FORMATS[format_name]
        header = self.tokens.header() if data.truncation == "truncate_prompt_left" else 0
        self.limit = Limit(data.max_length, data.truncation, header, self.tokens.bos)
        self._space: dict[int, bool] = {}
        self._talks = False
        self._turns = False

    def encode(self, raw: Iterable[tuple[int, dict[str, Any], str]]) -> tuple[dict[str, list[Any]], Report]:
        """Encode raw rows given as (index in the source, row, place).

        Returns:
            Columns of token rows (see `data.formats.row_types`) with `source_row`, and the report over these rows.
        """
        report = Report()
        items: list[Item] = []
        for index, row, where in raw:
            report.read += 1
            try:
                named = rename(row, self.columns)
                task = self._task(named, row)
                items += [Item(index, where, one, task=task) for one in self.format.convert(named, self.options)]
            except BadRow as bad:
                report.drop(bad.reason, where, bad.detail)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                report.drop(f"not a {self.format.name} row", where, f"{type(error).__name__}: {error}")
        if items:
            self._dispatch(items, report)
        names = [*self.kind.lists, *self.kind.masks, *(n for n, _ in self.kind.scalars), "source_row"]
        columns: dict[str, list[Any]] = {name: [] for name in names}
        lost: set[int] = set()
        for item in items:
            if item.bad is not None:
                if item.index not in lost:
                    report.drop(item.bad.reason, item.where, item.bad.detail, item.bad.tokens)
                lost.add(item.index)
                continue
            for done in item.done:
                report.kept += 1
                done |= {"source_row": item.index, "task": item.task}
                for name in names:
                    columns[name].append(done.get(name))
        return columns, report

    def _task(self, named: dict[str, Any], row: dict[str, Any]) -> str | None:
        """The name (or number) of a row's task; None where it has none or nothing asks for it."""
        if self.task_field is None:
            return None
        value = named.get(self.task_field, row.get(self.task_field))
        return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None

    def _dispatch(self, items: Sequence[Item], report: Report) -> None:
        name = self.kind.name
        if name in ("text", "dialogue", "tokens", "multimodal"):
            sequences.encode(self, items, report)
        elif name in ("preference", "unpaired", "choices"):
            preference.encode_answers(self, items, report)
        elif name == "prompt":
            preference.encode_prompts(self, items, report)
        elif name == "labelled":
            labelled_rows.encode_labelled(self, items, report)
        else:
            labelled_rows.encode_pairs(self, items, report)

    def need_template(self, where: str, turns: bool = False) -> None:
        """Conversations cannot be encoded without a template.

        Args:
            turns: assistant turns are looked for, not just the end of a prompt.

        Raises:
            DataError: the tokenizer has none.
        """
        if self.tokens.template is None:
            raise DataError(
                f"{where}: rows are conversations, and this tokenizer has no chat template; "
                "set tokenizer.chat_template to chatml, plain, alpaca, a file, or Jinja text"
            )
        self._talks = True
        self._turns |= turns

    def describe(self) -> str:
        """Which template was used, for the report."""
        template = self.tokens.template
        if self._talks and template is not None:
            how = "{% generation %} marks" if self._turns and template.marks and self.tokens.fast else "token prefixes"
            return f"{template.name} (boundaries from {how})"
        return "none (raw text)" if template is None else "none (raw text; tokenizer.chat_template=own would wrap it)"

    def note(self, report: Report, ids: Sequence[int], where: str, answers: Sequence[Sequence[int]] = ()) -> None:
        """Count the start and the end tokens of one sequence and whether its answers end."""
        tokens = self.tokens
        if tokens.bos is not None:
            leading = 0
            while leading < len(ids) and ids[leading] == tokens.bos:
                leading += 1
            report.bos[leading] += 1
            if leading > 1 and tokens.bos != tokens.eos:
                report.first.setdefault(TWO_BOS, where)
        if tokens.ends:
            report.eos[sum(list(ids).count(end) for end in tokens.ends)] += 1
        for answer in answers:
            report.endable += 1
            report.ended += self.ends(answer)

    def ends(self, answer: Sequence[int]) -> bool:
        """Whether the last token that is not white space is an end token."""
        at = len(answer) - 1
        while at >= 0 and answer[at] not in self.tokens.ends and self._is_space(answer[at]):
            at -= 1
        return at >= 0 and answer[at] in self.tokens.ends

    def _is_space(self, token: int) -> bool:
        if token not in self._space:
            self._space[token] = token not in self.tokens.special and self.tokens.is_space([token])
        return self._space[token]


@functools.cache
def code_version() -> str:
    """Hash of the modules that decide token ids and masks, and the versions of the libraries that do."""
    import hashlib
    from pathlib import Path

    import tokenizers
    import transformers

    folder = Path(__file__).parent.parent
    digest = hashlib.sha256(f"{tokenizers.__version__} {transformers.__version__}".encode())
    for path in sorted([*folder.glob("formats/*.py"), *folder.glob("tokenize/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
