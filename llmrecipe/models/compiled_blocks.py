"""Compiled blocks: each block of a model traced by `torch.compile`, the rest of it left as it is.

A block is compiled with the hooks inside it, for rows of any number and length, and blocks of one kind share a graph. What
cannot be traced divides a block into several graphs and runs between them as ever: modules with a hook that does not say it
can be (`Hook.traceable`), attention of packed rows and under hooks. Only passes that train run compiled; sampling, whose shapes
change with every token, and evaluation do not. Gradient checkpointing stays outside: a block is computed again by its graph.

Source: regional compilation, as PyTorch's documentation of `torch.compile` calls it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from llmrecipe.core.errors import ModelError
from llmrecipe.models.hooks import between_graphs
from llmrecipe.models.hooks.hook import first_tensor, recording
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.random_state import random_state_kept
from llmrecipe.models.recompiled import KINDS, recompiled
from llmrecipe.models.resolve_class import first_line

SETTLED = 4
"""Steps after which no graph should be new; the first one runs uncompiled where its hooks are counted."""
AT_ONCE: dict[str, Any] = {
    name: True for name in ("force_non_lazy_backward_lowering",) if hasattr(torch._functorch.config, name)
}
"""Compiles a backward pass with its forward one, so that a failure is known before the step depends on it, where torch can."""


class CompiledBlocks:
    """The blocks of a model under `torch.compile`, and how often that compiled something.

    Args:
        named: whether a key says so: what cannot be compiled is an error then, and else runs as it is.
        selective: whether graphs keep products and fused attention alone for the backward pass.
        backend: what compiles the graphs.
    """

    def __init__(self, blocks: Iterable[nn.Module], named: bool, selective: bool = False, backend: str = "inductor"):
        self.named, self.on, self.tried, self.reported = named, True, False, False
        self.graphs = self.steps = self.settled = self.full = 0
        self._full_before = _pieces_full()
        self.report: Callable[[str], None] = lambda text: None
        self.blocks = list({id(block): block for block in blocks}.values())
        inner: Any = torch._dynamo.lookup_backend(backend)

        def counted(graph: object, inputs: object, **options: object) -> object:
            with torch._functorch.config.patch(aggressive_recomputation=selective, **AT_ONCE):
                made = inner(graph, inputs, **options)
            self.graphs += 1
            return made

        self._traced = functools.partial(recompiled, dynamic=True, backend=counted)
        self._computed = self._traced(_computed)
        # A number such as alpha / r is the same in every step; traced as one that may change, it makes each graph twice.
        torch._dynamo.config.specialize_float = True
        between_graphs.apart = torch._dynamo.disable(_called)
        for block in self.blocks:
            if selective:
                whole: Any = block
                whole._gradient_checkpointing_func = functools.partial(self._kept, whole._gradient_checkpointing_func)
            # Where `nn.Module.__call__` looks for a compiled form; copies of a module leave it out.
            block.__dict__["_compiled_call_impl"] = self._call(block, self._traced(block._call_impl))

    def _call(self, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return what a block is called by: compiled as a whole, or inside of what recomputes it."""
        plain: Any = block

        def call(*args: object, **kwargs: object) -> object:
            if not (self.on and torch.is_grad_enabled()) or recording():
                return plain._call_impl(*args, **kwargs)
            if not (block.training and getattr(block, "gradient_checkpointing", False)):
                return self._tried(compiled, plain._call_impl, args, kwargs)
            checkpoint = plain._gradient_checkpointing_func
            plain._gradient_checkpointing_func = functools.partial(self._recomputed, checkpoint)
            try:
                return plain._call_impl(*args, **kwargs)
            finally:
                plain._gradient_checkpointing_func = checkpoint

        return call

    def _recomputed(self, checkpoint: Callable[..., Any], compute: functools.partial[Any], *args: object) -> object:
        """Checkpoint a block that runs compiled both times: `torch.utils.checkpoint` itself is not traced."""

        ran: list[Callable[..., Any]] = []

        def computed(*args: object) -> object:
            given = (compute.func, compute.args, compute.keywords, args)
            if ran:
                # As the first time, whatever has failed since: both passes keep the same tensors.
                return ran[0](*given)
            out = self._tried(self._computed, _computed, given, {})
            ran.append(self._computed if self.on else _computed)
            return out

        return checkpoint(computed, *args)

    def _kept(self, checkpoint: Callable[..., Any], compute: Callable[..., Any], *args: object) -> object:
        """Compute a block once where its graph says what is computed again."""
        return compute(*args) if self.on and not recording() else checkpoint(compute, *args)

    def _tried(
        self, compiled: Callable[..., Any], plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        if not self.on:
            return plain(*args, **kwargs)
        try:
            if not (self.named or self.tried):
                self.tried = True
                _both_passes(compiled, args, kwargs)
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._failed(error)
            return plain(*args, **kwargs)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a failed compilation of a backward pass inside the context into an error that says what to set.

        Raises:
            ModelError: there was one.
        """
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ModelError(f"model.compile: {_reason(error)}; set model.compile=off") from error

    def _failed(self, error: Exception) -> None:
        """Run uncompiled from here on, and say so.

        Raises:
            ModelError: a key names compiled blocks.
        """
        text = _reason(error)
        if self.named:
            raise ModelError(f"model.compile=blocks: {text}; set model.compile=off") from error
        self.remove()
        self.report(f"model.compile: {text}; the run goes on without")

    def __deepcopy__(self, memo: dict[int, object]) -> CompiledBlocks:
        """Return the same object: a copy of a model is not compiled."""
        return self

    def remove(self) -> None:
        """Leave the blocks as they were."""
        self.on = False
        between_graphs.apart = None
        for block in self.blocks:
            block.__dict__.pop("_compiled_call_impl", None)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Compile nothing inside: probes have shapes that no batch has."""
        kept, self.on = self.on, False
        try:
            yield
        finally:
            self.on = kept

    def after_step(self, step: int) -> None:
        """Count a step, and report, once, that something was compiled again after the first ones, or no longer is.

        Args:
            step: its number in the run.
        """
        self.steps += 1
        full = _pieces_full() - self._full_before
        if full > self.full == 0:
            self.report(
                f"model.compile: at step {step} a piece of code had {KINDS} graphs, and runs uncompiled where none fits "
                "(set model.compile=off, or give the run fewer kinds of batches)"
            )
        self.full = max(self.full, full)
        if self.steps <= SETTLED:
            self.settled = self.graphs
        elif self.graphs > self.settled and not self.reported:
            self.reported = True
            more = f"{self.graphs - self.settled} more graphs after the first {SETTLED} steps"
            self.report(
                f"model.compile: step {step} compiled {more}; each costs as much as the first (set model.compile=off where "
                "this goes on)"
            )

    def summary(self) -> str:
        """Return in one line what was compiled."""
        later = self.graphs - self.settled
        full = f"; {self.full} pieces of code with more kinds than graphs" if self.full else ""
        return f"blocks compiled: {self.graphs} graphs, {later or 'none'} of them after the first {SETTLED} steps{full}"


def _pieces_full() -> int:
    """Return how many pieces of code this process compiles no further, because they have all the graphs they may have."""
    given_up = torch._dynamo.utils.counters["unimplemented"]
    return sum(count for text, count in given_up.items() if "limit exceeded" in text)


def _called(function: Callable[..., Any], *args: object, **kwargs: object) -> object:
    return function(*args, **kwargs)


def _computed(function: Callable[..., Any], first: tuple[Any, ...], named: dict[str, Any], args: tuple[Any, ...]) -> object:
    return function(*first, *args, **named)


def _both_passes(compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compile a block and its backward pass on a copy of its inputs, before anything of a step depends on it."""

    def apart(value: Tensor) -> Tensor:
        return value.detach().requires_grad_(value.is_floating_point())

    own, named = tree_map_only(Tensor, apart, (args, kwargs))
    device = next(value for value in tree_leaves((own, named)) if isinstance(value, Tensor)).device
    with random_state_kept(device):
        out = first_tensor(compiled(*own, **named))
        wanted = [value for value in tree_leaves((own, named)) if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.grad(out.float().sum(), wanted, allow_unused=True)


def _reason(error: Exception) -> str:
    return f"a block cannot be compiled ({type(error).__name__}: {first_line(error)})"


def compiled_blocks(model: nn.Module, named: bool, selective: bool = False, backend: str = "inductor") -> CompiledBlocks | None:
    """Compile the blocks of a model; None where it has none and no key names them.

    Raises:
        ModelError: it has none, and a key names them.
    """
    try:
        blocks = [site.module for site in anatomy(model).sites if site.role == "block"]
    except ModelError:
        blocks = []
    if blocks:
        return CompiledBlocks(blocks, named, selective, backend)
    if named:
        raise ModelError(
            "model.compile=blocks: this model's blocks are not known (model.anatomy names them); set model.compile=off"
        )
    return None
