"""What a hook at a stack of blocks computed once for the hooks inside it (`Context.shared`)."""

from __future__ import annotations

from typing import Any

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import current


def handed_down(owner: str) -> Any:  # noqa: ANN401 (each method hands down its own type)
    """Return what the host's hook of a wrapper handed down in this forward pass.

    Raises:
        ModelError: a module runs on its own, outside the forward pass of its stack.
    """
    shared = current().shared
    if owner not in shared:
        raise ModelError(
            f"stack.{owner}: a module runs outside the forward pass of its model. With activation checkpointing, pass "
            "context_fn=llmrecipe.core.forward_context.checkpoint_contexts, so that the replay sees the same tensors"
        )
    return shared[owner]
