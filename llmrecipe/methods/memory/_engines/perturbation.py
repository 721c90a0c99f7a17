"""How the forward passes of a zeroth-order step see theta + scale z: the tensors moved in place, or layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmrecipe.methods.memory._engines.zeroth_order import Noise, Trained, shift
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.shared_module import shared_modules


class Perturbation(Protocol):
    """Moves the trained tensors along one z."""

    def aim(self, step: int, sample: int) -> None:
        """Choose z; the tensors are at theta."""

    def move(self, scale: float) -> None:
        """Put the model at theta + scale z; 0 brings theta back."""

    def include_missed(self) -> bool:
        """Include trained tensors that the pass since the last `move` left out; return whether it has to be repeated."""

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for all passes of a step."""


def moved(parameter: Tensor) -> None:
    """Mark a parameter as changed: writes through `.data` do not, and sparse deltas look at its version."""
    torch.autograd.graph.increment_version(parameter)


class InPlace:
    """theta itself is moved: + eps, - 2 eps, + eps. No extra memory; exact up to the rounding of three additions."""

    def __init__(self, trained: Sequence[Trained], noise: Noise):
        self.trained = trained
        self.noise = noise
        self.at = 0.0
        self.address = (0, 0)

    def aim(self, step: int, sample: int) -> None:
        """Choose z."""
        self.address = (step, sample)

    def move(self, scale: float) -> None:
        """Shift by the difference to where theta is now."""
        if scale != self.at:
            for item in self.trained:
                shift(item.parameter.data, item.name, self.noise, *self.address, scale - self.at)
                moved(item.parameter)
        self.at = scale

    def include_missed(self) -> bool:
        """Return False: every reader sees the moved tensors."""
        return False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Bring theta back when a pass raises."""
        try:
            yield
        finally:
            self.move(0.0)


class Layerwise:
    """Each module computes with W + scale z in a temporary and gets its own tensor object back afterwards: exact.

    The extra memory is one module's weights. Tensors that are not read by their own module's forward (injected hooks, tensors
    a forward pass did not visit) are swapped for the whole pass instead. A tensor that a module owns *and* another module reads
    directly during the same pass would be perturbed for its owner only; use `inplace` for such models.
    """

    def __init__(self, model: nn.Module, trained: Sequence[Trained], noise: Noise):
        self.noise = noise
        self.scale = 0.0
        self.address = (0, 0)
        self.hosts, self.apart = _split(model, trained)
        self.live = {item.name: item.parameter.data for item in trained}
        self.kept: dict[str, Tensor] = {}
        self.depth: dict[int, int] = {}
        self.visited: set[str] = set()

    def aim(self, step: int, sample: int) -> None:
        """Choose z."""
        self.address = (step, sample)

    def move(self, scale: float) -> None:
        """Record the scale for the modules; swap what no module swaps."""
        for item in self.apart:
            self._restore(item)
        self.scale = scale
        self.visited.clear()
        for item in self.apart:
            self._swap(item)

    def include_missed(self) -> bool:
        """Swap the tensors of hosts that were not called for entire passes from then on; return whether there were any."""
        unseen = [(m, items) for m, items in self.hosts.items() if any(i.name not in self.visited for i in items)]
        for module, items in unseen:
            self.hosts[module] = [i for i in items if i.name in self.visited]
            self.apart += [i for i in items if i.name not in self.visited and i not in self.apart]
        return bool(unseen)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Install the hooks for the passes of one step."""
        # Whoever trains or restores between steps may have given a parameter other data.
        every = [item for items in self.hosts.values() for item in items] + self.apart
        self.live = {item.name: item.parameter.data for item in every}
        try:
            with bracket(self.hosts, self._enter, self._leave):
                yield
        finally:
            for item in every:
                self._restore(item)
            self.scale = 0.0
            self.depth.clear()

    def _enter(self, module: nn.Module) -> None:
        self.depth[id(module)] = self.depth.get(id(module), 0) + 1
        for item in self.hosts[module]:
            self.visited.add(item.name)
            self._swap(item)

    def _leave(self, module: nn.Module) -> None:
        self.depth[id(module)] -= 1
        if self.depth[id(module)] == 0:
            for item in self.hosts[module]:
                self._restore(item)

    def _swap(self, item: Trained) -> None:
        own = self.live[item.name]
        # Other data means that somebody computes with other weights on purpose (the policy of step 0): not ours to move.
        if self.scale == 0.0 or item.name in self.kept or item.parameter.data.data_ptr() != own.data_ptr():
            return
        away = own.clone()
        shift(away, item.name, self.noise, *self.address, self.scale)
        self.kept[item.name] = own
        item.parameter.data = away
        moved(item.parameter)

    def _restore(self, item: Trained) -> None:
        own = self.kept.pop(item.name, None)
        if own is not None:
            item.parameter.data = own
            moved(item.parameter)


def _split(model: nn.Module, trained: Sequence[Trained]) -> tuple[dict[nn.Module, list[Trained]], list[Trained]]:
    """Return (module -> tensors its own forward reads, tensors to swap for the entire pass)."""
    by_id = {id(item.parameter): item for item in trained}
    inside = {id(m) for _, _, _, hook in all_hooks(model) for m in hook.modules()}
    inside |= {id(m) for _, shared in shared_modules(model) for m in shared.modules()}
    hosts: dict[nn.Module, list[Trained]] = {}
    for module in model.modules():
        own = [by_id[id(p)] for p in module._parameters.values() if p is not None and id(p) in by_id]
        if own and id(module) not in inside:
            hosts[module] = own
    covered = {item.name for items in hosts.values() for item in items}
    return hosts, [item for item in trained if item.name not in covered]


@contextlib.contextmanager
def bracket(modules: Iterable[nn.Module], enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Run `enter(module)` before and `leave(module)` after every forward of the modules, also after one that raises."""
    handles: list[Any] = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda m, _: enter(m), prepend=True))
            handles.append(module.register_forward_hook(lambda m, *_: leave(m), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
