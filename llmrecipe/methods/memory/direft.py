"""DiReFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import Annotated, Field, Literal, OpenFraction, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import ParamGroup, Stage, Wrapper
from llmrecipe.methods.memory._engines.representation_edit import (
    EditPlan,
    attach_edits,
    edit_groups,
    edit_memory,
    positions_of,
)

if TYPE_CHECKING:
    from torch import nn


@register
class Direft(Wrapper):
    """DiReFT: h <- h + W_2^T (W_1 h + b) at the first n and last m tokens of each prompt; LoReFT without its constraints.

    h (d) is a block's output, W_1 and W_2 (r, d), b (r). All start as a linear layer's: step 0 is not the base model;
    `init: identity` starts with W_2 = 0, which is. 2 r d + r numbers train for each edit, weights stay as they are. Positions,
    generation and memory are those of `loreft`. `variant: offset` learns one vector a position, O (n + m, d), from zero: it
    cannot depend on h. Not mergeable.

    Paper: ReFT: Representation Finetuning for Language Models (arXiv 2404.03592). Its code calls the form with an orthonormal
    W_2 DiReFT: that is `variant: direft_orth`. Departures: those of `loreft`.
    """

    stage: ClassVar[Stage] = Stage.INJECT
    modality: ClassVar[str] = "text"
    otherwise: ClassVar[str] = "use vpt or lora"
    identity: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "it edits some tokens and not others; no weight can hold it"

    target: str = "block"
    """Blocks whose output is edited, such as `layers.3|9|18|24.block`."""
    r: Rank = 8
    """Rank of the edit."""
    positions: Annotated[str, Field(pattern=r"^(f\d+(\+l\d+)?|l\d+)$")] = "f7+l7"
    """Edited tokens: the first n and the last m of each prompt."""
    share_weights: bool = True
    """One edit a block for both ends of the prompt; false: one for each."""
    variant: Literal["direft", "direft_orth", "offset"] = "direft"
    """direft_orth: W_2 has orthonormal rows; offset: a learned vector a position."""
    activation: Literal["identity", "relu", "gelu", "silu", "tanh"] = "identity"
    """Applied to W_1 h + b."""
    dropout: OpenFraction = 0.0
    """Dropout while training."""
    dropout_on: Literal["edit", "output"] = "edit"
    """What is dropped: what the edit adds, or the whole edited state."""
    init: Literal["default", "identity"] = "default"
    """identity: start at the base model."""

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse positions that name no token."""
        positions_of(self.positions, f"stack.{self.name}.positions")

    def plan(self) -> EditPlan:
        """Return the edit."""
        first, last = positions_of(self.positions, f"stack.{self.name}.positions")
        output, shared = self.dropout_on == "output", self.share_weights or self.variant == "offset"
        identity = self.init == "identity"
        return EditPlan(self.variant, self.r, first, last, shared, self.activation, self.dropout, output, identity)

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add an edit at every block of `target`.

        Raises:
            RecipeError: the target names something else than blocks that read a prompt.
            ModelError: the rank is larger than the width of a state.
        """
        attach_edits(model, self.name, self.target, self.plan())

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base model."""
        return self.init == "identity" or self.variant == "offset"

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return the orthonormal matrices without weight decay."""
        return edit_groups(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 2 r d + r numbers an edit, (n + m) d for offsets."""
        return edit_memory(model, self.name, self.target, self.plan())
