"""A running batch of fixed shape: a decoding step reads and writes tensors that keep their shapes and their places.

Letters: R rows, C columns of the text, V vocabulary.

    prefill   as in `continuous_batching`: waiting prompts in a pass of their own, of whatever shape they have
    put       their keys and values overwrite rows whose answers have ended
    decode    one token for every row, wanted or not, over C columns of which the dead ones are masked
    move      when column C has been written, all rows move to the left by the columns that are dead in every row

R is the number of answers decoded at once, C the longest prompt and answer, rounded up, with columns to move in. Rows that have
no answer see their own token alone, so that nothing of them is undefined.

As shapes and addresses stay, a step can be captured as a CUDA graph (`engine.captured_step`) and replayed: on a GPU most of a
step is the time in which Python starts its kernels. It is captured for each call of `generate`, because what hooks decide
in Python, such as whether an adapter is on, may differ in the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.engine.answer_ends import AnswerEnds
from llmrecipe.engine.continuous_batching import DecodingRow, PendingPrompt, RunningBatch
from llmrecipe.engine.sampling import NextTokens, Sampling
from llmrecipe.models.kv_cache import FixedCache, RowCache, cache_name, columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel

BUCKET = 64
"""C is a multiple of it."""
INPUTS = ("ids", "starts", "live", "lengths", "tasks")
"""What a step reads for each row: newest token, first column, whether it has an answer, prompt tokens, task."""

Compute = Callable[[], Tensor]


def columns_for(requests: Sequence[PendingPrompt], new: int, rows: int) -> int:
    """Return C for prompts and the most new tokens of an answer.

    Rows that take turns begin later and later; with `BUCKET` columns to spare they move once in as many steps or more.

    Examples:
        >>> prompts = [PendingPrompt(0, (5,) * 30, None), PendingPrompt(1, (5,) * 100, None)]
        >>> columns_for(prompts, 20, 2), columns_for(prompts, 20, 1)
        (128, 192)
    """
    longest = max(len(request.ids) for request in requests) + new
    return (-(-longest // BUCKET) + (len(requests) > rows)) * BUCKET


class StaticBatch(RunningBatch):
    """The rows that are being decoded and their cache, all of fixed shape.

    Args:
        requests: all that will be decoded; they fix the shapes.
        capture: makes of the computation of a step what is called instead; None calls it as it is.
    """

    cache: FixedCache  # type: ignore[assignment]
    """Keys and values of the rows; there from the first admission on."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        picker: NextTokens,
        ends: AnswerEnds,
        context: Context,
        requests: Sequence[PendingPrompt],
        capture: Callable[[Compute], Compute] | None = None,
    ):
        super().__init__(model, tokenizer, sampling, picker, ends, context)
        self.size = min(sampling.batch, len(requests))
        self.capacity = columns_for(requests, sampling.max_new_tokens, self.size)
        self.compute: Compute | None = None
        """What replays a step, once it is captured; not the step itself, as a batch that held itself would keep its cache."""
        self.capture, self.virtual, self.has_tasks = capture, 0, requests[0].task is not None
        self.inputs = torch.zeros(len(INPUTS), self.size, dtype=torch.long, device=self.device)
        self.at = torch.arange(self.capacity, device=self.device)
        self.places = self.inputs[0, :0]

    def _join(self, rows: list[DecodingRow], cache: RowCache, width: int) -> None:
        if not hasattr(self, "cache"):
            # Virtual tokens of the stack stand in the cache and in no text.
            self.virtual = columns_of(cache) - width
            self.cache = FixedCache(cache, self.size, self.capacity + self.virtual)
        if not self.rows:
            self.columns = width
            self.cache.stand_at(width + self.virtual)
        elif width > self.columns:
            self._move(width - self.columns)
        free = sorted(set(range(self.size)) - {row.place for row in self.rows})
        for row, place in zip(rows, free, strict=False):
            row.place, row.start = place, row.start + self.columns - width
        self.cache.put(torch.tensor([row.place for row in rows], device=self.device), cache)
        self.rows = [*self.rows, *rows]
        self._describe()

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """Decode one token for every row and yield the answers that end with it."""
        if self.columns == self.capacity:
            self._move(-min(row.start for row in self.rows))
        if self.capture is not None:
            made, self.capture = self.capture(self._pass), None
            self.compute = None if made == self._pass else made
        logits = (self._pass() if self.compute is None else self.compute())[self.places]
        self.columns += 1
        self.cache.advance()
        answers, at = [row.request.index for row in self.rows], [len(row.new) for row in self.rows]
        tokens = self.picker.pick(logits, answers, at)
        self.inputs[0].index_copy_(0, self.places, tokens)
        ended = self._append(self.rows, tokens.tolist())
        left = [row for row, over in zip(self.rows, ended, strict=True) if over]
        if left:
            self.rows = [row for row, over in zip(self.rows, ended, strict=True) if not over]
            self._describe()
        yield from ((row.request.index, row.new) for row in left)

    def _move(self, columns: int) -> None:
        self.columns += columns
        self.cache.move(columns)
        for row in self.rows:
            row.start += columns
        self._describe()

    def _describe(self) -> None:
        """Write what a step reads of the rows, in one transfer."""
        inputs = [[0] * self.size for _ in INPUTS]
        for row in self.rows:
            one = (row.new[-1], row.start, 1, len(row.request.ids), row.request.task or 0)
            for values, value in zip(inputs, one, strict=True):
                values[row.place] = value
        self.inputs.copy_(torch.tensor(inputs))
        self.places = torch.tensor([row.place for row in self.rows], dtype=torch.long, device=self.device)

    def _pass(self) -> Tensor:
        """Return logits (R, V) behind the newest tokens; the same when it is called again before the cache advances."""
        ids, starts, live, lengths, tasks = self.inputs.unbind()
        column = self.cache.column - self.virtual
        starts = torch.where(live.bool(), starts, column)
        mask = ((self.at >= starts[:, None]) & (self.at <= column)).long()
        own = replace(
            self.context, attention_mask=mask, prompt_lengths=lengths, task_ids=tasks[:, None] if self.has_tasks else None
        )
        taken = cache_name(self.model.forward)
        inputs: dict[str, Any] = {taken: self.cache, "use_cache": True, "attention_mask": mask, **self.last_only}
        if self.reads_positions:
            inputs["position_ids"] = (column - starts)[:, None] + getattr(self.model, "position_offset", 0)
        # Not by `prepare_inputs_for_generation`, which makes of this mask one that virtual tokens cannot widen.
        with activate(own):
            return self.model(input_ids=ids[:, None], **inputs, return_dict=True).logits[:, -1]
