"""A whole optimizer step of every objective and of every wrapper, on a device whose values cannot be read.

Forward and backward passes, clipping, the optimizer, the hooks of the stack: nothing of it waits for the device. What a step
reports is read in one copy. The exceptions are listed with their reasons.
"""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._base.update_rule import LateResult, StepContext, StepResult, backprop
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.recipe.schema import RuntimeSection
from llmrecipe.runtime.processes import Runtime
from llmrecipe.training.run_state import RunState
from llmrecipe.training.startup_report import waiting_lines
from tests.contract import KINDS, OPTIONS, Subject, bare_model, build, subject_of
from tests.objectives.harness import OBJECTIVES, SAMPLED, Case
from tests.tiny import tiny_model
from tests.waiting import PLACE, Device, device

READING = Counter({("copy to the host", "data/transfer.py"): 1})
"""What a step that is read late makes the host wait for: nothing but this, when it is read."""
WHILE_SAMPLING = {
    "engine/decoders.py": "a token is chosen before the next one can be computed, and an answer may end with any of them",
    "engine/continuous_batching.py": "the same, for rows that others take the place of",
    "engine/sampling.py": "which rows are still being answered",
    "objectives/alignment/_engines/rollout.py": "answers are scored and laid out on the host, once a rollout",
}
"""Where an objective that samples may wait while it makes the rows of its steps: file -> why."""
OBJECTIVE_SAMPLE = ("sft", "dpo", "kto")
"""Those of the fast suite."""


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW may step on the device."""
    adamw = registry.load_class("optim", "adamw")
    monkeypatch.setattr(adamw, "devices", (*adamw.devices, PLACE.type))
    monkeypatch.setattr(importlib.import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda parameter: None)


def marked(names: list[str], fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def by_file(found: Device) -> Counter[tuple[str, str]]:
    """How often each file waits, and in which way."""
    counts: Counter[tuple[str, str]] = Counter()
    for (what, line), times in found.waits.items():
        counts[what, line.partition(":")[0]] += times
    return counts


def update(subject: Any, micros: list[Any], optimizer: torch.optim.Optimizer | None, step: int = 0) -> StepResult | LateResult:
    """One step through the stack's own rule, read late; the copy of what it reports has begun."""
    stack, model, roles = subject.roles.stack, subject.model, subject.roles
    runtime = Runtime.start(RuntimeSection(device="cpu"))
    run: Any = SimpleNamespace(objective=subject.objective, runtime=runtime, model=model, optim=SimpleNamespace(clip=1.0))
    context = StepContext(
        step, 10, 1e-3, 0, Path(), model, stack, optimizer, subject.objective, roles, runtime,
        lambda micros: RunState.total_weight(run, micros), lambda: RunState.clip(run), late=True,
    )  # fmt: skip
    result = (stack.rule() or backprop)(context, micros)
    stack.after_step(model, step)
    if isinstance(result, LateResult):
        result.start(list(stack.metrics(model).values()))
    return result


def optimizer_of(model: nn.Module, stack: Any) -> torch.optim.Optimizer:
    config = registry.load_class("optim", "adamw")(lr=1e-3)
    return build_optimizer(config, parameter_groups(model, config, stack.groups(model)))


def moved(case: Case, own: Device) -> None:
    """Move a case to the device; scores of its reference are there already, as they are in a run."""
    own.to(case.model)
    for other in case.roles.others.values():
        own.to(other.engine)
        other.device = PLACE
    if case.roles.stack.snapshot is not None:
        case.roles.stack.snapshot = {n: p.detach().clone() for n, p in case.trained().items()}
    case.roles.device = PLACE
    if "reference" in case.objective.roles and case.name not in SAMPLED:
        for batch in case.objective.reference_batches(case.rows, case.roles):
            case.roles.cache.known |= {key: torch.zeros(batch.sequences // len(batch.keys)) for key in batch.keys}
        case.roles.cache.complete = True
        own.waits.clear()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", marked(list(OBJECTIVES), OBJECTIVE_SAMPLE))
def test_a_step_of_an_objective_waits_for_nothing(name: str, packing: bool) -> None:
    case = Case(name, packing=packing, micro=4)
    with device() as own:
        moved(case, own)
        micros = case.micros()
        laid_out = by_file(own)
        own.waits.clear()
        result = update(case, micros, optimizer_of(case.model, case.roles.stack))
        case.objective.after_step(1, result.metrics, case.roles)
    files = {file for _, file in laid_out}
    assert files <= set(WHILE_SAMPLING) if name in SAMPLED else not files, laid_out
    assert by_file(own) == READING, own.waits


def test_a_step_with_weights_of_classes_waits_for_nothing() -> None:
    case = Case("classification", micro=4)
    case.objective.row_weights[:] = [1.0, 3.0, 0.5]
    with device() as own:
        moved(case, own)
        micros = case.micros()
        own.waits.clear()
        update(case, micros, optimizer_of(case.model, case.roles.stack))
    assert by_file(own) == READING, own.waits


def test_a_device_notes_what_the_host_waits_for() -> None:
    """Every way of reading a value, by hand; what can be done without waiting is not noted."""
    with device() as own:
        x = torch.ones(3, device=PLACE)
        y = x * 2 + torch.arange(3, device=PLACE)
        assert own.waits == Counter()
        assert isinstance(float(y.sum()), float)
        assert y.tolist() == [1.0, 1.0, 1.0]
        if bool((y > 1).any()):
            y.nonzero()
        y[y > 1]
        torch.unique(y)
        torch.ones(2).to(PLACE)
        y.cpu()
        torch.ones(2).to(PLACE, non_blocking=True)
        y.to("cpu", non_blocking=True)
    counts = Counter(what for what, _ in own.waits.elements())
    assert counts == Counter(
        {"read": 2, "copy to the host": 2, "nonzero": 1, "index by a mask": 1, "_unique2": 1, "copy from the host": 1}
    )
    assert sum(own.copies.values()) == 1


def _rows(lengths: list[int]) -> Any:
    return pad([Sequence(range(3, 3 + n), [0] + [1] * (n - 1)) for n in lengths], 0)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 3]])
@pytest.mark.parametrize("window", [None, 4])
def test_a_mask_that_is_built_unread_masks_the_same(
    lengths: list[int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with and without padding: states of real tokens equal those of the mask that looked at its values."""
    engine = Engine(tiny_model("mistral", sliding_window=window).double().eval())
    batch = _rows(lengths)
    looked = engine.hidden_of(batch)
    from llmrecipe.models import attention

    asked: list[bool | None] = []
    unread = attention._unread

    def as_on_a_device(kwargs: dict[str, Any]) -> dict[str, Any]:
        given = kwargs["attention_mask"]
        asked.append(attention.current().padded)
        known = attention.current().padded is False and attention.current().attention_mask.shape == given.shape
        return {**kwargs, "attention_mask": None} if known else {**kwargs, "allow_is_causal_skip": False}

    assert unread({"attention_mask": batch.attention_mask}) == {"attention_mask": batch.attention_mask}
    monkeypatch.setattr(attention, "_unread", as_on_a_device)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(engine.hidden_of(batch)[real], looked[real], rtol=1e-12, atol=1e-12)
    assert set(asked) == {lengths[0] != lengths[1]}


DECIDES = tuple(kind for kind in KINDS if registry.spec("stack", kind).facts.get("waits"))
"""Wrappers that declare what the host has to know of the device's values during a step."""
ELSEWHERE = {
    "int8": "its kernel for the columns of outliers has no shape without values",
    "nf4": "its kernel reads its tables on the host",
}
"""Wrappers whose base is computed by a library's kernels that do not run on this device."""
SENDS = {"dora": 1}
"""Wrapper -> copies of its own that it sends for at the end of a step and reads at the end of the next one."""
WRAPPER_SAMPLE = ("lora", "adalora", "unipelt", "l2sp", "dora", "smt")
WRAPPERS = [kind for kind in KINDS if kind not in ELSEWHERE and kind not in DECIDES]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", marked(WRAPPERS, WRAPPER_SAMPLE))
def test_a_step_under_a_wrapper_waits_for_nothing(kind: str, packing: bool) -> None:
    reading = Counter({key: times + SENDS.get(kind, 0) for key, times in READING.items()})
    assert_waits(build(kind, packing), reading)


def test_what_is_declared_to_wait_does_and_nowhere_but_in_its_own_files() -> None:
    """Of coda alone: this device has no generator for the noise of mezo, and no float32 products of the experts of esft."""
    found = waits_of(build("coda", False))
    files = {file for _, file in found} - {file for _, file in READING}
    assert files and all(file.startswith("methods/") for file in files), found


def test_few_may_wait() -> None:
    """A declaration is for mathematics that decides by a value, not for what could be read a step later."""
    assert set(DECIDES) == {"coda", "esft", "mezo"}
    assert [name for name in OBJECTIVES if registry.spec("objective", name).facts.get("waits")] == ["ppo"]


def test_a_run_says_what_its_steps_wait_for() -> None:
    stack = [registry.load_class("stack", kind)(name=kind, **OPTIONS.get(kind, {})) for kind in ("lora", "coda")]
    sft, ppo = (registry.load_class("objective", name) for name in ("sft", "ppo"))
    assert waiting_lines(stack, sft, "cpu") == waiting_lines(stack[:1], sft, "cuda") == []
    lines = waiting_lines(stack, ppo, "cuda")
    assert [line.partition(":")[0] for line in lines] == ["objective", "stack.coda"]
    assert lines[1].endswith("each step waits for the device to know which tokens its blocks compute, so how many of them")


def assert_waits(subject: Subject, reading: Counter[tuple[str, str]]) -> None:
    found = waits_of(subject)
    assert found == reading, found


def waits_of(subject: Subject) -> Counter[tuple[str, str]]:
    """What the second step waits for: what a method moves or makes once is there."""
    subject.roles.engine.train()
    with device() as own:
        own.to(subject.model)
        subject.roles.device = PLACE
        optimizer = optimizer_of(subject.model, subject.stack)
        for step in range(2):
            own.waits.clear()
            subject.stack.before_step(subject.model, step)
            update(subject, [subject.batch(), subject.batch()], optimizer, step)
            optimizer.zero_grad(set_to_none=True)
    return by_file(own)


def test_two_hooks_on_rows_of_one_layer_wait_for_nothing() -> None:
    """GPT-2 computes q, k and v in one layer, and each hook asks which others change its rows."""
    subject = build("dora", family="gpt2", target="attn.q|v")
    reading = Counter({key: times + SENDS["dora"] for key, times in READING.items()})
    assert_waits(subject, reading)


def test_rows_that_a_prompt_lengthens_are_known_on_the_host() -> None:
    """ReFT edits the last tokens of prompts, and where these are depends on the mask of padded rows."""
    model, kinds = bare_model("loreft"), ("prompt_tuning", "loreft")
    stack = Stack([registry.load_class("stack", kind)(name=kind, **OPTIONS.get(kind, {})) for kind in kinds])
    stack.attach(model)
    assert_waits(subject_of("loreft", model, stack, packing=False), READING)
