"""Gates that a layer's input opens by itself: g = sigmoid(w x + b), one number a token, or one a document.

Letters: R rows, T columns, d width. A gate multiplies what a method adds to a layer. `token` reads one token alone, so it is
causal and the same in cached generation; `mean` averages over the real tokens of a document, which only a layer may do that
sees them all. Gates are float32 whatever the base. Paper: UniPELT (arXiv 2110.07577).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import activate, current
from llmrecipe.methods._engines.document_tokens import host_of, summarised
from llmrecipe.models.hooks.hook import Hook, all_hooks
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

T = TypeVar("T")


class InputGate(nn.Module):
    """g = sigmoid(w x + b), (..., d) -> (..., 1); w starts N(0, 0.02^2), b at zero."""

    def __init__(self, width: int, pool: str, owner: str, normalized: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))
        self.pool, self.owner, self.normalized = pool, owner, normalized
        self.last: Tensor | None = None
        """Mean of the last gates, for a report; a tensor, so that nothing waits for it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return gates (R, T, 1), or (R, 1, 1) for the mean over padded rows, in the dtype of x."""
        wide = x.to(self.weight.dtype)
        if self.normalized:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        g = torch.sigmoid(nn.functional.linear(wide, self.weight, self.bias))
        if self.pool == "mean":
            g = self._document_mean(g)
        self.last = g.detach().mean()
        return g.to(x.dtype)

    def _document_mean(self, g: Tensor) -> Tensor:
        facts: DocumentTokens | None = current().shared.get(self.owner)
        if facts is None:
            raise ModelError(
                f"stack.{self.owner}.gate: a layer runs outside the forward pass of its model, which knows documents"
            )
        weights = facts.tokens.to(g.dtype)
        counts = weights.sum(1, keepdim=True).clamp(min=1)
        if not facts.packed:
            return (weights[:, :, None] * g).sum(1, keepdim=True) / counts[:, :, None]
        return (weights.T @ (weights @ g[0] / counts))[None]


@dataclasses.dataclass(frozen=True)
class DocumentTokens:
    """Which tokens a document is the mean of."""

    tokens: Tensor
    """(R, T), or (S, T) over one packed row."""
    packed: bool


class DocumentTokensHook(Hook):
    """At a stack of blocks: the tokens of each document, for the gates inside."""

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the stack with the tokens of its documents in the context."""
        context = current()
        facts = DocumentTokens(summarised("all", context, inputs), context.layout is not None)
        with activate(dataclasses.replace(context, shared={**context.shared, self.owner: facts})):
            return call(**inputs)


def prepare_gates(model: nn.Module, name: str, pool: str, sites: Iterable[Site]) -> None:
    """Let gates of a wrapper know the documents of a pass, where they average over them.

    Raises:
        RecipeError: a mean over tokens that a causal layer has not seen yet.
    """
    if pool != "mean":
        return
    sides = {site.side: site for site in sites}
    if "decoder" in sides and anatomy(model).causal:
        path = sides["decoder"].path
        raise RecipeError(f"stack.{name}.gate: a mean over the input of {path} reads tokens to come; use gate: token")
    for side in sides:
        add_hook(host_of(model, side), name, DocumentTokensHook(), name)


def gate_means(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the mean of a wrapper's gates in the last forward pass, for its metrics."""
    seen = [gate.last for _, _, _, hook in all_hooks(model, name) for gate in hook.modules() if isinstance(gate, InputGate)]
    known = [value for value in seen if value is not None]
    return {"gate": torch.stack(known).mean()} if known else {}
