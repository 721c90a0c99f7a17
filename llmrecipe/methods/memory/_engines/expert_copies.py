"""Some experts of a fused mixture as trained copies; the others run where they are.

A mixture calls `experts(hidden (N, D), index (N, K), weights (N, K))`. Pairs (token, expert) whose expert was chosen go through
the copies, n of E in each 3-D tensor, all others through the host: both with the family's own forward pass, one pair a row.
Frozen experts keep no inputs and get no gradient; the host's own tensors are never written.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import current
from llmrecipe.models.hooks.hook import Hook, T, first_tensor, hooks_of
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.site import Site


def mixtures(model: nn.Module) -> dict[str, list[Site]]:
    """Return module path -> its fused tensors, for every mixture of a model.

    Raises:
        ModelError: the model has none.
    """
    found: dict[str, list[Site]] = {}
    for site in anatomy(model).sites:
        if site.role == "experts" and site.tensor is not None:
            found.setdefault(site.path, []).append(site)
    if not found:
        raise ModelError("this model has no mixture of experts in fused tensors; use lora, or a model such as OLMoE or Mixtral")
    return found


class ChosenExperts(Hook):
    """At an experts module: the trained copies of the chosen experts."""

    chosen: Tensor
    place: Tensor
    scores: Tensor
    """(E,) what the experts were chosen by, for the report."""

    def __init__(self, host: nn.Module, tensors: Sequence[str], count: int, chosen: Sequence[int]):
        super().__init__()
        device = getattr(host, tensors[0]).device
        self.host, self.tensors, self.count = [host], tuple(tensors), count
        self.register_buffer("chosen", torch.tensor(list(chosen), dtype=torch.long, device=device))
        place = torch.full((count,), -1, dtype=torch.long)
        place[list(chosen)] = torch.arange(len(chosen))
        self.register_buffer("place", place.to(device), persistent=False)
        self.register_buffer("scores", torch.zeros(count, device=device))
        for name in tensors:
            own = getattr(host, name).detach()[list(chosen)]
            wide = torch.float64 if own.dtype == torch.float64 else torch.float32
            self.register_parameter(name, nn.Parameter(own.to(wide).clone()))

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Return the sum over experts, (N, D)."""
        (hidden_name, x), (index_name, index), (weight_name, weight) = list(inputs.items())[:3]
        slots = self.place[index]
        y = torch.zeros_like(x)

        def rows(tokens: Tensor, columns: Tensor, experts: Tensor) -> dict[str, Tensor]:
            pair = weight[tokens, columns][:, None]
            return {hidden_name: x[tokens], index_name: experts[tokens, columns][:, None], weight_name: pair}

        tokens, columns = (slots < 0).nonzero(as_tuple=True)
        if tokens.numel():
            y = y.index_add(0, tokens, first_tensor(call(**rows(tokens, columns, index))).to(y.dtype))
        tokens, columns = (slots >= 0).nonzero(as_tuple=True)
        if tokens.numel():
            with self._in_place_of_all(x.dtype) as forward:
                y = y.index_add(0, tokens, forward(*rows(tokens, columns, slots).values()).to(y.dtype))
        elif torch.is_grad_enabled():
            # Data-parallel processes wait for every gradient, also of experts that no token of this one visits.
            y = y + sum(getattr(self, name).sum() for name in self.tensors).to(y.dtype) * 0.0
        return cast(T, y)

    @contextlib.contextmanager
    def _in_place_of_all(self, dtype: torch.dtype) -> Iterator[Callable[..., Tensor]]:
        """Give the host the chosen experts alone, for one call of its own forward pass."""
        host: Any = self.host[0]
        kept, experts = dict(host._parameters), host.num_experts
        try:
            for name, value in kept.items():
                if name in self.tensors:
                    host._parameters[name] = getattr(self, name).to(dtype)
                elif value is not None and value.shape[:1] == (self.count,):
                    host._parameters[name] = value[self.chosen]
            host.num_experts = len(self.chosen)
            yield host.__dict__.get("_inner_forward") or types.MethodType(type(host).forward, host)
        finally:
            host._parameters.update(kept)
            host.num_experts = experts

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Write the copies over the host's experts."""
        for name in self.tensors:
            own = getattr(module, name)
            own.data[self.chosen] = getattr(self, name).to(own.dtype)


def add_chosen(model: nn.Module, owner: str, chosen: Mapping[str, Sequence[int]]) -> None:
    """Add copies at the mixtures where experts are chosen."""
    for path, sites in mixtures(model).items():
        if chosen.get(path):
            names = [str(site.tensor) for site in sites]
            add_hook(sites[0].module, owner, ChosenExperts(sites[0].module, names, sites[0].experts, chosen[path]), owner)


def refuse_changed(model: nn.Module, owner: str) -> None:
    """Refuse another method on the same expert tensors: its change would not reach the copies.

    Raises:
        ModelError: naming it.
    """
    for path, sites in mixtures(model).items():
        other = next((h.owner for h in hooks_of(sites[0].module, "weight")), None)
        if other is not None:
            raise ModelError(
                f"stack.{owner}: {other} changes the experts of {path} as well; leave them out of stack.{other}.target "
                f"(of ia3: stack.{other}.scaled=[key,value])"
            )


class RoutingScores:
    """Sums over samples of the mean gate, and of the share of selections, of every expert of a mixture."""

    def __init__(self, paths: Sequence[str], experts: int):
        self.gate = {path: torch.zeros(experts, dtype=torch.float64) for path in paths}
        self.selected = {path: torch.zeros(experts, dtype=torch.float64) for path in paths}
        self.samples, self.tokens = 0, 0

    def see(self, path: str, index: Tensor, weight: Tensor) -> None:
        """Add the routing (N, K) of a pass over samples laid out as the context says."""
        sample = samples_of(index.shape[0]).to(index.device)
        count = int(sample.max()) + 1 if sample.numel() else 0
        lengths = torch.bincount(sample[sample >= 0], minlength=count).double()
        real = sample >= 0
        each = 1.0 / lengths[sample[real]]
        picked, gates = index[real], weight[real].double()
        experts = len(self.gate[path])
        for sums, values in ((self.gate, gates), (self.selected, torch.ones_like(gates) * (gates > 0) / index.shape[1])):
            added = torch.zeros(experts, dtype=torch.float64, device=index.device)
            added.index_add_(0, picked.reshape(-1), (values * each[:, None]).reshape(-1))
            sums[path] += added.cpu()
        if path == next(iter(self.gate)):
            self.samples += count
            self.tokens += int(real.sum())


def samples_of(tokens: int) -> Tensor:
    """Return the number of the sample (row, or packed segment) of each token of a flattened pass; -1 on padding."""
    context = current()
    if context.layout is not None:
        found = torch.full((context.layout.rows, context.layout.columns), -1, dtype=torch.long)
        for number, segment in enumerate(context.layout.segments):
            found[segment.row, segment.start : segment.start + segment.length] = number
        if found.numel() == tokens:
            return found.reshape(-1)
    mask = context.attention_mask
    if mask is not None and mask.numel() == tokens:
        rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
        return rows.masked_fill(mask == 0, -1).reshape(-1)
    return torch.zeros(tokens, dtype=torch.long)


def smallest_set(scores: Tensor, p: float, least: int = 1) -> list[int]:
    """Return experts in descending order of their scores until these sum to p; at least `least`, ascending by number."""
    order = scores.argsort(descending=True, stable=True).tolist()
    chosen: list[int] = []
    total = 0.0
    for expert in order:
        # Sums of shares come out below p by rounding alone.
        if total >= p - 1e-9 and len(chosen) >= least:
            break
        chosen.append(expert)
        total += float(scores[expert])
    return sorted(chosen)
