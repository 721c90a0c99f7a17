"""Data-dependent initialization: from the layers' inputs, their gradients, or the weights before rounding.

Batches come from the probe every `calibrate` gets; with several processes each takes its share and the sums are added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import current
from llmrecipe.methods._engines import initialization
from llmrecipe.methods._engines.loftq_codes import Requantized, stored_weight
from llmrecipe.methods._engines.low_rank import LowRank, is_transposed, wide
from llmrecipe.methods._engines.quantized import dense_weight
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.sparse_method import base_weights
from llmrecipe.models.hooks.hook import Hook, all_hooks, hooks_of
from llmrecipe.models.hooks.host import add_hook, remove_hook
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.methods._base.method import Probe

OWNER = "input_moments"


@dataclass(frozen=True)
class BranchPlace:
    """A branch and the layer it is added to."""

    path: str
    module: nn.Module
    name: str
    hook: LowRank

    def rows(self, matrix: Tensor) -> Tensor:
        """Return the rows of a layer's matrix (out, in) that this branch adds to."""
        return matrix if self.hook.rows is None else matrix[self.hook.rows]

    def weight(self) -> Tensor:
        """Return the float32 weight (rows, in), as the layer computes with it."""
        return self.rows(wide(stored_weight(self.module)))


def places_of(model: nn.Module, owner: str) -> list[BranchPlace]:
    """Return every branch of a wrapper, in model order."""
    return [BranchPlace(path, m, name, hook) for path, m, name, hook in all_hooks(model, owner) if isinstance(hook, LowRank)]


def begin(model: nn.Module, owner: str, init: str, probe: Probe, batches: int, rho: float, iterations: int) -> None:
    """Initialize every branch of a wrapper from data, or from the weights before they were rounded.

    Args:
        init: one of `initialization.FROM_DATA`.
        batches: how many batches are looked at (rows, for CorDA).
        rho: for EVA, the largest rank of a layer as a multiple of its own.
        iterations: for LoftQ, how often codes and branch are chosen in turn.

    Raises:
        ModelError: no gradient arrived (lora_ga), or another method needs the codes that would change (loftq).
    """
    places = places_of(model, owner)
    with torch.no_grad():
        if init == "loftq":
            _loftq(owner, places, probe, iterations)
        elif init == "eva":
            _eva(model, places, probe, batches, rho)
        elif init == "lora_ga":
            _lora_ga(model, places, probe, batches)
        else:
            _corda(model, places, probe, batches, init)


def _loftq(owner: str, places: list[BranchPlace], probe: Probe, iterations: int) -> None:
    """Set s B A to the best approximation, at rank r, of what rounding removed from the weight.

    Every iteration after the first one first chooses new codes, nearest to W - s B A, and then A and B for them.

    Raises:
        ModelError: another method of the stack stands on the weight whose codes would change.
    """
    original = probe.original()
    layers: dict[int, list[BranchPlace]] = {}
    for place in places:
        layers.setdefault(id(place.module), []).append(place)
    for branches in layers.values():
        path, module = branches[0].path, branches[0].module
        codes = getattr(module, f"{owner}__codes", None)
        if isinstance(codes, Requantized):
            _stands_alone(path, module, owner)
        exact = wide(dense_weight(original.get_submodule(path))).to(branches[0].hook.A.device)
        for iteration in range(iterations):
            if iteration and isinstance(codes, Requantized):
                codes.quantize(exact - _change(branches, exact))
            lost = exact - stored_weight(module, torch.float32).to(exact)
            for place in branches:
                A, B = initialization.leading(place.rows(lost), place.hook)
                place.hook.A.copy_(A)
                place.hook.B.copy_(B)


def _change(branches: list[BranchPlace], weight: Tensor) -> Tensor:
    """Return (out, in) s B A of all branches of a layer, each at its rows."""
    total = torch.zeros_like(weight)
    for place in branches:
        rows = slice(None) if place.hook.rows is None else place.hook.rows
        total[rows] += place.hook.product().to(weight)
    return total


def _stands_alone(path: str, module: nn.Module, owner: str) -> None:
    other = next((p.owner for p in hooks_of(module) if hasattr(p, "weight_rows") and not p.mounted), None)
    if other is not None:
        raise ModelError(
            f"stack.{owner}.loftq_iter: it chooses other codes for {path}, and stack.{other} takes its start from those of the "
            "base; set loftq_iter to 1, or let the two target different layers"
        )


def _lora_ga(model: nn.Module, places: list[BranchPlace], probe: Probe, batches: int) -> None:
    """Initialize from the gradient of the mean loss with respect to each layer's weight, dropout off."""
    names = {id(weight.value): name for name, weight in base_weights(model).items()}
    wanted = {names[id(place.module.weight)] for place in places}
    weights = {name: weight for name, weight in base_weights(model).items() if name in wanted}
    with torch.enable_grad():
        totals = selection.score_entries(model, probe, weights, batches, rows=None, power="signed", reduction="mean")
    for place in places:
        name = names[id(place.module.weight)]
        gradient = totals[name].reshape(weights[name].shape) / probe.count(batches)
        gradient = place.rows(gradient.t() if is_transposed(place.module) else gradient)
        place.hook.start_at(*initialization.from_gradient(gradient, place.hook.A.shape[0]))


def _corda(model: nn.Module, places: list[BranchPlace], probe: Probe, rows: int, init: str) -> None:
    """Initialize from the second moments of each layer's inputs, every row of data scaled to a largest input of one."""
    moments = inputs(model, places, probe, rows, 1, lambda x: x / x.max().abs())
    for place in places:
        found = moments[id(place.module)]
        covariance = double(found.gram / found.calls)
        place.hook.start_at(*initialization.from_covariance(place.weight(), covariance, place.hook, last=init == "corda_kpm"))


def _eva(model: nn.Module, places: list[BranchPlace], probe: Probe, batches: int, rho: float) -> None:
    """Initialize from principal directions of each layer's inputs; ranks follow explained variance, their sum stays."""
    moments = inputs(model, places, probe, batches, None)
    directions, shares = [], []
    for place in places:
        found = moments[id(place.module)]
        most = round(place.hook.A.shape[0] * rho)
        axes, share = initialization.principal(found.count, double(found.total), double(found.gram), most)
        directions.append(axes)
        shares.append(share)
    ranks = initialization.distribute(shares, sum(place.hook.A.shape[0] for place in places))
    for place, axes, r in zip(places, directions, ranks, strict=True):
        if r == 0:
            remove_hook(place.module, place.name)
            continue
        place.hook.resize(r)
        place.hook.A.copy_(axes[:r])


def double(x: Tensor) -> Tensor:
    """Cast to float64 where the device has it: a decomposition of second moments needs the digits."""
    return x if x.device.type == "mps" else x.double()


class InputMoments:
    """Sums over the inputs x (n, in) of a layer."""

    def __init__(self) -> None:
        self.calls, self.count = 0, 0
        self.total: Tensor = torch.zeros(())
        self.gram: Tensor = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Add more inputs (n, in)."""
        x = wide(x)
        self.calls += 1
        self.count += len(x)
        self.total = x.sum(0) + self.total.to(x.device)
        self.gram = x.t() @ x + self.gram.to(x.device)

    def gather(self, probe: Probe) -> None:
        """Sum over all processes."""
        counts = probe.world.sum(torch.tensor([self.calls, self.count], dtype=torch.float64))
        self.calls, self.count = int(counts[0]), int(counts[1])
        self.total = probe.world.sum(double(self.total)).to(self.total)
        self.gram = probe.world.sum(double(self.gram)).to(self.gram)


class InputTap(Hook):
    """Shows a layer's inputs, padding left out, and changes nothing."""

    def __init__(self, see: Callable[[Tensor], None]):
        super().__init__()
        self.see = see
        self.mask: Tensor | None = None
        """(R, T) real positions of the inputs, where the context's are those of other rows (cross-attention)."""

    def before(self, x: Tensor) -> Tensor:
        """Record x (..., in) and return it unchanged."""
        mask = current().attention_mask if self.mask is None else self.mask
        flat = x.detach().reshape(-1, x.shape[-1])
        self.see(flat if mask is None or mask.shape != x.shape[:-1] else flat[mask.reshape(-1).bool()])
        return x


@contextlib.contextmanager
def tapped(places: list[BranchPlace], see: Callable[[int, Tensor], None]) -> Iterator[dict[str, InputTap]]:
    """Record the inputs of every layer during a pass; path -> recorder."""
    modules = {place.path: place.module for place in places}
    taps = {path: InputTap(lambda x, key=id(module): see(key, x)) for path, module in modules.items()}  # type: ignore[misc]
    try:
        for path, tap in taps.items():
            add_hook(modules[path], OWNER, tap, OWNER)
        yield taps
    finally:
        for module in modules.values():
            remove_hook(module, OWNER)


def inputs(
    model: nn.Module,
    places: list[BranchPlace],
    probe: Probe,
    batches: int,
    rows: int | None,
    scaled: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[int, InputMoments]:
    """Return moments of each layer's inputs on some batches of the training rows, dropout off, by the layer's identity.

    Args:
        rows: rows of a batch; None for the recipe's.
        scaled: the inputs of one batch -> what is summed.
    """
    crossed = {s.path for s in anatomy(model).sites if s.role in ("cross.k", "cross.v")}
    moments = {id(place.module): InputMoments() for place in places}
    world, rank = getattr(probe.world, "world", 1), getattr(probe.world, "rank", 0)
    with selection.mode(model, False), tapped(places, lambda key, x: moments[key].add(scaled(x))) as taps:
        for index, micros in enumerate(probe.groups(batches, rows)):
            for batch in micros if index % world == rank else ():
                for path, tap in taps.items():
                    tap.mask = batch.extra.get("encoder_mask") if path in crossed else None
                probe.loss(batch)
    if world > 1:
        for found in moments.values():
            found.gather(probe)
    return moments
