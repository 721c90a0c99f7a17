"""A stand-in for a run: the parts an update rule reads, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._base.update_rule import StepContext
from llmrecipe.methods.memory.mezo import Mezo
from llmrecipe.objectives.base import Loss


class Alone:
    """One process."""

    world, rank = 1, 0

    def sum(self, value: Tensor) -> Tensor:
        return value

    def passes(self, own: int) -> int:
        return own


class Plain:
    """An objective on a model without a loss of its own."""

    def training_loss(self, micro: Any, roles: Any) -> Loss:
        return self.loss(micro, roles)  # type: ignore[attr-defined]


class Squares(Plain):
    """Summed squared error of micro-batches (x, y)."""

    def __init__(self) -> None:
        self.modes: list[bool] = []
        self.with_graph = 0

    def weight(self, micro: Any) -> float:
        return float(len(micro[0]))

    def loss(self, micro: Any, roles: Any) -> Loss:
        x, y = micro
        out = roles.prepared(x)
        self.modes.append(roles.engine.training)
        total = (out - y).square().sum()
        self.with_graph += total.requires_grad
        return Loss(total, {"error": (total, len(x))})


class Accuracy(Plain):
    """Minus the number of right answers: piecewise constant, no gradient anywhere."""

    def has_gradient(self) -> bool:
        return False

    def weight(self, micro: Any) -> float:
        return float(len(micro[0]))

    def loss(self, micro: Any, roles: Any) -> Loss:
        x, label = micro
        return Loss(-(roles.prepared(x).argmax(-1) == label).sum())


class Next(Plain):
    """Next-token loss of a Transformers model on a (1, T) tensor of ids."""

    def weight(self, micro: Tensor) -> float:
        return float(micro.shape[1] - 1)

    def loss(self, micro: Tensor, roles: Any) -> Loss:
        logits = roles.prepared(input_ids=micro).logits[0, :-1]
        return Loss(nn.functional.cross_entropy(logits.float(), micro[0, 1:], reduction="sum"))


@dataclass
class FakeRun:
    model: nn.Module
    stack: Stack
    dir: Any
    objective: Any = field(default_factory=Squares)
    runtime: Any = field(default_factory=Alone)
    learning_rate: float = 0.1
    steps: int = 10
    seed: int = 7

    def __post_init__(self) -> None:
        self.roles = SimpleNamespace(engine=self.model, prepared=self.model, device=torch.device("cpu"))
        self.progress = SimpleNamespace(step=0)

    def total_weight(self, micros: list[Any]) -> float:
        own = sum(self.objective.weight(m) for m in micros)
        return float(self.runtime.sum(torch.tensor([own], dtype=torch.float64)))

    def step(self, micros: list[Any]) -> Any:
        context = StepContext(
            self.progress.step, self.steps, self.learning_rate, self.seed, self.dir.path, self.model, self.stack, None,
            self.objective, self.roles, self.runtime, self.total_weight, lambda: 0.0,
        )  # fmt: skip
        result = self.stack.rule()(context, micros)
        self.progress.step += 1
        return result


def make_run(
    model: nn.Module, path: Path, wrappers: tuple[Any, ...] = (), run: dict[str, Any] | None = None, **mezo: Any
) -> FakeRun:
    """A fake run with MeZO, attached."""
    stack = Stack([*wrappers, Mezo(name="mezo", **mezo)])
    stack.attach(model)
    return FakeRun(model, stack, SimpleNamespace(path=path), **(run or {}))
