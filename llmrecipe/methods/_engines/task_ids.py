"""Which task each token of an activation belongs to, for methods that keep tasks apart."""

from __future__ import annotations

from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import current


def task_ids_for(x: Tensor) -> Tensor | None:
    """Return the tasks (R, T | 1) of an activation (R, T, ...); None where the batch names none.

    Rows longer or shorter than the batch's (an encoder's, or one step of cached generation) take the task of their first
    token: a padded row belongs to one task.

    Raises:
        ModelError: packed rows cannot be matched to their tokens, or there are other rows than the batch has.
    """
    tasks = current().task_ids
    if tasks is None:
        return None
    if tasks.shape[1] != x.shape[1]:
        if current().layout is not None:
            raise ModelError(f"task ids of shape {tuple(tasks.shape)} do not fit packed rows of {x.shape[1]} tokens")
        tasks = tasks[:, :1]
    if x.shape[0] != tasks.shape[0]:
        raise ModelError(f"task ids of {tasks.shape[0]} rows do not fit a batch of {x.shape[0]}")
    return tasks
