"""The first step uses every hook and every trained tensor, or the run stops and names what it left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import RunError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._base.update_rule import StepResult
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.training import first_step
from tests.runtime.test_processes import start
from tests.trainings import events, learned, train_recipe

SHORT = (
    "steps=2",
    "data.limit=16",
    "batch.size=4",
    "batch.micro=2",
    "eval.at_start=false",
    "eval.batches=1",
    "schedule.warmup=0",
)


class Spare(Hook):
    """y -> y, or y + w where it is told to use its tensor."""

    def __init__(self, uses: Any = lambda: False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.uses = uses

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        # Probes before the first step make no gradient.
        return y + self.w if torch.is_grad_enabled() and self.uses() else y


def plant(monkeypatch: pytest.MonkeyPatch, host: Any, hook: Any) -> None:
    """LoRA with one more hook of its own."""
    original = Lora.attach

    def attach(self: Lora, model: nn.Module, structure: Any = None) -> None:
        original(self, model, structure)
        add_hook(host(model), "lora__spare", hook(), self.name)

    monkeypatch.setattr(Lora, "attach", attach)


def first_block(model: Any) -> nn.Module:
    return model.base_model.layers[0]


def aside(model: Any) -> nn.Module:
    """A module no pass goes through."""
    model.aside = nn.Linear(2, 2)
    return model.aside


def test_a_tensor_no_gradient_reaches_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, first_block, Spare)
    with pytest.raises(
        RunError, match=r"stack\.lora: step 1 left trained tensors that no gradient reached: .*lora__spare\.w\."
    ):
        train_recipe(tmp_path / "run", "sft_lora", *SHORT)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_a_hook_that_is_never_called_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, aside, Spare)
    with pytest.raises(RunError, match=r"stack\.lora: step 1 left hooks that were never called: aside\.lora__spare"):
        train_recipe(tmp_path / "run", "sft_lora", *SHORT)


def test_what_is_declared_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plant(monkeypatch, first_block, Spare)
    monkeypatch.setattr(Lora, "may_skip", lambda self, name: asked.append(name) or "lora__spare" in name)
    train_recipe(tmp_path / "run", "sft_lora", *SHORT)
    assert set(asked) == {"model.layers.0.lora__spare.w"}


def test_one_micro_batch_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plant(monkeypatch, first_block, lambda: Spare(lambda: calls.append(1) or len(calls) == 1))
    train_recipe(tmp_path / "run", "sft_lora", *SHORT)
    assert len(calls) == 4, "two steps of two micro-batches"


def test_a_gradient_of_zero_is_a_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With B = 0 the gradient of LoRA's A is exactly zero in the first step, and the run goes on."""
    seen: dict[str, float] = {}
    original = first_step.checked

    def checked(rule: Any, run: Any, micros: Any) -> StepResult:
        result = original(rule, run, micros)
        seen.update({n: float(p.grad.abs().max()) for n, p in run.model.named_parameters() if p.requires_grad})
        return result

    monkeypatch.setattr(first_step, "checked", checked)
    train_recipe(tmp_path / "run", "sft_lora", *SHORT)
    assert {value for name, value in seen.items() if name.endswith(".A")} == {0.0}
    assert all(value > 0 for name, value in seen.items() if name.endswith(".B"))


# --- without a run ---------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """One weight that is used and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.pooler = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)


def run_of(model: nn.Module, stack: Stack | None = None, elsewhere: float = 0.0, optimizer: Any = "adamw") -> Any:
    """Just what the check reads of a run; another process uses everything to this degree."""
    runtime = SimpleNamespace(maximum=lambda flags: flags.clamp(min=elsewhere))
    said: list[str] = []
    run = SimpleNamespace(
        model=model, stack=stack or Stack([]), runtime=runtime, optimizer=optimizer, unused=True, said=said,
        progress=SimpleNamespace(step=0), events=SimpleNamespace(warning=said.append),
        profile=SimpleNamespace(compile=False),
    )  # fmt: skip
    run.step_context = lambda: run
    return run


def rule(run: Any, micros: Any, finite: bool = True) -> StepResult:
    run.model.used(torch.ones(1, 2)).sum().backward()
    return StepResult(0.0, finite=finite)


def test_weights_that_train_because_everything_does_are_named_in_a_warning() -> None:
    run = run_of(Two())
    first_step.checked(rule, run, [])
    assert run.said == ["1 trained weights are not read by this objective and stay as they are: pooler.weight"]
    assert run.unused, "processes go on looking for it"


def test_a_new_head_that_is_never_read_stops() -> None:
    model = Two()
    model.new_heads = ("pooler",)  # type: ignore[assignment]
    with pytest.raises(RunError, match=r"step 1: the objective trains a head it never reads: pooler\.weight"):
        first_step.checked(rule, run_of(model), [])


def test_another_process_may_have_reached_it() -> None:
    run = run_of(Two(), elsewhere=1.0)
    first_step.checked(rule, run, [])
    assert not run.said and not run.unused


def test_a_skipped_step_and_a_rule_without_gradients_prove_nothing() -> None:
    skipped = run_of(Two())
    first_step.checked(lambda run, micros: rule(run, micros, finite=False), skipped, [])
    own = run_of(Two(), optimizer=None)
    first_step.checked(lambda run, micros: StepResult(0.0), own, [])
    assert not skipped.said and not own.said


# --- two processes ---------------------------------------------------------------------------------------------------

WORKER = """
from llmrecipe.models.hooks.hook import (Hook)
from llmrecipe.models.hooks.host import (add_hook)
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.core.errors import UserError
from tests.trainings import train_recipe

case, steps, calls, original = sys.argv[2], sys.argv[3], [], Lora.attach
rank = int(os.environ["RANK"])


class Spare(Hook):
    # Only the first process reads it, in the first of its micro-batches.
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def after(self, x, y):
        if torch.is_grad_enabled():
            calls.append(1)
        return y + self.w if torch.is_grad_enabled() and case != "never" and rank == 0 and len(calls) == 1 else y


def attach(self, model, structure=None):
    original(self, model, structure)
    add_hook(model.base_model.layers[0], "lora__spare", Spare(), self.name)


Lora.attach = attach
if case == "declared":
    Lora.may_skip = lambda self, name: "lora__spare" in name
words = ["data.limit=16", "batch.size=8", "batch.micro=2", "eval.at_start=false", "eval.batches=1", "schedule.warmup=0"]
try:
    run = train_recipe(out / "run", "sft_lora", *words, f"steps={steps}", "runtime.processes=2", "eval.load_best=false")
    found = {n: p.detach().flatten().tolist() for n, p in run.model.named_parameters() if p.requires_grad}
except UserError as error:
    found = {"error": str(error)}
(out / f"rank{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "steps"), [("once", 1), ("declared", 3), ("never", 2)])
def test_one_process_is_enough(case: str, steps: int, tmp_path: Path) -> None:
    """Reached by one process only: both learn it alike. Reached by none: both stop with the same words."""
    done = start(tmp_path, WORKER, 2, case, str(steps))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    if case == "never":
        assert "step 1 left trained tensors that no gradient reached" in one["error"]
        return
    assert one["model.layers.0.lora__spare.w"] != [0.0]
    assert learned(tmp_path / "run") and len(events(tmp_path / "run")) == steps
