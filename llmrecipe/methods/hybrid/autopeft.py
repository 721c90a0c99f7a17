"""AutoPEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Annotated, Field, Literal, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.hybrid._engines.parts import part_of
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn

OFF = 10
"""The exponent that leaves a part out."""


def size_at(width: int, k: int) -> int:
    """Return the size an exponent stands for: floor(d / 2^k), 1 at k = 9, 0 (left out) at k = 10.

    Examples:
        >>> [size_at(768, k) for k in range(11)]
        [768, 384, 192, 96, 48, 24, 12, 6, 3, 1, 0]
    """
    return 0 if k == OFF else 1 if k == OFF - 1 else max(1, width >> k)


@register
class Autopeft(Wrapper):
    """AutoPEFT: one point of its space, a size for each of three parts and a switch for each layer.

    size = floor(d / 2^k), k = 9 is 1 and k = 10 leaves the part out; a layer that is off has no part

    adapter           x' = x + y + W_u relu(W_d u), pfeiffer        serial, after the feed-forward
    parallel_adapter  y = F(N(x)) + s (W_u relu(W_d N(x)))          parallel to the feed-forward
    prefix_tuning     y = softmax(Q [P_K; K]^T / sqrt(e)) [P_V; V]  in attention

    It stands for those three with sizes by layer, which a recipe may write out instead: `check` prints them. The recipe
    `autopeft` searches the space for score against the numbers a run leaves: `llmrecipe search recipe=autopeft`. Both
    adapters start at zero; a prefix makes step 0 another model than the base. Left by a run, for each layer that is on:
    (2 d + 1) b + d for each adapter and 2 d_kv P for the prefix. Not mergeable.

    Paper: AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning (arXiv 2301.12132). Departures: the
    serial adapter reads the stream with what the parallel one has added, where the paper's reads it without; costs count
    biases and take the model's own d, where its code takes 768 for every model and no biases.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = False
    identity: ClassVar[bool] = False

    adapter: Annotated[int, Field(ge=0, le=10)] = 4
    """k of the serial adapters."""
    parallel_adapter: Annotated[int, Field(ge=0, le=10)] = 4
    """k of the parallel adapters."""
    prefix_tuning: Annotated[int, Field(ge=0, le=10)] = 6
    """k of the prefix."""
    layers: dict[str, bool] = Field(default_factory=dict)
    """Switch by layer number; layers that are not named are on."""
    scale: float = 4.0
    """Factor s of the parallel adapters."""
    reparam: Literal["mlp", "flat"] = "mlp"
    """How the prefix trains: a small table and an MLP, or the columns themselves."""
    hidden: Rank = 800
    """Width of the prefix's MLP."""

    def expand(self, model: nn.Module) -> list[Wrapper]:
        """Return the parts that have a size.

        Raises:
            RecipeError: every part or every layer is off, or a switch names a layer that is not there.
        """
        sites = anatomy(model)
        count = max(sites.blocks(side) for side in ("encoder", "decoder"))
        unknown = [layer for layer in self.layers if layer not in map(str, range(count))]
        if unknown:
            raise RecipeError(f"stack.{self.name}.layers.{unknown[0]}: this model has layers 0 to {count - 1}")
        on = {str(i): self.layers.get(str(i), True) for i in range(count)}

        def sizes(k: int) -> dict[str, int]:
            return {layer: size_at(sites.width, k) if switch else 0 for layer, switch in on.items()}

        made: list[Wrapper] = []
        if self.adapter != OFF:
            made.append(part_of(self, Adapter, placement="pfeiffer", sizes=sizes(self.adapter)))
        if self.parallel_adapter != OFF:
            made.append(part_of(self, ParallelAdapter, sites=["ffn"], sizes=sizes(self.parallel_adapter), scale=self.scale))
        if self.prefix_tuning != OFF:
            columns = sizes(self.prefix_tuning)
            made.append(part_of(self, PrefixTuning, reparam=self.reparam, hidden=self.hidden, sizes=columns))
        if not made or not any(on.values()):
            what = "every layer is off" if made else "every part is off (k = 10)"
            raise RecipeError(f"stack.{self.name}: {what}, so nothing would train; leave one on")
        return made
