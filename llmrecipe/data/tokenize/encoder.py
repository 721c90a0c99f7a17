"""What the encoding of rows into tokens works with: the tokenizer with its template, the mask, the length policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.loss_mask import loss_mask
from llmrecipe.data.tokenize.special_tokens import Tokens
from llmrecipe.data.tokenize.truncation import Limit, truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.recipe.data_section import DataSection

TWO_BOS = "two leading BOS tokens"


@dataclass
class Item:
    """One canonical row that is being encoded."""

    index: int
    where: str
    row: dict[str, Any]
    done: list[dict[str, Any]] = field(default_factory=list)
    """Its token rows."""
    bad: BadRow | None = None
    task: str | None = None
    """Name of its task, for batches that mix tasks."""


class Encoder:
    """What a row type encodes its rows with.

    Args:
        tokenizer: with its chat template.
        mask: name of the loss mask: which tokens are trained.
        data: the recipe's section; only `max_length` and `truncation` are read.
        stride: tokens by which rows of a text that is cut up move on (see `Limit.stride`).

    Raises:
        RecipeError: there is no such mask or truncation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask: str, data: DataSection, stride: int | None = None) -> None:
        self.tokens = Tokens(tokenizer)
        self.mask = loss_mask(mask)
        self.truncation = truncation(data.truncation)
        header = self.tokens.header() if self.truncation.keeps_header else 0
        self.limit = Limit(data.max_length, header, self.tokens.bos, stride)
        self._space: dict[int, bool] = {}
        self._talks = False
        self._turns = False

    def need_template(self, where: str, turns: bool = False) -> None:
        """Refuse conversations where the tokenizer has no template.

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
        """Return which template was used, for the report."""
        template = self.tokens.template
        if self._talks and template is not None:
            how = "{% generation %} marks" if self._turns and template.marks and self.tokens.fast else "token prefixes"
            return f"{template.name} (boundaries from {how})"
        return "none (raw text)"

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

    def shortens(self, ids: Sequence[int], where: str, report: Report) -> bool:
        """Return whether a text is to be cut to the longest length, and count what it loses.

        Raises:
            BadRow: it is too long, and the truncation drops such rows.
        """
        lost = len(ids) - self.limit.length
        if lost <= 0:
            return False
        self.truncation.shortens_texts(len(ids), self.limit, where)
        report.truncated += 1
        report.tokens_lost += lost
        return True

    def ends(self, answer: Sequence[int]) -> bool:
        """Return whether the last token that is not white space is an end token."""
        at = len(answer) - 1
        while at >= 0 and answer[at] not in self.tokens.ends and self._is_space(answer[at]):
            at -= 1
        return at >= 0 and answer[at] in self.tokens.ends

    def text_tokens(self, answer: Sequence[int]) -> int:
        """Return the number of tokens of an answer before the end tokens and the white space it closes with, if it does."""
        if not self.ends(answer):
            return len(answer)
        at = len(answer)
        while at and answer[at - 1] not in self.tokens.ends:
            at -= 1
        while at and answer[at - 1] in self.tokens.ends:
            at -= 1
        return at

    def only_ends(self, answer: Sequence[int]) -> bool:
        """Return whether an answer is nothing but end tokens and white space."""
        return all(token in self.tokens.ends or self._is_space(token) for token in answer)

    def _is_space(self, token: int) -> bool:
        if token not in self._space:
            self._space[token] = token not in self.tokens.special and self.tokens.is_space([token])
        return self._space[token]
