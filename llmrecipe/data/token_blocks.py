"""Documents laid end to end and cut into rows of one length (`data.blocks`), read from the memory-mapped token tables.

A table keeps whole documents, so one table serves every length, and a row is sliced out of its buffers when it is read:
what is in memory grows with the number of record batches, not with the corpus.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from llmrecipe.core.errors import DataError
from llmrecipe.data.cache import TokenTable
from llmrecipe.data.token_data import Row, TokenData
from llmrecipe.data.token_report import Report
from llmrecipe.recipe.data_section import DataSection

WHOLE = 1 << 30
"""Length limit of documents that are cut up later."""


def check_blocks(data: DataSection, rows: str) -> None:
    """Refuse rows that cannot be laid end to end.

    Raises:
        DataError: the objective reads something else than documents, or rows are read as they come.
    """
    if rows != "text":
        raise DataError(
            f"data.blocks: documents are laid end to end for objectives that read plain text (clm), and this one reads {rows} "
            "rows; leave the key out, data.packing lays its rows end to end without cutting them"
        )
    if data.streaming:
        raise DataError("data.blocks: rows are cut from a table of tokens, which data.streaming does not keep; drop one")
    if data.max_length < 2:
        raise DataError("data.blocks: data.max_length must be at least 2, one token and the one it predicts")


class TokenStrip:
    """The documents of one table as a single strip of tokens."""

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self.parts = [batch.lists for batch in table.batches]
        sizes = [int(lists["ids"][0][-1] - lists["ids"][0][0]) for lists in self.parts]
        self.starts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, begin: int, end: int) -> Row:
        """Return `ids` and `trained` of the tokens begin <= t < end, the lengths of the documents they belong to, in order
        (`documents`), and the raw row of the first."""
        ids: list[int] = []
        trained: list[int] = []
        documents: list[int] = []
        source = -1
        for part, low, high in self._pieces(begin, end):
            offsets, values, _ = self.parts[part]["ids"]
            marks = self.parts[part]["trained"][1]
            low, high = low + int(offsets[0]), high + int(offsets[0])
            ids += values[low:high].tolist()
            trained += marks[low:high].tolist()
            first = int(np.searchsorted(offsets, low, side="right")) - 1
            last = int(np.searchsorted(offsets, high, side="left"))
            borders = [low, *offsets[first + 1 : last].tolist(), high]
            documents += [int(b - a) for a, b in pairwise(borders) if b > a]
            if source < 0:
                source = int(self.table.batches[part].scalars["source_row"][first].as_py())
        return {"ids": ids, "trained": trained, "documents": documents, "source_row": source}

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (record batch, begin, end) within each batch that a stretch of the strip touches."""
        part = bisect_right(self.starts, begin) - 1
        while begin < end:
            stop = min(end, self.starts[part + 1])
            if stop > begin:
                yield part, begin - self.starts[part], stop - self.starts[part]
            begin, part = stop, part + 1


class BlockData(TokenData):
    """Rows of `length` tokens across documents; the last of each source may be shorter.

    Row i of a source holds the tokens from i (length - 1) on: its first token is the last one of the row before, so that every
    token that is a target in its document is the target of one row. `documents` are the lengths of the stretches of a row that
    belong to one document, for layouts that keep documents apart.
    """

    def __init__(self, tables: Sequence[TokenTable], weights: Sequence[float] | None, key: str, report: Report, length: int):
        super().__init__(tables, weights, f"{key}/{length}", copy.deepcopy(report), None)
        self.length = length
        self.strips = [TokenStrip(table) for table in tables]
        tokens = max(map(len, self.strips), default=0)
        if 0 < tokens < length:
            raise DataError(
                f"data.max_length: blocks of {length} tokens cannot be cut from training rows of {tokens} tokens altogether; "
                f"set data.max_length={max(tokens, 2)} or less, or data.blocks=false"
            )
        counts = [max(-(-(len(strip) - 1) // (length - 1)), 0) for strip in self.strips]
        self.starts = np.cumsum([0, *counts])
        self.report.longest = min(tokens, length)
        self.report.blocks = int(self.starts[-1])

    def read(self, at: int) -> Row:
        """Return the row of a running number that exists, sliced out of its table."""
        source = int(np.searchsorted(self.starts, at, side="right")) - 1
        strip = self.strips[source]
        begin = (at - int(self.starts[source])) * (self.length - 1)
        row = strip.read(begin, min(begin + self.length, len(strip)))
        row["trained"][0] = 0
        return {**row, "row": at}

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, (rows,)."""
        parts = []
        for strip, count in zip(self.strips, np.diff(self.starts)):
            sizes = np.full(int(count), self.length, dtype=np.int64)
            if count:
                sizes[-1] = len(strip) - (int(count) - 1) * (self.length - 1)
            parts.append(sizes)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
