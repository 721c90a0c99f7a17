"""Building a run: data, model, stack, engine, optimizer, in that order, each from the validated recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrecipe.core.device_profile import profile_of, use
from llmrecipe.core.key_reads import KeyReads
from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.data.tokenize.chat_templates import keep_trained_template
from llmrecipe.engine import reference_model
from llmrecipe.engine.decoders import report_decoding
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.packing import packing_for
from llmrecipe.engine.reference_cache import ReferenceCache
from llmrecipe.engine.reference_policy import PlannedRows
from llmrecipe.engine.role_models import Roles
from llmrecipe.feedback.directions import direction
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import compiled_blocks
from llmrecipe.models.fused_kernels import check_kernels, fuse_kernels
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.optimizations import ready_to_compile, speed_up
from llmrecipe.optim.optimizer import Divide, Optimizer, build_optimizer, parameter_groups
from llmrecipe.recipe.validate import instantiate
from llmrecipe.runs import open_model
from llmrecipe.runs.events import Events
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.runtime.accelerate_environment import check_environment
from llmrecipe.runtime.peer_errors import reported
from llmrecipe.runtime.processes import Runtime
from llmrecipe.training import resume_rules
from llmrecipe.training.best import BestTracker
from llmrecipe.training.build_model import build_model, everything_trains, seed_everything, stack_for
from llmrecipe.training.model_checks import check_forward_pass
from llmrecipe.training.read_rows import check_model_fits, check_monitor, read_data, test_rows
from llmrecipe.training.recipe_checks import check_attention, check_chain, check_parts
from llmrecipe.training.run_identity import identify
from llmrecipe.training.run_profile import decided_profile
from llmrecipe.training.run_state import Progress, RunState

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.recipe.schema import Recipe


@contextlib.contextmanager
def abandoned(directory: RunDir | None, runtime: Runtime | None, resume: Path | None) -> Iterator[None]:
    """Release a run that cannot be built: a new one records why it failed, one to be resumed is left unchanged."""
    try:
        yield
    except BaseException as error:
        met = reported(error, runtime.rank, runtime.world) if runtime is not None and isinstance(error, Exception) else error
        if directory is not None:
            if resume is None:
                directory.status("failed", error=str(met) or type(met).__name__, step=0)
            directory.unlock()
        if runtime is not None:
            runtime.close()
        if met is error:
            raise
        raise met from error


@open_model.shared_tokenizers()
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
    check_parts(recipe, parts)
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
        check_kernels(recipe.model.kernels, runtime.device.type)
        if profile.compile:
            ready_to_compile(runtime.device)
        directory = RunDir.open(resume, runtime) if resume else RunDir.create(composition, runtime)
    with abandoned(directory, runtime, resume):
        changes = resume_rules.check_resume(directory, composition, steps) if resume else {}
        identity = identify(recipe, directory, data, validation) if runtime.is_main else None
        events = open_events(composition, parts.objective, directory.path if runtime.is_main else None, steps)
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
        if roles.engine.compiled is not None:
            roles.engine.compiled.report = events.warning
        report_decoding(roles.model, events.warning)
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


def open_events(composition: Composition, objective: Objective, folder: Path | None, steps: int) -> Events:
    """Open the events of a run, which show what the objective and the recipe name.

    Args:
        folder: the run directory; None on a process that does not report.
    """
    recipe = composition.recipe
    watched = recipe.eval.monitor.partition("/")[2]
    shown = (*objective.headline, *recipe.eval.metrics, watched, *recipe.log.show)
    live, trackers = recipe.log.live, recipe.log.trackers
    return Events(folder, live=live, steps=steps, trackers=trackers, config=composition.mapping, metrics=shown)


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
    engine = Engine(model.model, autocast_of(dtype, stack))
    if profile.kernels == "liger":
        dtype_of = engine.autocast or torch.bfloat16
        with torch.autocast(device.type, dtype=dtype_of, enabled=engine.autocast is not None):
            engine.fused = fuse_kernels(model.model, "kernels" in profile.chosen)
    if profile.compile:
        selective = recipe.model.gradient_checkpointing == "selective"
        engine.compiled = compiled_blocks.compiled_blocks(model.model, "compile" in profile.chosen, selective)
    packed = packing_for(recipe.data.packing, engine, device)
    roles = Roles(engine, stack, model.tokenizer, device, packed, recipe.batch.micro, profile.micro_tokens, scores)
    roles.runtime = runtime
    roles.seed, roles.max_length = recipe.seed, recipe.data.max_length
    return roles


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
