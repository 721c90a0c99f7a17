"""Model FLOPs utilisation: the work a step has to do over what the device could do in the same time.

The work of a step, whatever an implementation saves or does twice:

    forward    2 W a token, and 4 h in each layer for every pair of a query and a key it sees
    backward   2 W a token for the inputs of these products, 2 W_t for the weights that train, and 8 h for every such pair

W are the weights of matrix products (embedding look-ups, norms and biases count nothing, the head does), W_t those of them
that train, h the width of all heads together. A causal query sees the tokens of its document up to its own, a bidirectional
one all of them. Source: the count of PaLM (arXiv 2204.02311, appendix B) with causal pairs counted once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmrecipe.models.pretrained import pretrained

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import Recipe

PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "A10G": 70e12,
    "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 products a second, in FLOP/s, by the makers' data sheets; the first name found in the device's is taken."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Config values of a mixture of experts, of whose weights a token meets some."""
SIZE, ROUNDS = 512, 5


def matmul_rate(device: str) -> float:
    """Measure the floating-point operations per second of a float32 matrix product, in a few milliseconds."""
    a = torch.randn(SIZE, SIZE, device=device)
    a @ a
    started = time.perf_counter()
    for _ in range(ROUNDS):
        b = a @ a
    float(b[0, 0])
    return ROUNDS * 2 * SIZE**3 / max(time.perf_counter() - started, 1e-9)


@dataclass(frozen=True)
class ModelFlops:
    """The work of one model, and the peak of the device it runs on in FLOP/s."""

    weights: int
    trained: int
    """Those of `weights` that train."""
    pairs: int
    """FLOP of a forward pass for one query and one key, over all layers: 4 h layers."""
    causal: bool
    peak: float
    source: str
    """`data sheet`, or `measured`."""

    def step(self, micros: list[Batch]) -> float:
        """Return the FLOP that a step over these micro-batches has to do."""
        tokens = sum(micro.tokens for micro in micros)
        return tokens * (4.0 * self.weights + 2.0 * self.trained) + 3.0 * self.pairs * sum(map(self._seen, micros))

    def _seen(self, micro: Batch) -> float:
        """Return the pairs of a query and a key in a micro-batch."""
        if not micro.tokens:
            return 0.0
        micro = micro.here
        real = torch.ones_like(micro.position_ids) if micro.attention_mask is None else micro.attention_mask
        seen = float(((micro.position_ids + 1) * real).sum())
        # All n keys for each of n queries instead of 1 + 2 + ... + n.
        return seen if self.causal else 2.0 * seen - micro.tokens


def model_flops(recipe: Recipe, objective: Objective, roles: Roles) -> ModelFlops | None:
    """Return what utilisation is computed from; None where the work or the peak is not known.

    The work is not known of mixtures of experts, of models without attention heads in their config, of encoder-decoders, and
    under update rules other than back-propagation. The peak of a GPU is looked up for low-precision training; any other is
    measured where `log.mfu` is `measure`.
    """
    wanted, model = recipe.log.mfu, roles.model
    config = pretrained(model).config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")]
    # Pyramids of stages have a list of widths, or of heads.
    hidden, heads, layers = (size if isinstance(size, int) else 0 for size in sizes)
    experts = any(isinstance(getattr(config, name, None), int) for name in EXPERTS)
    if (
        wanted == "off"
        or not hidden
        or not heads
        or not layers
        or experts
        or roles.engine.is_pair_model
        or roles.stack.rule() is not None
    ):
        return None
    found = peak_of(roles.device, recipe.model.dtype, wanted == "measure")
    if found is None:
        return None
    width = heads * int(getattr(config, "head_dim", None) or hidden // heads)
    products = {id(w): w for module in model.modules() if (w := _product(module)) is not None}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - set(products)
    trained = [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in looked_up]
    weights, learned = (sum(w.numel() for w in group) for group in (products.values(), trained))
    return ModelFlops(weights, learned, 4 * width * layers, objective.model_head() == "causal", *found)


def peak_of(device: torch.device, dtype: str, measure: bool) -> tuple[float, str] | None:
    """Return the peak of a device in FLOP/s and where it comes from; None where it is not known and not to be measured."""
    if device.type == "cuda" and dtype in ("bfloat16", "float16", "auto"):
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        if known is not None:
            return known, "data sheet"
    return (max(matmul_rate(str(device)) for _ in range(3)), "measured") if measure else None


def _product(module: nn.Module) -> torch.Tensor | None:
    """Return the weight that a module multiplies its input with; None of look-ups, norms and containers."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding) else None
