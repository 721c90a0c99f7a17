"""LLM-Adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import Literal, OpenFraction, PositiveFloat, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.hybrid._engines.parts import part_of
from llmrecipe.methods.reparameterized.lora import Lora

if TYPE_CHECKING:
    from torch import nn


@register
class LlmAdapters(Wrapper):
    """LLM-Adapters: where each of four methods stands in a decoder, by the survey of that name.

    series     y = F(x) + c U tanh(D F(x)), after the feed-forward                     `adapter`
    parallel   y = W x + c U tanh(D x), in parallel with up- and down-projection each  `parallel_adapter`
    lora       y = W x + (alpha / r) B A x, at queries, keys, values, up and down      `lora`
    prefix     columns in every attention                                              `prefix_tuning`

    The bottlenecks have no biases. It stands for that one wrapper, which a recipe may write out instead: `check` prints it. U
    and B start at zero, so all but the prefix start at the base model. Trained: series 2 d r a layer, parallel r (in + out) a
    linear, lora r (in + out) a linear. Only lora is mergeable.

    Paper: LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models (arXiv 2304.01933).
    Departures: U at zero, where the code draws both matrices from N(0, 0.02^2) (`init: bert`). The series adapter stands
    after the feed-forward, as in the paper; the command published for LLaMA puts two before its up and gate projections.
    One parallel adapter a linear layer reproduces the paper's tables; `granularity: sublayer` is one around the feed-forward.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT

    method: Literal["series", "parallel", "lora", "prefix"] = "series"
    """Which of the four."""
    granularity: Literal["linear", "sublayer"] = "linear"
    """Parallel adapters: one for each linear layer, or one for the feed-forward."""
    r: Rank | None = None
    """Bottleneck or rank; null takes the paper's, 256 and 32."""
    scale: float = 1.0
    """Factor c of a bottleneck."""
    init: Literal["zero_up", "bert"] = "zero_up"
    """Start of a bottleneck: exact identity, or both matrices N(0, 0.02^2)."""
    alpha: PositiveFloat = 64.0
    """Scale of lora, multiplied by alpha / r."""
    dropout: OpenFraction = 0.05
    """Dropout on the input of lora while training."""
    num_virtual_tokens: Rank = 10
    """Virtual tokens of the prefix."""

    def expand(self, model: nn.Module) -> list[Wrapper]:
        """Return the wrapper that `method` names."""
        if self.method == "lora":
            rank, target = self.r or 32, "attn.q|k|v + mlp.up|down"
            return [part_of(self, Lora, target=target, r=rank, alpha=self.alpha, dropout=self.dropout)]
        if self.method == "prefix":
            return [part_of(self, PrefixTuning, num_virtual_tokens=self.num_virtual_tokens)]
        shape: dict[str, Any] = {"r": self.r or 256, "activation": "tanh", "bias": False}
        shape |= {"scale": self.scale, "init": self.init}
        if self.method == "series":
            return [part_of(self, Adapter, placement="houlsby", sublayers=["ffn"], **shape)]
        if self.granularity == "linear":
            return [part_of(self, ParallelAdapter, target="mlp.up|down", **shape)]
        return [part_of(self, ParallelAdapter, sites=["ffn"], **shape)]
