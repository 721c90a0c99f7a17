"""MeZO: training with forward passes only."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.foreign import stored_count, stored_number
from llmrecipe.core.option_types import Field, Literal, OpenFraction, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.late_values import MetricSums
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._base.update_rule import StepContext, StepResult
from llmrecipe.methods.memory._engines.perturbation import InPlace, Layerwise, Perturbation
from llmrecipe.methods.memory._engines.replay import History, header_of, recall
from llmrecipe.methods.memory._engines.zeroth_order import (
    Noise,
    StepEstimate,
    Trained,
    UpdateMoments,
    float32,
    projected_gradient,
    update,
)
from llmrecipe.models.sharded import is_sharded

if TYPE_CHECKING:
    from torch import nn

    from llmrecipe.data.collate import Batch


NEGLIGIBLE = 1e-3
"""Estimates weighted less than this share are left out of a recomputed moment."""
HISTORY_FILE = "mezo_history.bin"


@register
class Mezo(Wrapper):
    """MeZO: theta <- theta - lr (g z + decay theta), g = (L(theta + eps z) - L(theta - eps z)) / (2 eps), z ~ N(0, I).

    Two forward passes a sample on the same batch, dropout off; no activations, no gradients and, for SGD, no optimizer state:
    memory is that of inference. z is drawn again from its address instead of being kept. Trains whatever the rest of the stack
    opens (everything in an empty one), also on objectives without a gradient. The reported loss is the mean of both sides.
    Every process draws the same z; they exchange two numbers a sample. Where processes divide the weights, each moves its part
    by its part of z, in place. `optim` gives the learning rate, nothing else.

    Works when the task is put as text to complete (no new heads) and training is long: 20,000 steps of 16 rows; full weights
    lr 1e-6 eps 1e-3, LoRA lr 1e-4 eps 1e-2, prefixes lr 1e-2 eps 1e-1.

    Paper: Fine-Tuning Language Models with Just Forward Passes (arXiv 2305.17333). Departures: noise by address instead of a
    reseeded global generator; exact restoration (`layerwise`); stochastic rounding of 16-bit weights; moments recomputed from
    the history instead of stored; gradient accumulation and data parallelism.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero2", "zero3")
    unsharded: ClassVar[str] = "zero1 divides the state of the optimizer, and it keeps none"
    whole_options: ClassVar[dict[str, dict[str, str]]] = {
        "perturb": {"layerwise": "it gives each module a moved copy of its weights, which no process has whole; use inplace"}
    }
    waits: ClassVar[str] = "the estimated slope, which is written to a file before the weights move"
    stage: ClassVar[Stage] = Stage.RULE
    mergeable: ClassVar[bool] = True
    masters: ClassVar[bool] = False
    gradient_free: ClassVar[bool] = True

    eps: PositiveFloat = 1e-3
    """Size of the perturbation."""
    n: PositiveInt = 1
    """Independent z averaged in one step (n-SPSA); each costs two forward passes."""
    n_schedule: Literal["constant", "linear"] = "constant"
    """linear: from one sample in the first step to `n` in the last."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """What becomes of the estimates: the estimate itself, its running mean, or Adam's ratio."""
    beta1: OpenFraction = 0.9
    """Decay of the running mean."""
    beta2: OpenFraction = 0.99
    """Decay of the running square (adam)."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the running square (adam)."""
    moments: Literal["recompute", "store"] = "recompute"
    """recompute: from the last estimates, z drawn again for each; store: float32 tensors kept in memory."""
    history: PositiveInt | None = None
    """Estimates a recomputed moment reaches back; default: until they weigh less than 0.001 (66 for 0.9)."""
    perturb: Literal["auto", "inplace", "layerwise"] = "auto"
    """inplace moves the weights; layerwise gives each module a moved copy and restores exactly; auto: layerwise for 16 bit."""
    rng: Literal["device", "cpu"] = "device"
    """Where z is drawn; cpu gives the same numbers on every machine, slowly."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay."""
    decay_exclude: list[str] = Field(default_factory=lambda: ["bias", "norm"])
    """Tensors that do not decay, by a part of their name or of their module's class."""
    clip_projected_grad: PositiveFloat | None = None
    """Largest |g|."""
    store_history: bool = True
    """Write mezo_history.bin (10 bytes a step), from which `replay` makes the weights again."""

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse layerwise moves under a penalty on weights, and stored moments without the history that rebuilds them."""
        if self.perturb == "layerwise" and (named := penalized(wrappers)):
            raise RecipeError(
                f"stack.{self.name}.perturb: the penalty of {', '.join(named)} reads weights outside their modules, where "
                "layerwise does not perturb them; use inplace"
            )
        if self.window() is None and not self.store_history:
            raise RecipeError(
                f"stack.{self.name}.moments: stored moments are rebuilt from the history on resume; set store_history=true"
            )

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add nothing.

        Raises:
            RecipeError: the model recomputes activations, which only a backward pass would need.
        """
        if _recomputes(model):
            raise RecipeError(_CHECKPOINTING)

    def merge(self, model: nn.Module) -> None:
        """Do nothing: the weights themselves were trained."""

    def rule(self) -> ZerothOrder:
        """Return the update rule."""
        return self._update

    @functools.cached_property
    def _update(self) -> ZerothOrder:
        return ZerothOrder(self)

    def window(self) -> int | None:
        """Return how many estimates a recomputed moment reaches back (1 for SGD); None where moments are stored."""
        if self.optimizer == "sgd":
            return 1
        if self.moments == "store":
            return None
        slowest = max(self.beta1, self.beta2 if self.optimizer == "adam" else 0.0)
        return self.history or (max(1, math.ceil(math.log(NEGLIGIBLE) / math.log(slowest))) if slowest else 1)

    def samples(self, step: int, steps: int) -> int:
        """Return n of a step."""
        return self.n if self.n_schedule == "constant" else max(1, math.ceil(self.n * (step + 1) / max(steps, 1)))

    def state(self) -> dict[str, Any]:
        """Return the estimates that still weigh in a recomputed moment."""
        return {"past": [[e.step, e.lr, list(e.g)] for e in self._update.past]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the estimates."""
        self._update.past = [
            StepEstimate(
                stored_count(step, "a step"),
                stored_number(lr, "a learning rate"),
                tuple(stored_number(value, "a projected gradient") for value in g),
            )
            for step, lr, g in state.get("past", [])
        ]

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: no gradients, no saved activations, and no optimizer state unless moments are stored."""
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tensors = {"sgd": 0, "momentum": 1, "adam": 2}[self.optimizer] if self.moments == "store" else 0
        return {"optimizer_bytes": 4 * tensors * count, "gradient_bytes": 0, "saved_bytes": 0}


_CHECKPOINTING = "model.gradient_checkpointing: zeroth-order training keeps no activations to recompute; set it to false"


def penalized(wrappers: Iterable[Wrapper]) -> list[str]:
    """Return the names of the wrappers whose penalty adds a term."""
    return [w.name for w in wrappers if w.penalizes()]


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class ZerothOrder:
    """One run's update rule: the state it keeps between steps."""

    def __init__(self, config: Mezo):
        self.config = config
        self.past: list[StepEstimate] = []
        self.noise: Noise
        self.mode: Perturbation
        self.trained: list[Trained] = []
        self.file: History | None = None
        self.stored: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
        self.moments = UpdateMoments(config.optimizer, config.beta1, config.beta2, config.adam_eps, config.weight_decay)

    @torch.no_grad()
    def __call__(self, context: StepContext, micros: list[Batch]) -> StepResult:
        """Estimate and move.

        Raises:
            RecipeError: something in the recipe needs gradients.
        """
        self._prepare(context)
        step = context.step
        count = self.config.samples(step, context.steps)
        sides, metrics = self._sides(context, micros, step, count)
        weight = max(context.weight(micros), 1e-12)
        means = (context.runtime.sum(sides[:, :, 0].reshape(-1)) / weight).reshape(count, 2).tolist()
        full = [[means[i][s] + float(sides[i, s, 1]) for s in (0, 1)] for i in range(count)]
        loss = sum(sum(pair) for pair in means) / (2 * count)
        if not all(math.isfinite(value) for pair in full for value in pair):
            self._record(None, context.learning_rate)
            return StepResult(loss, None, metrics, finite=False)
        g = tuple(projected_gradient(a, b, self.config.eps, self.config.clip_projected_grad) for a, b in full)
        entry = StepEstimate(step, float32(float(context.learning_rate)), g)
        self._move(context, entry)
        self._record(entry)
        return StepResult(loss, None, {**metrics, "projected_grad": sum(g) / count})

    # --- the two sides ----------------------------------------------------------------------------------------------

    def _sides(self, context: StepContext, micros: list[Batch], step: int, count: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return ((samples, 2 sides, [summed loss of this process, penalty]), mean metrics)."""
        sides = torch.zeros(count, 2, 2, dtype=torch.float64)
        sums = MetricSums()
        mode = self.mode
        was, prepared = context.model.training, context.roles.prepared
        # The bare module: a data-parallel wrapper would synchronise buffers, and ranks may differ in micro-batches.
        context.roles.prepared = context.roles.engine
        context.model.eval()
        try:
            with mode.installed():
                for sample in range(count):
                    mode.aim(step, sample)
                    generators = _generators(context)
                    for side, scale in enumerate((self.config.eps, -self.config.eps)):
                        _restore_generators(generators)
                        sides[sample, side, 0], found = self._evaluate(context, micros, scale)
                        sides[sample, side, 1] = float(context.stack.penalty(context.model))
                        for metrics in found:
                            sums.add(metrics)
                    mode.move(0.0)
        finally:
            context.roles.prepared = prepared
            context.model.train(was)
        return sides, sums.mean(context.runtime)

    def _evaluate(self, context: StepContext, micros: list[Batch], scale: float) -> tuple[float, list[dict[str, Any]]]:
        """Return the summed loss of this process at theta + scale z."""
        self.mode.move(scale)
        losses = []
        for index in range(context.runtime.passes(len(micros))):
            # Where every process has to make the same passes, one with fewer micro-batches repeats its last one for nothing.
            loss = context.objective.training_loss(micros[min(index, len(micros) - 1)], context.roles)
            losses += [loss] if index < len(micros) else []
        if self.mode.include_missed():
            return self._evaluate(context, micros, scale)
        return sum(float(loss.total + loss.auxiliary) for loss in losses), [loss.metrics for loss in losses]

    # --- the update -------------------------------------------------------------------------------------------------

    def _move(self, context: StepContext, entry: StepEstimate) -> None:
        window = self.config.window()
        entries = [*self.past, entry][-(window or 1) :]
        update(self.trained, self.noise, self.moments, entries, self.stored)
        # The next step's own estimate takes one place of the window.
        self.past = entries[-(window - 1) :] if window is not None and window > 1 else []

    def _record(self, entry: StepEstimate | None, lr: float = 0.0) -> None:
        if self.file is not None:
            self.file.append(entry, lr)

    # --- before the first step --------------------------------------------------------------------------------------

    def _prepare(self, context: StepContext) -> None:
        trained = self._trained(context)
        known = [(t.name, id(t.parameter)) for t in self.trained]
        if known == [(t.name, id(t.parameter)) for t in trained]:
            return
        first = not self.trained
        self._refuse(context, trained)
        for item in trained:
            if not is_sharded(item.parameter):
                item.parameter.data = item.parameter.data.contiguous()
        self.trained = trained
        self.noise = Noise(context.seed, cpu=self.config.rng == "cpu")
        self.mode = Layerwise(context.model, trained, self.noise) if self._layerwise(context) else InPlace(trained, self.noise)
        path = context.folder / HISTORY_FILE
        if self.config.window() is None:
            self.stored = recall(path, trained, self.noise, self.moments, context.step)
        if first and self.config.store_history:
            header = header_of(trained, self.noise, self.moments, self.config.window(), self.config.eps)
            if context.runtime.rank == 0:
                self.file = History(path, header, context.step)

    def _trained(self, context: StepContext) -> list[Trained]:
        scale = {name: group.lr_scale for group in context.stack.groups(context.model) for name in group.names}
        kinds = {path: type(module).__name__ for path, module in context.model.named_modules()}
        found: list[Trained] = []
        for name, parameter in context.model.named_parameters():
            if parameter.requires_grad:
                text = f"{name} {kinds[name.rpartition('.')[0]]}".lower()
                decays = not any(word.lower() in text for word in self.config.decay_exclude)
                found.append(Trained(name, parameter, decays, scale.get(name, 1.0)))
        return found

    def _layerwise(self, context: StepContext) -> bool:
        if self.config.perturb != "auto":
            return self.config.perturb == "layerwise"
        if any(is_sharded(t.parameter) for t in self.trained):
            return False
        return not penalized(context.stack) and any(t.parameter.dtype in (torch.float16, torch.bfloat16) for t in self.trained)

    def _refuse(self, context: StepContext, trained: list[Trained]) -> None:
        name = f"stack.{self.config.name}"
        if not trained:
            raise RecipeError(f"{name}: nothing in this stack trains")
        if _recomputes(context.model):
            raise RecipeError(_CHECKPOINTING)


def _generators(context: StepContext) -> list[tuple[torch.device, torch.Tensor]]:
    """Return the state of torch's global generators: both sides see the same random numbers where an objective samples."""
    states = [(torch.device("cpu"), torch.get_rng_state())]
    device = context.roles.device
    if device.type == "cuda":
        states.append((device, torch.cuda.get_rng_state(device)))
    return states


def _restore_generators(states: list[tuple[torch.device, torch.Tensor]]) -> None:
    for device, state in states:
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
