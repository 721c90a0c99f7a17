"""What verifications work on: a short training of the recipe in a temporary folder, and its model in memory."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch
from llmrecipe.recipe.validate import instantiate
from llmrecipe.training.train import train

if TYPE_CHECKING:
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.training.run import Run

BOUND, COARSE = 1e-3, 5e-2
"""Largest difference that passes, as a share of the largest value: in float32, and where values have 8 to 11 bits."""
STEPS, HALF = 4, 2
ROWS = 4
SEED = 20


@dataclass
class Bench:
    """A recipe under verification."""

    composition: Composition
    """The recipe, with `short_words` applied."""
    folder: Path
    """A temporary folder."""
    finished: Path | None = None
    """The run directory that is verified; None for a recipe."""
    given: Composition | None = None
    """The recipe as it is, without the words of the short training."""

    @property
    def directory(self) -> Path:
        """Return the run directory of the short training."""
        return self.folder / "run"

    @functools.cached_property
    def run(self) -> Run:
        """Train `STEPS` steps, with a checkpoint after `HALF`, and return the finished run.

        Raises:
            ProofError: its first update did not do what the recipe says.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            return train(self.composition)

    @property
    def bound(self) -> float:
        """Return the largest difference that rounding explains, as a share of the largest value."""
        low = self.run.roles.engine.autocast is not None or any(
            p.element_size() < 4 for p in self.run.model.parameters() if p.dtype != torch.float64
        )
        return COARSE if low else BOUND

    @contextlib.contextmanager
    def probing(self, packing: bool | None = None, rows: int | None = None) -> Iterator[Run]:
        """Yield the run with dropout off and without events, laid out as given; everything is put back.

        Args:
            packing: whether micro-batches are packed; None keeps what the recipe does.
            rows: most rows of a micro-batch; None puts all of them in one.
        """
        run = self.run
        roles = run.roles
        kept = {name: getattr(roles, name) for name in ("packing", "micro_rows", "micro_tokens", "events", "prepared")}
        state = run.objective.state()
        roles.packing = roles.packing if packing is None else packing
        roles.micro_rows, roles.micro_tokens, roles.events, roles.prepared = rows, None, None, roles.engine
        try:
            with roles.evaluating(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                yield run
        finally:
            for name, value in kept.items():
                setattr(roles, name, value)
            run.objective.load_state(state)

    def rows(self) -> list[dict[str, Any]]:
        """Return the token rows of the probe batch: the first that were trained on, which any reference has scored."""
        count = min(ROWS, len(self.run.data), STEPS * self.run.recipe.batch.size)
        return [self.run.data[int(i)] for i in self.run.order(0)[:count]]

    def micros(self, run: Run) -> list[Batch]:
        """Return the micro-batches of the probe rows; call inside `probing`."""
        return next(iter(run.objective.batches(iter([self.rows()]), run.roles)))

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of what trains, as the last backward pass left them, and free them."""
        found = {n: p.grad.detach().clone() for n, p in self.run.model.named_parameters() if p.grad is not None}
        self.run.model.zero_grad(set_to_none=True)
        return found

    @property
    def by_gradient(self) -> bool:
        """Return whether the recipe trains by gradients."""
        return self.run.optimizer is not None


def short_words(composition: Composition, folder: Path) -> list[str]:
    """Return the overrides that make a training of a recipe short and quiet."""
    recipe = composition.recipe
    size = min(recipe.batch.size, ROWS)
    words = [
        f"steps={STEPS}", f"run.dir={folder / 'run'}", f"save.every={HALF}", f"batch.size={size}", "schedule=constant",
        "eval.at_start=false", "eval.every=null", "eval.batches=1", "eval.load_best=false", "eval.patience=null",
        "eval.test=false", "eval.samples=0", "eval.metrics=[]", "log.live=off", "log.trackers=[]",
    ]  # fmt: skip
    if recipe.batch.warmup is not None:
        # One that ends after the checkpoint from which the bench resumes.
        start = min(recipe.batch.warmup.start, size - 1)
        words += [f"batch.warmup.start={start}", f"batch.warmup.batches={STEPS}", "batch.warmup.increment=1"]
    if not recipe.data.streaming:
        words.append(f"data.limit={min(recipe.data.limit or 256, 256)}")
    if recipe.objective.get("max_new_tokens", 0) > 12 and instantiate(recipe).objective.generates():
        words.append("objective.max_new_tokens=12")
    return words


def largest(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of tensors by name, as a share of the largest value of all, and where it is."""
    names = sorted({*wanted, *found})
    scale = max((float(t.double().abs().max()) for t in wanted.values() if t.numel()), default=0.0) or 1.0
    worst, where = 0.0, ""
    for name in names:
        if name not in wanted or name not in found:
            return float("inf"), f"{name} is on one side only"
        apart = float((wanted[name].double() - found[name].double()).abs().max()) / scale if wanted[name].numel() else 0.0
        if not apart <= worst:
            worst, where = apart, name
    return worst, where
