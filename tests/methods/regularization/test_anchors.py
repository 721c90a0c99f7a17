"""L2-SP and elastic weight consolidation: formulas in float64, the Fisher information, memory, refusals, resume, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmrecipe.core.errors import DataError, ModelError, RecipeError
from llmrecipe.core.registry import PACKAGE
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.memory.freeze import Freeze
from llmrecipe.methods.regularization._engines.anchors import anchors_of, held_values
from llmrecipe.methods.regularization.ewc import Ewc
from llmrecipe.methods.regularization.l2sp import L2sp
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models import task_heads
from llmrecipe.training.dry_run import check
from tests.methods.probe import language_probe
from tests.tiny import tiny_model
from tests.trainings import QUIET, events, learned, resumes_to_the_bit, train_recipe

SHORT = ["steps=2", "batch.size=4", "schedule=constant", "eval.batches=1", "eval.at_start=false", "data.max_length=128"]
FEW = ["stack.ewc.num_samples=3"]


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Every weight away from where it started; returns by how much."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found[name] = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            parameter.add_(found[name].to(parameter))
    return found


def test_l2sp_is_the_formula_in_loss_and_gradients() -> None:
    model = tiny_model("llama").double()
    task_heads.add_head(model, "reward")
    stack = Stack([L2sp(name="l2sp", alpha=0.3, beta=0.7)])
    stack.attach(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    heads = sum(float(p.square().sum()) for n, p in start.items() if n.startswith("task_head"))
    assert heads > 0 and float(stack.penalty(model).detach()) == pytest.approx(0.35 * heads)
    moved(model)
    wanted: dict[str, Tensor] = {}
    value = 0.0
    for name, parameter in model.named_parameters():
        now = parameter.detach().clone()
        away, strength = (now, 0.7) if name.startswith("task_head") else (now - start[name], 0.3)
        wanted[name] = strength * away
        value += 0.5 * strength * float(away.square().sum())
    penalty = stack.penalty(model)
    (2.0 * penalty).backward()
    assert float(penalty.detach()) == pytest.approx(value, rel=1e-9)
    assert stack.metrics(model) == {"l2sp/penalty": pytest.approx(value, rel=1e-9)}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, (2.0 * wanted[name]).to(parameter), rtol=1e-6, atol=1e-12)


def fisher(model: nn.Module, rows: int, targets: Any = None) -> tuple[dict[str, Tensor], float]:
    """Squares of the gradients of log p of each row, summed in the open, and how many targets there were."""
    probe = language_probe(model, packing=False)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    count = 0.0
    for batch in probe.batches(rows, 1):
        weight = float(probe.weight(batch))
        count += weight
        for variant, share in targets(batch) if targets else ((batch, 1.0),):
            grads = torch.autograd.grad(probe.loss(variant) * weight, list(model.parameters()))
            for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
                total[name] += share * grad.square()
    return {n: t / count for n, t in total.items()}, count


@pytest.mark.parametrize("options", [{"sample_type": "label"}, {"draws": 2, "seed": 4}])
def test_ewc_is_the_formula_with_the_fisher_information_of_single_rows(options: dict[str, Any]) -> None:
    # Drawn targets are weighed before the losses' float32 rounding, the open sum weighs after it: hence 1e-5.
    model = tiny_model("llama").double()
    stack = Stack([Ewc(name="ewc", strength=3.0, num_samples=3, **options)])
    stack.attach(model)
    drawn = selection.sampled_targets(language_probe(model).engine, 2, 4) if "draws" in options else None
    wanted, _ = fisher(model, 3, drawn)
    stack.calibrate(model, language_probe(model, packing=False))
    found = stack.training_tensors(model)
    assert found.keys() == {f"ewc.{n}" for n in wanted}
    for name, value in wanted.items():
        torch.testing.assert_close(found[f"ewc.{name}"], value, rtol=1e-5, atol=1e-12)
    away = moved(model)
    penalty = stack.penalty(model)
    penalty.backward()
    value = 1.5 * sum(float((wanted[n] * away[n].square()).sum()) for n in wanted)
    assert value > 0 and float(penalty.detach()) == pytest.approx(value, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 3.0 * wanted[name] * away[name], rtol=1e-5, atol=1e-12)


def test_drawn_targets_make_the_penalty_the_divergence_from_the_start_to_second_order() -> None:
    """1/2 d' F d over the whole matrix is KL(p_0 || p); along one weight its diagonal entry is all of it."""
    model = tiny_model("llama").double()
    stack = Stack([Ewc(name="ewc", num_samples=1, draws=100)])
    stack.attach(model)
    probe = language_probe(model, packing=False)
    stack.calibrate(model, probe)
    parameter = dict(model.named_parameters())["model.norm.weight"]
    batches = list(probe.batches(1, 1))
    with torch.no_grad():
        before = [model(b.input_ids).logits.log_softmax(-1) for b in batches]
        parameter[1] += 0.02
        after = [model(b.input_ids).logits.log_softmax(-1) for b in batches]
    lost, count = 0.0, 0
    for batch, old, new in zip(batches, before, after, strict=True):
        each = (old.exp() * (old - new)).sum(-1).reshape(-1)[batch.source]
        lost, count = lost + float(each.sum()), count + len(each)
    assert float(stack.penalty(model).detach()) == pytest.approx(lost / count, rel=0.25)


def test_only_what_trains_is_pulled_and_the_copy_is_counted() -> None:
    model = tiny_model("llama")
    stack = Stack([L2sp(name="l2sp", alpha=1.0), Freeze(name="freeze", layers="0")])
    stack.attach(model)
    away = moved(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(trained) < len(away)
    value = sum(0.5 * float(away[n].square().sum()) for n in trained)
    assert float(stack.penalty(model).detach()) == pytest.approx(value, rel=1e-4)
    count = sum(p.numel() for p in model.parameters())
    assert stack.wrappers[1].memory(model) == {"state_bytes": 4 * count}
    assert not stack.delta(model).keys() - {n for n, _ in model.named_parameters()}
    assert set(model.state_dict()) == set(tiny_model("llama").state_dict())
    stack.finish(model)
    assert stack.wrappers[1].memory(model) == {"state_bytes": 0}


def test_a_start_takes_the_bytes_of_the_checkpoint_where_they_hold_it() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        model.model.norm.weight[0] = 1.0 + 2.0**-12
    model.stored_dtype = torch.bfloat16
    stack = Stack([Ewc(name="ewc")])
    stack.attach(model)
    count, exact = sum(p.numel() for p in model.parameters()), model.model.norm.weight.numel()
    # 2 bytes a weight but for the tensor that bfloat16 does not hold, and 4 of the Fisher information.
    assert stack.wrappers[0].memory(model) == {"state_bytes": 2 * (count - exact) + 4 * exact + 4 * count}
    start = held_values(anchors_of(model, "ewc").start)
    assert all(torch.equal(start[n].float(), p) for n, p in model.named_parameters())


@pytest.mark.parametrize("anchor", [L2sp(name="pull"), Ewc(name="pull")])
@pytest.mark.parametrize("other", [Lora(name="lora"), Bitfit(name="bitfit")])
def test_where_the_base_is_frozen_an_anchor_is_refused(anchor: Wrapper, other: Wrapper) -> None:
    with pytest.raises(RecipeError, match=rf"pulls the weights of the base back .*, and {other.name} freezes it"):
        Stack([anchor, other])


def test_an_anchor_of_nothing_that_trains_is_refused() -> None:
    model = tiny_model("llama")
    stack = Stack([L2sp(name="l2sp")])
    stack.attach(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="none of the weights"):
        stack.penalty(model)


def test_old_rows_that_cannot_be_read_are_refused_by_their_key_before_weights() -> None:
    with pytest.raises(DataError, match=r"stack\.ewc\.data: .*nowhere"):
        check("ewc", [*QUIET, "stack.ewc.data=/nowhere.jsonl"])


def lost(folder: Path) -> float:
    """What a run forgot of the general set."""
    return float(json.loads((folder / "final" / "metrics.json").read_text(encoding="utf-8"))["forget/own"])


@pytest.mark.slow
def test_the_penalty_is_in_the_update_and_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    words = [*SHORT, *FEW, "steps=2", "optim.lr=3e-3", "eval.forgetting={}"]
    resumes_to_the_bit(tmp_path / "ewc", "ewc", [*words, "stack.ewc.strength=1e5"], 1)
    train_recipe(tmp_path / "free", "ewc", *words, "stack.ewc.strength=0")
    train_recipe(tmp_path / "plain", "sft", *(w for w in words if "ewc" not in w))
    held, free, plain = (learned(tmp_path / name) for name in ("ewc/whole", "free", "plain"))
    assert all(torch.equal(free[n], plain[n]) for n in plain) and free.keys() == plain.keys() == held.keys()
    steps = events(tmp_path / "ewc" / "whole")
    # The first step stands on the start, where the penalty has no slope; the second one is pulled back.
    assert steps[0]["ewc/penalty"] == 0.0 < steps[1]["ewc/penalty"]
    assert not all(torch.equal(held[n], free[n]) for n in held)
    checkpoint = max((tmp_path / "ewc" / "whole" / "checkpoints").iterdir())
    assert {t.dtype for t in load_file(str(checkpoint / "wrappers.safetensors")).values()} == {torch.float32}


def test_a_few_steps_of_l2sp_forget_less_resume_to_the_bit_and_leave_a_plain_model(tmp_path: Path) -> None:
    old = (PACKAGE / "assets" / "data" / "chat" / "valid.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "old.jsonl").write_text("\n".join(old), encoding="utf-8")
    general = f"eval.forgetting={{own: {tmp_path / 'old.jsonl'}}}"
    words = [*SHORT, "steps=8", "optim.lr=1e-3", "eval.load_best=false", general]
    run = resumes_to_the_bit(tmp_path, "l2sp", [*words, "stack.l2sp.alpha=3"], 5)
    train_recipe(tmp_path / "plain", "sft", *words)
    lost = [json.loads((tmp_path / n / "final" / "metrics.json").read_text(encoding="utf-8")) for n in ("whole", "plain")]
    assert 0 < lost[0]["forget/own"] < 0.6 * lost[1]["forget/own"]
    final = tmp_path / "whole" / "final"
    assert not (final / "stack.yaml").exists()
    plain = AutoModelForCausalLM.from_pretrained(final / "model")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, run.model.eval()(ids).logits)
