"""Building a run: data, model, stack, engine, optimizer, in that order, each from the validated recipe."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from llmrecipe.core.console import lasting
from llmrecipe.core.device_profile import profile_of, use
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.key_reads import KeyReads
from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.data.tokenize.chat_templates import keep_trained_template
from llmrecipe.engine import reference_model
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.packing import packing_for
from llmrecipe.engine.reference_cache import ReferenceCache
from llmrecipe.engine.reference_policy import PlannedRows
from llmrecipe.engine.role_models import Roles
from llmrecipe.feedback.directions import direction
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import new_token_rows
from llmrecipe.models.chunked_ffn import chunk_feed_forward
from llmrecipe.models.load import may_bypass_attention, prepare_for_training, skeleton
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.optimizations import ready_to_compile, speed_up
from llmrecipe.models.resolve_class import HEAD_MODULES, NEW_HEADS
from llmrecipe.optim.optimizer import Divide, Optimizer, build_optimizer, parameter_groups
from llmrecipe.recipe.validate import instantiate
from llmrecipe.runs import base_storage, delta, open_model
from llmrecipe.runs.checkpoint_io import saved_structures
from llmrecipe.runs.events import Events
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.runtime.accelerate_environment import check_environment
from llmrecipe.runtime.processes import Runtime
from llmrecipe.training import resume_rules
from llmrecipe.training.best import BestTracker
from llmrecipe.training.model_checks import check_forward_pass
from llmrecipe.training.read_rows import check_family, check_model_fits, check_monitor, check_sections, read_data, test_rows
from llmrecipe.training.run_identity import identify
from llmrecipe.training.run_profile import decided_profile
from llmrecipe.training.run_state import Progress, RunState

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.recipe.schema import ModelSection, Recipe


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def abandoned(directory: RunDir | None, runtime: Runtime | None, resume: Path | None) -> Iterator[None]:
    """Release a run that cannot be built: a new one records why it failed, one to be resumed is left unchanged."""
    try:
        yield
    except BaseException as error:
        if directory is not None:
            if resume is None:
                directory.status("failed", error=str(error) or type(error).__name__, step=0)
            directory.unlock()
        if runtime is not None:
            runtime.close()
        raise


def build_parts(composition: Composition, resume: Path | None) -> RunState:
    """Build everything the loop needs, or raise one teaching error before weights are read.

    Args:
        resume: the directory of a run to continue; None makes a new one.
    """
    recipe = composition.recipe
    parts = instantiate(recipe)
    reads = KeyReads(key for key, origin in composition.origins.items() if origin.kind != "default")
    for group, part in (("objective", parts.objective), ("optim", parts.optimizer), ("schedule", parts.schedule)):
        reads.watch(part, group)
    check_sections(recipe)
    parts.objective.read_folder(recipe.model)
    check_objective(parts.objective, parts.wrappers)
    direction(recipe.eval, parts.objective)
    check_cuts(parts.optimizer, parts.wrappers)
    check_family(recipe, parts.objective)
    data, validation, labels = read_data(recipe, parts.objective, parts.wrappers)
    parts = replace(parts, wrappers=[w.for_tasks(data.tasks) for w in parts.wrappers])
    for wrapper in parts.wrappers:
        reads.watch(wrapper, "stack", wrapper.name)
    parts.objective.check(recipe, data)
    check_monitor(recipe, parts.objective, validation, composition.origins)
    steps = step_count(recipe, len(data), parts.objective.updates())
    parts.schedule.check(steps)
    check_chain(recipe, parts.wrappers)
    check_attention(recipe, parts.objective, parts.wrappers, labels)
    check_model_fits(recipe, parts.objective, data, validation, labels)
    check_environment(recipe)
    runtime = Runtime.start(recipe.runtime)
    with abandoned(None, runtime, resume):
        profile = decided_profile(recipe, runtime.device, resume, runtime.is_main)
        use(profile)
        if profile.compile:
            ready_to_compile(runtime.device)
        directory = RunDir.open(resume, runtime) if resume else RunDir.create(composition, runtime)
    with abandoned(directory, runtime, resume):
        changes = resume_rules.check_resume(directory, composition, steps) if resume else {}
        folder = directory.path if runtime.is_main else None
        live, trackers = recipe.log.live, recipe.log.trackers
        identity = identify(recipe, directory, data, validation) if runtime.is_main else None
        watched = recipe.eval.monitor.partition("/")[2]
        metrics = (*parts.objective.headline, *recipe.eval.metrics, watched, *recipe.log.show)
        events = Events(folder, live=live, steps=steps, trackers=trackers, config=composition.mapping, metrics=metrics)
        rows = planned_rows(recipe, parts.objective, data, validation, steps)
        scores = reference_model.scored(recipe, parts.objective, rows, runtime.device)
        parts.objective.prepare_rows(recipe, rows, runtime.device)
        seed_everything(recipe.seed)
        stack = stack_for(parts.objective, parts.wrappers)
        model = build_model(recipe, parts.objective, stack, labels, resume, runtime.device.type)
        if parts.objective.model_head() in ("causal", "seq2seq"):
            keep_trained_template(model.tokenizer, data.report.template, data.report.format)
        roles = build_roles(recipe, stack, model, runtime, scores)
        check_forward_pass(recipe, parts.objective, roles)
        roles.data, roles.events = data, events
        if identity is not None:
            identity.tokenizer = model.tokenizer
        optimizer = None
        # Methods that choose what trains from data have opened nothing yet; `Run.rebuild` follows their calibration, which
        # looks at the undivided model.
        waits = runtime.in_step and resume is None and any(w.calibrates() for w in stack)
        if not waits and any(p.requires_grad for p in roles.model.parameters()):
            roles.prepared = prepared(runtime, roles, stack, True)
            optimizer = (
                None
                if stack.rule() is not None
                else optimizer_for(roles.model, parts.optimizer, stack, divide=runtime.optimizer)
            )
        return RunState(
            composition, directory, runtime, events, parts.objective, stack, parts.optimizer, parts.schedule, model, data,
            validation, roles, optimizer, steps, BestTracker(recipe.eval, direction(recipe.eval, parts.objective)), Progress(),
            changes, identity, reads=reads,
        )  # fmt: skip


def prepared(runtime: Runtime, roles: Roles, stack: Stack, unused: bool) -> nn.Module:
    """Wrap the engine for the processes of the run.

    Args:
        unused: whether a trained tensor may have no gradient on some process.
    """
    if not runtime.in_step:
        return runtime.prepare(roles.engine, unused)
    parts = [site.module for site in anatomy(roles.model).sites if site.role == "block"]
    blocks = list({id(part): part for part in parts}.values())
    return runtime.prepare(roles.engine, any(type(w).may_skip is not Wrapper.may_skip for w in stack), blocks)


def build_model(
    recipe: Recipe, objective: Objective, stack: Stack, labels: list[str] | None, resume: Path | None, device: str
) -> open_model.LoadedModel:
    """Load the model of a recipe and attach its stack.

    Args:
        device: kind of the device it will train on.
        labels: class names of a classification head.
        resume: a run directory whose newest checkpoint gives the structures (ranks, masks) of the stack.
    """
    model = open_for(recipe, objective, stack, labels, device)
    objective.prepare_roles(model, base_is_frozen(stack))
    objective.prepare_model(model.model, recipe.seed)
    seed_everything(recipe.seed)
    with lasting(f"attaching {', '.join(w.name for w in stack) or 'nothing'}"):
        attach_stack(model, stack, everything_trains(stack), None if resume is None else saved_structures(resume))
    return model


def build_roles(recipe: Recipe, stack: Stack, model: open_model.LoadedModel, runtime: Runtime, scores: ReferenceCache) -> Roles:
    """Put the model on its device and wrap it in the engine, as the objective sees it.

    Args:
        scores: those of a reference that is another model; empty for a named reference.
    """
    device = runtime.device
    model.model.to(device)
    speed_up(model.model)
    dtype = compute_dtype(recipe.model.dtype, model.model.stored_dtype, device.type)
    profile = profile_of(device)
    engine = Engine(model.model, autocast_of(dtype, stack), profile.compile)
    packed = packing_for(recipe.data.packing, engine, device)
    roles = Roles(engine, stack, model.tokenizer, device, packed, recipe.batch.micro, profile.micro_tokens, scores)
    roles.runtime = runtime
    roles.seed, roles.max_length = recipe.seed, recipe.data.max_length
    return roles


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


def stack_for(objective: Objective, wrappers: list[Any]) -> Stack:
    """Return the stack of a training: the recipe's wrappers, and those an objective adds for its roles."""
    return Stack([*wrappers, *objective.role_wrappers(wrappers)])


def on_meta(
    recipe: Recipe,
    objective: Objective,
    stack: Stack,
    labels: list[str] | None,
    device: str,
    structures: dict[str, Any] | None = None,
) -> nn.Module:
    """Build the model of a recipe on the meta device, with the stacks below it and its own attached.

    Args:
        structures: those of a stack that has made its choices.

    Raises:
        UserError: the stack does not fit the model.
    """
    base, saved, _ = open_model.resolve_section(recipe.model)
    base, device = stored_as(base, stack, device)
    tokenizer = open_model.tokenizer_of(recipe.model, recipe.tokenizer)
    model = skeleton(base, rows_head=objective.model_head(), labels=labels, tokenizer=tokenizer, device=device)
    layers = [*(saved.layers if saved else []), *open_model.imported(base, model)]
    if not everything_trains(stack):
        for wrapper in base_storage.storage_below(layers, stack.wrappers):
            wrapper.attach(model)
    for index, layer in enumerate(layers):
        delta.mount_layer(model, layer, index)
    objective.prepare_model(model, recipe.seed)
    stack.attach(model, structures)
    if recipe.runtime.ffn_rows is not None:
        chunk_feed_forward(model, recipe.runtime.ffn_rows)
    return model


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
        ModelError: it names the wrapper and the class of attention (see `models.hooks.hook.refuse_unrouted`).
    """
    base, _, _ = open_model.resolve_section(recipe.model)
    if may_bypass_attention(base, objective.model_head()):
        on_meta(recipe, objective, stack_for(objective, wrappers), labels, "cpu")


def planned_rows(
    recipe: Recipe, objective: Objective, data: SplitRows, validation: SplitRows | None, steps: int
) -> PlannedRows:
    """Return the rows a run will read, for scoring before its first step."""

    def others() -> list[Any]:
        # The test split's rows are scored under the untrained policy only; no metric of them is computed before the end.
        return [validation, test_rows(recipe, objective, data, open_model.tokenizer_of(recipe.model, recipe.tokenizer))]

    return PlannedRows(data, others, steps, BatchPlan.of(recipe.batch, len(data)), recipe.seed)


def step_count(recipe: Recipe, rows: int, updates: int = 1) -> int:
    """Return the optimizer steps of the run: `steps`, or those of the passes over the rows, `updates` for each batch."""
    if recipe.steps is not None:
        return recipe.steps
    return BatchPlan.of(recipe.batch, rows).batches(recipe.epochs or 1.0) * updates


def open_for(
    recipe: Recipe, objective: Objective, stack: Stack, labels: list[str] | None, device: str
) -> open_model.LoadedModel:
    """Load the model of a recipe with its attention routed, its blocks optimized and earlier stacks mounted."""
    logging.disable_progress_bar()
    section, device = stored_as(recipe.model, stack, device)
    model = open_model.open_model(
        section,
        recipe.tokenizer,
        head=objective.model_head(),
        labels=labels,
        own=stack.wrappers,
        seed=recipe.seed,
        device=device,
    )
    if objective.model_head() in NEW_HEADS and recipe.model.init == "random":
        model.model.new_heads = tuple(n for n in HEAD_MODULES if hasattr(model.model, n))
    prepare_for_training(model.model, recipe.model)
    if recipe.runtime.ffn_rows is not None:
        chunk_feed_forward(model.model, recipe.runtime.ffn_rows)
    return model


def stored_as(section: ModelSection, stack: Stack, device: str) -> tuple[ModelSection, str]:
    """Return the section that a model's weights are held by, and the kind of device that decides what its dtype `auto` means.

    Full training keeps float32 master weights; autocast lowers the precision of the computation.
    """
    if not (everything_trains(stack) and all(w.masters for w in stack)):
        return section, device
    if section.dtype in ("bfloat16", "float16"):
        return section.model_copy(update={"dtype": "float32"}), device
    return section, "cpu" if section.dtype == "auto" else device


def attach_stack(
    model: open_model.LoadedModel, stack: Stack, everything: bool, structures: dict[str, Any] | None = None
) -> None:
    """Attach the stack; the layer of a continued run gives its structures and initial values, also on resume."""
    if everything:
        new_token_rows.fold_token_rows(model.model)
    if everything and model.mounted:
        open_model.merge_mounted(model)
    if model.continued is None or structures not in (None, model.continued.structures):
        stack.attach(model.model, structures)
        return
    missing = sorted(set(model.continued.wrappers) ^ {w.name for w in stack})
    if missing:
        raise RunError(
            f"model.continue: the run was trained with stack [{', '.join(model.continued.wrappers)}], this recipe has "
            f"[{', '.join(w.name for w in stack)}]; use the same stack, or drop model.continue to train on top of it"
        )
    stack.attach(model.model, model.continued.structures)
    check_continued(model, stack)
    stack.restore(model.model, model.continued.tensors)


def check_continued(model: open_model.LoadedModel, stack: Stack) -> None:
    """Refuse to continue adapters of another shape or scale, naming the options that fit.

    Raises:
        RunError: tensors or scales differ from what was saved.
    """
    found = {name: tuple(value.shape) for name, value in stack.delta(model.model).items()}
    assert model.continued is not None, "only a continued run has a layer to compare with"
    saved = {name: tuple(value.shape) for name, value in model.continued.tensors.items()}
    kept = model.continued.wrappers
    off = [w for w in stack if getattr(w, "alpha", None) != kept[w.name].get("alpha", getattr(w, "alpha", None))]
    if found.items() >= saved.items() and not off:
        return
    wanted = [
        f"stack.{name}.{option}={value}"
        for name, mapping in kept.items()
        for option in ("target", "r", "alpha", "rank_pattern", "alpha_pattern")
        if (value := mapping.get(option))
    ]
    raise RunError(f"model.continue: the stack differs from the one that was trained; it had\n  {' '.join(wanted)}")


def everything_trains(stack: Stack) -> bool:
    """Return whether every weight trains: no wrapper freezes the base."""
    return not any(w.stage in (Stage.INJECT, Stage.SELECT) for w in stack)


def base_is_frozen(stack: Stack) -> bool:
    """Return whether nothing in the stack changes a weight of the base."""
    return not everything_trains(stack) and not any(w.stage is Stage.SELECT for w in stack)


def compute_dtype(named: str, stored: torch.dtype, device: str) -> str:
    """Return the dtype that a model computes in: `auto` is the checkpoint's own, on a CPU float32."""
    if named != "auto":
        return named
    return "float32" if device == "cpu" else str(stored).removeprefix("torch.")


def autocast_of(dtype: str, stack: Stack) -> torch.dtype | None:
    """Return the autocast dtype where base modules combine float32 master weights and low-precision compute; else None."""
    if dtype not in ("bfloat16", "float16") or not all(w.masters for w in stack):
        return None
    if everything_trains(stack):
        return torch.bfloat16 if dtype == "bfloat16" else torch.float16
    return None


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


def cut_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, axis: int, kept: torch.Tensor) -> None:
    """Keep some rows of a shortened parameter's optimizer state; counters stay."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, torch.Tensor) and value.dim() == parameter.dim():
            optimizer.state[parameter][key] = value.index_select(axis, kept.to(value.device))


def optimizer_for(
    model: nn.Module,
    optim: Optimizer,
    stack: Stack,
    keep: torch.optim.Optimizer | None = None,
    divide: Divide | None = None,
) -> torch.optim.Optimizer:
    """Build the torch optimizer of what trains; states of parameters of `keep` are carried over, cut where these were cut.

    Args:
        divide: see `build_optimizer`.
    """
    optimizer = build_optimizer(optim, parameter_groups(model, optim, stack.groups(model)), divide)
    if keep is not None:
        trained = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        for parameter, state in keep.state.items():
            if id(parameter) in trained:
                optimizer.state[parameter] = state
        names = dict(model.named_parameters())
        for name, (axis, kept) in stack.cuts(model).items():
            cut_state(optimizer, names[name], axis, kept)
    return optimizer
