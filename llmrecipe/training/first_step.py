"""Checks that the first optimizer step uses every attached hook and every trained tensor.

A trained tensor without a gradient (None, not zero) in any micro-batch of any process would be saved as learned, and a hook
that was never called would do nothing; neither would show in any loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmrecipe.core.errors import ProofError
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.update_rule import LateResult
from llmrecipe.models.hooks.hook import all_hooks, own_tensors, recorded_calls
from llmrecipe.models.task_heads import is_head
from llmrecipe.training import build_run

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.methods._base.update_rule import StepResult, UpdateRule
    from llmrecipe.training.run_state import RunState

SHOWN = 5
"""Names an error or a warning lists."""


def checked(rule: UpdateRule, run: RunState, micros: list[Batch]) -> StepResult:
    """Make an update, then refuse what it left unused; a skipped step proves nothing.

    Raises:
        ProofError: a hook was never called, or a tensor never reached, and its wrapper does not say that this may be.
    """
    # Compiled blocks run uncompiled inside, where calls can be seen.
    with recorded_calls() as called:
        made = rule(run.step_context(), micros)
        result = made.read() if isinstance(made, LateResult) else made
    if not result.finite:
        return result
    _check_hooks(run, called)
    # A rule that brings its own update has no optimizer, and no gradients.
    if run.optimizer is not None:
        trained = {name: p.grad is not None for name, p in run.model.named_parameters() if p.requires_grad}
        unreached = _nowhere(run, trained)
        _judge(run, unreached)
        run.unused = bool(unreached) or any(type(w).may_skip is not Wrapper.may_skip for w in run.stack)
    return result


def _check_hooks(run: RunState, called: set[int]) -> None:
    """Stop for hooks of the stack that no forward pass called."""
    hooks = {f"{path}.{name}": hook for path, _, name, hook in all_hooks(run.model)}
    uncalled = _nowhere(run, {name: id(hook) in called for name, hook in hooks.items()})
    _refuse(run, [(hooks[name].owner, name) for name in uncalled], "hooks that were never called")


def finalize_first_step(run: RunState) -> None:
    """Refuse lifecycle hooks that did not run in the first step; stop looking for unused tensors where none are possible.

    Raises:
        ProofError: a hook a wrapper depends on never ran.
    """
    if unfired := run.stack.unfired():
        raise ProofError(f"hooks that never ran in step 1: {', '.join(unfired)}; the method would silently do nothing")
    if not run.unused:
        run.roles.prepared = build_run.prepared(run.runtime, run.roles, run.stack, False)


def _nowhere(run: RunState, used: dict[str, bool]) -> list[str]:
    """Return the names that are used on no process."""
    if not used:
        return []
    flags = run.runtime.maximum(torch.tensor([float(one) for one in used.values()]))
    return [name for name, flag in zip(used, flags.tolist(), strict=True) if not flag]


def _judge(run: RunState, unreached: list[str]) -> None:
    """Raise for unused tensors of a wrapper or an objective; warn about base weights that train because everything does."""
    if not unreached:
        return
    owners = {n: w.name for w in run.stack for n in owned(run, w)}
    _refuse(run, [(owners[n], n) for n in unreached if n in owners], "trained tensors that no gradient reached")
    heads = [n for n in unreached if n not in owners and is_head(run.model, n)]
    if heads:
        raise ProofError(f"step {run.progress.step + 1}: the objective trains a head it never reads: {listed(heads)}")
    rest = [n for n in unreached if n not in owners]
    if rest:
        run.unread = frozenset(rest)
        run.events.warning(f"{len(rest)} trained weights are not read by this objective and stay as they are: {listed(rest)}")


def _refuse(run: RunState, found: list[tuple[str, str]], what: str) -> None:
    wrappers = {w.name: w for w in run.stack}
    wrong = [(owner, name) for owner, name in found if owner in wrappers and not wrappers[owner].may_skip(name)]
    if not wrong:
        return
    owner = wrong[0][0]
    names = [name for whose, name in wrong if whose == owner]
    raise ProofError(
        f"stack.{owner}: step {run.progress.step + 1} left {what}: {listed(names)}. They would silently do nothing; name only "
        f"modules this objective uses (stack.{owner}.target, or its layers), or take '{owner}' out of the stack"
    )


def owned(run: RunState, wrapper: Wrapper) -> set[str]:
    """Return the tensors a wrapper trains or holds: its own, and those it opens in the base."""
    return {*own_tensors(run.model, wrapper.name), *wrapper.opened(run.model)}


def listed(names: list[str]) -> str:
    """Return names for a message, the first few of them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
