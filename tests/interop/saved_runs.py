"""Finished runs without training: a tiny base on disk, a stack with random learned tensors, `final/` as a run leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.checkpoint_path import DELTA_FILE, TINY
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import open_model
from tests.methods.kinds import probe_of
from tests.tiny import tiny_model

VOCABULARY = int(json.loads((TINY / "config.json").read_text())["vocab_size"])


def base_folder(root: Path, family: str = "llama", **more: Any) -> Path:
    """A base model with the embedded tokenizer."""
    from transformers import AutoTokenizer

    folder = root / f"base-{family}"
    model = tiny_model(family, vocab_size=VOCABULARY, **more)
    model.config._attn_implementation_internal = "sdpa"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def fill(model: nn.Module, scale: float = 0.2, seed: int = 3) -> None:
    """Random learned tensors, so that every part of a formula shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * scale


def saved_run(
    folder: Path,
    model_path: Path | str,
    *wrappers: Any,
    seed: int = 3,
    head: str = "causal",
    labels: Any = None,
    dtype: str = "auto",
    steps: int = 0,
    prepare: Callable[[nn.Module], Any] = lambda model: None,
) -> nn.Module:
    """Write a finished run of these wrappers on a base; returns its model.

    Args:
        steps: how many steps begin, for methods that choose from data or change with time; with any, data are seen before.
        prepare: what happens to the model before the stack is attached.
    """
    stack = Stack(list(wrappers))
    loaded = open_model(
        ModelSection(path=str(model_path), dtype=dtype),
        TokenizerSection(),
        head=head,
        labels=labels,
        own=stack.wrappers,
    )
    prepare(loaded.model)
    stack.attach(loaded.model)
    if steps:
        stack.calibrate(loaded.model, probe_of(loaded.model, Engine(loaded.model)))
    fill(loaded.model, seed=seed)
    for step in range(steps):
        stack.before_step(loaded.model, step)
        stack.after_step(loaded.model, step)
    own = delta.Layer(
        {w.name: delta.wrapper_mapping(w) for w in stack},
        stack.structures(loaded.model),
        DELTA_FILE,
        stack.delta(loaded.model),
    )
    layers = [delta.Layer(x.wrappers, x.structures, f"parent-{i}.safetensors", x.tensors) for i, x in enumerate(loaded.layers)]
    base = {"path": loaded.section.path, "fingerprint": loaded.base_fingerprint, "section": {"dtype": dtype}}
    delta.write_stack(folder / "final", delta.SavedStack(base, [*layers, own], head, labels))
    loaded.tokenizer.save_pretrained(folder / "final")
    return loaded.model


def hooks(model: nn.Module) -> int:
    """How many hooks a model has."""
    return sum(1 for _ in all_hooks(model))
