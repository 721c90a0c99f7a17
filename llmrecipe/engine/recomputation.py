"""Activations are recomputed where dropout is off, too."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

T = TypeVar("T")
BLOCKS = "checkpointing_blocks"
"""Attribute of a model: its blocks that can recompute, as last found."""


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Have the blocks of a model in eval mode recompute activations in a pass with gradients, where checkpointing is on.

    Transformers recomputes in training mode alone, which objectives without dropout leave. A block is in training mode when it
    is called and in eval mode while it computes, in the first pass and in the recomputation.
    """
    blocks = [] if model.training or not torch.is_grad_enabled() else _checkpointed(model)
    functions = [block._gradient_checkpointing_func for block in blocks]
    for block, function in zip(blocks, functions, strict=True):
        block.training = True
        block._gradient_checkpointing_func = functools.partial(_in_eval_mode, block, function)
    try:
        yield
    finally:
        for block, function in zip(blocks, functions, strict=True):
            block.training = False
            block._gradient_checkpointing_func = function


def forget_blocks(model: nn.Module) -> None:
    """Have the next pass look for the blocks of a model again: its modules may be others."""
    model.__dict__.pop(BLOCKS, None)


def _checkpointed(model: nn.Module) -> list[Any]:
    blocks = model.__dict__.get(BLOCKS)
    if blocks is None:
        # A walk over all modules takes longer than a small pass should notice, and they are the same at every step.
        blocks = model.__dict__[BLOCKS] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [block for block in blocks if block.gradient_checkpointing and not block.training]


def _in_eval_mode(block: nn.Module, checkpoint: Callable[..., T], compute: Callable[..., T], *args: object) -> T:
    def computed(*args: object) -> T:
        was, block.training = block.training, False
        try:
            return compute(*args)
        finally:
            block.training = was

    return checkpoint(computed, *args)
