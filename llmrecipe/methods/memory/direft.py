"""DiReFT."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods.memory._engines.representation_edit import StateEdits


@register
class Direft(StateEdits, Wrapper):
    """DiReFT: h <- h + W_2^T (W_1 h + b) at the first n and last m tokens of each prompt; LoReFT without its constraints.

    h (d) is a block's output, W_1 and W_2 (r, d), b (r). All start as a linear layer's: step 0 is not the base model;
    `init: identity` starts with W_2 = 0, which is. 2 r d + r numbers train for each edit, weights stay as they are. Positions,
    generation and memory are those of `loreft`. `variant: offset` learns one vector a position, O (n + m, d), from zero: it
    cannot depend on h. Not mergeable.

    Paper: ReFT: Representation Finetuning for Language Models (arXiv 2404.03592). Its code calls the form with an orthonormal
    W_2 DiReFT: that is `variant: direft_orth`. Departures: those of `loreft`.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")

    variant: Literal["direft", "direft_orth", "offset"] = "direft"
    """direft_orth: W_2 has orthonormal rows; offset: a learned vector a position."""

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base model."""
        return super().starts_at_base() or self.variant == "offset"
