"""How much work a training step is said to be, and what a device could do at most.

The convention, per token of a sequence of T tokens:

    forward   2 x (weights of matrix products in the blocks, and of the head) + layers x 2 T (heads x head size)

The second term is attention: two products of 2 T (heads x head size) each, halved because a causal query meets half of the
keys. Embedding look-ups, norms and the branches of LoRA count nothing. A step is 2 forwards where the base is frozen (forward,
and backward to the inputs) and 3 where all weights train; a reference adds one. Work that an implementation saves (padding,
prompts that two answers share, positions without a label) is not subtracted, and work done twice is not added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PEAKS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0,
    "A100": 312.0, "A10": 125.0, "L4": 121.0, "L40S": 362.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip
"""Dense bfloat16 products, TFLOP/s, by the makers' data sheets; the first name found in the device's is taken."""
FACTORS = {"lora": 2, "qlora": 2, "full": 3}


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forwards and grouped queries."""

    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    tied: bool
    theta: float = 500000.0

    def config(self) -> dict[str, Any]:
        """Keyword arguments of the family's config."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": 8192,
            "rope_theta": self.theta,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        }

    @property
    def matmul_weights(self) -> int:
        """Weights of the matrix products that every token passes, the head included, tied or not."""
        attention = 2 * self.width * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn) + self.vocabulary * self.width

    def forward_flops(self, length: int) -> int:
        """Of one whole sequence."""
        return 2 * self.matmul_weights * length + self.layers * 2 * length**2 * self.heads * self.head_size


SHAPES = {
    "llama-3.1-8b": Shape("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
    "llama-3.2-1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "qwen3-0.6b": Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 1000000.0),
    "tiny": Shape("llama", 32, 2, 4, 2, 8, 48, 8192, True),
    "tiny-qwen3": Shape("qwen3", 32, 2, 4, 2, 8, 48, 8192, True),
    "tiny-wide": Shape("llama", 128, 2, 4, 2, 32, 192, 8192, True),
}
"""The tiny ones are for the dry run and for losses compared with those of the CPU; the wide one has heads and rows of weights
that the kernels of a GPU take."""


def step_flops(shape: Shape, lengths: Iterable[int], method: str, reference: bool = False) -> int:
    """Of a training step over sequences of these lengths.

    Args:
        method: `lora`, `qlora` or `full`.
        reference: whether a reference scores them too.
    """
    return (FACTORS[method] + reference) * sum(shape.forward_flops(length) for length in lengths)


def peak_tflops(device: str) -> float | None:
    """What a device could do at most; None for one that is not in the table."""
    for name, peak in PEAKS.items():
        if re.search(rf"\b{re.escape(name)}\b", device, re.IGNORECASE):
            return peak
    return None


def utilisation(flops_per_second: float, device: str) -> float | None:
    """Share of the device's peak; None where that is not known."""
    peak = peak_tflops(device)
    return None if peak is None else flops_per_second / (peak * 1e12)
