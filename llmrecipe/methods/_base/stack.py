"""The stack: an ordered list of wrappers, checked for legality, that forwards every hook of the loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.forward_context import activate, current
from llmrecipe.methods._base.method import ParamGroup, Probe, Stage, Wrapper
from llmrecipe.methods._base.stack_checks import check_legal, named_in_errors, refuse_idle, refuse_modality
from llmrecipe.models import task_heads
from llmrecipe.models.excluded import excluded
from llmrecipe.models.hooks.fp32_master import raise_to_master
from llmrecipe.models.hooks.hook import all_hooks, own_tensors
from llmrecipe.models.hooks.shared_module import shared_modules
from llmrecipe.models.sharded import is_sharded
from llmrecipe.models.stored_tensors import copy_saved
from llmrecipe.models.task_heads import is_head

if TYPE_CHECKING:
    from llmrecipe.methods._base.update_rule import UpdateRule


DIVIDED_REFERENCE = (
    "runtime.shard: the policy of step 0 would be a copy of what trains, which cannot be exchanged with parameters that are "
    "divided over processes; use runtime.shard=zero1, or a stack that can be disabled, such as lora"
)


class Stack:
    """Wrappers attached to one model."""

    def __init__(self, wrappers: Mapping[str, Wrapper] | list[Wrapper]):
        named = list(wrappers.values()) if isinstance(wrappers, Mapping) else list(wrappers)
        # A stable sort: list order decides only inside a stage.
        self.wrappers = sorted(named, key=lambda w: w.stage)
        self.fired: Counter[str] = Counter()
        self.snapshot: dict[str, Tensor] | None = None
        self.reshaped = False
        """Whether the last change of the trained set also changed which tensors are saved."""
        self.hybrids: dict[str, list[Wrapper]] = {}
        """Name of each hybrid -> the wrappers it was replaced by when it was attached."""
        check_legal(self.wrappers)

    def __iter__(self) -> Iterator[Wrapper]:
        return iter(self.wrappers)

    # --- building -------------------------------------------------------------------------------------------------

    def load_kwargs(self) -> dict[str, Any]:
        """Return what `from_pretrained` needs, merged over wrappers."""
        merged: dict[str, Any] = {}
        for wrapper in self.wrappers:
            merged |= wrapper.load_kwargs()
        return merged

    def attach(self, model: nn.Module, structures: Mapping[str, dict[str, Any]] | None = None) -> None:
        """Expand hybrids, attach every wrapper in order and set what trains.

        Raises:
            ModelError: a wrapper does not fit the model, or would act at an embedding that is never called.
        """
        expanded: list[Wrapper] = []
        for wrapper in self.wrappers:
            refuse_modality(model, wrapper)
            with named_in_errors(wrapper):
                parts = wrapper.expand(model)
            if parts != [wrapper]:
                self.hybrids[wrapper.name] = parts
            expanded += parts
        self.wrappers = sorted(expanded, key=lambda w: w.stage)
        check_legal(self.wrappers)
        for wrapper in self.wrappers:
            refuse_modality(model, wrapper)
            with named_in_errors(wrapper):
                wrapper.attach(model, (structures or {}).get(wrapper.name))
            refuse_idle(model, wrapper.name)
            if wrapper.role:
                for _, _, _, hook in all_hooks(model, wrapper.name):
                    hook.roles = frozenset({wrapper.role})
        for wrapper in self.wrappers:
            with named_in_errors(wrapper):
                wrapper.check_attached(model)
        self.set_trainable(model)

    def written_out(self) -> list[str]:
        """Return the lines of YAML that stand, in a recipe's `stack`, for each hybrid of an attached stack."""
        lines = []
        for name, parts in self.hybrids.items():
            lines.append(f"stack.{name} stands for")
            for part in parts:
                text = yaml.safe_dump(changed_options(part), default_flow_style=True, sort_keys=False, width=10**9)
                lines.append(f"  {part.name}: {text.strip()}")
        return lines

    def set_trainable(self, model: nn.Module) -> None:
        """Set which parameters train: `trainable`, without what rests for now."""
        opened = self._opened(model)
        for name, parameter in list(model.named_parameters()):
            if name in opened and _can_train(parameter):
                raise_to_master(model, parameter)
        names = self.trainable(model) - {name for wrapper in self.wrappers for name in wrapper.resting(model)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

    def trainable(self, model: nn.Module) -> set[str]:
        """Return the names of the parameters that train at some time of the run.

        An empty stack, or one with only RULE and FREEZE wrappers, trains everything; INJECT and SELECT wrappers freeze the
        base; injected tensors train unless their wrapper declares them frozen; SELECT wrappers open what they name;
        quantized weights never train; a new task head always trains.
        """
        changes = self._changes()
        trained = self._opened(model)
        for wrapper in changes:
            trained |= set(own_tensors(model, wrapper.name)) - wrapper.frozen(model)
        found: set[str] = set()
        for name, parameter in model.named_parameters():
            everything = not changes and not excluded(parameter) and not task_heads.is_frozen(model, name)
            if _can_train(parameter) and (everything or name in trained or is_head(model, name)):
                found.add(name)
        return found

    def _changes(self) -> list[Wrapper]:
        return [w for w in self.wrappers if w.stage in (Stage.INJECT, Stage.SELECT)]

    def _opened(self, model: nn.Module) -> set[str]:
        return {name for wrapper in self._changes() for name in wrapper.opened(model)}

    # --- hooks of the loop ----------------------------------------------------------------------------------------

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Make data-dependent choices, once, before step 0."""
        for wrapper in self.wrappers:
            wrapper.calibrate(model, probe)
            self._mark(wrapper, "calibrate")
        self.set_trainable(model)

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Return the sum of the wrappers' penalties, a scalar."""
        total: Tensor | float = 0.0
        for wrapper in self.wrappers:
            total = total + wrapper.penalty(model)
            self._mark(wrapper, "penalty")
        return total

    def before_step(self, model: nn.Module, step: int) -> bool:
        """Return True when a wrapper changed the set of trained tensors."""
        changed = [wrapper for wrapper in self.wrappers if self._prepares(wrapper, model, step)]
        self.reshaped = any(wrapper.stage is not Stage.FREEZE for wrapper in changed)
        if changed:
            self.set_trainable(model)
        return bool(changed)

    def _prepares(self, wrapper: Wrapper, model: nn.Module, step: int) -> bool:
        self._mark(wrapper, "before_step")
        return bool(wrapper.before_step(model, step))

    def cuts(self, model: nn.Module) -> dict[str, tuple[int, Tensor]]:
        """Return every wrapper's shortened tensors."""
        return {name: cut for wrapper in self.wrappers for name, cut in wrapper.cuts(model).items()}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Call `after_backward` of every wrapper."""
        for wrapper in self.wrappers:
            wrapper.after_backward(model, step)
            self._mark(wrapper, "after_backward")

    def after_step(self, model: nn.Module, step: int) -> None:
        """Call `after_step` of every wrapper."""
        for wrapper in self.wrappers:
            wrapper.after_step(model, step)
            self._mark(wrapper, "after_step")

    def finish(self, model: nn.Module) -> None:
        """Call `finish` of every wrapper."""
        for wrapper in self.wrappers:
            wrapper.finish(model)

    @contextlib.contextmanager
    def stepping(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Return the contexts of all wrappers for the optimizer's own step."""
        with contextlib.ExitStack() as entered:
            for wrapper in self.wrappers:
                entered.enter_context(wrapper.stepping(model, optimizer))
            yield

    def metrics(self, model: nn.Module) -> dict[str, Tensor | float]:
        """Return what the wrappers report at every step, each under its name; scalars of the device are not read here."""
        return {f"{w.name}/{key}": value for w in self.wrappers for key, value in w.metrics(model).items()}

    def rule(self) -> UpdateRule | None:
        """Return the only update rule of the stack, if a wrapper brings one."""
        rules = [rule for wrapper in self.wrappers if (rule := wrapper.rule()) is not None]
        return rules[0] if rules else None

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return every wrapper's own parameter groups."""
        return [group for wrapper in self.wrappers for group in wrapper.groups(model)]

    def unfired(self) -> list[str]:
        """Return `name.hook` for declared lifecycle hooks that have not fired; the run stops on any after step 1."""
        return [f"{w.name}.{hook}" for w in self.wrappers for hook in w.lifecycle_hooks if not self.fired[f"{w.name}.{hook}"]]

    def _mark(self, wrapper: Wrapper, hook: str) -> None:
        self.fired[f"{wrapper.name}.{hook}"] += 1

    # --- what was learned -----------------------------------------------------------------------------------------

    def structures(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the structure of each wrapper, for the file next to a delta."""
        return {w.name: w.structure(model) for w in self.wrappers}

    def delta(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what training changed: all wrappers' deltas and task heads, or all weights when everything trains."""
        if not self._changes():
            names = self.trainable(model)
            facts = {n: b for n, b in model.named_buffers() if n.startswith("task_head.") and is_head(model, n)}
            return {**{n: p.detach() for n, p in model.named_parameters() if n in names}, **facts}
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors: dict[str, Tensor] = {n: v.detach() for n, v in state.items() if is_head(model, n)}
        for wrapper in self.wrappers:
            tensors |= wrapper.delta(model)
        return tensors

    def restore(self, model: nn.Module, delta: Mapping[str, Tensor]) -> None:
        """Load a saved delta back, bit for bit.

        Raises:
            RecipeError: it holds tensors that this stack does not have.
            ValueError: it lacks tensors of a wrapper, or has others of their names.
        """
        left = dict(delta)
        for wrapper in self.wrappers:
            wanted = list(wrapper.delta(model))
            if missing := [name for name in wanted if name not in left]:
                raise ValueError(f"the saved delta lacks {', '.join(missing[:5])} of {wrapper.name}")
            wrapper.restore(model, {name: left.pop(name) for name in wanted})
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        unknown = sorted(set(left) - set(state))
        if unknown:
            raise RecipeError(f"the saved delta holds tensors this stack does not have: {', '.join(unknown[:5])}")
        copy_saved(model, left)

    def training_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what the wrappers need to go on training and did not learn, by `<wrapper>.<name>`."""
        return {f"{w.name}.{key}": t for w in self.wrappers for key, t in w.training_tensors(model).items()}

    @torch.no_grad()
    def load_training_tensors(self, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Put back what `training_tensors` returned."""
        for name, tensor in self.training_tensors(model).items():
            if saved[name].shape != tensor.shape:
                raise ValueError(f"the saved {name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(saved[name])

    # --- the policy of step 0 -------------------------------------------------------------------------------------

    def reference_is_off(self) -> bool:
        """Return whether disabling every hook gives the policy of step 0: all hooks start as identity, nothing else trains."""
        injected = [w for w in self.wrappers if w.stage is Stage.INJECT]
        others = [w for w in self.wrappers if w.stage is Stage.SELECT]
        return bool(injected) and not others and all(w.starts_at_base() for w in injected)

    def learns_init(self) -> bool:
        """Return whether a method is initialized from data or text: a model rebuilt to resume is not the policy of step 0."""
        return any(w.calibrates() and w.stage is Stage.INJECT for w in self.wrappers)

    def snapshot_reference(self, model: nn.Module) -> None:
        """Snapshot the policy of step 0 where disabling the stack does not give it. Call once, before the first update."""
        if not self.reference_is_off():
            self.snapshot_trained(model)

    def snapshot_trained(self, model: nn.Module) -> None:
        """Keep a copy of everything that trains: the reference from then on.

        Raises:
            RecipeError: the tensors are divided over processes, which a copy cannot be exchanged with.
        """
        names = self.trainable(model)
        if any(is_sharded(p) for n, p in model.named_parameters() if n in names):
            raise RecipeError(DIVIDED_REFERENCE)
        self.snapshot = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}

    @torch.no_grad()
    def mix_reference(self, model: nn.Module, alpha: float) -> None:
        """Update snapshot <- alpha policy + (1 - alpha) snapshot (arXiv 2404.09656)."""
        assert self.snapshot is not None, "there is no snapshot of a reference to move"
        live = dict(model.named_parameters())
        for name, value in self.snapshot.items():
            value.mul_(1.0 - alpha).add_(live[name].detach(), alpha=alpha)

    @contextlib.contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Compute as the policy of step 0 inside this context: hooks disabled, or the snapshot swapped in."""
        if self.snapshot is None:
            with activate(dataclasses.replace(current(), role="reference")):
                yield
            return
        live = {n: p for n, p in model.named_parameters() if n in self.snapshot}
        kept = {n: p.data for n, p in live.items()}
        try:
            for name, parameter in live.items():
                parameter.data = self.snapshot[name]
            yield
        finally:
            for name, parameter in live.items():
                parameter.data = kept[name]


def base_parameters(model: nn.Module) -> int:
    """Count the parameters of a model without what was added to it: hooks, shared modules, new heads."""
    added = {id(p) for _, _, _, hook in all_hooks(model) for p in hook.parameters()}
    added |= {id(p) for _, shared in shared_modules(model) for p in shared.parameters()}
    heads = (task_heads.ATTRIBUTE, *getattr(model, "new_heads", ()))
    return sum(p.numel() for name, p in model.named_parameters() if id(p) not in added and not _inside(name, heads))


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and not hasattr(parameter, "quant_state")


def kind_name(component: object) -> str:
    """Return the registered name of a component: the stem of its file."""
    return registry.name_of(type(component))


def changed_options(wrapper: Wrapper) -> dict[str, Any]:
    """Return the kind of a wrapper and the options that differ from their defaults, as a recipe would give them."""
    kind = kind_name(wrapper)
    values = {f.name: getattr(wrapper, f.name) for f in dataclasses.fields(wrapper) if f.name not in ("name", "role")}
    defaults = registry.spec("stack", kind).defaults()
    return {"kind": kind, **{k: v for k, v in values.items() if v != defaults.get(k, ...)}}
