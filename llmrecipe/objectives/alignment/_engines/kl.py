"""Divergence from the reference: per-token estimates and the coefficient that weighs them.

With x sampled from pi and l = log pi(x) - log pi_ref(x), three estimates of KL(pi || pi_ref) (J. Schulman, 2020):

    k1 = l                      unbiased, signed
    k2 = l^2 / 2                biased, never negative
    k3 = e^-l - 1 + l           unbiased, never negative
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmrecipe.core.foreign import stored_number


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Estimate the divergence per token, in the shape of the inputs.

    As a term of a loss, over the policy's own samples, k1's gradient has mean zero and k2's has the gradient of KL as its mean.
    """
    ratio = logprobs - reference
    if kind == "k1":
        return ratio
    if kind == "k2":
        return 0.5 * ratio**2
    return torch.expm1(-ratio) + ratio


@dataclass
class KlController:
    """beta, the weight of the divergence.

    Fixed, or adaptive (arXiv 1909.08593): beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), with KL the mean
    divergence of a whole answer and n the answers since the last change.
    """

    coef: float
    target: float | None = None
    """Target divergence of an answer in nats; None keeps beta fixed."""
    horizon: float = 10_000.0
    """Answers after which beta may have changed by a fifth."""

    def update(self, kl: float, answers: int) -> None:
        """Adapt beta to one rollout.

        Args:
            kl: mean divergence of an answer, in nats.
            answers: number of answers of the rollout.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * answers / self.horizon

    def state(self) -> dict[str, Any]:
        """Return the JSON state for a checkpoint."""
        return {"coef": self.coef}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.coef = stored_number(state["coef"], "the KL coefficient")
