"""Which tokens of a pass belong to which document, for methods that summarise documents.

Letters: R rows, S segments of a packed row, T columns.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, Layout
from llmrecipe.data.transfer import to_device
from llmrecipe.models.kv_cache import prompts_of
from llmrecipe.models.module_map import anatomy


def stack_input(inputs: dict[str, Any]) -> Tensor:
    """Return the ids (R, T) or embeddings (R, T, D) a stack reads."""
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if inputs.get(name) is not None:
            return inputs[name]
    raise ModelError("the model was called without input_ids or inputs_embeds")


def host_of(model: nn.Module, side: str) -> nn.Module:
    """Return the module that turns ids into the states of one stack of blocks: the innermost one every pass goes through."""
    path = next(s.path for s in anatomy(model).sites if s.role == "block" and s.side == side)
    while path:
        path = path.rpartition(".")[0]
        host = model.get_submodule(path)
        if not isinstance(host, nn.ModuleList) and "input_ids" in inspect.signature(type(host).forward).parameters:
            break
    return host


def summarised(summary: str, context: Context, inputs: dict[str, Any]) -> Tensor:
    """Return a mask of the tokens a summary averages: (S, T) for a packed row, (R, T) for padded ones."""
    tokens = stack_input(inputs)
    if context.layout is not None:
        return _summarised_packed(summary, context.layout, tokens.device)
    rows, columns = tokens.shape[:2]
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        mask = context.attention_mask
    if mask is None or mask.shape != (rows, columns):
        mask = torch.ones(rows, columns, dtype=torch.long, device=tokens.device)
    real = mask != 0
    count = real.long().cumsum(1)
    most = count.new_ones(rows)
    if summary == "all":
        most = count[:, -1]
    elif summary == "prompt_mean":
        prompt = prompts_of(inputs, context.prompt_lengths, real)
        most = most if prompt is None else prompt.clamp(min=1)
    return real & (count <= most[:, None])


def _summarised_packed(summary: str, layout: Layout, device: torch.device) -> Tensor:
    key = ("summary", summary)
    if key not in layout.cache:
        chosen = torch.zeros(len(layout.segments), layout.columns, dtype=torch.bool)
        for index, segment in enumerate(layout.segments):
            while segment.parent is not None and summary != "all":
                segment = layout.segments[segment.parent]
            whole = segment.length if summary == "all" else 1
            count = max(1, segment.prompt) if summary == "prompt_mean" else whole
            chosen[index, segment.start : segment.start + count] = True
        layout.cache[key] = to_device(chosen, device)
    return layout.cache[key]
