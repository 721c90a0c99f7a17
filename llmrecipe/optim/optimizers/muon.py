"""Muon for hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import NonNegativeFloat, OpenFraction, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.optim.optimizer import Optimizer, joint_optimizer, kernel_flags, numel

if TYPE_CHECKING:
    import torch


@register
class Muon(Optimizer):
    """Muon: u = momentum u + g, w -= lr (orthogonalised u + decay w) for every matrix inside the network.

    A few Newton-Schulz steps replace u by the nearest matrix with singular values near 1. Its size is matched to that of an
    AdamW update, so AdamW's rates carry over. Embeddings, the output head, vectors and stacked experts are stepped by
    AdamW with the same rate. torch's implementation of K. Jordan's Muon (2024); the size matching is that of
    "Muon is Scalable for LLM Training", arXiv 2502.16982.
    """

    unscaled: ClassVar[bool] = False

    lr: PositiveFloat = 2e-4
    """Learning rate at its peak, of both parts."""
    momentum: OpenFraction = 0.95
    """Memory of Muon's momentum."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    newton_schulz_steps: PositiveInt = 5
    """Iterations of the orthogonalisation."""
    beta1: OpenFraction = 0.9
    """AdamW's memory of the mean gradient."""
    beta2: OpenFraction = 0.95
    """AdamW's memory of the mean squared gradient."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of matrices; norms, biases and adapters do not decay."""
    decay_adapters: bool = False
    """Also decay the matrices of adapters, which pulls them to the base model."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm of a step; 0 turns clipping off."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`; groups that hold matrices and other tensors are split."""
        from torch.optim import AdamW as TorchAdamW
        from torch.optim import Muon as TorchMuon

        hidden = [part for group in params if (part := _split(group, True))]
        rest = [part for group in params if (part := _split(group, False))]
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(
                TorchMuon(
                    hidden,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    ns_steps=self.newton_schulz_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            parts.append(TorchAdamW(rest, betas=(self.beta1, self.beta2), **kernel_flags(rest)))
        return joint_optimizer(parts)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return one 32-bit momentum for a matrix, AdamW's two averages for the rest (an embedding counts as a matrix)."""
        return 4 * numel(shape) if len(shape) == 2 else 8 * numel(shape) + 4


def _split(group: dict[str, Any], hidden: bool) -> dict[str, Any] | None:
    """Return the part of a group that Muon steps (`hidden`), or the part left to AdamW."""
    inside = group.get("kind") in ("matrix", "adapter")
    chosen = [i for i, p in enumerate(group["params"]) if (inside and p.ndim == 2) is hidden]
    if not chosen:
        return None
    part = {**group, "params": [group["params"][i] for i in chosen]}
    if "names" in group:
        part["names"] = [group["names"][i] for i in chosen]
    return part
