"""From the recipe's data section to token rows: `prepare`, the list-like `TokenData`, and the order of an epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmrecipe.core.errors import DataError
from llmrecipe.core.tasks import Tasks, natural
from llmrecipe.data import validation
from llmrecipe.data.cache import TokenTable, table_key, tokenizer_fingerprint
from llmrecipe.data.features.read_file import FeatureReader
from llmrecipe.data.features.table import feature_table
from llmrecipe.data.formats.splits import NoSplitError, Part, open_split
from llmrecipe.data.streaming import StreamedRows, TokenStream
from llmrecipe.data.token_blocks import WHOLE, BlockData, check_blocks
from llmrecipe.data.token_data import TokenData
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.data.tokenize_split import build_table, plugin_code
from llmrecipe.recipe.data_section import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rows(Protocol):
    """Token rows by index."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Return one row."""


SplitRows = TokenData | StreamedRows
"""The rows of a split, all of them known or read as they come."""


def prepare(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    rows: str,
    *,
    mask: str = "completion",
    split: str = "train",
    seed: int,
    label_map: Sequence[str] | None = None,
    unseal: bool = False,
    tasks: Tasks | None = None,
    needs: Mapping[str, str] | None = None,
    reader: FeatureReader | None = None,
) -> SplitRows | None:
    """Return the token rows of a split, from the cache where possible.

    Args:
        data: the recipe's section.
        tokenizer: with its chat template set (`templates.set_template`).
        rows: row type the objective needs.
        mask: completion, assistant, last or all.
        split: train, validation or test.
        seed: decides which rows `data.limit` draws; token rows do not depend on it.
        label_map: `labels` of the training rows, so that every split numbers them alike, or the names an objective gives
            them. A whole number that is no name stands for the name at this place.
        tasks: the tasks with separate parameters; without names, those of the training rows (then in `TokenData.tasks`).
        unseal: must be True for the test split; only the one final test passes it.
        needs: column that every prompt row must hold -> key path of what reads it; rows without it are dropped and counted.
        reader: how files that rows name are read; without one they stay paths.

    Returns:
        The rows, or None where the recipe has no validation (or test) split. With `data.streaming`, training rows are
        read on demand.

    Raises:
        DataError: there are no training rows, the test split is sealed, the format is unknown, a row's task is unknown, or
            data validation stops.
    """
    if split == "test" and not unseal:
        raise DataError("the test split is sealed: it is scored once, after training; use the validation split to decide")
    if tasks is not None and "task" not in dict(row_type(rows).scalars):
        raise DataError(f"the recipe keeps tasks apart, but {rows} rows have no task; train on prompts with answers")
    blocks = data.blocks and split == "train"
    if blocks:
        check_blocks(data, rows)
    if data.streaming:
        _check_streaming(data, rows, split)
        if split == "train":
            return _streamed(data, tokenizer, rows, mask, seed, tasks, needs)
    try:
        parts = open_split(data, split)
    except NoSplitError:
        if split == "train":
            raise
        return None
    draws = _draws(data, parts, seed) if split == "train" and data.limit else [None] * len(parts)
    field = tasks.field if tasks is not None else None
    stride = _stride(data, rows, split)
    cut = data.model_copy(update={"max_length": WHOLE}) if blocks else data
    tables = [build_table(part, cut, tokenizer, rows, mask, draw, field, needs, stride) for part, draw in zip(parts, draws)]
    if reader is not None and row_type(rows).reads_files:
        for part, table in zip(parts, tables):
            _read_files(table, part, reader, data.cache)
    report = Report()
    for table in tables:
        report.merge(Report.from_dict(table.facts["report"]))
    validation.check_report(report, data, split)
    weighted = _weights(parts, tables, by_tokens=data.shares == "tokens" and not blocks)
    files = [t.features.key for t in tables if t.features is not None]
    joined = "".join([*(t.facts["key"] for t in tables), *files, json.dumps(weighted)])
    key = hashlib.sha256(joined.encode()).hexdigest()
    if blocks:
        return BlockData(tables, weighted, key, report, data.max_length)
    labels = _labels(tables, label_map, split, report.source) if row_type(rows).numbered else label_map
    if tasks is not None:
        tasks = tasks.resolve((value for table in tables for value in {*table.column("task")}), report.source)
    return TokenData(tables, weighted, key, report, labels, tasks)


def _check_streaming(data: DataSection, rows: str, split: str) -> None:
    """Refuse, for rows that are read on demand, what has to be known of all of them beforehand.

    Raises:
        DataError: it names the key.
    """
    if row_type(rows).reads_files:
        raise DataError("data.streaming: the files that rows name are prepared beforehand, so these rows cannot be streamed")
    if split == "train" and data.control:
        raise DataError(
            "data.control: the other rows of a stream are not known, so none can have their values; set streaming: false"
        )
    if split == "train" and data.shares == "tokens":
        raise DataError("data.shares: the tokens of rows that are streamed are not known beforehand; use shares: rows")


def _streamed(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    rows: str,
    mask: str,
    seed: int,
    tasks: Tasks | None,
    needs: Mapping[str, str] | None,
) -> StreamedRows:
    """Return training rows that are read and tokenized on demand; their key names everything they depend on."""
    ingredients = [
        data.model_dump(mode="json", exclude={"shares"}),  # always rows
        tokenizer_fingerprint(tokenizer),
        rows,
        mask,
        seed,
        *([dict(needs)] if needs else []),
        *([{"plugins": plugged}] if (plugged := plugin_code()) else []),
    ]
    stream = TokenStream(data, tokenizer, rows, mask=mask, seed=seed, tasks=tasks, needs=needs)
    return StreamedRows(stream, table_key({"stream": ingredients}))


def _weights(parts: Sequence[Part], tables: Sequence[TokenTable], by_tokens: bool) -> list[float] | None:
    """Return the weight of each part of the data in rows, or None where the recipe gives none.

    Args:
        by_tokens: the recipe's weights are shares of the targets (of all tokens where rows have none): divided by the mean of
            a row.

    Raises:
        DataError: a part with a weight has no rows.
    """
    empty = next((p for p, t in zip(parts, tables) if p.weight is not None and not len(t)), None)
    if empty is not None:
        raise DataError(f"data.path: {empty.reader.name} gives no rows, so its weight {empty.weight} cannot be kept")
    weights = [part.weight for part in parts]
    if any(w is None for w in weights):
        return None
    found = [float(w) for w in weights if w is not None]
    if not by_tokens:
        return found
    counted = [Report.from_dict(table.facts["report"]) for table in tables]
    return [w * len(t) / (one.trained or one.tokens) for w, t, one in zip(found, tables, counted, strict=True)]


def _stride(data: DataSection, rows: str, split: str) -> int | None:
    """Return by how many tokens the rows of a long text move on (see `Limit.stride`)."""
    if row_type(rows).windowed:
        return data.stride
    return None if split == "train" else data.stride or max(data.max_length - 1, 1)


def _read_files(table: TokenTable, part: Part, reader: FeatureReader, cached: bool) -> None:
    """Prepare the files that the rows of a table name."""
    places = zip(table.column("features"), table.column("source_row"))
    table.features = feature_table(((path, part.reader.where(row)) for path, row in places), reader, cached, part.reader.name)
    table.content = hashlib.sha256(f"{table.content} {''.join(table.features.contents)}".encode()).hexdigest()


def _draws(data: DataSection, parts: Sequence[Part], seed: int) -> list[tuple[int, int] | None]:
    """Return how many rows of each source make up `data.limit`, with the seed of the sample."""
    assert data.limit is not None
    shares = np.array([part.weight if part.weight is not None else len(part.reader) for part in parts], dtype=float)
    exact = shares / shares.sum() * data.limit
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact)[: data.limit - int(counts.sum())]:
        counts[i] += 1
    return [(max(int(count), 1), seed) for count in counts]


def _labels(tables: Sequence[TokenTable], given: Sequence[str] | None, split: str, source: str) -> list[str] | None:
    """Return class names in the order of their ids; None where labels are real numbers.

    Raises:
        DataError: the split has labels the training rows lack, or training rows have some that the objective does not name.
    """
    values = [json.loads(text) for table in tables for text in {*table.column("label")} if text is not None]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    if given is None:
        real = not flat or any(isinstance(v, float) for v in flat)
        return None if real else sorted({str(v) for v in flat}, key=natural)
    # Whole numbers stand for names only where no name is itself a number, as those of training rows may be.
    stand = all(isinstance(v, int) for v in flat) and not any(name.removeprefix("-").isdigit() for name in given)
    known = {*given, *map(str, range(len(given)))} if stand else set(given)
    unknown = sorted({str(v) for v in flat} - known, key=natural)
    if unknown and split == "train":
        raise DataError(
            f"{source}: the rows have labels that are not among those of the objective: {', '.join(unknown[:8])} "
            f"(named: {', '.join(list(given)[:20])}); add them to objective.tags in their order, or take these rows out"
        )
    if unknown:
        raise DataError(
            f"{source}: the {split} rows have labels the training rows lack: {', '.join(unknown[:8])} "
            f"(known: {', '.join(list(given)[:20])}); add training rows for them or take them out"
        )
    return list(given)


def order(data: SplitRows, seed: int, epoch: int) -> np.ndarray | range:
    """Return row indices of one epoch, shuffled by (seed, epoch); a stream shuffles itself, so its order is kept.

    Without weights it is a permutation. With weights it has as many entries as there are rows, and every stretch from the start
    of L entries has L weight_i / sum(weights) of source i, give or take fewer rows than there are sources: entry j of source i
    has place (j + u_i) / weight_i, u_i in [0, 1) by (seed, epoch), and places are sorted. Within a source rows come in a
    shuffled order that starts over when it is used up, so no row is seen n + 1 times before all were seen n times.
    """
    if isinstance(data, StreamedRows):
        return data.order(epoch)
    rng = np.random.default_rng([seed, epoch])
    if data.weights is None:
        return rng.permutation(len(data))
    shares = np.array(data.weights) / np.sum(data.weights)
    most = [int(np.ceil(len(data) * share)) + len(shares) for share in shares]
    places = [(np.arange(count) + rng.random()) / share for count, share in zip(most, shares, strict=True)]
    sources = np.repeat(np.arange(len(shares)), most)[np.argsort(np.concatenate(places), kind="stable")[: len(data)]]
    drawn = np.empty(len(data), dtype=np.int64)
    for i, (start, end) in enumerate(zip(data.starts[:-1], data.starts[1:])):
        own = np.flatnonzero(sources == i)
        rounds = -(-len(own) // int(end - start))
        rows = [rng.permutation(np.arange(start, end)) for _ in range(rounds)]
        drawn[own] = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])[: len(own)]
    return drawn


def source_hashes(data: DataSection, split: str) -> list[str] | None:
    """Return the hash of each source's content without reading rows; None where the split does not exist or is unreadable."""
    try:
        return [part.reader.fingerprint() for part in open_split(data, split)]
    except DataError:
        return None
