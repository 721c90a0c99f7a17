"""LoReFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import RecipeError
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
class Loreft(Wrapper):
    """LoReFT: h <- h + R^T (W h + b - R h), R R^T = I, at the first n and last m tokens of each prompt.

    h (d) is a block's output, R and W (r, d), b (r): in the r-dimensional space of R the state becomes W h + b. Weights stay as
    they are. R starts orthonormal at random, W and b as a linear layer's: step 0 is not the base model (it moves edited
    states by about sqrt(r / d)); `init: identity` starts with W = R, b = 0, which is. 2 r d + r numbers train for each edit.
    R is the Q of a QR decomposition of the trained tensor, so it stays orthonormal, whatever the optimizer does.

    Of a prompt of P tokens at most P // 2 are edited at each end; in an encoder the text is the prompt. Generation edits the
    prompt as it is read; later tokens see it through the cache. Rows without a prompt stay as they are. Not mergeable. Memory:
    few numbers train, but gradients flow down to the lowest edited block, so activations above it are kept: name high blocks
    (`target: layers.-4:.block`) to save them.

    Paper: ReFT: Representation Finetuning for Language Models (arXiv 2404.03592); defaults are those for its commonsense
    and arithmetic tasks (lr 9e-4, no weight decay); instruction following takes r 4, f5+l5, four layers.
    Departures: dropout on the edit instead of the edited state (`dropout_on`), no dummy position edited in short prompts.
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
    variant: Literal["loreft", "noreft", "consreft", "lobireft", "linear"] = "loreft"
    """noreft: R is free; consreft: R^T (b - R h); lobireft: R^T b; linear: h + U V h, a plain low-rank change of the state."""
    activation: Literal["identity", "relu", "gelu", "silu", "tanh"] = "identity"
    """Applied to W h + b."""
    dropout: OpenFraction = 0.0
    """Dropout while training."""
    dropout_on: Literal["edit", "output"] = "edit"
    """What is dropped: what the edit adds, or the whole edited state."""
    init: Literal["default", "identity"] = "default"
    """identity: start at the base model."""

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse an identity start of a variant that has none, and positions that name no token."""
        positions_of(self.positions, f"stack.{self.name}.positions")
        if self.init == "identity" and self.variant == "consreft":
            raise RecipeError(
                f"stack.{self.name}.init: consreft replaces what R reads by a constant, which no start makes the base model; "
                "use init: default, or variant: lobireft"
            )

    def plan(self) -> EditPlan:
        """Return the edit."""
        first, last = positions_of(self.positions, f"stack.{self.name}.positions")
        output = self.dropout_on == "output"
        return EditPlan(
            self.variant, self.r, first, last, self.share_weights, self.activation, self.dropout, output, self.starts_at_base()
        )

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add an edit at every block of `target`.

        Raises:
            RecipeError: the target names something else than blocks that read a prompt.
            ModelError: the rank is larger than the width of a state.
        """
        attach_edits(model, self.name, self.target, self.plan())

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base model."""
        return self.init == "identity"

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return R without weight decay."""
        return edit_groups(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 2 r d + r numbers an edit."""
        return edit_memory(model, self.name, self.target, self.plan())
