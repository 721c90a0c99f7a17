"""The first update leaves what is frozen, moves what trains and reads what is set, or the run stops and names the culprit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.cli.app import run_command as command
from llmrecipe.core import registry
from llmrecipe.core.device_profile import TABLE
from llmrecipe.core.errors import ProofError
from llmrecipe.core.key_reads import KeyReads
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.update_rule import StepResult
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.training.checksum import checksums, integer_view
from llmrecipe.training.dry_run import check
from llmrecipe.training.first_update import FirstUpdate
from llmrecipe.training.measured_memory import MemoryMeter
from tests.runtime.test_processes import start
from tests.support import PeakBytes
from tests.trainings import events, resume, stop_after, train_recipe

SHORT = (
    "steps=2",
    "data.limit=16",
    "batch.size=4",
    "eval.at_start=false",
    "eval.batches=1",
    "schedule.warmup=0",
)
NORM = "model.layers.1.input_layernorm.weight"


def after_step(monkeypatch: pytest.MonkeyPatch, act: Any, at: int = 0) -> None:
    """Let LoRA do something to the model after one step."""
    original = Lora.after_step

    def changed(self: Lora, model: nn.Module, step: int) -> None:
        original(self, model, step)
        if step == at:
            with torch.no_grad():
                act(model)

    monkeypatch.setattr(Lora, "after_step", changed)


def nudge(model: nn.Module) -> None:
    """One entry of a frozen norm by one unit in the last place."""
    weight = dict(model.named_parameters())[NORM]
    weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))


# --- checksums -------------------------------------------------------------------------------------------------------


def test_a_checksum_is_the_weighted_sum_of_its_words() -> None:
    """sum_i w_i x_i mod 2^64, with the weights of unit vectors."""
    unit = torch.eye(3, dtype=torch.int64)
    w = checksums([unit[0], unit[1], unit[2]]).tolist()
    assert all(one % 2 for one in w) and len(set(w)) == 3
    x = torch.tensor([5, -7, 2**62], dtype=torch.int64)
    wanted = (5 * w[0] - 7 * w[1] + 2**62 * w[2]) % 2**64
    assert checksums([x]).tolist() == [wanted - 2**64 if wanted >= 2**63 else wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.bool])
def test_any_entry_and_any_exchange_shows(dtype: torch.dtype) -> None:
    """Also beyond the first chunk, and in sizes that are no multiple of eight bytes."""
    count = 8 * TABLE["cpu"].words + 5
    value = (torch.arange(count) % 7 < 3).to(dtype)
    (before,) = checksums([value])
    for place in (0, 1, count // 2, count - 1):
        other = value.clone()
        other[place] = 1 - other[place].to(torch.int64)
        assert checksums([other])[0] != before, place
    swapped = value.clone()
    swapped[[2, count - 3]] = swapped[[count - 3, 2]] if value[2] != value[count - 3] else 1 - value[[2, 2]].to(torch.int64)
    assert checksums([swapped])[0] != before
    assert checksums([value.clone()])[0] == before


def test_opposite_changes_do_not_cancel_and_a_transposed_matrix_is_read_where_it_lies() -> None:
    zeros = torch.zeros(64)
    moved = torch.tensor([1e-3, -1e-3]).repeat(32)
    assert checksums([zeros])[0] != checksums([moved])[0]
    matrix = torch.randn(6, 10)
    assert integer_view(matrix.t()).data_ptr() == matrix.data_ptr()
    assert checksums([matrix.t()]) == checksums([matrix])
    assert checksums([matrix[:, ::2]]) != checksums([matrix[:, 1::2]]), "a view with gaps"


def test_nothing_of_the_size_of_a_weight_is_allocated() -> None:
    weight = torch.zeros(2048, 1024)
    with PeakBytes([weight]) as memory:
        checksums([weight])
    assert memory.peak < 0.15 * weight.numel() * 4


# --- runs ------------------------------------------------------------------------------------------------------------


def test_every_run_says_what_it_proved(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "dpo_lora", *SHORT)
    proved = json.loads((tmp_path / "run" / "report.json").read_text())["proved"]
    assert proved["step"] == 1 and proved["step_zero"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert proved["frozen"] == {"tensors": 38, "unchanged": 38}
    # With B = 0 the first gradient of A is zero, and without weight decay A stays.
    assert (proved["trained"]["tensors"], proved["trained"]["changed"]) == (56, 28)
    assert all(name.endswith(".A") for name in proved["trained"]["waiting"])
    assert proved["hooks"] == 28 and proved["keys"]["set"] == proved["keys"]["read"] > 0


def test_a_frozen_tensor_that_moves_stops_the_run_before_its_second_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after_step(monkeypatch, nudge)
    code = command(["train", "recipe=sft_lora", f"run.dir={tmp_path / 'run'}", "log.live=off", *SHORT])
    assert code == 3 and f"step 1: frozen tensors moved: {NORM}" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert not events(tmp_path / "run")


def test_the_first_update_after_a_resume_is_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(1, tmp_path / "run", "sft_lora", *SHORT)
    after_step(monkeypatch, nudge, at=1)
    with pytest.raises(ProofError, match=rf"step 2: frozen tensors moved: {NORM}"):
        resume(tmp_path / "run")


def test_a_trained_tensor_whose_value_is_put_back_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step(monkeypatch, lambda model: model.model.layers[2].mlp.up_proj.lora.B.zero_())
    with pytest.raises(ProofError, match=r"with a gradient did not move: model\.layers\.2\.mlp\.up_proj\.lora\.B"):
        train_recipe(tmp_path / "run", "sft_lora", *SHORT)


def test_a_tensor_the_optimizer_does_not_hold_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(self: Lora, model: nn.Module, step: int) -> None:
        hook = model.model.layers[0].self_attn.q_proj.lora  # type: ignore[union-attr]
        hook.B = nn.Parameter(hook.B.detach().clone())  # type: ignore[union-attr]

    monkeypatch.setattr(Lora, "before_step", replace)
    with pytest.raises(ProofError, match=r"in no group of the optimizer: model\.layers\.0\.self_attn\.q_proj\.lora\.B"):
        train_recipe(tmp_path / "run", "sft_lora", *SHORT)


@pytest.mark.slow
def test_entries_that_are_trained_in_place_are_no_frozen_tensor(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "sft", *SHORT, "stack=[fishmask]", "stack.fishmask.num_samples=4")
    frozen = json.loads((tmp_path / "run" / "report.json").read_text())["proved"]["frozen"]
    assert 0 < frozen["unchanged"] < frozen["tensors"]


# --- without a run ---------------------------------------------------------------------------------------------------


def run_of(model: nn.Module, optimizer: Any, rate: float = 0.1, others: Any = ()) -> Any:
    """Just what the check reads of a run; `others` are what further processes found."""
    runtime = SimpleNamespace(
        maximum=lambda flags: flags, gather_json=lambda own: [own, *others], world=1, in_step=False, shard="none",
        device=torch.device("cpu"),
    )  # fmt: skip
    run = SimpleNamespace(
        model=model, stack=[], runtime=runtime, optimizer=optimizer, progress=SimpleNamespace(step=0), learning_rate=rate,
        meter=MemoryMeter(), profile=SimpleNamespace(compile=True),
    )  # fmt: skip
    return run


def proof(run: Any, act: Any, finite: bool = True) -> FirstUpdate:
    """An update under watch, without the checks of `first_step`."""
    from llmrecipe.training import first_step

    first = FirstUpdate(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_step, "checked", lambda rule, run, micros: rule(run, micros))
        result = first.make(lambda run, micros: (act(), StepResult(0.0, finite=finite))[1], [])
    first.compare(result)
    return first


class Statistics(nn.Module):
    """A frozen linear, a trained one, running statistics and a saved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.requires_grad_(False)
        self.trained.requires_grad_(True)
        self.register_buffer("table", torch.ones(3))

    def step(self) -> None:
        self.trained(self.norm(torch.randn(4, 2))).sum().backward()
        with torch.no_grad():
            for p in self.trained.parameters():
                p.sub_(0.1)


def test_statistics_may_move_and_a_table_may_not() -> None:
    model = Statistics()
    optimizer = torch.optim.SGD(model.trained.parameters(), lr=0.1)
    first = proof(run_of(model, optimizer), model.step)
    assert first.facts["frozen"] == {"tensors": 5, "unchanged": 5} and first.facts["trained"]["changed"] == 2
    with pytest.raises(ProofError, match="frozen tensors moved: table"):
        proof(run_of(model, optimizer), lambda: (model.step(), model.table.add_(1)))


def test_a_step_below_the_rounding_of_the_weights_proves_nothing() -> None:
    model = Statistics()
    with torch.no_grad():
        for p in model.trained.parameters():
            p.fill_(1.0)

    def step() -> None:
        for p in model.trained.parameters():
            p.grad = torch.ones_like(p)

    optimizer = torch.optim.SGD(model.trained.parameters(), lr=1e-9)
    assert proof(run_of(model, optimizer, 1e-9), step).facts["trained"]["waiting"] == ["trained.bias", "trained.weight"]
    optimizer = torch.optim.SGD(model.trained.parameters(), lr=1e-2)
    with pytest.raises(ProofError, match=r"did not move: trained\.weight, trained\.bias"):
        proof(run_of(model, optimizer, 1e-2), step)


def test_a_skipped_step_is_not_the_first_update() -> None:
    model = Statistics()
    first = proof(run_of(model, torch.optim.SGD(model.trained.parameters(), lr=0.1)), lambda: model.table.add_(1), finite=False)
    first.finalize(StepResult(0.0, finite=False))
    assert first.pending and not first.facts


def test_what_another_process_found_stops_this_one() -> None:
    model = Statistics()
    run = run_of(model, torch.optim.SGD(model.trained.parameters(), lr=0.1), others=[["elsewhere"]])
    with pytest.raises(ProofError, match="elsewhere"):
        proof(run, model.step)


WORKER = """
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.core.errors import ProofError
from tests.trainings import train_recipe

case, rank, original = sys.argv[2], int(os.environ["RANK"]), Lora.after_step


def after_step(self, model, step):
    original(self, model, step)
    layer = model.base_model.layers[1]
    with torch.no_grad():
        if rank == 1:
            (layer.input_layernorm.weight if case == "frozen" else layer.mlp.up_proj.lora.B).add_(1.0)


Lora.after_step = after_step
words = ["data.limit=16", "batch.size=8", "eval.at_start=false", "eval.batches=1", "schedule.warmup=0", "steps=2"]
try:
    train_recipe(out / "run", "sft_lora", *words, "runtime.processes=2", "eval.load_best=false")
    said = ""
except ProofError as error:
    said = str(error)
(out / f"rank{rank}.txt").write_text(said)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("frozen", "tensors differ between the processes: model.layers.1.input_layernorm.weight"),
        ("trained", "tensors differ between the processes: model.layers.1.mlp.up_proj.lora.B"),
    ],
)
def test_both_processes_stop_for_what_one_of_them_did(case: str, words: str, tmp_path: Path) -> None:
    done = start(tmp_path, WORKER, 2, case)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert one == two and words in one


# --- keys of the recipe ----------------------------------------------------------------------------------------------


@register
class Options(Wrapper):
    """Options of which one is read, one would be, and one is only accepted."""

    used: int = 1
    at_the_end: int = 2
    forgotten: int = 3

    def finish(self, model: nn.Module) -> None:
        self.show(self.at_the_end)

    def show(self, value: int) -> int:
        return value + self.used


def test_an_option_counts_as_read_when_it_is_read_or_when_code_of_its_class_can_still_read_it() -> None:
    options = Options(name="mine", used=4, at_the_end=5, **{"forgot" + "ten": 6})
    reads = KeyReads([("stack", "mine", name) for name in ("kind", "used", "at_the_end", "forgot" + "ten")])
    reads.watch(options, "stack", "mine")
    assert type(options).__module__ == Options.__module__ and isinstance(options, Options)
    assert options.show(1) == 5
    assert reads.count() == {"set": 3, "read": 1}
    assert reads.unread() == ["stack.mine.forgot" + "ten"]
    reads.stop()
    assert type(options) is Options


def test_a_value_that_is_the_default_need_not_be_read() -> None:
    """The recipe that a run keeps, and that a resume reads, holds every option."""
    reads = KeyReads([("stack", "mine", "forgot" + "ten")])
    reads.watch(Options(name="mine", **{"forgot" + "ten": 3}), "stack", "mine")
    assert reads.unread() == [] and reads.count() == {"set": 1, "read": 0}


@pytest.mark.slow
def test_a_rule_that_does_without_an_option_of_the_optimizer_goes_on_after_a_resume(tmp_path: Path) -> None:
    stop_after(1, tmp_path / "run", "mezo", *SHORT[:-1], "schedule=constant", "optim.clip=0.5")
    resume(tmp_path / "run")
    assert len(events(tmp_path / "run")) == 2


def test_what_the_recipe_does_not_set_need_not_be_read() -> None:
    options = Options(name="mine")
    reads = KeyReads()
    reads.watch(options, "stack", "mine")
    assert reads.unread() == [] and reads.count() == {"set": 0, "read": 0}


PLUGIN = '''
from llmrecipe.plugin import ClassVar, Objective, collate_tokens, register, token_loss


@register
class IdleLoss(Objective):
    """L = -sum log p."""

    mask: ClassVar[str] = "all"

    sharpness: float = 1.0
    """Does nothing."""

    def collate(self, rows, roles):
        return collate_tokens(rows, roles)

    def loss(self, batch, roles):
        return token_loss(batch, roles)
'''


@pytest.fixture
def idle_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "packages" / "llmrecipe_idle"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "idle_loss.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield
    registry._plugins[:] = [(n, p) for n, p in registry._plugins if n != "llmrecipe_idle"]
    registry._index.cache_clear()


def test_a_key_nothing_reads_stops_the_run(idle_package: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plugins=[llmrecipe_idle]", "objective=idle_loss", "data.path=builtin:sft", *SHORT, "log.live=off"]
    assert command(["train", "recipe=base", f"run.dir={tmp_path / 'fine'}", *words]) == 0
    code = command(["train", "recipe=base", f"run.dir={tmp_path / 'run'}", *words, "objective.sharpness=2.0"])
    assert code == 3 and "objective.sharpness: the recipe sets it and nothing reads it" in capsys.readouterr().err
    assert not events(tmp_path / "run")


def test_a_section_nothing_reads_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    """By `check` and `train` in the same words, whatever the weights are."""
    words = [*SHORT, "+roles.value=1", "+roles.reward.path=x", "model.path=/nowhere/at/all"]
    with pytest.raises(ProofError, match=r"roles\.reward\.path, roles\.value: the recipe sets them and nothing reads") as one:
        check("sft_lora", words)
    with pytest.raises(ProofError) as other:
        train_recipe(tmp_path / "run", "sft_lora", *words)
    assert str(one.value) == str(other.value) and not (tmp_path / "run").exists()
