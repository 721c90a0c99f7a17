"""Refusals of stacks that cannot be, or that do not fit a model."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, RecipeError, UserError
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.idle_embedding import idle_embedding
from llmrecipe.models.vocabulary import reads_images
from llmrecipe.recipe.stack_rules import Declared, refusals


def refuse_modality(model: nn.Module, wrapper: Wrapper) -> None:
    """Refuse a wrapper that is made for what this model does not read.

    Raises:
        ModelError: naming both, and what to use instead.
    """
    reads = "images" if reads_images(model) else "text"
    if wrapper.modality and wrapper.modality != reads:
        kind = registry.name_of(type(wrapper))
        raise ModelError(
            f"stack.{wrapper.name}: {kind} is for models that read {wrapper.modality}, and this one reads {reads}; "
            f"{wrapper.otherwise}"
        )


def refuse_idle(model: nn.Module, name: str) -> None:
    """Refuse hooks at an embedding that only lends its weight: they would be saved as learned and do nothing."""
    idle = idle_embedding(model)
    path = next((path for path, module, _, _ in all_hooks(model, name) if module is idle), None)
    if path is not None:
        raise ModelError(
            f"stack.{name}: {path} only lends its weight to the embeddings of encoder and decoder and is never called, so that "
            f"what is added to it would do nothing; leave embed out of stack.{name}.target, or train entries of the weight "
            "itself with a method such as fishmask"
        )


@contextlib.contextmanager
def named_in_errors(wrapper: Wrapper) -> Iterator[None]:
    """Prefix errors of a wrapper with its entry of the stack."""
    try:
        yield
    except UserError as error:
        if f"stack.{wrapper.name}" in str(error):
            raise
        raise type(error)(f"stack.{wrapper.name}: {error}") from error


def check_legal(wrappers: list[Wrapper]) -> None:
    """Refuse impossible stacks, naming both sides and the reason.

    Raises:
        RecipeError: a reused name, what `stack_rules` forbids, or what options of a wrapper forbid.
    """
    names = Counter(w.name for w in wrappers)
    for name, count in names.items():
        if count > 1:
            raise RecipeError(f"stack: two wrappers are called '{name}'")
    for refusal in refusals([Declared.of_wrapper(w) for w in wrappers]):
        raise RecipeError(f"stack.{refusal.name}: {refusal.text}")
    for wrapper in wrappers:
        with named_in_errors(wrapper):
            wrapper.check_stack(wrappers)
