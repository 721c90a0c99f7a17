"""The ways to decode answers, and which of them are right on the model at hand.

    continuous   rows leave and join a running batch (see `engine.continuous_batching`)
    static       the same with tensors of fixed shape, of which a row is overwritten (see `engine.static_batch`)
    graphs       the same, each step replayed as one CUDA graph (see `engine.captured_step`)
    padded       batches padded on the left, by the model's own `generate`
    equal        batches of prompts of equal length, by the model's own `generate`
    uncached     one prompt at a time, every token from a pass over everything before it

The device profile chooses among the first three (`runtime.decoding`); where its choice is not right on a model, `continuous`
and those below it follow.

The last is right for every model that can read a text, and slow. A state that reads the padding, positions counted from the
first column, and a cache that is not kept make the others wrong without a word, so each is tried on a few made-up prompts: the
scores of three tokens must be those of the uncached way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList

from llmrecipe.core.console import say_progress
from llmrecipe.core.device_profile import profile_of
from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import reason_of
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.engine.answer_ends import AnswerEnds, StopRows
from llmrecipe.engine.captured_step import captured
from llmrecipe.engine.continuous_batching import PendingPrompt, RunningBatch, decode_continuously, open_prompts, pad_token
from llmrecipe.engine.row_reading import in_full_precision
from llmrecipe.engine.sampling import NextTokens, PickerProcessor, Sampling
from llmrecipe.engine.static_batch import Compute, StaticBatch
from llmrecipe.models import kv_cache
from llmrecipe.models.random_state import random_state_kept
from llmrecipe.models.vocabulary import input_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel

FINE, COARSE = 1e-3, 0.25
"""Largest root mean square of a difference of scores that is rounding, over that of the scores: in float32; in lower precision
or of quantized weights, where a choice of experts may tip over."""
LENGTHS = (3, 7, 5)
"""Tokens of the prompts that are tried."""
NEW = 3
"""Tokens that follow them."""


@dataclass(frozen=True)
class Decoding:
    """What a decoder works with."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    picker: NextTokens
    ends: AnswerEnds
    """Decides where answers end."""
    context: Context
    """Of the forward passes; masks and tasks are filled in."""
    trial: bool = False
    """Whether it is found out here if a way is right."""


Scores = dict[tuple[int, int], Tensor]
"""Scores (V,) by (answer, number of its tokens before)."""
Decoder = Callable[[Decoding, Sequence[PendingPrompt]], Iterator[tuple[int, list[int]]]]
"""Yields (index, new token ids) of each answer as it ends."""


def continuous(job: Decoding, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
    """Decode a fixed number of answers at once, replacing those that have ended."""
    batch = RunningBatch(job.model, job.tokenizer, job.sampling, job.picker, job.ends, job.context)
    yield from decode_continuously(batch, requests)


def static(job: Decoding, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
    """Decode as `continuous` does, in tensors of fixed shape."""
    yield from decode_continuously(_static_batch(job, requests), requests)


def graphs(job: Decoding, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
    """Decode as `static` does, replaying each step as a CUDA graph.

    Raises:
        ModelError: a key names this way, and a step cannot be captured; else answers go on without.
    """

    def capture(compute: Compute) -> Compute:
        try:
            return captured(compute, next(job.model.parameters()).device)
        except Exception as error:  # CUDA and hooks raise whatever they do
            if job.trial:
                raise
            _passed_over(job.model, "graphs", f"a step cannot be captured: {reason_of(error)}", error)
            return compute

    yield from decode_continuously(_static_batch(job, requests, capture), requests)


def _static_batch(
    job: Decoding, requests: Sequence[PendingPrompt], capture: Callable[[Compute], Compute] | None = None
) -> StaticBatch:
    return StaticBatch(job.model, job.tokenizer, job.sampling, job.picker, job.ends, job.context, requests, capture)


def left_padded(job: Decoding, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
    """Decode padded batches with the model's own `generate`."""
    for first in range(0, len(requests), job.sampling.batch):
        part = requests[first : first + job.sampling.batch]
        yield from zip([a.index for a in part], _batch(job, part), strict=True)


def equal(job: Decoding, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
    """Decode batches of prompts of equal length with the model's own `generate`; prompts of one length stand together."""
    # Processes that share the weights make the same passes whatever the lengths of their prompts are.
    size = 1 if kv_cache.sharded(job.model) else job.sampling.batch
    for _, alike in groupby(requests, key=lambda a: len(a.ids)):
        yield from left_padded(replace(job, sampling=replace(job.sampling, batch=size)), list(alike))


def uncached(job: Decoding, requests: Sequence[PendingPrompt]) -> Iterator[tuple[int, list[int]]]:
    """Decode one prompt at a time, each token from a pass over the whole text."""
    model: Any = job.model
    pair = bool(getattr(model.config, "is_encoder_decoder", False))
    plain = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for request in requests:
        new: list[int] = []
        while not (new and job.ends.reached(new)):
            read = request if pair else replace(request, ids=(*request.ids, *new))
            ids, own = open_prompts(model, job.tokenizer, [read], job.context)
            own = replace(own, prompt_lengths=torch.tensor([len(request.ids)], device=ids.device))
            more = {"decoder_input_ids": torch.tensor([[decoder_start(model), *new]], device=ids.device)} if pair else {}
            with activate(own):
                logits = model(input_ids=ids, attention_mask=own.attention_mask, **more, **plain).logits
            new.append(int(job.picker.pick(logits[:, -1], [request.index], [len(new)])[0]))
        yield request.index, new


WAYS: dict[str, Decoder] = {
    "graphs": graphs,
    "static": static,
    "continuous": continuous,
    "padded": left_padded,
    "equal": equal,
}
_reports: WeakKeyDictionary[nn.Module, Callable[[str], None]] = WeakKeyDictionary()
FIXED = ("graphs", "static")
"""Ways that are tried only where the device profile chooses them."""


def report_decoding(model: nn.Module, report: Callable[[str], None]) -> None:
    """Have a model's decoders report what they fall back from, as a run does in its events; else it is a line of progress."""
    _reports[model] = report


def decoder_of(job: Decoding, task: int | None) -> Decoder:
    """Return the first decoder that is right on the model; each is tried once and the result kept with the model.

    Args:
        task: a task to try it under, where the model keeps tasks apart.

    Raises:
        ModelError: the model cannot be run on a text, a key names a way that is not right, or nothing but the slow way is right
            and its weights are sharded.
    """
    model: Any = job.model
    tried: dict[str, bool] = model.__dict__.setdefault("decoders_tried", {})
    wanted: Scores | Exception | None = None
    chosen = profile_of(next(model.parameters()).device).decoding
    for name in [chosen, *(other for other in WAYS if other not in (chosen, *FIXED))]:
        if why := _lacking(model, name):
            _passed_over(model, name, why)
            continue
        if name not in tried:
            wanted = _scores(uncached, job, task) if wanted is None else wanted
            found = _scores(WAYS[name], job, task)
            tried[name] = _right(model, found, wanted)
            if isinstance(found, Exception):
                _passed_over(model, name, reason_of(found), found)
        if tried[name]:
            return WAYS[name]
        _passed_over(model, name, "its scores are not those without a cache")
    if "uncached" not in tried:
        wanted = _scores(uncached, job, task) if wanted is None else wanted
        family = model.config.model_type
        if isinstance(wanted, Exception):
            raise ModelError(
                f"model.path: '{family}' cannot be run on a few probe tokens, so nothing is generated: {reason_of(wanted)}"
            ) from wanted
        if kv_cache.sharded(model):
            raise ModelError(
                f"model.path: '{family}' generates only without a cache, and sharded weights need the same passes in every "
                "process; use runtime.shard=none"
            )
        say_progress(f"'{family}' has no cache that can be used: every new token takes a pass over the whole text")
        tried["uncached"] = True
    return uncached


def _lacking(model: LanguageModel, name: str) -> str | None:
    """Return why a way cannot be tried on a model; None where it can."""
    device = next(model.parameters()).device.type
    if name == "graphs" and device != "cuda":
        return f"it needs a CUDA GPU, and the device is {device}"
    if name in FIXED and not kv_cache.fixable(model):
        return "the model has no cache of fixed shape"
    if name == "continuous":
        return "the cache has no rows that can leave and join" if kv_cache.fresh(model) is None else None
    return None if name in FIXED or model.can_generate() else "the model cannot generate"


def _passed_over(model: LanguageModel, name: str, why: str, error: Exception | None = None) -> None:
    """Report that a way is not taken on a model, where the device profile chose it among those of fixed shape.

    Raises:
        ModelError: a key names it.
    """
    profile = profile_of(next(model.parameters()).device)
    if name != profile.decoding or (name == "continuous" and "decoding" not in profile.chosen):
        return
    text = f"runtime.decoding: '{model.config.model_type}' is not decoded by {name}: {why}"
    if "decoding" in profile.chosen:
        raise ModelError(f"{text}; use auto") from error
    said: set[str] = model.__dict__.setdefault("decoders_passed_over", set())
    if name not in said:
        said.add(name)
        _reports.get(model, say_progress)(f"{text}; it is decoded in another way")


def _scores(way: Decoder, job: Decoding, task: int | None) -> Scores | Exception:
    """Return the scores of made-up prompts whose answers are given, or what went wrong."""
    embedding = input_embedding(job.model)
    rows = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 2
    picker = _GivenTokens(rows)
    sampling = Sampling(NEW, batch=2)
    trial = replace(job, sampling=sampling, picker=picker, ends=AnswerEnds(job.tokenizer, (), sampling), trial=True)
    order = sorted(range(len(LENGTHS)), key=lambda i: -LENGTHS[i])
    prompts = [PendingPrompt(i, tuple((5 * i + k + 3) % rows for k in range(LENGTHS[i])), task) for i in order]
    device = next(job.model.parameters()).device
    try:
        with random_state_kept(device):
            for _ in way(trial, prompts):
                pass
    except Exception as error:  # families raise whatever their own code leads to; whether it matters the caller knows
        return error
    return picker.scores


def _right(model: nn.Module, found: Scores | Exception, wanted: Scores | Exception) -> bool:
    """Return whether a way to decode gives the scores that are wanted but for rounding; any will do where none are known."""
    if isinstance(found, Exception) or isinstance(wanted, Exception):
        return not isinstance(found, Exception)
    if found.keys() != wanted.keys():
        return False
    exact = in_full_precision(model)
    for key, right in wanted.items():
        centred = right - right.mean()
        apart = (found[key] - found[key].mean()) - centred
        if not apart.square().mean().sqrt() <= (FINE if exact else COARSE) * centred.square().mean().sqrt().clamp_min(1e-6):
            return False
    return True


class _GivenTokens:
    """Picks the same tokens whatever the scores are, and keeps the scores."""

    greedy = False

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        self.scores: Scores = {}

    def pick(self, logits: Tensor, answers: Sequence[int], at: Sequence[int]) -> Tensor:
        """Return the given token of each row, (R,), and keep its scores (R, V)."""
        for row, answer, place in zip(logits.detach().float().cpu(), answers, at, strict=True):
            self.scores[answer, place] = row
        given = [(7 * answer + 11 * place + 4) % self.vocabulary for answer, place in zip(answers, at, strict=True)]
        return torch.tensor(given, device=logits.device)


def decoder_start(model: LanguageModel) -> int:
    """Return the token that an encoder-decoder's answer starts with."""
    return int(getattr(model.config, "decoder_start_token_id", None) or 0)


def _batch(job: Decoding, requests: Sequence[PendingPrompt]) -> list[list[int]]:
    """Decode one padded batch with the model's own `generate`, which runs until the longest answer ends."""
    model, tokenizer = job.model, job.tokenizer
    ids, own = open_prompts(model, tokenizer, requests, job.context)
    config = GenerationConfig(
        max_new_tokens=job.sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(job.ends.tokens) or None,
        pad_token_id=pad_token(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    picker = job.picker
    more: dict[str, Any] = {} if picker.greedy else {"logits_processor": [PickerProcessor(picker, [a.index for a in requests])]}
    if kv_cache.sharded(model):
        more["synced_gpus"] = True
    start = 1 if getattr(model.config, "is_encoder_decoder", False) else ids.shape[1]
    stops = StopRows(job.ends, start)
    if job.ends.stops:
        more["stopping_criteria"] = StoppingCriteriaList([stops])
    # Transformers fills what a config leaves open from the checkpoint's own settings (top_p, penalties, banned words).
    kept = getattr(model, "generation_config", None)
    try:
        model.generation_config = GenerationConfig()
        with activate(own):
            out = model.generate(input_ids=ids, attention_mask=own.attention_mask, generation_config=config, **more)
    finally:
        model.generation_config = kept
    return [_cut(row[: stops.lengths.get(i)], job.ends.tokens) for i, row in enumerate(out[:, start:].tolist())]


def _cut(ids: list[int], ends: Collection[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids
