"""Continuous batching: a fixed number of answers is decoded at once, and a row whose answer has ended is replaced by a prompt.

Letters: R rows, C columns of the cache, V vocabulary.

    prefill   waiting prompts, padded on the left, in one pass; answers to the same prompt share its row of that pass
    join      their keys and values are appended to the batch's cache, the narrower of the two widened with dead columns
    decode    one token for every row
    leave     rows that have ended leave the cache, and leading columns that are dead in every row are cut off

All rows end at column C, so a row that begins at column s has position C - s next and sees the columns from s on. Every row of
a decoding pass gives a token that is needed; in a padded batch rows go on until the longest answer has ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.engine.answer_ends import AnswerEnds
from llmrecipe.engine.sampling import NextTokens, Sampling
from llmrecipe.models import kv_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.kv_cache import RowCache
    from llmrecipe.models.pretrained import LanguageModel

FREE = 4
"""Batch size over free rows at which prompts are taken in: a pass over one prompt costs as much time as a step of the batch."""


@dataclass(frozen=True)
class PendingPrompt:
    """A prompt that waits for its answer."""

    index: int
    ids: tuple[int, ...]
    task: int | None


@dataclass
class DecodingRow:
    """One answer that is being decoded."""

    request: PendingPrompt
    start: int
    """Column of its first token."""
    new: list[int] = field(default_factory=list)
    place: int = 0
    """Which row of a batch of fixed shape it is."""


def decode_continuously(batch: RunningBatch, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
    """Yield (place, new token ids) of each answer as it ends.

    Args:
        batch: the running batch, still empty.
        requests: prompts in the order in which they are taken in; those that are alike share a pass when they stand together.
    """
    size = batch.sampling.batch
    waiting = list(reversed(requests))
    while waiting or batch.rows:
        free = size - len(batch.rows)
        if waiting and (not batch.rows or free * FREE >= size):
            yield from batch.admit([waiting.pop() for _ in range(min(free, len(waiting)))])
        else:
            yield from batch.step()


class RunningBatch:
    """The rows that are being decoded and their cache.

    Args:
        ends: decides where answers end.
    """

    cache: RowCache
    """Keys and values of the rows; there from the first admission on."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        picker: NextTokens,
        ends: AnswerEnds,
        context: Context,
    ):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.picker, self.ends, self.context = picker, ends, context
        self.device = next(model.parameters()).device
        takes = inspect.signature(model.forward).parameters
        self.reads_positions = "position_ids" in takes
        self.cache_name = kv_cache.cache_name(model.prepare_inputs_for_generation)
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.rows: list[DecodingRow] = []
        self.columns = 0

    def admit(self, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
        """Run waiting prompts through the model and add their rows; yield answers that end with their first token."""
        different = list(dict.fromkeys((a.ids, a.task) for a in requests))
        ids, own = open_prompts(self.model, self.tokenizer, [PendingPrompt(0, *each) for each in different], self.context)
        cache, width = kv_cache.fresh(self.model), ids.shape[1]
        assert cache is not None, "the model's cache has rows that can leave and join"
        logits = self._forward(ids, cache, [width - len(prompt) for prompt, _ in different], own, first=True)
        copies = torch.tensor([different.index((a.ids, a.task)) for a in requests], device=self.device)
        if len(different) < len(requests):
            kv_cache.keep_rows(cache, copies)
        rows = [DecodingRow(a, width - len(a.ids)) for a in requests]
        tokens = self._picked(logits[copies], rows)
        ended = self._append(rows, tokens)
        going = [i for i, row in enumerate(rows) if not ended[i]]
        yield from ((rows[i].request.index, rows[i].new) for i in range(len(rows)) if ended[i])
        if len(going) < len(rows):
            kv_cache.keep_rows(cache, torch.tensor(going, dtype=torch.long, device=self.device))
        if going:
            self._join([rows[i] for i in going], cache, width)

    def _join(self, rows: list[DecodingRow], cache: RowCache, width: int) -> None:
        if self.rows:
            wide = max(width, self.columns)
            for group, own in ((self.rows, self.columns), (rows, width)):
                for row in group:
                    row.start += wide - own
            kv_cache.join(self.cache, cache)
            self.rows, self.columns = [*self.rows, *rows], wide
        else:
            self.rows, self.cache, self.columns = rows, cache, width
        self._trim()

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """Decode one token for every row and yield the answers that end with it."""
        ids = torch.tensor([[row.new[-1]] for row in self.rows], device=self.device)
        self.columns += 1
        own = self.context_of(self.rows, self.columns)
        logits = self._forward(ids, self.cache, [row.start for row in self.rows], own, first=False)
        ended = self._append(self.rows, self._picked(logits, self.rows))
        going = [i for i, over in enumerate(ended) if not over]
        left = [row for row, over in zip(self.rows, ended, strict=True) if over]
        self.rows = [self.rows[i] for i in going]
        if left and going:
            kv_cache.keep_rows(self.cache, torch.tensor(going, device=self.device))
            self._trim()
        yield from ((row.request.index, row.new) for row in left)

    def _trim(self) -> None:
        dead = min(row.start for row in self.rows)
        if dead:
            kv_cache.drop_columns(self.cache, dead)
            self.columns -= dead
            for row in self.rows:
                row.start -= dead

    def _forward(self, ids: Tensor, cache: RowCache, starts: list[int], own: Context, first: bool) -> Tensor:
        """Return logits (R, V) at the last column."""
        inputs: dict[str, Any] = {self.cache_name: cache, "use_cache": True, **self.last_only}
        mask = own.attention_mask
        assert mask is not None, "rows of one batch are padded"
        if self.reads_positions:
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs["position_ids"] = places + getattr(self.model, "position_offset", 0)
        # As in Transformers' own loop: without padding there is no mask, which leaves the faster kernels open.
        inputs["attention_mask"] = mask if any(starts) else None
        with activate(own):
            ready = self.model.prepare_inputs_for_generation(
                ids, next_sequence_length=ids.shape[1], is_first_iteration=first, **inputs
            )
            return self.model(**ready, return_dict=True).logits[:, -1]

    def _picked(self, logits: Tensor, rows: Sequence[DecodingRow]) -> list[int]:
        answers, at = [row.request.index for row in rows], [len(row.new) for row in rows]
        return self.picker.pick(logits, answers, at).tolist()

    def _append(self, rows: Sequence[DecodingRow], tokens: Sequence[int]) -> list[bool]:
        """Append each row's token and return whether its answer ends with it."""
        for row, token in zip(rows, tokens, strict=True):
            row.new.append(token)
        return [self.ends.reached(row.new) for row in rows]

    def context_of(self, rows: Sequence[DecodingRow], columns: int) -> Context:
        """Return the context of a pass over the rows' newest tokens."""
        starts = torch.tensor([row.start for row in rows], device=self.device)
        mask = (torch.arange(columns, device=self.device) >= starts[:, None]).long()
        return _context(self.context, mask, [row.request for row in rows])


def open_prompts(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[PendingPrompt], context: Context
) -> tuple[Tensor, Context]:
    """Return padded ids (R, T) of prompts and the context of the pass over them."""
    ids, mask = padded(model, [a.ids for a in requests], pad_token(tokenizer), next(model.parameters()).device)
    return ids, _context(context, mask, requests)


def _context(context: Context, mask: Tensor, requests: Sequence[PendingPrompt]) -> Context:
    lengths = torch.tensor([len(a.ids) for a in requests], device=mask.device)
    tasks = None if requests[0].task is None else torch.tensor([[a.task] for a in requests], device=mask.device)
    return replace(context, attention_mask=mask, prompt_lengths=lengths, task_ids=tasks)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills the rows of a batch; it is never read."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def padded(
    model: LanguageModel, prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (R, T), padded on the left, or on the right where an encoder counts positions."""
    width = max(len(p) for p in prompts)
    right = getattr(model.config, "is_encoder_decoder", False)

    def filled(row: Sequence[int], value: int) -> list[int]:
        rest = [value] * (width - len(row))
        return [*row, *rest] if right else [*rest, *row]

    ids = torch.tensor([filled(p, pad) for p in prompts], device=device)
    mask = torch.tensor([filled([1] * len(p), 0) for p in prompts], device=device)
    return ids, mask
