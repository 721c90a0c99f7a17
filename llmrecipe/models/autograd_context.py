"""What an autograd function receives as `ctx`; a function that keeps more on it extends the protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class AutogradContext(Protocol):
    """The context of one call, from its forward to its backward pass."""

    saved_tensors: tuple[Any, ...]
    """What `save_for_backward` was given: tensors, and None where one is missing."""
    needs_input_grad: tuple[bool, ...]
    """Whether each argument of the forward pass needs a gradient."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Say which results have no gradient."""
