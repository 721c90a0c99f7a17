"""Every registered wrapper on every kind of model: what the matrices of promises stand on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.data.collate import Batch, Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from tests.contract import IMAGES, KINDS, MIXTURES, OPTIONS
from tests.methods.additive.harness import fill, model_of

FAMILIES = ("llama", "bert", "t5", "bart", "native-decoder", "native-encoder", "native-encoder_decoder", "native-mixture")
"""A decoder with grouped keys, a post-norm encoder, two encoder-decoders, and the seed's transformer in three kinds and with
experts."""
GENERATE = tuple(f for f in FAMILIES if f not in ("bert", "native-encoder"))
STAGES = {k: str(registry.spec("stack", k).facts.get("stage")).removeprefix("Stage.") for k in KINDS}
CHANGES = [k for k in KINDS if STAGES[k] in ("INJECT", "SELECT", "None") and k not in IMAGES]
"""Wrappers that bring or open what trains in models that read text."""
BASES = [k for k in KINDS if STAGES[k] == "BASE"]
EXACT: dict[str, dict[str, Any]] = {"dora": {"detach_norm": False}, "diff_pruning": {"alpha_init": 0.5, "alpha_lr_scale": 1.0}}
"""Options under which the backward pass is the derivative of the forward one: DoRA treats its norm as a constant, and gates of
diff pruning that are shut have no slope."""
ROWS = [[3, 5, 6, 7, 8, 9, 2], [3, 12, 13, 2], [3, 20, 21, 22, 23, 24, 25, 26, 2]]
PROMPT = [3, 2, 5]
SOURCES = [[5, 40, 41, 2], [6, 42, 2], [7, 43, 44, 45, 46, 2]]
"""What the encoder of a pair model reads."""


def matrix(kinds: list[str], families: tuple[str, ...]) -> list[Any]:
    """Every (wrapper, family); each wrapper on one family, and so each family with some, runs in the fast suite."""
    return [
        pytest.param(kind, family, id=f"{kind}-{family}", marks=() if (i + j) % len(families) == 0 else pytest.mark.slow)
        for i, kind in enumerate(kinds)
        for j, family in enumerate(families)
        if kind not in MIXTURES or family.endswith("mixture")
    ]


@dataclass
class Cell:
    """A wrapper on a model."""

    model: nn.Module
    stack: Stack
    engine: Engine

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, batch: Batch | None = None) -> Tensor:
        """Mean negative log-probability of the targets; a hypermodel reads examples first."""
        batch = batch or batch_of(self.model)
        if any(wrapper.reads_examples for wrapper in self.stack):
            batch = batch.with_extra(example_ids=torch.tensor([[5, 9, 12, 2]]), example_mask=torch.ones(1, 4, dtype=torch.long))
        return -self.engine(batch)["logprobs"].mean()

    def gradients(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """Fresh gradients by name; zeros where none arrives."""
        self.model.zero_grad(set_to_none=True)
        (self.loss(batch) + self.stack.penalty(self.model)).backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in self.trained().items()}


def batch_of(model: nn.Module, packing: bool = False, rows: list[int] | None = None) -> Batch:
    """Unequal rows with prompts, every token a target, on the layout asked for."""
    chosen = list(range(len(ROWS))) if rows is None else rows
    sequences = [Sequence(ROWS[i], [1] * len(ROWS[i]), prompt=PROMPT[i]) for i in chosen]
    if not getattr(model.config, "is_encoder_decoder", False):
        return pack(sequences) if packing else pad(sequences, 0)
    wide = max(len(SOURCES[i]) for i in chosen)
    ids = torch.tensor([SOURCES[i] + [0] * (wide - len(SOURCES[i])) for i in chosen])
    mask = torch.tensor([[1] * len(SOURCES[i]) + [0] * (wide - len(SOURCES[i])) for i in chosen])
    return pad(sequences, 0, extra={"encoder_ids": ids, "encoder_mask": mask})


def probe_of(model: nn.Module, engine: Engine) -> Probe:
    """A probe over the rows above."""

    def batches(n: int, rows: int | None = None) -> Iterator[Batch]:
        size = rows or len(ROWS)
        for i in range(n):
            yield batch_of(model, rows=[(i * size + j) % len(ROWS) for j in range(size)])

    def loss(batch: Batch) -> Tensor:
        return -engine(batch)["logprobs"].mean()

    return Probe(batches, loss, None, lambda b: float(b.target.numel()), rows=len(ROWS), steps=10, engine=Engine(model))


def wrapper_of(kind: str, name: str = "", **options: Any) -> Any:
    """A wrapper with the options small models need."""
    return registry.load_class("stack", kind)(name=name or kind, **{**OPTIONS.get(kind, {}), **options})


def put(model: nn.Module, *wrappers: Any, autocast: torch.dtype | None = None, original: Any = None) -> Cell:
    """A stack on a model, its data-dependent choices made; `original` gives the model before it was quantized."""
    stack = Stack(list(wrappers))
    torch.manual_seed(1)
    stack.attach(model)
    engine = Engine(model, autocast).eval()
    probe = probe_of(model, engine)
    probe.original = original
    stack.calibrate(model, probe)
    return Cell(model, stack, engine)


def cell(kind: str, family: str, moved: bool = False, **options: Any) -> Cell:
    """A wrapper on a fresh model of a family; `moved` from its start, so that every part of its formula shows."""
    made = put(model_of(family), wrapper_of(kind, **options))
    made.stack.before_step(made.model, 0)
    if moved:
        fill(made.model)
        refresh(made.stack, made.model)
    return made


def refresh(stack: Stack, model: nn.Module) -> None:
    """Methods that write what they learned into base weights do so after a step."""
    for wrapper in stack:
        again = getattr(wrapper, "refresh", None)
        if callable(again):
            again(model)


def slopes(made: Cell) -> tuple[float, float]:
    """(central difference, product with the gradient) of the loss in float64.

    Along one direction to which every trained tensor contributes about 1: a wrong one shows, whatever its size.
    """
    made.model.double()
    refresh(made.stack, made.model)
    grads = made.gradients()
    assert grads, "nothing trains"
    generator = torch.Generator().manual_seed(5)
    direction = {}
    for name, grad in grads.items():
        noise = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        size = float(grad.norm())
        along = grad / size if size > 1e-12 else torch.zeros_like(grad)
        direction[name] = (along + 0.5 * noise / noise.norm()) / max(size, 1e-2)
    wanted = sum(float((grads[n] * d).sum()) for n, d in direction.items())
    values = []
    eps = 1e-7
    trained = made.trained()
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for name, d in direction.items():
                trained[name].add_(sign * eps * d)
            refresh(made.stack, made.model)
        values.append(float((made.loss() + made.stack.penalty(made.model)).detach()))
    slope = (values[0] - values[1]) / (2 * eps)
    return slope, wanted


def wide_norms(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Transformers takes the mean of an RMS norm in float32 whatever the model: noise in a difference of float64 losses."""

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            monkeypatch.setattr(type(module), "forward", norm)
