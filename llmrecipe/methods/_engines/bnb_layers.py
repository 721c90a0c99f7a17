"""The two quantized linear layers of bitsandbytes, with forwards that are safe to evaluate in the middle of training.

Imported only where a model is quantized: the library is slow to import and has no build for some machines.

Three things of the library's own forwards are undone here:

- an `eval()` forward on a CPU with AVX512-BF16 repacks the 4-bit weight for another kernel; training forwards cannot read it;
- the bias is cast in place to the compute dtype, so a trained float32 bias would become 16-bit without a word;
- 8-bit layers on CPU compute with integer activations in eval mode and float ones in training mode: two different models.

A dequantized weight lives for one product, in the forward and again in the backward pass, which keeps the codes alone. The next
layer gets its memory from the allocator; a buffer for each shape would hold it between passes too.
"""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from llmrecipe.models.hooks.between_graphs import call_apart

# On a GPU it says, at every product of an 8-bit layer, that the states pass through float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Linear4bit(bnb.nn.Linear4bit):
    """y = x dequantize(W)^T + b. `compute_dtype` None computes in the dtype of x, or of autocast where that is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., in) -> (..., out)."""
        return call_apart(self._product, x)

    def _product(self, x: Tensor) -> Tensor:
        # A sharded rebuild replaces the parameter object; the module keeps the state that belongs to it.
        state: Any = getattr(self.weight, "quant_state", None) or self.quant_state
        kind = x.device.type
        if self.compute_dtype is not None:
            dtype, out = self.compute_dtype, x.dtype
        elif torch.is_autocast_enabled(kind):
            dtype = out = torch.get_autocast_dtype(kind)
        else:
            dtype = out = x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # Turned over, as every version of the library takes the codes: before 0.50 it read others as the transposed weight.
        return bnb.matmul_4bit(x.to(dtype), self.weight.t(), bias=bias, quant_state=state).to(out)


class Linear8bit(bnb.nn.Linear8bitLt):
    """y = x (C diag(s) / 127)^T + b with int8 codes C and one scale a row."""

    def _apply(self, fn: Any, recurse: bool = True) -> Linear8bit:  # noqa: ANN401 - as torch has it
        """Move the layer with all that belongs to its codes: torch moves these in place and knows of nothing else."""
        super()._apply(fn, recurse)
        weight: Any = self.weight
        holders: tuple[Any, ...] = weight, self.state
        for holder in holders:
            if getattr(holder, "CB", None) is not None:
                holder.CB = weight.data
            if getattr(holder, "SCB", None) is not None:
                holder.SCB = holder.SCB.to(weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., in) -> (..., out)."""
        # The library keeps states of its own in Python objects.
        return call_apart(self._product, x)

    def _product(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if weight.CB is not None:
            self.init_8bit_state()
        self.state.is_training = self.training or x.device.type == "cpu"
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bnb.matmul(x, self.weight, bias=bias, state=self.state)


def empty_state(module: nn.Module, dtype: torch.dtype, block: int, scale_block: int) -> None:
    """Give a 4-bit layer whose codes have no numbers the scales that belong to them, without numbers too.

    Args:
        dtype: that of the weight before it was quantized.
        block: weights that share a scale.
        scale_block: scales that share one of their own, where they are quantized too.
    """
    layer: Any = module
    shape, known = torch.Size((layer.out_features, layer.in_features)), layer.weight.__dict__
    blocks, options = -(-shape.numel() // block), {}
    if known["compress_statistics"]:
        inner = QuantState(torch.empty(-(-blocks // scale_block)), None, torch.empty(256), scale_block, None, torch.float32)
        options = {"offset": torch.empty(()), "state2": inner}
    scales = torch.empty(blocks, dtype=torch.uint8 if options else torch.float32)
    layer.quant_state = QuantState(scales, shape, torch.empty(16), block, known["quant_type"], dtype, **options)
