"""Generation: answers to prompts, decoded with a key/value cache under the hooks of the stack.

A fixed number of answers is decoded at once, and a row whose answer has ended is replaced by the next prompt (continuous
batching). Models for which that is not right, or whose cache has no rows that could leave and join, are decoded in another way
(see `engine.decoders`). In each an answer is the same, up to the rounding of its logits, whatever else is in the batch.

The checkpoint's generation settings are overridden, not merged: without a temperature, decoding is greedy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llmrecipe.core.errors import RunError
from llmrecipe.core.forward_context import Context, current
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.continuous_batching import PendingPrompt
from llmrecipe.engine.decoders import Decoding, decoder_of, equal, left_padded
from llmrecipe.engine.sampling import Picker, Report, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel


def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    context: Context | None = None,
    tasks: Sequence[int] | None = None,
    keys: Sequence[int | str] | None = None,
) -> list[list[int]]:
    """Continue each prompt and return the new token ids, including the end token where it was reached.

    Args:
        context: of the forward passes, by default the one that is active; masks and tasks are filled in here.
        tasks: number of each prompt's task, where the model keeps tasks apart.
        keys: names of the answers' random streams, by default their places; equal keys draw equal numbers.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for i, answer in answered(model, tokenizer, prompts, sampling, context, tasks, keys):
        answers[i] = answer
    return answers


@dataclass(frozen=True)
class ScoredAnswer:
    """A generated answer with the log-probabilities that its decoder had."""

    tokens: list[int]
    """New token ids, including the end token where it was reached."""
    logprobs: Tensor
    """(n,) log softmax(logits / temperature) of each token, float32 on the CPU."""


def generate_scored(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    keys: Sequence[int | str] | None = None,
) -> list[ScoredAnswer]:
    """Sample an answer to each prompt and return it with its log-probabilities; arguments as in `generate`.

    Raises:
        ValueError: the sampling is greedy, for which Transformers' own search shows no scores.
    """
    if sampling.temperature <= 0:
        raise ValueError("scored answers are sampled at a temperature above 0")
    if not prompts:
        return []
    picker = Picker(sampling, range(len(prompts)) if keys is None else keys, record=True)
    found = {
        i: ScoredAnswer(tokens, picker.logprobs(i, len(tokens)))
        for i, tokens in _decoded(model, tokenizer, prompts, sampling, None, None, picker)
    }
    return [found[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class RecordedAnswer:
    """A generated answer with the log-probabilities its decoder had."""

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor
    """(n,), as in `ScoredAnswer`."""
    temperature: float
    task: int | None = None


_recording: list[RecordedAnswer] | None = None


@contextlib.contextmanager
def recorded_answers() -> Iterator[list[RecordedAnswer]]:
    """Collect, in the list that is yielded, every answer generated inside the context by a decoder that sees its scores."""
    global _recording
    found: list[RecordedAnswer] = []
    _recording = found
    try:
        yield found
    finally:
        _recording = None


def answered(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    context: Context | None = None,
    tasks: Sequence[int] | None = None,
    keys: Sequence[int | str] | None = None,
    report: Report | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield the answers of `generate` in the order in which they end, each with its index.

    Args:
        report: called with (index, token) as tokens are picked; in a padded batch also with those behind the end of an answer.
    """
    if not prompts:
        return iter(())
    picker = Picker(sampling, range(len(prompts)) if keys is None else keys, report, record=_recording is not None)
    return _decoded(model, tokenizer, prompts, sampling, context, tasks, picker)


@torch.no_grad()
def _decoded(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    context: Context | None,
    tasks: Sequence[int] | None,
    picker: Picker,
) -> Iterator[tuple[int, list[int]]]:
    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt]:
        raise RunError(
            f"generation: prompt {empty[0]} of {len(prompts)} has no token ({len(empty)} have none): the tokenizer and the "
            "chat template make nothing of it; give it text, or a template that renders its turns (tokenizer.chat_template)"
        )
    was_training = model.training
    model.eval()
    context = context or current()
    if tasks is None and context.task_ids is not None:
        tasks = context.task_ids[:, 0].expand(len(prompts)).tolist()
    ends = answer_ends(model, tokenizer, sampling)
    # Long prompts first: the largest batch comes first, and like lengths share a pass.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    requests = [PendingPrompt(i, tuple(prompts[i]), None if tasks is None else tasks[i]) for i in order]
    try:
        job = Decoding(model, tokenizer, sampling, picker, ends, context)
        decoder = decoder_of(job, requests[0].task)
        by_transformers = decoder is left_padded or decoder is equal
        for i, tokens in decoder(job, requests):
            if _recording is not None and not by_transformers:
                logprobs = picker.logprobs(i, len(tokens))
                task = None if tasks is None else tasks[i]
                _recording.append(RecordedAnswer(list(prompts[i]), list(tokens), logprobs, picker.temperature, task))
            yield i, tokens
    finally:
        model.train(was_training)


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode token ids without special tokens."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def prompt_and_references(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str]]:
    """Return a token row's prompt and its right answers as texts, the one that is trained first.

    The answer of a dialogue is its last trained run, the prompt what precedes it.
    """
    if "prompt_ids" in row:
        right = row["choice_ids"][: row["choice_lengths"][0]] if "choice_ids" in row else []
        answer = row.get("chosen_ids") or row.get("completion_ids") or right
        return list(row["prompt_ids"]), [decode_ids(tokenizer, answer)]
    trained = row["trained"]
    end = len(trained) - 1
    while end >= 0 and not trained[end]:
        end -= 1
    start = end
    while start > 0 and trained[start - 1]:
        start -= 1
    others = [text.strip() for text in json.loads(row.get("references", "[]"))]
    return list(row["ids"][:start]), list(dict.fromkeys([decode_ids(tokenizer, row["ids"][start : end + 1]), *others]))
