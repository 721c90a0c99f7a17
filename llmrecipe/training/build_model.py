"""Building the model of a run with its stack: with its weights, or on the meta device for what is found out before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from llmrecipe.core.console import lasting
from llmrecipe.core.errors import RunError
from llmrecipe.methods._base.method import Stage
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import new_token_rows
from llmrecipe.models.chunked_ffn import chunk_feed_forward
from llmrecipe.models.load import prepare_for_training, skeleton
from llmrecipe.models.resolve_class import HEAD_MODULES, NEW_HEADS
from llmrecipe.runs import base_storage, delta, open_model
from llmrecipe.runs.checkpoint_io import saved_structures

if TYPE_CHECKING:
    from llmrecipe.models.checkpointing import Host
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import ModelSection, Recipe


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_model(
    recipe: Recipe, objective: Objective, stack: Stack, labels: list[str] | None, resume: Path | None, device: str
) -> open_model.LoadedModel:
    """Load the model of a recipe and attach its stack.

    Args:
        device: kind of the device it will train on.
        labels: class names of a classification head.
        resume: a run directory whose newest checkpoint gives the structures (ranks, masks) of the stack.
    """
    model = open_for(recipe, objective, stack, labels, device)
    objective.prepare_roles(model, base_is_frozen(stack))
    objective.prepare_model(model.model, recipe.seed)
    seed_everything(recipe.seed)
    with lasting(f"attaching {', '.join(w.name for w in stack) or 'nothing'}"):
        attach_stack(model, stack, everything_trains(stack), None if resume is None else saved_structures(resume))
    return model


def stack_for(objective: Objective, wrappers: list[Any]) -> Stack:
    """Return the stack of a training: the recipe's wrappers, and those an objective adds for its roles."""
    return Stack([*wrappers, *objective.role_wrappers(wrappers)])


def on_meta(
    recipe: Recipe,
    objective: Objective,
    stack: Stack,
    labels: list[str] | None,
    device: str,
    structures: dict[str, Any] | None = None,
    host: Host | None = None,
) -> nn.Module:
    """Build the model of a recipe on the meta device, with the stacks below it and its own attached.

    Args:
        structures: those of a stack that has made its choices.
        host: see `prepare_for_training`.

    Raises:
        UserError: the stack does not fit the model.
    """
    base, saved, _ = open_model.resolve_section(recipe.model)
    base, device = stored_as(base, stack, device)
    tokenizer = open_model.tokenizer_of(recipe.model, recipe.tokenizer)
    model = skeleton(base, rows_head=objective.model_head(), labels=labels, tokenizer=tokenizer, device=device)
    layers = [*(saved.layers if saved else []), *open_model.imported(base, model)]
    if not everything_trains(stack):
        for wrapper in base_storage.storage_below(layers, stack.wrappers):
            wrapper.attach(model)
    for index, layer in enumerate(layers):
        delta.mount_layer(model, layer, index)
    prepare_blocks(model, recipe, host)
    objective.prepare_model(model, recipe.seed)
    stack.attach(model, structures)
    return model


def open_for(
    recipe: Recipe, objective: Objective, stack: Stack, labels: list[str] | None, device: str
) -> open_model.LoadedModel:
    """Load the model of a recipe with its attention routed, its blocks optimized and earlier stacks mounted."""
    logging.disable_progress_bar()
    section, device = stored_as(recipe.model, stack, device)
    model = open_model.open_model(
        section,
        recipe.tokenizer,
        head=objective.model_head(),
        labels=labels,
        own=stack.wrappers,
        seed=recipe.seed,
        device=device,
    )
    if objective.model_head() in NEW_HEADS and recipe.model.init == "random":
        model.model.new_heads = tuple(n for n in HEAD_MODULES if hasattr(model.model, n))
    prepare_blocks(model.model, recipe)
    return model


def prepare_blocks(model: LanguageModel, recipe: Recipe, host: Host | None = None) -> None:
    """Set up what the recipe says of how blocks compute: gradient checkpointing, feed-forward layers in chunks.

    Args:
        host: see `prepare_for_training`.

    Raises:
        ModelError: the family cannot compute so.
    """
    prepare_for_training(model, recipe.model, host)
    if recipe.runtime.ffn_rows is not None:
        chunk_feed_forward(model, recipe.runtime.ffn_rows)


def stored_as(section: ModelSection, stack: Stack, device: str) -> tuple[ModelSection, str]:
    """Return the section that a model's weights are held by, and the kind of device that decides what its dtype `auto` means.

    Full training keeps float32 master weights; autocast lowers the precision of the computation.
    """
    if not (everything_trains(stack) and all(w.masters for w in stack)):
        return section, device
    if section.dtype in ("bfloat16", "float16"):
        return section.model_copy(update={"dtype": "float32"}), device
    return section, "cpu" if section.dtype == "auto" else device


def attach_stack(
    model: open_model.LoadedModel, stack: Stack, everything: bool, structures: dict[str, Any] | None = None
) -> None:
    """Attach the stack; the layer of a continued run gives its structures and initial values, also on resume."""
    if everything:
        new_token_rows.fold_token_rows(model.model)
    if everything and model.mounted:
        open_model.merge_mounted(model)
    if model.continued is None or structures not in (None, model.continued.structures):
        stack.attach(model.model, structures)
        return
    missing = sorted(set(model.continued.wrappers) ^ {w.name for w in stack})
    if missing:
        raise RunError(
            f"model.continue: the run was trained with stack [{', '.join(model.continued.wrappers)}], this recipe has "
            f"[{', '.join(w.name for w in stack)}]; use the same stack, or drop model.continue to train on top of it"
        )
    stack.attach(model.model, model.continued.structures)
    check_continued(model, stack)
    stack.restore(model.model, model.continued.tensors)


def check_continued(model: open_model.LoadedModel, stack: Stack) -> None:
    """Refuse to continue adapters of another shape or scale, naming the options that fit.

    Raises:
        RunError: tensors or scales differ from what was saved.
    """
    found = {name: tuple(value.shape) for name, value in stack.delta(model.model).items()}
    assert model.continued is not None, "only a continued run has a layer to compare with"
    saved = {name: tuple(value.shape) for name, value in model.continued.tensors.items()}
    kept = model.continued.wrappers
    off = [w for w in stack if getattr(w, "alpha", None) != kept[w.name].get("alpha", getattr(w, "alpha", None))]
    if found.items() >= saved.items() and not off:
        return
    wanted = [
        f"stack.{name}.{option}={value}"
        for name, mapping in kept.items()
        for option in ("target", "r", "alpha", "rank_pattern", "alpha_pattern")
        if (value := mapping.get(option))
    ]
    raise RunError(f"model.continue: the stack differs from the one that was trained; it had\n  {' '.join(wanted)}")


def everything_trains(stack: Stack) -> bool:
    """Return whether every weight trains: no wrapper freezes the base."""
    return not any(w.stage in (Stage.INJECT, Stage.SELECT) for w in stack)


def base_is_frozen(stack: Stack) -> bool:
    """Return whether nothing in the stack changes a weight of the base."""
    return not everything_trains(stack) and not any(w.stage is Stage.SELECT for w in stack)
