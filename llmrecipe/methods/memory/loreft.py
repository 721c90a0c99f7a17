"""LoReFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods.memory._engines.representation_edit import StateEdits


@register
class Loreft(StateEdits, Wrapper):
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

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")

    variant: Literal["loreft", "noreft", "consreft", "lobireft", "linear"] = "loreft"
    """noreft: R is free; consreft: R^T (b - R h); lobireft: R^T b; linear: h + U V h, a plain low-rank change of the state."""

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse an identity start of a variant that has none, and positions that name no token."""
        super().check_stack(wrappers)
        if self.init == "identity" and self.variant == "consreft":
            raise RecipeError(
                f"stack.{self.name}.init: consreft replaces what R reads by a constant, which no start makes the base model; "
                "use init: default, or variant: lobireft"
            )
