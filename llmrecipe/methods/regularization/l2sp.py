"""L2-SP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import NonNegativeFloat
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.regularization._engines.anchors import (
    AnchorMethod,
    anchored,
    place_anchors,
    quadratic,
    total,
)
from llmrecipe.models.task_heads import is_head

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class L2sp(AnchorMethod, Wrapper):
    """L2-SP: L = loss + alpha/2 ||w - w_0||^2 + beta/2 ||v||^2, full fine-tuning that is pulled back to its start.

    w are the weights of the base that train and w_0 the values they start from; v are those of a new task head, which have no
    start worth keeping and are pulled to 0. The penalty is part of the gradient, so an adaptive optimizer rescales it with the
    rest; it is added once to the mean loss of a step, whatever the number of micro-batches. Starts at the base model, and the
    result is a plain model. w_0 is kept in the dtype of the checkpoint (2 bytes a weight of a 16-bit model), is written to no
    file, and is read from the base again on resume.

    Paper: Explicit Inductive Bias for Transfer Learning with Convolutional Networks (arXiv 1802.01483). Departures: none.
    """

    stage: ClassVar[Stage] = Stage.ANCHOR
    mergeable: ClassVar[bool] = True
    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "it compares whole weights with where they started, and each process holds a part of them"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("penalty",)
    needs_base: ClassVar[str] = "pulls the weights of the base back to where they started"

    alpha: NonNegativeFloat = 0.1
    """Strength at the weights of the base."""
    beta: NonNegativeFloat = 0.01
    """Strength at a new task head."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Copy the weights of the base."""
        place_anchors(model, self.name, factors=False)

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Return alpha/2 ||w - w_0||^2 + beta/2 ||v||^2."""
        terms = [self.alpha * quadratic(parameter, start) for parameter, start, _ in anchored(model, self.name)]
        heads = [p for n, p in model.named_parameters() if p.requires_grad and is_head(model, n)]
        value = total([*terms, *(self.beta * quadratic(p) for p in heads)])
        self.note(model, value)
        return value
