"""NF4: the base weights in 4 bits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.option_types import Field, Literal
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines.quantized import adopt, dequantize_model, layers, quantized, replace_linears, skip_patterns
from llmrecipe.models.site_finder import widths

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 64
"""Weights that share one scale."""
SCALE_BLOCK = 256
"""Scales that share one scale of their own under double quantization."""

__all__ = ["Nf4", "dequantize_model", "packed_bytes"]


@register
class Nf4(Wrapper):
    """4-bit base weights (the Q of QLoRA): W_hat = q[code] * c per block of 64, q the 16 NormalFloat levels, c = max |w|.

    NF4 levels are quantiles of a standard normal distribution, scaled to [-1, 1] with an exact zero. Double quantization stores
    c - mean(c) in 8 bits, blocks of 256: 4.127 bits a weight instead of 4.5. The forward pass multiplies by the dequantized
    weight; gradients go to the input and to whatever is stacked on top, never to the codes.

    Step 0 is the quantized model, not the original one: rounding moves a normally distributed weight by 9% of its size on
    average. Output and task heads, embeddings, norms and 3-D expert tensors keep their dtype. Merging adds the methods above
    to the dequantized weights they were trained on.

    Paper: QLoRA: Efficient Finetuning of Quantized LLMs (arXiv 2305.14314). Departure: norms stay in the model's dtype, which
    the families' own norms compute in float32 anyway.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "torch's fully_shard leaves 4-bit weights whole, or changes the codes of those stored as floats"
    stage: ClassVar[Stage] = Stage.BASE
    mergeable: ClassVar[bool] = True
    identity: ClassVar[bool] = False
    compute_options: ClassVar[tuple[str, ...]] = ("compute_dtype",)
    conflicts: ClassVar[dict[str, str]] = {
        "int8": "both quantize the base weights; keep one",
        "smt": "it writes into base weights, and 4-bit codes cannot be trained",
        "esft": "it trains base weights, and 4-bit codes cannot be trained",
    }

    type: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels: nf4 for normally distributed weights, fp4 for 4-bit floats (larger error)."""
    double: bool = True
    """Also quantize the scales, to 8 bits."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the product; auto follows the activations."""
    storage: Literal["auto", "uint8", "float32", "bfloat16", "float16"] = "auto"
    """Dtype the packed codes are held in: uint8, except under FSDP, which shards only one dtype at a time."""
    skip: list[str] = Field(default_factory=list)
    """Further layers to leave alone, by a part of their path (`o_proj`, `layers.0.mlp`)."""

    def load_kwargs(self) -> dict[str, Any]:
        """Quantize while loading, so that the dense weights never exist all at once."""
        layers()
        from transformers import BitsAndBytesConfig

        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.type,
                bnb_4bit_use_double_quant=self.double,
                bnb_4bit_compute_dtype=torch.float32 if self.compute_dtype == "auto" else self.compute_dtype,
                bnb_4bit_quant_storage=str(self._storage()).removeprefix("torch."),
                llm_int8_skip_modules=skip_patterns(self.skip),
            )
        }

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Quantize what loading has not quantized, and give every 4-bit layer the forward that is safe in eval mode.

        Raises:
            ModelError: the model has no linear layer that can be quantized.
        """
        replace_linears(model, self.skip, self._make)
        for module in adopt(model, layers().Linear4bit, self.skip):
            module.compute_dtype = None if self.compute_dtype == "auto" else getattr(torch, self.compute_dtype)

    def _make(self, old: nn.Module, weight: Tensor) -> nn.Module:
        bnb = layers().bnb

        rows, columns = weight.shape
        options: dict[str, Any] = {
            "compress_statistics": self.double,
            "quant_type": self.type,
            "quant_storage": self._storage(),
        }
        new = layers().Linear4bit(columns, rows, bias=False, device="meta", **options)
        if weight.is_meta:
            # A skeleton is never computed with; it only has to weigh what the packed weight weighs.
            size = (weight.numel() + 1) // 2 // self._storage().itemsize
            packed = torch.empty((size, 1), dtype=self._storage(), device="meta")
            new.weight = bnb.nn.Params4bit(packed, requires_grad=False, bnb_quantized=True, module=new, **options)
            return new
        # The library quantizes 16- and 32-bit floats only.
        ready = weight.float() if weight.dtype == torch.float64 else weight
        parameter: Any = bnb.nn.Params4bit(ready.contiguous(), requires_grad=False, module=new, **options)
        new.weight = parameter.to(weight.device)
        return new

    def _storage(self) -> torch.dtype:
        if self.storage != "auto":
            return getattr(torch, self.storage)
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if not sharded:
            return torch.uint8
        return torch.bfloat16 if self.compute_dtype == "auto" else getattr(torch, self.compute_dtype)

    def merge(self, model: nn.Module) -> None:
        """Dequantize, so that what is stacked on top merges into the weights it was trained on."""
        dequantize_model(model)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return bytes of the quantized layers: n / 2 of codes and one scale a block, itself in 8 bits under `double`."""
        shapes = [math.prod(widths(module, 0)[:2]) for _, module in quantized(model)]
        return {"trainable": 0, "weights": sum(shapes), "base_bytes": sum(packed_bytes(n, self.double) for n in shapes)}

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield how many weights are held in 4 bits."""
        yield f"weights in {self.type}", self.memory(model)["weights"]


def packed_bytes(weights: int, double: bool) -> int:
    """Return bytes of one quantized tensor of n weights, tables included.

    n/2 codes + 64 (the 16 levels) + 4 n/64 scales; under double quantization n/64 + 4 n/(64 * 256) + 1024 (the 256 levels of
    the 8-bit map) + 4 (the mean of the scales) instead of 4 n/64.
    """
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // SCALE_BLOCK) + 1024 + 4 if double else 4 * blocks
    return (weights + 1) // 2 + 64 + scales
