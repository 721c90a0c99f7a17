"""The documents of a batch, whatever its layout: their tokens, and which of their tokens are targets."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from llmrecipe.data.collate import Batch, Sequence, pad


@dataclass
class BatchText:
    """One sequence with everything before it."""

    ids: list[int]
    prompt: int
    """Leading tokens that belong to the prompt."""
    task: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)
    """(index of a target in the batch, position of the token that predicts it)."""
    segments: list[int] | None = None
    """Segment of each token (0 or 1), where the batch says it."""
    examples: dict[str, Tensor] = field(default_factory=dict)
    """What the batch's adapters are made from, where a hypermodel makes them (see `Batch.context`)."""

    def batch(self, pad_id: int) -> Batch:
        """Return a batch of this document alone, under the adapter it has in its own batch."""
        return pad([self.sequence()], pad_id, extra=dict(self.examples))

    def sequence(self) -> Sequence:
        """Return the document by itself; of its targets those that are next tokens are trained."""
        trained = [0] * len(self.ids)
        for _, position in self.places:
            if position + 1 < len(self.ids):
                trained[position + 1] = 1
        return Sequence(self.ids, trained, prompt=self.prompt, task=self.task)


def documents_of(batch: Batch) -> list[BatchText]:
    """Return the documents of a batch; a shared prompt stands at the beginning of each document that continues it."""
    found = _packed(batch) if batch.layout is not None else _padded(batch)
    given: dict[str, Tensor] = {n: batch.extra[n] for n in ("example_ids", "example_mask") if n in batch.extra}
    for document in found:
        document.examples = given
    return [document for document in found if document.places]


def _packed(batch: Batch) -> list[BatchText]:
    assert batch.layout is not None, "padded rows have none"
    segments, ids = batch.layout.segments, batch.input_ids[0].tolist()
    kinds = segment_rows(batch)
    tasks = None if batch.task_ids is None else batch.task_ids[0].tolist()
    found = []
    for segment in segments:
        own = ids[segment.start : segment.start + segment.length]
        parent = None if segment.parent is None else segments[segment.parent]
        before = [] if parent is None else ids[parent.start : parent.start + parent.length]
        text = BatchText([*before, *own], len(before) + segment.prompt, tasks[segment.start] if tasks else 0)
        if kinds is not None and parent is None:
            text.segments = kinds[0][segment.start : segment.start + segment.length]
        found.append(text)
    sources, owners = batch.source.tolist(), batch.sequence.tolist()
    for index, (column, owner) in enumerate(zip(sources, owners, strict=True)):
        segment = segments[owner]
        parent = None if segment.parent is None else segments[segment.parent]
        if segment.start <= column < segment.start + segment.length:
            position = column - segment.start + (0 if parent is None else parent.length)
        else:
            assert parent is not None, "only a continued prompt is read from outside"
            position = column - parent.start
        found[owner].places.append((index, position))
    return found


def _padded(batch: Batch) -> list[BatchText]:
    assert batch.attention_mask is not None, "packed rows have none"
    rows, width = batch.input_ids.tolist(), batch.input_ids.shape[1]
    firsts = batch.attention_mask.argmax(1).tolist()
    lengths = batch.attention_mask.sum(1).tolist()
    prompts = [0] * len(rows) if batch.prompt_lengths is None else batch.prompt_lengths.tolist()
    tasks = [0] * len(rows) if batch.task_ids is None else batch.task_ids[:, 0].tolist()
    kinds = segment_rows(batch)
    found = [
        BatchText(row[first : first + length], prompt, task)
        for row, first, length, prompt, task in zip(rows, firsts, lengths, prompts, tasks, strict=True)
    ]
    if kinds is not None:
        for number, text in enumerate(found):
            text.segments = kinds[number][firsts[number] : firsts[number] + lengths[number]]
    for index, flat in enumerate(batch.source.tolist()):
        row, column = divmod(flat, width)
        found[row].places.append((index, column - firsts[row]))
    return found


def segment_rows(batch: Batch) -> list[list[int]] | None:
    """Return the segment of each token of each row of a batch (`token_type_ids`), or None where it has none."""
    return batch.extra["token_type_ids"].tolist() if "token_type_ids" in batch.extra else None
