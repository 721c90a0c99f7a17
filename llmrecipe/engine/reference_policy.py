"""The policy of step 0 as the reference: by disabling the stack, by a snapshot, or by scoring all rows beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from llmrecipe.core.console import lasting
from llmrecipe.core.errors import RecipeError
from llmrecipe.data import order
from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.engine.reference_cache import NAMED, ReferenceCache, cache_file, weights_digest
from llmrecipe.methods._base.method import Stage
from llmrecipe.recipe.code_key import code_behind
from llmrecipe.runs import delta

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.methods._base.stack import Stack
    from llmrecipe.runs.open_model import LoadedModel


SMALL = 0.1
"""Up to this share of the model the trained tensors are kept twice; beyond it all rows are scored before step 0."""


class ScoredObjective(Protocol):
    """What the engine needs of an objective whose rows a reference scores (see the interface `Objective`)."""

    pairs_rows: ClassVar[bool]
    samples: ClassVar[bool]

    def model_head(self) -> str:
        """Return the head that the model is loaded with."""

    def reference_of(self) -> str:
        """Return which policy the reference is."""

    def reference_moves(self) -> bool:
        """Return whether the reference follows the policy."""

    def compares_distributions(self) -> bool:
        """Return whether more of the reference is read than the scores of its rows."""

    def reference_batches(self, rows: list[dict[str, Any]], roles: Roles) -> Iterator[Batch]:
        """Yield the batches whose reference log-probabilities the rows of one step need."""

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a split that one process evaluates."""


@dataclass(frozen=True)
class PlannedRows:
    """The rows a run will read."""

    train: SplitRows
    """Training rows; `train.key` stands for their content."""
    others: Callable[[], list[SplitRows | None]]
    """Prepares the other splits that will be scored; None among them where there is none."""
    steps: int
    plan: BatchPlan
    """Which of them each batch has."""
    seed: int


def prepare_reference(objective: ScoredObjective, stack: Stack, loaded: LoadedModel, roles: Roles, rows: PlannedRows) -> None:
    """Make the policy of step 0 available for the whole run. Call with the model as step 0 has it.

    Stacks that can be disabled need nothing. Of a small trained part a snapshot is kept and swapped in. Where most weights
    train, every row the run will use is scored at this point, so that there is never a second model in memory. Rows that the
    policy will sample cannot be, so there a snapshot of all trained tensors is kept, as where whole distributions are compared,
    and where the reference moves or the initial values depend on data; of the latter two checkpoints hold it. Another model's
    scores were computed before this one was loaded (see `reference_model`).
    """
    which = objective.reference_of()
    if which not in NAMED or which == "none":
        return
    model = roles.model
    if objective.reference_moves():
        roles.reference_moves = True
        stack.snapshot_trained(model)
        return
    off = base_names(stack, loaded) if which == "base" else None
    with lasting("hashing the weights of the reference"):
        roles.cache = ReferenceCache(cache_path(stack, loaded, roles, rows, off is not None))
    if off is not None:
        roles.reference_off = off
        return
    if stack.reference_is_off() and loaded.continued is None:
        return
    if needs_snapshot(objective, stack, model, loaded.continued is not None):
        stack.snapshot_trained(model)
        return
    score_all(row_groups(objective, rows), objective, roles)


def needs_snapshot(objective: ScoredObjective, stack: Stack, model: nn.Module, continued: bool) -> bool:
    """Return whether the policy of step 0 is a copy of what trains; the model may be on the meta device.

    Args:
        continued: whether the stack starts from what another run has learned.
    """
    if objective.reference_of() not in NAMED or objective.reference_of() == "none":
        return False
    if objective.reference_moves():
        return True
    if stack.reference_is_off() and not continued:
        return False
    if objective.samples or objective.compares_distributions() or stack.learns_init():
        return True
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained <= SMALL * sum(p.numel() for p in model.parameters())


def base_names(stack: Stack, loaded: LoadedModel) -> frozenset[str] | None:
    """Return the mounted wrappers to switch off so that the base answers; None where the policy of step 0 is the base.

    Raises:
        RecipeError: the base's weights are no longer in memory.
    """
    mounted = loaded.mounted
    if not (mounted or loaded.merged) and loaded.continued is None and all(w.starts_at_base() for w in stack):
        return None
    injected = [w for w in stack if w.stage is Stage.INJECT]
    opens = [w.name for w in (*stack, *mounted) if w.stage is Stage.SELECT]
    if opens or not injected:
        what = f"{', '.join(opens)} changes" if opens else "this run trains"
        raise RecipeError(
            f"objective.reference: {what} the base's own weights, so the base cannot be evaluated together with the policy; "
            "use reference=initial, or a stack of injected methods such as lora"
        )
    return frozenset(w.name for w in mounted)


@torch.no_grad()
def score_all(groups: Iterable[list[dict[str, Any]]], objective: ScoredObjective, roles: Roles) -> None:
    """Score all rows of some groups into the roles' cache, save it, and use it in place of the model from then on."""
    cache = roles.cache
    with roles.evaluating(), lasting("scoring rows under the reference", lambda: f"{cache.misses:,} rows"):
        for rows in groups:
            for batch in objective.reference_batches(rows, roles):
                if batch.keys and cache.get(batch) is None:
                    cache.put(batch, batch.sum_by_sequence(roles.engine(batch)["logprobs"]))
    cache.complete = True
    cache.save()


def row_groups(objective: ScoredObjective, rows: PlannedRows) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each split, and of every step over all processes; one pass where rows are looked at one by one."""
    for split in rows.others():
        if split is not None:
            yield objective.evaluation_rows(split, list(range(len(split))))
    data = rows.train
    last = rows.steps if objective.pairs_rows else min(rows.steps, rows.plan.batches(1))
    indices: np.ndarray | range = range(0)
    for epoch, first, end in rows.plan.spans(last):
        indices = order(data, rows.seed, epoch) if first == 0 else indices
        yield [data[int(i)] for i in indices[first:end]]


def cache_path(stack: Stack, loaded: LoadedModel, roles: Roles, rows: PlannedRows, base: bool = False) -> Path:
    """Return where the numbers of this reference lie: keyed by weights, stacks with their code, start, data and engine."""
    model = roles.model
    facts: dict[str, Any] = {
        "base": loaded.base_fingerprint,
        # Mounted stacks that were folded into the weights show only here.
        "weights": delta.fingerprint(model),
        "layers": [weights_digest(layer.tensors) for layer in loaded.layers],
        "dtype": str(next(model.parameters()).dtype),
        "autocast": str(roles.engine.autocast),
        "data": rows.train.key,
    }
    code = code_behind(type(part).__module__ for part in (*stack, *loaded.mounted))
    if code:
        facts["code"] = code
    if base:
        facts["reference"] = "base"
    elif any(not w.starts_at_base() for w in stack) or loaded.continued is not None:
        facts["start"] = start_of(stack, model, rows)
    return cache_file(facts)


def start_of(stack: Stack, model: nn.Module, rows: PlannedRows) -> str | dict[str, Any]:
    """Return what the stack's initial values depend on: its tensors, or the data and options they are initialized from."""
    learned = [w for w in stack if w.calibrates() and w.stage is Stage.INJECT]
    names = {name for w in learned for name in w.delta(model)}
    digest = weights_digest({n: v for n, v in stack.delta(model).items() if n not in names})
    if not learned:
        return digest
    options = [delta.wrapper_mapping(w) for w in learned]
    return {"tensors": digest, "learned": options, "seed": rows.seed, "batch": rows.plan.size}
