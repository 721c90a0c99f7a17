"""Scores that make a prefix depend on its document: one number a virtual token and layer, from a summary of the layer's input.

Letters: R rows, S segments of a packed row, T columns, P virtual tokens, d width.

    summary    h = the document's first token, or the mean of its prompt (of its first token where it has none)
    score      alpha = sigmoid(h W + b)   (R | S, P);   columns of the layer times lambda alpha

Which tokens those are follows once a pass from the layout or the masks; none of them comes after a target. During cached
generation the scores of the first pass stay with the cache and move with its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.forward_context import activate, current
from llmrecipe.methods._engines.document_tokens import stack_input, summarised
from llmrecipe.methods._engines.handed_down import handed_down
from llmrecipe.methods.additive._engines.prefix_kv import ColumnPlan, Made, PrefixTables, attach_prefix
from llmrecipe.models.hooks.hook import Hook, all_hooks
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.kv_cache import cache_of, cached, carried
from llmrecipe.models.module_map import anatomy

T = TypeVar("T")

Scores = dict[int, Tensor]
"""alpha (R, P) by layer."""


@dataclass(frozen=True)
class Facts:
    """How documents are summarised in one pass."""

    tokens: Tensor | None
    """Which tokens, (R, T), or (S, T) over one packed row; None in a pass over a cache."""
    packed: bool
    kept: Scores | None
    """Scores to read in a pass over a cache, or to fill for later ones; None where no cache will follow."""


class ScoredTables(PrefixTables):
    """Tables whose columns each block multiplies by its own scores."""

    summary: str = "first"

    def make(self, inputs: dict[str, Any]) -> Made:
        """Return the columns, and how to summarise the documents of this pass."""
        if cached(inputs):
            facts = Facts(None, False, carried(cache_of(inputs)).get(self.owner))
        else:
            tokens = summarised(self.summary, current(), inputs)
            # A loaded model may be called outside `no_grad`; only training never continues what it has read.
            kept: Scores | None = None if self.training else {}
            facts = Facts(tokens, current().layout is not None, kept)
        return dataclasses.replace(super().make(inputs), facts=facts)

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the stack; a cache it returns keeps the scores."""
        facts: list[Facts] = []

        def noting(**changed: object) -> T:
            facts.append(handed_down(self.owner).facts)
            return call(**changed)

        out = super().wrap_module(noting, inputs)
        cache = cache_of(out) if isinstance(out, Mapping) else None
        if cache is not None and facts[0].kept is not None:
            carried(cache)[self.owner] = facts[0].kept
        return out


class BlockScores(Hook):
    """At a block: the scores of its prefix, from the residual stream that enters it."""

    def __init__(self, layer: int, width: int, virtual_tokens: int, token: str, layer_gate: bool, bias: bool):
        super().__init__()
        self.layer, self.token = layer, token
        if token == "input":
            self.gate = nn.Parameter(torch.randn(width, virtual_tokens) * 0.02)
        if (token == "input" and bias) or token == "static":
            self.bias = nn.Parameter(torch.zeros(virtual_tokens))
        if layer_gate:
            self.scale = nn.Parameter(torch.ones(()))

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the block with its factor lambda alpha in the context."""
        made: Made = handed_down(self.owner)
        factor = self.token_scores(made.facts, stack_input(inputs))
        if hasattr(self, "scale"):
            factor = self.scale * factor
        shared = {**current().shared, self.owner: dataclasses.replace(made, factor=factor)}
        with activate(dataclasses.replace(current(), shared=shared)):
            return call(**inputs)

    def token_scores(self, facts: Facts, x: Tensor) -> Tensor:
        """Return alpha (1 | R | S, P)."""
        if self.token == "off":
            return x.new_ones(1, 1, dtype=self._float(x))
        if self.token == "static":
            return torch.sigmoid(self.bias)[None]
        if facts.tokens is None:
            return facts.kept[self.layer]  # type: ignore[index]
        score = self.summary(facts, x).to(self.gate.dtype) @ self.gate
        alpha = torch.sigmoid(score + self.bias if hasattr(self, "bias") else score)
        if facts.kept is not None:
            facts.kept[self.layer] = alpha
        return alpha

    @staticmethod
    def _float(x: Tensor) -> torch.dtype:
        return torch.float64 if x.dtype == torch.float64 else torch.float32

    def summary(self, facts: Facts, x: Tensor) -> Tensor:
        """Return the summary (R | S, d) in float32."""
        wide = x.to(self._float(x))
        weights = facts.tokens.to(wide.dtype)  # type: ignore[union-attr]
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        return weights @ wide[0] if facts.packed else torch.einsum("rt,rtd->rd", weights, wide)


class ColumnsGate(Hook):
    """At an attention module: g = sigmoid(w x + b) of its input scales its columns, keys and values.

    `token`: each query by its own g; `mean`: a document by the mean over its tokens, which only a layer may do that sees
    them all.
    """

    def __init__(self, width: int, pool: str):
        super().__init__()
        self.pool = pool
        self.gate = nn.Parameter(torch.randn(width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(()))
        self.last: Tensor | None = None
        """Mean of the last gates, for a report; a tensor, so that nothing waits for it."""

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the attention module with its gate in the context."""
        x = stack_input(inputs)
        made: Made = handed_down(self.owner)
        g = torch.sigmoid(x.to(self.gate.dtype) @ self.gate + self.bias)
        self.last = g.detach().mean()
        if self.pool == "token":
            made = dataclasses.replace(made, scale=g[:, None, :, None])
        else:
            weights = made.facts.tokens.to(g.dtype)
            rows = g[0].expand(weights.shape[0], -1) if made.facts.packed else g
            made = dataclasses.replace(made, factor=((weights * rows).sum(1) / weights.sum(1))[:, None])
        with activate(dataclasses.replace(current(), shared={**current().shared, self.owner: made})):
            return call(**inputs)


def column_gates(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the mean of a wrapper's gates in the last forward pass, for its metrics."""
    seen = [hook.last for _, _, _, hook in all_hooks(model, name) if isinstance(hook, ColumnsGate) and hook.last is not None]
    return {"gate": torch.stack(seen).mean()} if seen else {}


def gate_count(model: nn.Module, name: str) -> int:
    """Return how many numbers the gates of a wrapper's columns have."""
    gates = [hook for _, _, _, hook in all_hooks(model, name) if isinstance(hook, ColumnsGate)]
    return sum(p.numel() for hook in gates for p in hook.parameters())


class GatedTables(ScoredTables):
    """Tables for modules that gate their columns themselves."""

    summary = "all"


def attach_gated(model: nn.Module, name: str, plan: ColumnPlan, structure: dict[str, Any] | None, pool: str) -> None:
    """Attach a prefix whose attention modules gate their columns.

    Raises:
        RecipeError: a mean over tokens a causal layer has not seen yet.
    """
    parts = anatomy(model)
    for _, roles in attach_prefix(model, name, plan, structure, GatedTables):
        for site in (s for group in roles.values() for s in group):
            if pool == "mean" and site.side == "decoder" and parts.causal:
                raise RecipeError(f"stack.{name}.gate: a mean over {site.path}'s input reads tokens to come; use gate: token")
            hook = ColumnsGate(site.width_in, pool).to(next(model.parameters()).device)
            add_hook(site.module, f"{name}__gate", hook, name)
