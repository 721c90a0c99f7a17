"""Streaming: rows encoded as they are read, shuffled through a buffer, resumable to the row.

stream = TokenStream(data, tokenizer, "dialogue", mask="completion", seed=0)
row = next(stream)           # endless; `stream.epoch` counts passes
state = stream.state()       # JSON; `stream.load_state(state)` continues after that row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, overload

from llmrecipe.core.errors import DataError
from llmrecipe.core.tasks import Tasks
from llmrecipe.data import validation
from llmrecipe.data.formats.sources import HubStream
from llmrecipe.data.formats.splits import Part, open_split
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encode import RowEncoder
from llmrecipe.data.tokenize.encoder import TWO_BOS
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.data.tokenize_split import make_encoder
from llmrecipe.recipe.data_section import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Raw = tuple[int, int, Row]
"""(source, index, raw row)"""
BATCH = 64
"""Raw rows encoded at a time."""
CHECKED = 1000
"""Rows after which data validation checks the counts."""
ENDLESS = 1 << 40
"""Length of a stream whose sources have no known length."""


class TokenStream:
    """An endless iterator of token rows over the training split.

    A pass over the data ends when every source has been read once. In a weighted mixture each stretch from its start of L rows
    has L weight_i / sum(weights) of source i, give or take fewer rows than there are sources, before the buffer shuffles them;
    a source that ends before the others starts over.

    Args:
        buffer: rows the shuffle holds; 1 keeps the order of the files.
        tasks: names of the tasks for which the stack has separate parameters.
        needs: column that every prompt row must have -> key path of what reads it.
    """

    def __init__(
        self,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        rows: str,
        *,
        mask: str = "completion",
        seed: int,
        buffer: int = 1000,
        tasks: Tasks | None = None,
        needs: Mapping[str, str] | None = None,
    ) -> None:
        if row_type(rows).numbered:
            raise DataError("data.streaming: labels are numbered over all training rows, so these rows cannot be streamed")
        if tasks is not None and tasks.names is None:
            raise DataError("data.streaming: rows are not known beforehand, so the names of their tasks must be listed (tasks)")
        self.data, self.seed, self.buffer, self.tasks = data, seed, buffer, tasks
        stride = data.stride if row_type(rows).windowed else None
        self.parts: list[Part] = open_split(data, "train")
        self.encoders: list[RowEncoder] = [
            make_encoder(part, data, tokenizer, rows, mask, tasks.field if tasks else None, needs, stride)
            for part in self.parts
        ]
        self.report = Report(source=" + ".join(p.reader.name for p in self.parts), mask=mask)
        for encoder in self.encoders:
            self.report.mapping |= encoder.columns
        self.report.format = " + ".join(dict.fromkeys(e.format.name for e in self.encoders))
        self.emitted = 0
        self.epoch = 0
        self._start(0, 0, 0)

    def _start(self, epoch: int, batches: int, within: int) -> None:
        """Go to the position in an epoch after `batches` encoded batches and `within` rows of the next."""
        self.epoch, self._batches, self._within = epoch, batches, 0
        self._raw = self._shuffled(epoch)
        for _ in islice(self._raw, batches * BATCH):
            pass
        self._rows: list[Row] = []
        if within:
            self._fill()
            self._within = within

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        empty = 0
        while self._within >= len(self._rows):
            if self._rows or empty:
                self._batches += 1
            if not self._fill():
                if not self.report.kept:
                    validation.check_report(self.report, self.data)
                self._start(self.epoch + 1, 0, 0)
                self._fill()
            empty += 1
        row = {**self._rows[self._within], "row": self.emitted}
        if self.tasks is not None:
            row["task"] = self.tasks.number(row.get("task"), f"{self.report.source}, training row {self.emitted + 1}")
        self._within += 1
        self.emitted += 1
        return row

    def _fill(self) -> bool:
        """Encode the next raw rows; return False at the end of the epoch."""
        raw = list(islice(self._raw, BATCH))
        self._rows, self._within = [], 0
        for source in sorted({s for s, _, _ in raw}):
            encoder, part = self.encoders[source], self.parts[source]
            named = ((i, encoder.with_task(row, part.reader, i)) for s, i, row in raw if s == source)
            own = [(i, row, f"{part.reader.name} row {i + 1}") for i, row in named]
            columns, report = encoder.encode(own)
            report.template = encoder.describe()
            self.report.merge(report)
            self._rows += [dict(zip(columns, values)) for values in zip(*columns.values())]
        self._rows = [{k: v for k, v in row.items() if v is not None} for row in self._rows]
        places = {(s, i): n for n, (s, i, _) in enumerate(raw)}
        if len(self.parts) == 1:
            self._rows.sort(key=lambda row: places[0, row["source_row"]])
        else:
            Random(f"{self.seed} {self.epoch} {self._batches}").shuffle(self._rows)
        if TWO_BOS in self.report.first or self.report.unrendered or self.report.silent or self.report.read >= CHECKED:
            validation.check_report(self.report, self.data)
        return bool(raw)

    def _shuffled(self, epoch: int) -> Iterator[Raw]:
        """Yield raw rows of an epoch through a shuffle buffer: each new row replaces a random one."""
        rng = Random(f"{self.seed} {epoch}")
        held: list[Raw] = []
        for raw in self._mixed(epoch):
            if len(held) < self.buffer:
                held.append(raw)
                continue
            at = rng.randrange(self.buffer)
            yield held[at]
            held[at] = raw
        rng.shuffle(held)
        yield from held

    def _mixed(self, epoch: int) -> Iterator[Raw]:
        weights = [part.weight for part in self.parts if part.weight is not None]
        if len(weights) < len(self.parts):
            for source in range(len(self.parts)):
                yield from self._read(source)
            return
        rng = Random(f"{self.seed} {epoch} mixture")
        readers = [self._read(source) for source in range(len(self.parts))]
        ended: set[int] = set()
        places = [rng.random() / weight for weight in weights]
        while True:
            source = places.index(min(places))
            places[source] += 1.0 / weights[source]
            raw = next(readers[source], None)
            if raw is None:
                ended.add(source)
                if len(ended) == len(readers):
                    return
                readers[source] = self._read(source)
                raw = next(readers[source], None)
                if raw is None:
                    raise DataError(f"{self.parts[source].reader.name}: no rows for the training split")
            yield raw

    def _read(self, source: int) -> Iterator[Raw]:
        part = self.parts[source]
        return ((source, i, row) for i, row in part.reader.stream() if part.chosen(row))

    def state(self) -> dict[str, int]:
        """Return the position of the stream as JSON values."""
        return {"epoch": self.epoch, "batches": self._batches, "within": self._within, "emitted": self.emitted}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue after the row at which `state` was recorded. Rows before it are read again but not encoded."""
        self._start(state["epoch"], state["batches"], state["within"])
        self.emitted = state["emitted"]

    def seek(self, row: int) -> None:
        """Go to the row of that running number: exact, but rows before it are encoded again."""
        if row < self.emitted:
            self._start(0, 0, 0)
            self.emitted = 0
        for _ in range(row - self.emitted):
            next(self)


class StreamedRows(Sequence[Row]):
    """A stream that is indexed like `TokenData`, by running number, and read forward.

    A larger index reads on; a smaller one starts over. The length is the number of raw rows where the sources know it (dropped
    rows make a pass end a little later than the data), else `ENDLESS`: then a run needs `steps`.
    """

    labels: list[str] | None = None
    weights: list[float] | None = None
    reader: None = None
    """Rows of a stream name no files."""

    def shapes(self) -> set[tuple[int, ...]]:
        """Return nothing: rows of a stream name no files."""
        return set()

    def __init__(self, stream: TokenStream, key: str) -> None:
        self.stream, self.key, self.tasks = stream, key, stream.tasks
        readers = [part.reader for part in stream.parts]
        self._length = ENDLESS if any(isinstance(r, HubStream) for r in readers) else sum(map(len, readers))

    def content(self) -> list[str]:
        """Return the hash of each source's content."""
        return [part.reader.fingerprint() for part in self.stream.parts]

    def column(self, name: str) -> list[Any]:
        """Return an empty list: rows of a stream are known one by one, as they are read."""
        return []

    @property
    def report(self) -> Report:
        """Return counts over the rows read so far."""
        return self.stream.report

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if index != self.stream.emitted:
            self.stream.seek(int(index))
        return next(self.stream)

    def order(self, epoch: int) -> range:
        """Return the running numbers of one pass; the stream itself shuffles."""
        return range(epoch * self._length, (epoch + 1) * self._length)
