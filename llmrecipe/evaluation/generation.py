"""Generation: padded batches through the model's own `generate`, under the ports of the stack.

The checkpoint's generation settings are overridden, not merged: what is not asked for is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmrecipe.context import Context, activate, current


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy; otherwise all logits are divided by it."""
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 16
    """Prompts generated at once."""
    seed: int | None = None
    """Seed of the sampling; None uses the running random state."""


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    context: Context | None = None,
    tasks: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new token ids, end token included where it was reached.

    Args:
        prompts: token ids; prompts of one batch are padded (see `padded`).
        context: of the forward passes, by default the one that is active; masks and tasks are filled in here.
        tasks: number of each prompt's task, where the model keeps tasks apart.
    """
    was_training = model.training
    model.eval()
    # Long prompts first: the largest batch comes first, and like lengths share a batch.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    try:
        with torch.random.fork_rng(enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            for first in range(0, len(order), sampling.batch):
                part = order[first : first + sampling.batch]
                own = None if tasks is None else [tasks[i] for i in part]
                new = _batch(model, tokenizer, [prompts[i] for i in part], sampling, context or current(), own)
                for i, answer in zip(part, new, strict=True):
                    answers[i] = answer
    finally:
        model.train(was_training)
    return answers


def _batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    context: Context,
    tasks: Sequence[int] | None,
) -> list[list[int]]:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    device = next(model.parameters()).device
    ids, mask = padded(model, prompts, pad, device)
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature if sampling.temperature > 0 else None,
        top_p=sampling.top_p if sampling.temperature > 0 else None,
        top_k=sampling.top_k if sampling.temperature > 0 else None,
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    lengths = mask.sum(1)
    task_ids = context.task_ids if tasks is None else torch.tensor(list(tasks), device=device)[:, None]
    from dataclasses import replace

    # Transformers fills what a config leaves open from the checkpoint's own settings (top_p, penalties, banned words).
    kept = getattr(model, "generation_config", None)
    try:
        model.generation_config = GenerationConfig()  # type: ignore[assignment]
        with activate(replace(context, attention_mask=mask, prompt_lengths=lengths, task_ids=task_ids)):
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        model.generation_config = kept  # type: ignore[assignment]
    new = out[:, 1:] if getattr(model.config, "is_encoder_decoder", False) else out[:, ids.shape[1] :]
    return [_cut(row, ends) for row in new.tolist()]


def padded(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, T) ids and mask: on the left where answers follow in the same row, on the right where an encoder counts positions."""
    width = max(len(p) for p in prompts)
    right = getattr(model.config, "is_encoder_decoder", False)

    def filled(row: Sequence[int], value: int) -> list[int]:
        rest = [value] * (width - len(row))
        return [*row, *rest] if right else [*rest, *row]

    ids = torch.tensor([filled(p, pad) for p in prompts], device=device)
    mask = torch.tensor([filled([1] * len(p), 0) for p in prompts], device=device)
    return ids, mask


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those the checkpoint's generation settings name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({int(t) for t in found if t is not None})


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decoded text without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def prompt_and_reference(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """A token row -> the ids before its last run of trained tokens, and the text of that run."""
    if "prompt_ids" in row:
        answer = row.get("chosen_ids") or row.get("completion_ids") or []
        return list(row["prompt_ids"]), text_of(tokenizer, answer)
    trained = row["trained"]
    end = len(trained) - 1
    while end >= 0 and not trained[end]:
        end -= 1
    start = end
    while start > 0 and trained[start - 1]:
        start -= 1
    return list(row["ids"][:start]), text_of(tokenizer, row["ids"][start : end + 1])
