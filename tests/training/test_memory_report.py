"""What `check` predicts a run to hold against what the run counts: to the byte, and the peak of a whole process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.row_reading import RowReading
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.load import prepare_for_training
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs.report.page import memory_table
from llmrecipe.training.dry_run import check, predict_memory
from llmrecipe.training.kept_tensors import KeptTensors
from llmrecipe.training.measured_memory import MemoryMeter
from llmrecipe.training.memory_estimate import Estimate, retained_bytes
from llmrecipe.training.predicted_pass import largest_micros
from llmrecipe.training.symbolic_pass import Away, PassBytes, measure_pass, numberless
from tests.contract import MIXTURES
from tests.methods.additive.harness import model_of
from tests.methods.kinds import CHANGES, Cell, batch_of, put, wrapper_of
from tests.support import PeakBytes
from tests.trainings import events, train_recipe

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
BY_NUMBERS = ("coda", "esft", "noah")
"""Kinds for which the shapes of a pass depend on numbers: tokens picked or routed by their scores, sizes drawn at each step."""
SIZE = "model.init=random,batch.size=64,batch.tokens=2048"
WIDE = "hidden_size=512,intermediate_size=1408,num_hidden_layers=6,num_attention_heads=8,num_key_value_heads=4,head_dim=64"
SHORT = ("steps=1", "data.limit=64", "eval.at_start=false", "save.end=false", "data.validation=null", "eval.load_best=false")


def test_what_is_kept_counts_once_and_until_the_graph_lets_go() -> None:
    """A 10 x 6 input through two layers 6 -> 5 and a tanh: kept are the input (240 bytes) and the tanh's output (200)."""
    layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    x = torch.randn(10, 6)
    with KeptTensors(layers.parameters(), vocabulary=5) as kept:
        loss = (layers[0](x) + layers[1](x)).tanh().sum()
        assert (kept.now, kept.now_logits) == (440, 200)
        loss.backward()
        del loss
        assert kept.now == kept.now_logits == 0
    assert (kept.peak, kept.peak_logits) == (440, 200)


# --- a pass ----------------------------------------------------------------------------------------------------------


def stack_of(kind: str, base: str | None) -> list[Any]:
    """The wrappers of a cell."""
    return [*([wrapper_of(base)] if base else []), wrapper_of(kind)]


def numpy_copy(tensor: Tensor) -> tuple[Any, torch.dtype]:
    """Bytes that are no tensor's: what stands for the memory of the machine where the device is a CPU."""
    return tensor.contiguous().view(torch.uint8).numpy().copy(), tensor.dtype


def from_numpy(packed: tuple[Any, torch.dtype]) -> Tensor:
    array, dtype = packed
    found = torch.empty(array.shape, dtype=torch.uint8)
    return found.copy_(torch.from_numpy(array)).view(dtype)


def counted(kind: str, base: str | None, dtype: torch.dtype, form: Any) -> tuple[PassBytes, PassBytes]:
    """(Of a real pass, of one without numbers) in a layout of packed rows."""
    family = "native-mixture" if kind in MIXTURES else "llama"
    model = model_of(family).to(dtype)
    made = put(model, *stack_of(kind, base))
    made.stack.before_step(model, 0)
    with torch.device("meta"):
        bare = model_of(family).to(dtype)
    planned = Stack(stack_of(kind, base))
    planned.attach(bare, made.stack.structures(model))
    bare.row_reading = RowReading()
    away, moved = Away(), [0]

    def pack(tensor: Tensor) -> tuple[Any, torch.dtype]:
        moved[0] += tensor.nbytes
        return numpy_copy(tensor)

    for one, host in ((model, (pack, from_numpy)), (bare, (away.pack, away.unpack))):
        one.train()
        prepare_for_training(one, ModelSection(gradient_checkpointing=form), host)
    batch, fake = batch_of(model, packing=True), FakeTensorMode(allow_non_fake_inputs=True)
    numberless(bare, fake, {n: b for n, b in model.named_buffers() if not b.is_floating_point()})
    guess = measure_pass(bare, lambda: Cell(bare, planned, Engine(bare)).loss(batch), fake, 64)
    there = list(chain(model.parameters(), model.buffers()))
    with PeakBytes(there) as live:
        with KeptTensors(there, 64) as kept:
            loss = made.loss(batch)
        if not form:
            # A second instrument, which also finds what a function stores on its `ctx`.
            assert retained_bytes(loss, there) == kept.now
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        del loss, gradients
    return PassBytes(kept.peak, kept.peak_logits, live.peak, host=moved[0]), replace(guess, host=away.moved)


FORMS = (False, True, "selective", "offload")
FAST = {
    ("lora", None, torch.bfloat16, True), ("lora_fa", "nf4", torch.float32, False), ("dora", None, torch.float32, False),
    ("lora", "nf4", torch.float32, "selective"), ("lora", None, torch.bfloat16, "offload"),
}  # fmt: skip
CELLS = [
    pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow)
    for kind in CHANGES
    if kind not in BY_NUMBERS
    for base, dtype in ((None, torch.float32), (None, torch.bfloat16), ("nf4", torch.float32))
    if (kind, dtype) != ("dora", torch.bfloat16)
    for form in FORMS
    for cell in [(kind, base, dtype, form)]
]


@pytest.mark.parametrize(("kind", "base", "dtype", "form"), CELLS)
def test_what_a_pass_keeps_is_known_to_the_byte(kind: str, base: str | None, dtype: torch.dtype, form: bool | str) -> None:
    try:
        Stack(stack_of(kind, base))
        real, guess = counted(kind, base, dtype, form)
    except (RecipeError, ModelError) as refusal:
        pytest.skip(str(refusal))
    assert real.kept > 0 and (guess.kept, guess.logits, guess.host) == (real.kept, real.logits, real.host)
    assert (real.host > 0) == (form == "offload")
    assert 0.75 < (guess.peak + guess.buffers) / real.peak < 1.25, (guess, real)


class Picky(nn.Module):
    """Keeps as many rows as its first weight says, or only those with a positive sum."""

    def __init__(self, by: str):
        super().__init__()
        self.by, self.linear = by, nn.Linear(4, 4)
        self.config = SimpleNamespace()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.by == "size":
            return y[: int(self.linear.weight[0, 0])].sum()
        return (y.double() if bool(y.isnan().any()) else y).sum()


@pytest.mark.parametrize(("by", "dtype"), [("size", torch.float32), ("rounding", torch.bfloat16)])
def test_a_pass_that_depends_on_numbers_is_not_guessed(by: str, dtype: torch.dtype) -> None:
    model, fake = Picky(by).to(dtype), FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.linear.weight = nn.Parameter(torch.empty(4, 4, dtype=dtype))
        model.linear.bias = None
    with pytest.raises(ValueError, match=r"NaN|depends on rounding"):
        measure_pass(model, lambda: model(torch.ones(3, 4, dtype=dtype)), fake)


def test_only_micro_batches_that_may_be_the_largest_are_followed() -> None:
    def micro(tokens: int, targets: int, rows: int) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(1, tokens), target=torch.zeros(targets), sequences=rows)

    wide, scored, small = micro(9, 2, 2), micro(8, 5, 2), micro(8, 2, 1)
    assert largest_micros([wide, scored, small], penalised=False) == [(wide, False), (scored, False)]
    assert largest_micros([wide, scored, small], penalised=True) == [(wide, False), (scored, False), (small, True)]


# --- runs ------------------------------------------------------------------------------------------------------------

QUICK = ("dpo_lora",)
SLOW = (
    "sft", "sft_lora", "qlora", "smt", "fishmask", "child_tuning", "spt", "diff_pruning",
    "loreft", "freeze", "lora_fa", "mezo", "classify", "clm", "dora", "kto_lora",
    "prefix_tuning", "mlm", "contrastive", "sft model.dtype=bfloat16", "dpo_lora model.gradient_checkpointing=true",
    "sft_lora model.gradient_checkpointing=selective", "sft model.gradient_checkpointing=selective",
    "sft_lora model.gradient_checkpointing=true runtime.ffn_rows=100",
    "sft_lora batch.size=48", "grpo", "l2sp eval.forgetting={}", "ewc eval.forgetting={} stack.ewc.num_samples=8",
    "sft_lora stack.lora.init=eva stack.lora.eva_rho=1",
    "prompt_tuning stack.prompt_tuning.init=text stack.prompt_tuning.init_text=hello",
)  # fmt: skip
UNKNOWN = ("grpo", "dora")
"""Answers are sampled, or what is kept depends on the values of weights."""


@pytest.mark.parametrize("words", [*QUICK, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)])
def test_a_run_holds_what_check_predicts(words: str, tmp_path: Path) -> None:
    recipe, *more = words.split()
    train_recipe(tmp_path / "run", recipe, *SHORT, *more)
    found = predict_memory(tmp_path / "run")
    measured = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["memory"]
    known = found.predicted()
    assert bool(found.unpredicted) == ("activations" not in known) == (recipe in UNKNOWN)
    assert {name: measured[name] for name in PARTS if name in known} == {n: known[n] for n in PARTS if n in known}
    (event,) = events(tmp_path / "run", "memory")
    assert {name: event[name] for name in PARTS} == {name: measured[name] for name in PARTS}
    assert all(event[f"{name}/predicted"] == measured[name] for name in PARTS[:3])


PEAKS = [
    *itertools.product(
        ("sft", "sft_lora", "sft_lora model.dtype=bfloat16", "qlora", "dpo", "dpo_lora", "dpo_lora model.dtype=bfloat16"),
        ("false", "true"),
    ),
    *((words, "false") for words in ("mezo", "mezo model.dtype=bfloat16", "mezo_lora")),
]
"""(recipe and words, whether activations are recomputed); MeZO keeps none to recompute."""


@pytest.mark.slow
@pytest.mark.parametrize(("words", "checkpointing"), PEAKS)
def test_the_peak_of_a_process_is_within_a_quarter(words: str, checkpointing: str, tmp_path: Path) -> None:
    """In an allocator that returns what is freed; that of the C library keeps some of it for itself."""
    recipe, *more = words.split()
    sizes = [f"model.config.{word}" for word in WIDE.split(",")]
    options = [*more, *SHORT, "steps=2", *SIZE.split(","), *sizes, f"model.gradient_checkpointing={checkpointing}"]
    command = [sys.executable, "-m", "llmrecipe", "train", f"recipe={recipe}", *options, f"run.dir={tmp_path / 'run'}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    predicted = predict_memory(tmp_path / "run").predicted()
    measured = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["memory"]
    assert 0.75 < predicted["peak"] / measured["peak"] < 1.25, (predicted, measured)


def test_the_peak_of_a_process_is_its_own() -> None:
    """Not that of the process that started it, which here holds 900 MB."""
    held = bytearray(900 * 2**20)
    code = "from llmrecipe.training.measured_memory import MemoryMeter; print(MemoryMeter().peak_mb())"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 50 < float(told) < len(held) / 2**20 - 100


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_measures_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run on a GPU that one, wherever divided parameters rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0 if device is None else 3 << 20)
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    own, other = MemoryMeter(), MemoryMeter()
    own.watch(model, False, torch.device("cpu"))
    assert own.peak_mb() > 50
    other.watch(model, False, torch.device("cuda", 1))
    assert other.peak_mb() == 3.0 and other.totals() == {"peak": 3 << 20}


def test_what_cannot_be_known_has_no_number() -> None:
    found = check("grpo", ["data.limit=64"]).memory
    assert "policy writes the rows" in found.unpredicted and set(found.predicted()) == set(PARTS[:3])
    assert "rows of a stream" in check("sft_lora", ["data.streaming=true", "steps=4"]).memory.unpredicted


def test_the_report_shows_both_in_one_table() -> None:
    measured = {"weights": 1 << 20, "logits": 3 << 19, "peak": 9 << 19}
    known = Estimate(1 << 20, 1, 0, 0, 1 << 21, 1 << 19, 1 << 19)
    head, *lines = memory_table(measured, known.predicted())
    assert head == ["MB", "predicted", "measured"] and lines[-1] == ["peak", "at least 4.000", "4.500"]
    assert ["logits", "0.500", "1.500"] in lines and ["temporary", "0.500", "unknown"] in lines
    unknown = Estimate(1 << 20, 1, 0, 0, 1 << 21, 1 << 19, unpredicted="rows of a stream have not been read")
    assert ["logits", "unknown", "1.500"] in memory_table(measured, unknown.predicted())
