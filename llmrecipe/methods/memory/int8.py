"""LLM.int8(): the base weights in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.option_types import Field, NonNegativeFloat
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines.quantized import adopt, dequantize_model, layers, quantized, replace_linears, skip_patterns
from llmrecipe.models.site_finder import widths

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Int8(Wrapper):
    """8-bit base weights: W_hat = C diag(s) / 127 with int8 codes C and s = max |w| of each row.

    On a GPU the activations are quantized row by row too, except columns with an entry above `threshold`, which are multiplied
    in 16 bits; on CPU the product is taken with the dequantized weight, in training and in eval mode alike. Weights pass
    through float16. Step 0 is the quantized model, not the original one (about 0.7% off a layer's output).

    Paper: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (arXiv 2208.07339).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "torch's fully_shard leaves 8-bit weights whole"
    stage: ClassVar[Stage] = Stage.BASE
    mergeable: ClassVar[bool] = True
    identity: ClassVar[bool] = False
    compute_options: ClassVar[tuple[str, ...]] = ("threshold",)
    conflicts: ClassVar[dict[str, str]] = {
        "nf4": "both quantize the base weights; keep one",
        "smt": "it writes into base weights, and 8-bit codes cannot be trained",
        "esft": "it trains base weights, and 8-bit codes cannot be trained",
    }

    threshold: NonNegativeFloat = 6.0
    """Activation columns with a larger entry stay in 16 bits (GPU); 0 quantizes every column."""
    skip: list[str] = Field(default_factory=list)
    """Further layers to leave alone, by a part of their path (`o_proj`, `layers.0.mlp`)."""

    def load_kwargs(self) -> dict[str, Any]:
        """Quantize while loading, so that the dense weights never exist all at once."""
        layers()
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=self.threshold, llm_int8_skip_modules=skip_patterns(self.skip)
        )
        return {"quantization_config": config}

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Quantize what loading has not quantized, and give every 8-bit layer one forward for both modes.

        Raises:
            ModelError: the model has no linear layer that can be quantized.
        """
        replace_linears(model, self.skip, self._make)
        adopt(model, layers().Linear8bit, self.skip)

    def _make(self, old: nn.Module, weight: Tensor) -> nn.Module:
        bnb = layers().bnb

        rows, columns = weight.shape
        new = layers().Linear8bit(
            columns, rows, bias=False, has_fp16_weights=False, threshold=float(self.threshold), device="meta"
        )
        if weight.is_meta:
            new.weight = bnb.nn.Int8Params(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
            return new
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        new.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scale)
        return new

    def merge(self, model: nn.Module) -> None:
        """Dequantize, so that what is stacked on top merges into the weights it was trained on."""
        dequantize_model(model)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return bytes of the quantized layers: one a weight and a float32 scale a row."""
        shapes = [widths(module, 0)[:2] for _, module in quantized(model)]
        weights = sum(columns * rows for columns, rows in shapes)
        return {"trainable": 0, "weights": weights, "base_bytes": weights + sum(4 * rows for _, rows in shapes)}

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield how many weights are held in 8 bits."""
        yield "weights in int8", self.memory(model)["weights"]
