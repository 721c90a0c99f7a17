"""Refusals of recipes whose parts do not go together, before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError
from llmrecipe.feedback.directions import direction
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.load import may_bypass_attention
from llmrecipe.optim.optimizer import Optimizer
from llmrecipe.runs import base_storage, delta, open_model
from llmrecipe.training.build_model import everything_trains, on_meta, stack_for
from llmrecipe.training.read_rows import check_family, check_sections

if TYPE_CHECKING:
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import Recipe
    from llmrecipe.recipe.validate import Parts


def check_parts(recipe: Recipe, parts: Parts) -> None:
    """Refuse, before rows are read, parts of a recipe that do not go together or do not fit its model folder.

    Raises:
        UserError: it names the key.
    """
    check_sections(recipe)
    parts.objective.read_folder(recipe.model)
    check_objective(parts.objective, parts.wrappers)
    direction(recipe.eval, parts.objective)
    check_cuts(parts.optimizer, parts.wrappers)
    check_family(recipe, parts.objective)


def check_objective(objective: Objective, wrappers: list[Any]) -> None:
    """Refuse an objective without gradients under a rule that needs them, and one whose examples nothing would read.

    Raises:
        RecipeError: no wrapper of the stack can train the objective.
    """
    if objective.gives_examples and not any(w.reads_examples for w in wrappers):
        raise RecipeError(
            f"objective: {delta.kind_name(objective)} trains a hypermodel that reads examples, and the stack has none; add "
            "stack=[hypertuning]"
        )
    if not objective.has_gradient() and not any(w.stage is Stage.RULE for w in wrappers):
        raise RecipeError("objective: it has no gradient; add an update rule that needs none, such as stack=[mezo]")


def check_chain(recipe: Recipe, wrappers: list[Wrapper]) -> None:
    """Refuse, before weights are read, a stack that cannot be trained on the run that `model.path` names.

    Raises:
        RecipeError: nothing to continue, another way of storing the base than a continued run has, or a stack that does not go
            together with what is below it.
        ModelError: all weights are to train, and what is mounted cannot be merged into them.
    """
    section = recipe.model
    base, saved, _ = open_model.resolve_section(section, tensors=False)
    layers = saved.layers if saved is not None else []
    if section.continue_:
        check_continue(section.path, layers, wrappers, adapters=bool(base.adapters))
    elif layers:
        base_storage.check_change(layers, wrappers, section.path)
        below = [delta.build_wrapper(n, m) for layer in layers for n, m in layer.wrappers.items()]
        if everything_trains(Stack(wrappers)):
            open_model.check_mergeable([w for w in below if w.stage in (Stage.INJECT, Stage.SELECT)])
        elif not base_storage.base_wrappers(wrappers):
            Stack([*base_storage.storage_below(layers, wrappers), *wrappers])


def check_continue(path: str, layers: list[delta.Layer], wrappers: list[Wrapper], adapters: bool) -> None:
    """Refuse `model.continue` where nothing can be continued, or where the base would be stored in another way."""
    if adapters:
        return
    kept = [delta.build_wrapper(n, m) for n, m in layers[-1].wrappers.items()] if layers else []
    if not any(w.stage in (Stage.INJECT, Stage.SELECT) for w in kept):
        raise RecipeError(
            f"model.continue: {path} has no adapter to continue: it is no finished run, or one that trained every weight; "
            "leave model.continue out, and training starts from its weights"
        )
    before, now = base_storage.base_wrappers(kept), base_storage.base_wrappers(wrappers)
    if not base_storage.alike(before, now):
        wanted = ", ".join(delta.kind_name(w) for w in before) or "no quantization"
        raise RecipeError(
            f"model.continue: the base of {path} is stored with {wanted}, and its adapters were fitted to that; keep it, or "
            "leave model.continue out to train a new stack on top"
        )


def check_attention(recipe: Recipe, objective: Objective, wrappers: list[Wrapper], labels: list[str] | None) -> None:
    """Refuse, before weights are read, a stack that changes attention in a model that does not let it.

    Raises:
        ModelError: it names the wrapper and the class of attention (see `models.hooks.host.refuse_unrouted`).
    """
    base, _, _ = open_model.resolve_section(recipe.model, tensors=False)
    if may_bypass_attention(base, objective.model_head()):
        on_meta(recipe, objective, stack_for(objective, wrappers), labels, "cpu")


def check_cuts(optim: Optimizer, wrappers: list[Wrapper]) -> None:
    """Refuse a method that shortens trained tensors under an optimizer whose state cannot be shortened with them.

    Raises:
        RecipeError: it names both.
    """
    cutting = next((w for w in wrappers if w.shortens()), None)
    if cutting is not None and not optim.entrywise:
        kind = type(optim).__module__.rsplit(".", 1)[-1]
        raise RecipeError(
            f"stack.{cutting.name}: it drops rows of trained tensors during the run, and the state of {kind} is not kept entry "
            "by entry; use an optimizer such as adamw, ademamix, lion, rmsprop or sgd"
        )
