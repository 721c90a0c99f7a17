"""Proof that the first update did what the recipe says, made in every run and written to its `report.json`.

Frozen tensors have not moved, trained ones have, every process holds the same, every hook was called, every gradient arrived,
and every option that the recipe sets was read. None of it can be seen in a loss. The tensors are compared by checksum, so no
weight is copied.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ProofError
from llmrecipe.core.key_reads import refuse_unread
from llmrecipe.methods._base.update_rule import LateResult, StepResult
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.shared_module import shared_modules
from llmrecipe.models.sharded import is_sharded, local
from llmrecipe.recipe.sharding_rules import PLAIN
from llmrecipe.training import first_step, shard_proof
from llmrecipe.training.checksum import named_checksums
from llmrecipe.training.memory_estimate import stored_bytes
from llmrecipe.training.startup_report import add_to_report, record_proof

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.methods._base.update_rule import UpdateRule
    from llmrecipe.training.run_state import RunState


class FirstUpdate:
    """The first update of a run, or the first after a resume: what it has to leave and what it has to change.

    A step that is skipped because it was not finite proves nothing, so the next one is the first.
    """

    def __init__(self, run: RunState):
        self.run = run
        self.pending = True
        self.before: dict[str, tuple[int, ...]] = {}
        self.trained: set[str] = set()
        self.seconds = 0.0
        self.facts: dict[str, Any] = {}

    def make(self, rule: UpdateRule, micros: list[Batch]) -> StepResult:
        """Make the update under watch; see `first_step.checked`."""
        started = time.perf_counter()
        tensors = watched(self.run.model)
        self.trained = {n for n, p in self.run.model.named_parameters() if p.requires_grad}
        self.before = named_checksums(tensors)
        self.seconds += time.perf_counter() - started
        counted = self.run.runtime.shard == PLAIN and not self.run.profile.compile
        with self.run.meter.watch(self.run.model, counted, self.run.runtime.device):
            return first_step.checked(rule, self.run, micros)

    def compare(self, result: StepResult | LateResult) -> None:
        """Compare the tensors with what they were. Call after the update, while gradients exist.

        Raises:
            ProofError: naming a frozen tensor that moved, a trained one that did not, or one that differs between processes.
        """
        if not (self.pending and result.finite):
            return
        started = time.perf_counter()
        tensors = watched(self.run.model)
        after = named_checksums(tensors)
        names = sorted(self.before)
        known = dict(self.run.model.named_parameters())
        moved = self._anywhere([n for n in names if (after[n] != self.before[n] if n in after else n not in known)])
        divided = {n for n, t in tensors.items() if is_sharded(t)}
        self._refuse_unequal([n for n in sorted(after) if n not in divided], after)
        frozen = [n for n in names if n not in self.trained]
        own_writes = written_in_place(self.run.model)
        self._refuse(
            [n for n in moved if n not in self.trained and n not in own_writes],
            "frozen tensors moved",
            "something other than the optimizer writes into them, and what is saved would not be what was computed with",
        )
        still = sorted(self.trained - set(moved))
        self._judge_still({n: p for n, p in self.run.model.named_parameters() if n in still})
        self.facts |= {
            "step": self.run.progress.step + 1,
            "frozen": {"tensors": len(frozen), "unchanged": len(frozen) - sum(n in own_writes for n in frozen)},
            "trained": {
                "tensors": len(self.trained),
                "changed": len(self.trained) - len(still),
                "waiting": still[: first_step.SHOWN],
            },
            "hooks": sum(1 for _ in all_hooks(self.run.model)),
        }
        if self.run.runtime.shard != PLAIN:
            self.facts["sharding"] = shard_proof.prove(self.run)
        self.run.meter.count(self.run.model, self.run.stack, self.run.optimizer)
        self.before.clear()
        self.seconds += time.perf_counter() - started

    def finalize(self, result: StepResult | LateResult) -> None:
        """Finish the first update: lifecycle hooks and options of the recipe, then the report.

        Raises:
            ProofError: a lifecycle hook did not run, or an option was read by nothing.
        """
        if not (self.pending and result.finite):
            return
        first_step.finalize_first_step(self.run)
        started = time.perf_counter()
        reads = self.run.reads
        self.facts["keys"] = reads.count()
        refuse_unread(reads.unread())
        reads.stop()
        self.pending = False
        self._report_memory()
        self.seconds += time.perf_counter() - started
        record_proof(self.run, {**self.facts, "seconds": round(self.seconds, 4)})

    def _report_memory(self) -> None:
        """Write what the update held in memory next to what formulas give for the model as it is."""
        run, meter = self.run, self.run.meter
        if not meter.parts:
            return
        add_to_report(run, "memory", meter.totals())
        if run.first_step == 0:
            expected = stored_bytes(run.model, run.stack, run.optim)
            parts = {k: v for n, size in meter.parts.items() for k, v in ((n, size), (f"{n}/predicted", expected.get(n)))}
            run.events.memory(step=run.progress.step, **{name: size for name, size in parts.items() if size is not None})

    def _anywhere(self, names: list[str]) -> list[str]:
        """Return the names that are in the list of any process, where each compares its own part of the tensors."""
        if not self.run.runtime.in_step:
            return names
        return list(dict.fromkeys(name for each in self.run.runtime.gather_json(names) for name in each))

    # --- comparisons ----------------------------------------------------------------------------------------------

    def _judge_still(self, still: dict[str, nn.Parameter]) -> None:
        """Refuse trained tensors that should have moved.

        A gradient that is zero leaves a tensor where it is (A of LoRA while B is zero). Any other has to move it, unless the
        step is below the rounding of its values, and unless its method says that it may wait.
        """
        held = held_by(self.run.optimizer)
        lost = [n for n in still if held is not None and id(still[n]) not in held and not self._may_wait(n)]
        self._refuse(lost, "trained tensors are in no group of the optimizer", "they would be saved as learned")
        if held is None or not still or self.run.learning_rate == 0.0:
            return
        stuck = [name for name, p in still.items() if _should_move(p, held[id(p)]) and not self._may_wait(name)]
        self._refuse(stuck, "trained tensors with a gradient did not move", "something writes their old values back")

    def _may_wait(self, name: str) -> bool:
        return any(w.may_skip(name) for w in self.run.stack if name in first_step.owned(self.run, w))

    def _refuse_unequal(self, names: list[str], after: dict[str, tuple[int, ...]]) -> None:
        """Refuse tensors that differ between processes; every process has the same names."""
        if self.run.runtime.world == 1 or not names:
            return
        own = torch.tensor([after[n][0] for n in names], dtype=torch.int64)
        differs = (self.run.runtime.maximum(own) != own).tolist()
        wrong = [n for n, one in zip(names, differs, strict=True) if one]
        self._refuse(wrong, "tensors differ between the processes", "each process would train a model of its own")

    def _refuse(self, names: list[str], what: str, why: str) -> None:
        """Stop every process for what any of them found."""
        found = [name for each in self.run.runtime.gather_json(names) for name in each]
        if found:
            listed = first_step.listed(list(dict.fromkeys(found)))
            raise ProofError(f"step {self.run.progress.step + 1}: {what}: {listed}; {why}")


def watched(model: nn.Module) -> dict[str, Tensor]:
    """Return what the first update is judged by: all parameters, and the base's buffers that are saved.

    Buffers of methods count for themselves (masks, ranks), and statistics that a forward pass keeps move by themselves.
    4-bit weights that a CPU kernel has packed for itself are other bytes with the same values, and are left out.
    """
    own = {id(b) for _, _, _, hook in all_hooks(model) for b in hook.buffers()}
    own |= {id(b) for _, shared in shared_modules(model) for b in shared.buffers()}
    running = {id(b) for m in model.modules() if hasattr(m, "running_mean") for b in m._buffers.values()}
    buffers = {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set and id(value) not in own | running
    }
    packed = {
        n for n, p in model.named_parameters() if getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False)
    }
    return {**buffers, **{n: p for n, p in model.named_parameters() if n not in packed}}


def written_in_place(model: nn.Module) -> set[str]:
    """Return the frozen tensors into which hooks write what they have learned (see `Hook.in_place`)."""
    names = {id(p): name for name, p in model.named_parameters()}
    hosts = [getattr(module, hook.tensor) for _, module, _, hook in all_hooks(model) if hook.in_place]
    return {names[id(host)] for host in hosts if id(host) in names}


def held_by(optimizer: torch.optim.Optimizer | None) -> dict[int, float] | None:
    """Return id -> learning rate of the parameters an optimizer holds; None without one."""
    if optimizer is None:
        return None
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _should_move(parameter: nn.Parameter, rate: float) -> bool:
    """Return whether a step along the gradient is larger than half a unit in the last place of the largest value.

    The step is taken as rate times the largest gradient, at most the rate: a lower bound for plain and for scaled gradients.
    """
    if parameter.grad is None or not parameter.is_floating_point():
        return False
    if not local(parameter.grad).numel():
        return False
    slope, size = float(local(parameter.grad).abs().max()), float(local(parameter.detach()).abs().max())
    return rate * min(slope, 1.0) > torch.finfo(parameter.dtype).eps * size and slope > 1e-6
