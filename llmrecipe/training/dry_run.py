"""A dry run: everything a recipe would build, on the meta device, without reading a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.core.device_profile import Profile, kept_profiles, use
from llmrecipe.core.errors import RecipeError
from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.data.streaming import StreamedRows
from llmrecipe.data.validation import warnings as data_warnings
from llmrecipe.engine.packing import micro_tokens
from llmrecipe.engine.reference_policy import needs_snapshot
from llmrecipe.methods._base.stack import DIVIDED_REFERENCE, base_parameters, kind_name
from llmrecipe.models.checkpoint_path import STACK_FILE
from llmrecipe.models.hooks.hook import own_tensors
from llmrecipe.models.pretrained import pretrained
from llmrecipe.optim.optimizer import Group, parameter_groups
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import refuse_stages
from llmrecipe.recipe.profile_keys import check_device, profile_for
from llmrecipe.recipe.sharding_rules import GATHERED, PLAIN, shard_size
from llmrecipe.recipe.validate import instantiate
from llmrecipe.runs import delta, open_model
from llmrecipe.runs.tracker import check_trackers
from llmrecipe.runtime.processes import pick_device
from llmrecipe.training import build_model, build_run, recipe_checks
from llmrecipe.training.auxiliary_memory import auxiliary_bytes, copied_bytes
from llmrecipe.training.check_warnings import memory_warnings, rank_warnings, weight_warnings
from llmrecipe.training.memory_estimate import Estimate, delta_bytes, estimate_memory
from llmrecipe.training.model_flops import matmul_rate
from llmrecipe.training.predicted_pass import StackChoices, follow_pass
from llmrecipe.training.read_rows import check_model_fits, check_monitor, read_data
from llmrecipe.training.run_profile import stored_profile
from llmrecipe.training.shard_estimate import resting, saving, shard_table

if TYPE_CHECKING:
    from torch import nn

    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.methods._base.method import Wrapper
    from llmrecipe.methods._base.stack import Stack
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.recipe.schema import Recipe
    from llmrecipe.recipe.validate import Parts


@dataclass
class Findings:
    """What a recipe would do."""

    recipe: str
    objective: str
    stack: list[dict[str, str]]
    """name, kind and stage of each wrapper in the order they act."""
    hybrids: list[str]
    """What each hybrid stands for, as lines of YAML."""
    parameters: int
    """Of the base model."""
    added: int
    """Parameters that the stack and new heads add to it, trained or not."""
    trained: int
    groups: list[dict[str, Any]]
    """Optimizer groups: what trains at which rate and decay."""
    steps: int
    rows: int
    tokens_per_step: int | None
    """None where it cannot be known: rows of a stream have not been read, answers have not been sampled."""
    memory: Estimate
    """Bytes of each part."""
    memory_mb: dict[str, float]
    devices_mb: list[dict[str, float]]
    """Megabytes of a device under each value of `runtime.shard`, one row for each number of devices."""
    delta_bytes: int
    """Learned tensors of a checkpoint, without the optimizer's state."""
    seconds: float | None
    """A rough estimate: 6 floating-point operations per parameter and token at this machine's matmul rate; None where the
    tokens of a step cannot be known."""
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What the run may stumble over."""


def check(recipe: str, overrides: list[str]) -> Findings:
    """Compose, validate and build a recipe on the meta device.

    Raises:
        UserError: everything that would stop the run before its first step, except what only the weights can tell.
    """
    composition = compose(recipe, overrides)
    refuse_stages(composition.mapping)
    return examine(composition)


def predict_memory(run: Path) -> Estimate:
    """Return what a finished run was to hold, its stack with the choices it has made.

    Raises:
        UserError: its data, its base or its recipe are no longer there.
    """
    return examine(compose(run / "recipe.yaml"), _choices(run / "final"), known=stored_profile(run)).memory


def _choices(folder: Path) -> StackChoices | None:
    """Return what the stack of a finished model has chosen from data or weights; None where nothing was stored."""
    if not (folder / STACK_FILE).is_file():
        return None
    layer = delta.read_stack(folder).layers[-1]
    chosen = {n: s for n, s in layer.structures.items() if delta.build_wrapper(n, layer.wrappers[n]).calibrates()}
    return StackChoices(chosen, {n: t for n, t in layer.tensors.items() if not t.is_floating_point()})


@dataclass
class _Built:
    """What a recipe has been found to build."""

    composition: Composition
    parts: Parts
    device: str
    """Kind of the device it computes on."""
    data: SplitRows
    validation: SplitRows | None
    labels: list[str] | None
    stack: Stack
    model: nn.Module
    """On the meta device."""
    later: list[Wrapper]
    """Wrappers that are yet to choose, or to start, from data or weights."""

    @property
    def settings(self) -> Recipe:
        return self.composition.recipe

    @property
    def copied(self) -> bool:
        """Whether what trains is copied as it is at step 0."""
        return needs_snapshot(self.parts.objective, self.stack, self.model, self.settings.model.continue_)

    def tokens_per_step(self) -> int | None:
        """Return the tokens of a step; None where they cannot be known."""
        if self.settings.data.streaming or self.parts.objective.samples:
            return None
        # A pass over fewer rows than `batch.size`, or one that leaves a rest, reads fewer rows in a step.
        rows = len(self.data) / max(1, math.ceil(len(self.data) / self.settings.batch.size))
        return round(self.data.report.tokens / max(len(self.data), 1) * rows)

    def longest_row(self) -> int:
        """Return the tokens of the longest row, which a micro-batch holds whole however few tokens it may have."""
        if isinstance(self.data, StreamedRows):
            return self.settings.data.max_length
        return int(self.data.lengths().max(initial=0))

    def groups(self) -> list[Group]:
        """Return the optimizer's groups; none where the stack has yet to choose all that trains."""
        if self.later and not any(p.requires_grad for p in self.model.parameters()):
            return []
        return parameter_groups(self.model, self.parts.optimizer, self.stack.groups(self.model))


@kept_profiles()
@open_model.shared_tokenizers()
def examine(
    composition: Composition, made: StackChoices | None = None, follow: bool = True, known: Profile | None = None
) -> Findings:
    """Build a composed recipe on the meta device; see `check`.

    Args:
        made: what a run of this recipe has chosen from data or weights.
        follow: also find out what a pass keeps, operation by operation.
        known: what a run of this recipe has decided on its device.
    """
    built = _build(composition, made, known)
    settings, stack, model = built.settings, built.stack, built.model
    steps = build_run.step_count(settings, len(built.data), built.parts.objective.updates())
    built.parts.schedule.check(steps)
    groups, per_step = built.groups(), built.tokens_per_step()
    chosen = sum(w.memory(model).get("trainable", 0) for w in built.later)
    memory, unread = _memory(built, made, follow)
    total, base = sum(p.numel() for p in model.parameters()), base_parameters(model)
    warnings = [
        *data_warnings(built.data.report),
        *rank_warnings(model),
        *memory_warnings(memory.total, built.device),
        *weight_warnings(settings.model, model, built.parts.objective.model_head()),
    ]
    plan = BatchPlan.of(settings.batch, len(built.data))
    notes = [*_notes(built, memory, unread), *_sharding_notes(built, memory)]
    return Findings(
        composition.name, kind_name(built.parts.objective),
        [{"name": w.name, "kind": kind_name(w), "stage": w.stage.name} for w in stack], stack.written_out(),
        base, total - base, max(sum(g.count for g in groups), chosen), [g.row() for g in groups], steps, len(built.data),
        per_step, memory, _megabytes(memory), shard_table(memory, model), delta_bytes(model, stack),
        None if per_step is None else 6.0 * total * per_step * (steps - plan.saved(steps) / settings.batch.size)
        / matmul_rate(built.device), built.data.report.to_dict(), notes, warnings,
    )  # fmt: skip


def _build(composition: Composition, made: StackChoices | None, known: Profile | None) -> _Built:
    """Read the rows and build the model without weights, with every check that comes before weights."""
    settings = composition.recipe
    parts = instantiate(settings)
    check_trackers(settings.log.trackers)
    recipe_checks.check_parts(settings, parts)
    device = pick_device(settings.runtime.device)
    check_device(settings, device)
    use(profile_for(settings, device, known))
    data, validation, labels = read_data(settings, parts.objective, parts.wrappers)
    stack = build_model.stack_for(parts.objective, [w.for_tasks(data.tasks) for w in parts.wrappers])
    recipe_checks.check_chain(settings, parts.wrappers)
    parts.objective.check(settings, data)
    check_monitor(settings, parts.objective, validation, composition.origins)
    model = build_model.on_meta(settings, parts.objective, stack, labels, device, made.structures if made else None)
    check_model_fits(settings, parts.objective, data, validation, labels)
    later = [w for w in stack if w.calibrates()] if made is None else []
    return _Built(composition, parts, device, data, validation, labels, stack, model, later)


def _memory(built: _Built, made: StackChoices | None, follow: bool) -> tuple[Estimate, list[str]]:
    """Return the memory of the run, and a note on each other model than the policy that could not be looked at."""
    settings, stack, model, report = built.settings, built.stack, built.model, built.data.report
    most, per_step = settings.batch.tokens or micro_tokens(torch.device(built.device)), built.tokens_per_step()
    micro = max(most if per_step is None else min(per_step, most), built.longest_row())
    memory = estimate_memory(
        model, stack, built.parts.optimizer, micro, targets=max(1, round(micro * report.trained / max(report.tokens, 1))),
        activation_bytes=(build_run.autocast_of(settings.model.dtype, stack) or pretrained(model).dtype).itemsize,
        checkpointing=settings.model.gradient_checkpointing, device=built.device,
    )  # fmt: skip
    undecided = tuple(w.name for w in built.later if w.chooses() and not (own_tensors(model, w.name) or w.opened(model)))
    memory = replace(memory, undecided=undecided)
    if follow:
        memory = follow_pass(memory, settings, built.data, built.labels, built.device, made)
    else:
        memory = replace(memory, unpredicted="stages and trials are not followed through their models")
    models = built.parts.objective.held_models(settings, build_model.base_is_frozen(stack))
    held, unread = auxiliary_bytes(models, built.device)
    return replace(memory, auxiliary=held + (copied_bytes(model) if built.copied else 0)), unread


def _notes(built: _Built, memory: Estimate, unread: list[str]) -> list[str]:
    """Return what a reader of the findings should know besides the numbers."""
    settings, unused = built.settings, built.data.report.unused
    notes = [] if built.validation is not None else ["no validation split: nothing decides which checkpoint is best"]
    if built.validation is not None and settings.data.streaming:
        notes.append("rows that are in training and validation: unknown, the training rows are streamed")
    notes += [f"columns not used: {', '.join(unused)}"] if unused else []
    notes += [
        f"{w.name} chooses or starts before step 0, from data or from the weights as they were before quantization"
        for w in built.later
    ]
    notes += unread
    if settings.model.gradient_checkpointing == "offload" and built.device == "cpu":
        notes.append(
            "model.gradient_checkpointing=offload moves nothing on a CPU, whose memory is the machine's: it is as true"
        )
    if memory.host:
        notes.append(f"inputs of blocks wait in the memory of the machine: {memory.host / 2**20:.0f} MB")
    if memory.unpredicted:
        rough = (memory.activations + memory.logits) / 2**20
        notes.append(f"memory of the pass is unknown, {memory.unpredicted}; by rough formulas it keeps about {rough:.0f} MB")
    if (warm := settings.batch.warmup) is not None:
        notes.append(f"batches grow from {warm.start} rows to {settings.batch.size} over the first {warm.batches}")
    return notes


def _sharding_notes(built: _Built, memory: Estimate) -> list[str]:
    """Return what dividing the training saves.

    Raises:
        RecipeError: what is divided cannot be copied as a reference.
    """
    runtime = built.settings.runtime
    if runtime.shard in GATHERED and built.copied:
        raise RecipeError(DIVIDED_REFERENCE)
    if runtime.shard == PLAIN:
        return []
    devices = max(2, shard_size(runtime))
    notes = [saving(memory, built.model, runtime.shard, devices)]
    return notes if runtime.offload == "none" else [*notes, resting(memory, devices)]


def _megabytes(memory: Estimate) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in [*memory.rows(), ("total", memory.total)]}
