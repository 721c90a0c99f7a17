"""Building one token table: read, encode in batches (in several processes for large data), write, or reuse the cached one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrecipe.core import registry
from llmrecipe.core.console import Pace
from llmrecipe.core.errors import DataError
from llmrecipe.data.cache import (
    TableWriter,
    TokenTable,
    open_table,
    schema_of,
    sweep_tables,
    table_folder,
    table_key,
    to_batch,
    tokenizer_fingerprint,
)
from llmrecipe.data.formats import detect
from llmrecipe.data.formats.splits import Part
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encode import RowEncoder, code_version
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.recipe.code_key import code_behind
from llmrecipe.recipe.data_section import DataSection

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

BATCH = 1024
"""Raw rows encoded at a time."""
LARGE = 20_000
"""Least number of rows for which starting processes pays off."""
SAMPLE = 20
"""Rows that are read to detect the format."""

Draw = tuple[int, int]


def build_table(
    part: Part,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    rows: str,
    mask: str,
    draw: Draw | None = None,
    task_field: str | None = None,
    needs: Mapping[str, str] | None = None,
    stride: int | None = None,
) -> TokenTable:
    """Build the token table of one source.

    Args:
        draw: (count, seed): keep `count` rows drawn with the seed instead of all.
        task_field: column that names the task of a row, where the recipe keeps tasks apart.
        needs: column that every prompt row must have -> key path of what reads it.
        stride: tokens by which rows of a text that is cut up move on (see `Limit.stride`).
    """
    kind = row_type(rows)
    plugged = plugin_code()
    content = part.reader.fingerprint(remember=data.cache)
    key = table_key(
        {
            "data": content,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "rows": [rows, mask, data.format, data.columns, data.system],
            "length": [data.max_length, data.truncation, *([stride] if stride else [])],
            "part": [part.keep, draw],
            "folder": str(part.reader.base) if kind.reads_files else None,
            "code": code_version(),
            **({"dropped": data.drop_fields} if data.drop_fields else {}),
            # A row may have the task that its file is named after.
            **({"task": [task_field, part.reader.sources()]} if task_field else {}),
            **({"plugins": plugged} if plugged else {}),
            **({"needs": dict(needs)} if needs else {}),
            **({"control": part.control} if part.control else {}),
            **({"labels": [[*data.label_words.items()], data.label_prompt]} if data.label_words else {}),
        }
    )
    folder = table_folder(key) if data.cache else None
    if folder is not None:
        found = open_table(folder, kind)
        if found is not None:
            found.facts["report"] |= {"source": part.reader.name, "ignored": list(part.reader.ignored)}
            found.content = content
            return found
    encoder = make_encoder(part, data, tokenizer, rows, mask, task_field, needs, stride)
    writer = TableWriter(kind, folder)
    report = Report(source=part.reader.name, format=encoder.format.name, mapping=encoder.columns, mask=mask)
    report.ignored = list(part.reader.ignored)
    report.unused = encoder.unused(row for _, row in islice(part.reader.stream(), SAMPLE))
    pace = Pace(f"tokenising {part.reader.name}", draw[0] if draw is not None else len(part.reader))
    try:
        for batch, counted in _batches(encoder, part, draw, data.workers):
            writer.add(batch)
            report.merge(counted)
            pace.at(report.read if draw is None else report.kept)
    except BaseException:
        writer.abandon()
        raise
    made = writer.finish({"key": key, "report": report.to_dict()})
    made.content = content
    if folder is not None:
        sweep_tables()
    return made


GROUPS = ("format", "row_type", "loss_mask", "truncation")
"""Groups of components that decide token rows; a chat template is part of the tokenizer's fingerprint."""


def plugin_code() -> dict[str, str]:
    """Return a digest of each plugin that adds a component on which token rows depend."""
    return code_behind(registry.spec(group, name).module for group in GROUPS for name in registry.names(group))


def make_encoder(
    part: Part,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    rows: str,
    mask: str,
    task_field: str | None = None,
    needs: Mapping[str, str] | None = None,
    stride: int | None = None,
) -> RowEncoder:
    """Detect the source's format and make its encoder.

    Raises:
        DataError: no rows, or columns that fit no format.
    """
    found = source_layout(part, data, rows)
    encoder = RowEncoder(tokenizer, rows, mask, data, found.name, part.reader.base, task_field, found.aliases, needs, stride)
    encoder.look_for_repeats(row for _, row in islice(part.reader.stream(), SAMPLE))
    return encoder


def source_layout(part: Part, data: DataSection, rows: str) -> detect.DetectedFormat:
    """Return the format of a source and the columns recognised for it, from its first rows.

    Raises:
        DataError: no rows, or columns that fit no format.
    """
    first = list(islice(part.reader.stream(), SAMPLE))
    name = part.reader.name
    if not first:
        raise DataError(f"{name}: there are no rows")
    raw = [row for _, row in first]
    if part.controlled is not None:
        part.controlled.check(raw)
    detect.check_mapping(data.columns, raw[0], name, rows)
    mapped = [detect.map_columns(row, data.columns, sample=True) for row in raw]
    return detect.detect(mapped, rows, data.format, name, data.columns, raw)


Encoded = tuple["pa.RecordBatch", Report]


def _batches(encoder: RowEncoder, part: Part, draw: Draw | None, workers: int) -> Iterator[Encoded]:
    """Yield record batches with their reports, in source order (or in the order of the sample)."""
    if draw is not None:
        yield from _drawn(encoder, part, draw)
        return
    total = len(part.reader)
    ranges = [range(start, min(start + BATCH, total)) for start in range(0, total, BATCH)]
    processes = _processes(workers, total)
    if processes < 2:
        for indices in ranges:
            yield encode_range(encoder, part, indices)
        return
    yield from _parallel(encoder, part, ranges, processes)


def _processes(workers: int, total: int) -> int:
    """Return the number of encoding processes; one where forking is not safe or the data is small."""
    if not sys.platform.startswith("linux"):
        return 1
    if workers:
        return workers
    return min(len(os.sched_getaffinity(0)), 16) if total >= LARGE else 1


def _drawn(encoder: RowEncoder, part: Part, draw: Draw) -> Iterator[Encoded]:
    """Encode rows of a seeded permutation until `count` are kept, so a limited run encodes little more than it uses."""
    count, seed = draw
    shuffled = np.random.default_rng(seed).permutation(len(part.reader))
    step = max(min(BATCH, count), 1)
    for start in range(0, len(shuffled), step):
        indices = [int(i) for i in shuffled[start : start + step]]
        batch, report = encode_range(encoder, part, indices)
        if report.kept > count:
            last = indices.index(batch.column("source_row")[count - 1].as_py())
            batch, report = encode_range(encoder, part, indices[: last + 1])
            report.kept = count
            yield batch.slice(0, count), report
            return
        count -= report.kept
        yield batch, report
        if count <= 0:
            return


def encode_range(encoder: RowEncoder, part: Part, indices: Sequence[int] | range) -> Encoded:
    """Encode the rows at these indices that belong to the split."""
    reader = part.reader
    raw = ((i, encoder.with_task(row, reader, i), reader.where(i)) for i, row in part.rows(indices))
    columns, report = encoder.encode(raw)
    report.template = encoder.describe()
    return to_batch(columns, schema_of(encoder.kind)), report


_work: Any = None
"""(encoder, part), inherited by forked workers."""


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Collections would walk through everything the parent has imported, again and again, and copy its memory.
    gc.freeze()


def _encode_in_worker(indices: range) -> Encoded:
    encoder, part = _work
    return encode_range(encoder, part, indices)


def _parallel(encoder: RowEncoder, part: Part, ranges: Sequence[range], processes: int) -> Iterator[Encoded]:
    """Encode in forked workers, which share the open file and the tokenizer and send back only record batches."""
    global _work

    _work = (encoder, part)
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker) as pool:
            yield from pool.map(_encode_in_worker, ranges)
    finally:
        _work = None
