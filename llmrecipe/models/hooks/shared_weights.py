"""Replaced tensors that the micro-batches of an optimizer step share.

Where W' of a weight hook depends on trained tensors alone, it is the same in every micro-batch of a step and formed once. All
micro-batches but the last compute with W' cut off from its graph, and their dL/dW' are summed; the sum goes back through the
graph once, and the last micro-batch computes with W' itself. Processes that average gradients in the last micro-batch therefore
meet every trained tensor there, as without sharing.

Until the last micro-batch this takes W' and the sum, in float32 or wider, in place of the gradients of what W' is formed of,
which do not exist yet; in the last one W'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llmrecipe.models.hooks.hook import all_hooks


@dataclass
class _Formed:
    """One W' of the step."""

    value: Tensor
    """W', with its graph."""
    gradient: Tensor | None = None
    """Sum of dL/dW' over the micro-batches that have ended."""

    def copy(self) -> Tensor:
        """Return W' without its graph, as a leaf whose gradient is added to the sum."""
        leaf = self.value.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(self._add)
        return leaf

    def _add(self, leaf: Tensor) -> None:
        # As precise as the gradients of float32 master weights, which micro-batches are summed in otherwise.
        found = leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32))  # type: ignore[union-attr]
        leaf.grad = None
        self.gradient = found if self.gradient is None else self.gradient.add_(found)


class SharedWeights:
    """Every W' of one step, from its first micro-batch to its last."""

    def __init__(self, micros: int):
        self.left = micros
        self.formed: dict[Hashable, _Formed] = {}

    def of(self, key: Hashable, form: Callable[[], Tensor]) -> Tensor:
        """Return W' for one call.

        Args:
            key: what W' belongs to: users of one tensor have the same.
            form: forms W'.
        """
        if key not in self.formed:
            # Activation checkpointing, which may be running, recomputes nothing of this: its graph outlives the block.
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                self.formed[key] = _Formed(form())
        formed = self.formed[key]
        return formed.value if self.left == 1 or not formed.value.requires_grad else formed.copy()

    def finish_micro(self) -> None:
        """Finish a micro-batch after its backward pass; before the last one, the sums go back through the graphs."""
        self.left -= 1
        if self.left != 1:
            return
        for formed in self.formed.values():
            if formed.gradient is not None:
                # Rounded once, as the gradient of one micro-batch is: W' has the dtype that its host computes in.
                formed.value.backward(formed.gradient.to(formed.value.dtype), retain_graph=True)
                formed.gradient = None


@contextlib.contextmanager
def shared_weights(model: nn.Module, micros: int) -> Iterator[Callable[[], None]]:
    """Share, inside the context, what hooks form `once_a_step`; yield what to call after each backward pass.

    Args:
        micros: how many micro-batches will be computed inside.
    """
    shared = SharedWeights(micros)
    hooks = [hook for _, _, _, hook in all_hooks(model) if hook.once_a_step] if micros > 1 else []
    try:
        for hook in hooks:
            hook.sharing = shared.of
        yield shared.finish_micro
    finally:
        for hook in hooks:
            hook.sharing = None
