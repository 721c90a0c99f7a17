"""What one update of a recipe will keep and hold, from its own rows and a model without numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmrecipe.core.device_profile import kept_profiles, profile_of, use
from llmrecipe.core.errors import LlmRecipeError, ModelError
from llmrecipe.data import order
from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.row_reading import RowReading
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.load import may_bypass_attention
from llmrecipe.models.optimizations import speed_up
from llmrecipe.models.vocabulary import input_embedding
from llmrecipe.recipe.validate import instantiate
from llmrecipe.runs import open_model
from llmrecipe.training import build_model, build_run
from llmrecipe.training.measured_memory import vocabulary_of
from llmrecipe.training.symbolic_pass import Away, NumberlessMode, PassBytes, measure_pass, numberless, same_kind

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import Recipe
    from llmrecipe.training.memory_estimate import Estimate

STOPS = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, AssertionError, LlmRecipeError)
"""What a pass without numbers may stop with: a shape that depends on them, a library's kernel that has no such form."""


@dataclass(frozen=True)
class StackChoices:
    """What the stack of a run has chosen from data or weights, by the name of the wrapper."""

    structures: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Integer tensors by name: which entries train."""


def follow_pass(
    memory: Estimate, recipe: Recipe, data: SplitRows, labels: list[str] | None, device: str, chosen: StackChoices | None = None
) -> Estimate:
    """Return an estimate with what the first update is found to keep and hold, or with why that is not known.

    Args:
        data: the training rows.
        labels: class names of a classification head.
        device: kind of the device the run computes on.
        chosen: what a run of this recipe has chosen.
    """
    try:
        found = predict_pass(recipe, data, labels, device, chosen)
    except _NotFollowed as reason:
        return replace(memory, unpredicted=str(reason))
    return replace(
        memory,
        weights=memory.weights + found.buffers,
        activations=found.kept - found.logits,
        logits=found.logits,
        temporary=max(0, found.peak - found.kept - memory.gradients),
        host=found.host,
    )


class _NotFollowed(Exception):
    """Why the shapes of a pass are not known."""


def predict_pass(
    recipe: Recipe, data: SplitRows, labels: list[str] | None, device: str, chosen: StackChoices | None = None
) -> PassBytes:
    """Count what the largest micro-batch of the first update keeps and holds on one process.

    Raises:
        _NotFollowed: saying why that is not known.
    """
    parts = instantiate(recipe)
    objective = parts.objective
    objective.read_folder(recipe.model)
    objective.check(recipe, data)
    stack = build_model.stack_for(objective, [w.for_tasks(data.tasks) for w in parts.wrappers])
    _refuse(recipe, objective, stack, chosen, device)
    fake, away = FakeTensorMode(allow_non_fake_inputs=True), Away()
    host = None if device == "cpu" else (away.pack, away.unpack)
    with _stopped(), torch.random.fork_rng(devices=[]), kept_profiles():
        use(replace(profile_of(device), kind="cpu"))
        model: Any = build_model.on_meta(recipe, objective, stack, labels, device, chosen.structures if chosen else None, host)
        stack.before_step(model, 0)
        numberless(model, fake, chosen.tensors if chosen else {})
        with NumberlessMode(fake):
            speed_up(model, same_kind)
        roles = _roles(recipe, objective, stack, model, device)
        roles.data = data
        _, first, end = BatchPlan.of(recipe.batch, len(data)).place(0)
        rows = [{**data[int(i)], "epoch": 0} for i in order(data, recipe.seed, 0)[first:end]]
        micros = next(objective.batches(iter([rows]), roles))
        _refuse_shared(model, micros)
        penalised = any(type(w).penalty is not Wrapper.penalty for w in stack)
        found = [_pass_over(micro, end, objective, roles, fake, away) for micro, end in largest_micros(micros, penalised)]
    return max(found, key=lambda one: one.kept)


def _refuse(recipe: Recipe, objective: Objective, stack: Stack, chosen: StackChoices | None, device: str) -> None:
    """Refuse recipes whose first update depends on what does not exist yet, or is computed where it cannot be followed."""
    waiting = [w.name for w in stack if w.chooses()]
    by_values = [w.name for w in stack if w.held_by_values]
    reasons = {
        "the policy writes the rows it is trained on": objective.samples,
        "the model writes the answers that are scored": objective.generates() and not objective.samples,
        "rows of a stream have not been read": recipe.data.streaming,
        "what a compiled model keeps is its compiler's choice": profile_of(device).compile,
        f"{', '.join(waiting)} will choose from data or weights": waiting and chosen is None,
        f"what {', '.join(by_values)} keeps depends on the values of weights": by_values,
        "layers of this family compute attention in a way of their own": _bypassed(recipe, objective),
    }
    for reason, holds in reasons.items():
        if holds:
            raise _NotFollowed(reason)


def _refuse_shared(model: nn.Module, micros: list[Batch]) -> None:
    """Refuse weights that the micro-batches of a step share: they and their sums are kept over all of them."""
    shared = {hook.owner for _, _, _, hook in all_hooks(model) if hook.once_a_step}
    if shared and len(micros) > 1:
        raise _NotFollowed(f"micro-batches share the weights that {', '.join(sorted(shared))} form")


def _bypassed(recipe: Recipe, objective: Objective) -> bool:
    base, _, _ = open_model.resolve_section(recipe.model, tensors=False)
    return may_bypass_attention(base, objective.model_head())


@contextlib.contextmanager
def _stopped() -> Iterator[None]:
    """Say what a pass has stopped with as the reason why it cannot be followed."""
    try:
        yield
    except STOPS as error:
        kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
        text = f"{kind}{error}".splitlines()[0]
        raise _NotFollowed(f"its operations cannot be followed on shapes alone ({text})") from error


def largest_micros(micros: list[Batch], penalised: bool) -> list[tuple[Batch, bool]]:
    """Return the micro-batches that are not smaller than another one in every size, and whether each carries the penalty."""
    found: dict[tuple[int, ...], tuple[Batch, bool]] = {}
    for micro in micros:
        end = penalised and micro is micros[-1]
        found[micro.input_ids.numel(), micro.target.numel(), micro.sequences, int(end)] = micro, end
    return [
        kept
        for own, kept in found.items()
        if not any(all(a <= b for a, b in zip(own, other, strict=True)) for other in found if other != own)
    ]


def _pass_over(
    micro: Batch, penalised: bool, objective: Objective, roles: Roles, fake: FakeTensorMode, away: Away
) -> PassBytes:
    """Count what a micro-batch keeps and holds; the last one of a step carries the penalty of the stack."""
    stack, model = roles.stack, roles.model
    roles.engine.train(objective.dropout)

    def loss() -> Tensor:
        found = objective.training_loss(micro, roles)
        value = (found.total + found.auxiliary) / max(objective.weight(micro), 1e-12)
        return value + stack.penalty(model) if penalised else value

    away.moved = 0
    with torch.set_grad_enabled(stack.rule() is None):
        return replace(measure_pass(model, loss, fake, vocabulary_of(model)), host=away.moved)


def _roles(recipe: Recipe, objective: Objective, stack: Stack, model: LanguageModel, device: str) -> Roles:
    """Return what an objective needs of a run, on the CPU; rows are packed where hooks reach the model's attention."""
    # Both are measured on a model with numbers; what they tell apart are families that `_refuse` has refused.
    model.row_reading, model.obeys_causal_mask = RowReading(), True
    dtype = build_run.compute_dtype(recipe.model.dtype, model.stored_dtype, device)
    engine = Engine(model, build_run.autocast_of(dtype, stack))
    packed = recipe.data.packing != "off" and not engine.is_pair_model and isinstance(input_embedding(model), nn.Embedding)
    tokenizer, tokens = open_model.tokenizer_of(recipe.model, recipe.tokenizer), profile_of(device).micro_tokens
    roles = Roles(engine, stack, tokenizer, torch.device("cpu"), packed, recipe.batch.micro, tokens)
    roles.seed, roles.max_length = recipe.seed, recipe.data.max_length
    return roles
