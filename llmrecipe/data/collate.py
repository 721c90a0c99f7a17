"""Batches: token sequences laid out for one forward pass, and the flat list of positions that are scored.

Letters: R rows, T columns, N scored positions, S sequences.

Two layouts, one result. `pack` concatenates sequences in one row without padding; each attends to itself and to its parent
only. `pad` writes one row per sequence. Both fill the same flat lists, in the order of the sequences, so an objective does not
depend on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from llmrecipe.core.forward_context import Context, Layout, Segment
from llmrecipe.data.transfer import to_device


@dataclass(frozen=True)
class Slots:
    """Places of a batch that hold features instead of tokens: patches of pictures, regions, frames."""

    values: Tensor
    """(M, W) the vector of each."""
    index: Tensor
    """(M,) its place in the flattened (R*T) inputs."""
    place: Tensor
    """(M, 2) where it was: row and column of a patch, number of a frame and 0."""
    sequence: Tensor
    """(M,) index of the sequence it belongs to."""

    def to(self, device: torch.device | str) -> Slots:
        """Return the same places on a device."""
        return Slots(*(to_device(getattr(self, f.name), device) for f in fields(self)))


@dataclass(frozen=True)
class FeatureVectors:
    """The features of a sequence."""

    values: Tensor
    """(m, W)"""
    places: Tensor
    """(m, 2) row and column of a patch, number of a frame and 0."""


@dataclass(frozen=True)
class Sequence:
    """Tokens that belong together."""

    ids: Seq[int]
    trained: Seq[int]
    """1 where the token is a target."""
    parent: int | None = None
    """Index of the sequence it continues: the shared prompt of a chosen and a rejected answer."""
    prompt: int = 0
    """Number of leading tokens that belong to the prompt."""
    task: int = 0
    """Task of a mixed-task batch."""
    features: FeatureVectors | None = None
    """What is read before the tokens, without a position among them; only without parent and children."""

    @property
    def slots(self) -> int:
        """Number of places of its features."""
        return 0 if self.features is None else len(self.features.values)


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    input_ids: Tensor
    """(R, T)"""
    position_ids: Tensor
    """(R, T) position of each token in its document, parents included."""
    attention_mask: Tensor | None
    """(R, T) ones on real tokens; None for packed rows."""
    layout: Layout | None
    """None for padded rows."""
    source: Tensor
    """(N,) index into the flattened (R*T) hidden states that predict each target."""
    target: Tensor
    """(N,) token ids."""
    sequence: Tensor
    """(N,) index of the sequence each target belongs to."""
    sequences: int
    """S"""
    last: Tensor
    """(S,) flat index of each sequence's last real token."""
    task_ids: Tensor | None = None
    """(R, T), only where a batch mixes tasks."""
    prompt_lengths: Tensor | None = None
    """(R,) for padded rows."""
    rows: tuple[int, ...] = ()
    """Indices of the token rows in their data set."""
    keys: tuple[int, ...] = ()
    """A digest of each row's tokens, for what is cached by content (reference log-probabilities)."""
    tokens: int = 0
    """Real tokens and features the model reads; none where a process without rows reads a filler to take part in a step."""
    slots: Slots | None = None
    """Places whose inputs are features; the ids there are fillers."""
    pixels: Tensor | None = None
    """(S, C, H, W) pictures, for models that read them themselves; the ids are fillers then, one for each state."""
    texts: tuple[tuple[str, ...], ...] = ()
    """Texts of each row that answers are taken from and compared with."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What the objective needs in addition to tokens: labels, margins, advantages, encoder inputs."""
    host: Batch | None = field(default=None, repr=False)
    """The same batch as it was laid out, where this one is a copy on another device."""

    @property
    def here(self) -> Batch:
        """Return the batch whose tensors the host can read without waiting for a device."""
        return self if self.host is None else self.host

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on a device."""
        if torch.device(device).type == "cpu" and self.input_ids.device.type == "cpu":
            return self
        slots = None if self.slots is None else self.slots.to(device)
        names = (
            "input_ids",
            "position_ids",
            "attention_mask",
            "source",
            "target",
            "sequence",
            "last",
            "task_ids",
            "prompt_lengths",
            "pixels",
        )
        moved: dict[str, Any] = {n: to_device(v, device) for n in names if (v := getattr(self, n)) is not None}
        extra = {k: to_device(v, device) for k, v in self.extra.items()}
        return replace(self, **moved, slots=slots, extra=extra, host=self.here)

    def context(self, role: str = "policy") -> Context:
        """Return the context of a forward pass over this batch; `extra` may hold `example_ids` and `example_mask`, (K, T')."""
        examples = (self.extra["example_ids"], self.extra["example_mask"]) if "example_ids" in self.extra else None
        return Context(
            role=role,
            layout=self.layout,
            attention_mask=self.attention_mask,
            positions=self.position_ids,
            task_ids=self.task_ids,
            prompt_lengths=self.prompt_lengths,
            padded=self.padded,
            examples=examples,
            computed={},
            here=self._copied(),
        )

    def _copied(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the masks and lengths of its rows, each with what it was copied from."""
        if self.host is None:
            return ()
        both = [(getattr(self, name), getattr(self.host, name)) for name in ("attention_mask", "prompt_lengths")]
        both.append((self.extra.get("encoder_mask"), self.host.extra.get("encoder_mask")))
        return tuple((there, own) for there, own in both if there is not None and own is not None)

    @property
    def padded(self) -> bool | None:
        """Return whether some places of its rows are padding; None for rows without a mask."""
        mask = self.here.attention_mask
        return None if mask is None else not bool(mask.all())

    def with_extra(self, **tensors: Tensor) -> Batch:
        """Return the same batch with more tensors for the objective; those of the host are copied to the batch's device."""
        if self.host is None:
            return replace(self, extra={**self.extra, **tensors})
        place = self.input_ids.device
        host = self.host.with_extra(**{k: v for k, v in tensors.items() if v.device.type == "cpu"})
        return replace(self, extra={**self.extra, **{k: to_device(v, place) for k, v in tensors.items()}}, host=host)

    def with_texts(self, texts: tuple[tuple[str, ...], ...]) -> Batch:
        """Return the same batch with the texts of its rows."""
        return replace(self, texts=texts)

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sum per-target values (N,) by sequence, giving (S,)."""
        return values.new_zeros(self.sequences).index_add(0, self.sequence, values)

    def counts(self) -> Tensor:
        """Return the number of targets of each sequence, (S,), as float."""
        found = torch.bincount(self.here.sequence, minlength=self.sequences).to(torch.float32)
        return to_device(found, self.sequence.device)


def _tasks(sequences: Seq[Sequence]) -> bool:
    return any(s.task for s in sequences)


def _slots(sequences: Seq[Sequence], firsts: Seq[int]) -> Slots | None:
    """Return the places of features; `firsts` has the flat index of the first column of each sequence."""
    holding = [(i, s.features, firsts[i]) for i, s in enumerate(sequences) if s.features is not None and s.slots]
    if not holding:
        return None
    return Slots(
        values=torch.cat([own.values for _, own, _ in holding]),
        index=torch.cat([torch.arange(first, first + len(own.values)) for _, own, first in holding]),
        place=torch.cat([own.places for _, own, _ in holding]),
        sequence=torch.cat([torch.full((len(own.values),), i) for i, own, _ in holding]),
    )


def pack(sequences: Seq[Sequence], rows: Seq[int] = (), extra: dict[str, Tensor] | None = None) -> Batch:
    """Concatenate sequences in one row, R = 1.

    The first token of a sequence without parent has nothing before it and is never a target; the first token of a child is
    predicted from its parent's last token.
    """
    real = bool(sequences)
    sequences = list(sequences) or [Sequence([0], [0])]
    starts: list[int] = []
    offsets: list[int] = []
    segments: list[Segment] = []
    ids: list[int] = []
    positions: list[int] = []
    tasks: list[int] = []
    source: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    for index, s in enumerate(sequences):
        start = len(ids)
        offset = 0 if s.parent is None else offsets[s.parent] + len(sequences[s.parent].ids)
        starts.append(start)
        offsets.append(offset)
        length = s.slots + len(s.ids)
        segments.append(Segment(0, start, length, s.parent, s.slots + s.prompt))
        before = None if s.parent is None else starts[s.parent] + len(sequences[s.parent].ids) - 1
        _targets(s, index, start + s.slots, before, source, target, owner)
        ids.extend([0] * s.slots)
        ids.extend(s.ids)
        positions.extend([0] * s.slots)
        positions.extend(range(offset, offset + len(s.ids)))
        tasks.extend([s.task] * length)
        last.append(start + length - 1)
    columns = len(ids)
    return Batch(
        input_ids=torch.tensor([ids], dtype=torch.long),
        position_ids=torch.tensor([positions], dtype=torch.long),
        attention_mask=None,
        layout=Layout(tuple(segments), 1, columns),
        source=torch.tensor(source, dtype=torch.long),
        target=torch.tensor(target, dtype=torch.long),
        sequence=torch.tensor(owner, dtype=torch.long),
        sequences=len(sequences),
        last=torch.tensor(last, dtype=torch.long),
        task_ids=torch.tensor([tasks]) if _tasks(sequences) else None,
        rows=tuple(rows),
        tokens=columns if real else 0,
        slots=_slots(sequences, starts),
        extra=extra or {},
    )


def pad(
    sequences: Seq[Sequence],
    pad_id: int,
    side: str = "right",
    rows: Seq[int] = (),
    extra: dict[str, Tensor] | None = None,
    columns: int | None = None,
) -> Batch:
    """Write one padded row per sequence; a parent is repeated before each of its children.

    Args:
        columns: width of the rows; default the longest.
    """
    real = bool(sequences)
    sequences = list(sequences) or [Sequence([0], [0])]
    parents = {s.parent for s in sequences if s.parent is not None}
    leaves = [i for i in range(len(sequences)) if i not in parents]
    full: list[list[int]] = [
        [*([pad_id] * s.slots), *(sequences[s.parent].ids if s.parent is not None else ()), *s.ids]
        for s in (sequences[i] for i in leaves)
    ]
    firsts = [0] * len(sequences)
    width = max(columns or 0, max(len(r) for r in full))
    shape = (len(leaves), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    tasks = torch.zeros(shape, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    last = [0] * len(sequences)
    prompts: list[int] = []
    written: set[int] = set()
    for row, (leaf, tokens) in enumerate(zip(leaves, full, strict=True)):
        first = 0 if side == "right" else width - len(tokens)
        ids[row, first : first + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, first : first + len(tokens)] = 1
        s = sequences[leaf]
        positions[row, first + s.slots : first + len(tokens)] = torch.arange(len(tokens) - s.slots)
        tasks[row] = s.task
        firsts[leaf] = row * width + first
        start, before, shared = firsts[leaf] + s.slots, None, 0
        if s.parent is not None:
            parent = sequences[s.parent]
            shared = len(parent.ids)
            if s.parent not in written:
                written.add(s.parent)
                _targets(parent, s.parent, start, None, source, target, owner)
                last[s.parent] = start + shared - 1
            before = start + shared - 1
        _targets(s, leaf, start + shared, before, source, target, owner)
        last[leaf] = firsts[leaf] + len(tokens) - 1
        prompts.append(s.slots + shared + s.prompt)
    return Batch(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        layout=None,
        source=torch.tensor(source, dtype=torch.long),
        target=torch.tensor(target, dtype=torch.long),
        sequence=torch.tensor(owner, dtype=torch.long),
        sequences=len(sequences),
        last=torch.tensor(last, dtype=torch.long),
        task_ids=tasks if _tasks(sequences) else None,
        prompt_lengths=torch.tensor(prompts, dtype=torch.long),
        rows=tuple(rows),
        tokens=int(mask.sum()) if real else 0,
        slots=_slots(sequences, firsts),
        extra=extra or {},
    )


def picture_batch(
    pixels: Tensor, states: int, rows: Seq[int] = (), extra: dict[str, Tensor] | None = None, real: bool = True
) -> Batch:
    """Lay out pictures for a model that reads them itself, one row each, without tokens and without targets.

    Args:
        pixels: (S, C, H, W)
        states: states the model makes of a picture.
        real: False for the filler of a process without rows.
    """
    count, none = len(pixels), torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids=torch.zeros(count, states, dtype=torch.long),
        position_ids=torch.arange(states).expand(count, -1),
        attention_mask=torch.ones(count, states, dtype=torch.long),
        layout=None,
        source=none,
        target=none,
        sequence=none,
        sequences=count,
        last=torch.arange(1, count + 1) * states - 1,
        rows=tuple(rows),
        tokens=count * states if real else 0,
        pixels=pixels,
        extra=extra or {},
    )


def _targets(
    s: Sequence, index: int, start: int, before: int | None, source: list[int], target: list[int], owner: list[int]
) -> None:
    for i, (token, trained) in enumerate(zip(s.ids, s.trained, strict=True)):
        previous = start + i - 1 if i else before
        if not trained or previous is None:
            continue
        source.append(previous)
        target.append(token)
        owner.append(index)


def row_key(*parts: list[int]) -> int:
    """Return a 64-bit digest of token ids; hashes of integer tuples are the same in every process."""
    return hash(tuple(tuple(p) for p in parts))
