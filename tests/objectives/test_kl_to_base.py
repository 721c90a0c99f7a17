"""The divergence from the model a run starts from: by hand in float64, what is kept for it, what it saves, resume, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.registry import PACKAGE
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.training.dry_run import check
from tests.objectives.test_encoder_decoder import FAMILIES, pair_model
from tests.objectives.test_encoder_decoder import ROWS as PAIRS
from tests.objectives.test_encoder_decoder import words as words_of_pair
from tests.tiny import roles_for, tiny_model
from tests.trainings import events, learned, resumes_to_the_bit, train_recipe

ROWS: list[dict[str, Any]] = [
    {"row": 0, "ids": [1, 9, 3, 44, 7], "trained": [0, 0, 1, 1, 1], "weights": [0.0, 0.0, 0.5, 2.0, 1.0]},
    {"row": 1, "ids": [1, 21, 40, 2], "trained": [0, 1, 0, 1]},
]
WEIGHTS = [[0.0, 0.5, 2.0, 1.0], [1.0, 0.0, 1.0]]
"""Of the targets of each row, 0 where a token is none."""
SHORT = ["steps=8", "batch.size=4", "schedule=constant", "eval.batches=1", "eval.at_start=false", "data.max_length=128"]


def wrappers(kind: str) -> list[Wrapper]:
    """All weights, a head with an adapter, or entries of the base."""
    adapter = Lora(name="lora", r=2, target="attn.q|v + head")
    return {"full": [], "lora": [adapter], "bitfit": [Bitfit(name="bitfit", missing="add_zero")]}[kind]


def moved(model: Any) -> None:
    """Everything that trains away from where it started."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"loss_type": "dft"}], ids=str)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "bitfit"])
def test_loss_and_gradients_are_the_formula_in_float64(
    kind: str, packing: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of logits that plain calls of both models give, in chunks that are computed again in the backward pass."""
    monkeypatch.setattr("llmrecipe.engine.logprob.chunk_rows", lambda vocabulary, device: 2)
    model: Any = tiny_model().double()
    base = copy.deepcopy(model)
    stack = Stack(wrappers(kind))
    stack.attach(model)
    model.double()
    stack.snapshot_reference(model)
    moved(model)
    roles = roles_for(model, stack, packing)
    objective, plain = Sft(kl_to_base=0.3, **options), Sft(**options)
    loss = objective.training_loss(objective.collate(ROWS, roles), roles)
    apart, weighted = [], torch.zeros((), dtype=torch.float64)
    for row, weights in zip(ROWS, WEIGHTS, strict=True):
        ids = torch.tensor([row["ids"]])
        with torch.no_grad():
            log_p = base(ids).logits[0, :-1].log_softmax(-1)
        log_q = model(ids).logits[0, :-1].log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
        apart += [float(d) for d, w in zip(each.detach(), weights, strict=True) if w]
        weighted = weighted + (each * torch.tensor(weights, dtype=torch.float64)).sum()
    total, count = loss.metrics["kl_to_base"]
    assert (float(total), count) == (pytest.approx(sum(apart), rel=1e-9), 5.0) and sum(apart) > 0.05
    own = plain.training_loss(plain.collate(ROWS, roles), roles)
    assert float(loss.total.detach()) == pytest.approx(float(own.total.detach()), rel=1e-9), "it is no part of the loss"
    assert float(torch.as_tensor(loss.auxiliary).detach()) == pytest.approx(0.3 * float(weighted.detach()), rel=1e-9)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss.total + loss.auxiliary, trained)
    wanted = torch.autograd.grad(own.total + 0.3 * weighted, trained)
    for one, other in zip(found, wanted, strict=True):
        # The norms of the model compute in float32, here in two passes and there in three.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_an_encoder_decoder_it_is_the_divergence_of_the_decoder(family: str, kind: str) -> None:
    """Loss, metric and gradients against plain calls of both models with labels."""
    model: Any = pair_model(family).double()
    base = copy.deepcopy(model)
    stack = Stack([] if kind == "full" else [Lora(name="lora", r=2, target="attn.q|v")])
    stack.attach(model)
    model.double()
    stack.snapshot_reference(model)
    moved(model)
    roles = roles_for(model, stack)
    rows = [{"row": i, "ids": p + a, "trained": [0] * len(p) + [1] * len(a)} for i, (p, a) in enumerate(PAIRS)]
    objective, plain = Sft(kl_to_base=0.3), Sft()
    loss = objective.training_loss(objective.collate(rows, roles), roles)
    apart = torch.zeros((), dtype=torch.float64)
    for prompt, answer in PAIRS:
        ids, labels = torch.tensor([prompt]), torch.tensor([answer])
        with torch.no_grad():
            log_p = base(input_ids=ids, labels=labels).logits[0].double().log_softmax(-1)
        log_q = model(input_ids=ids, labels=labels).logits[0].double().log_softmax(-1)
        apart = apart + (log_p.exp() * (log_p - log_q)).sum()
    total, count = loss.metrics["kl_to_base"]
    assert (float(total), count) == (pytest.approx(float(apart.detach()), rel=1e-6), 10.0) and float(total) > 5e-3
    own = plain.training_loss(plain.collate(rows, roles), roles)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss.total + loss.auxiliary, trained, allow_unused=True)
    wanted = torch.autograd.grad(own.total + 0.3 * apart, trained, allow_unused=True)
    assert sum(g is not None for g in wanted) > 3
    for one, other in zip(found, wanted, strict=True):
        if other is not None and one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        else:
            assert (one is None or not one.any()) and (other is None or not other.any())


def test_a_run_of_an_encoder_decoder_is_held_to_its_start_and_resumes_to_the_bit(tmp_path: Path) -> None:
    words = words_of_pair("t5", tmp_path, "objective.kl_to_base=1", "optim.lr=1e-2")
    resumes_to_the_bit(tmp_path / "runs", "sft", words, 1)
    first, second = (event["kl_to_base"] for event in events(tmp_path / "runs" / "whole"))
    assert first == pytest.approx(0.0, abs=1e-6) and second > 1e-4


def test_the_model_of_step_0_reads_no_noise_and_an_evaluation_is_plain() -> None:
    """Where nothing has moved the divergence is 0; noise moves the policy alone, so that it is above."""
    model = tiny_model()
    roles = roles_for(model, Stack([]))
    rows = [{**row, "epoch": 0} for row in ROWS]
    still, noisy = Sft(kl_to_base=1.0), Sft(kl_to_base=1.0, neftune_alpha=5.0)
    values = []
    for objective in (still, noisy):
        loss = objective.training_loss(objective.collate(rows, roles), roles)
        values.append(float(loss.metrics["kl_to_base"][0]))
        assert "kl_to_base" not in objective.evaluate(objective.collate(rows, roles), roles)
    assert values[0] == pytest.approx(0.0, abs=1e-6) and values[1] > 0.05
    empty = still.training_loss(still.collate([], roles), roles)
    assert float(empty.total.detach()) == 0.0 and empty.metrics["kl_to_base"] == (0.0, 0.0)


def general(folder: Path) -> str:
    """A few held-out conversations of the old task."""
    old = (PACKAGE / "assets" / "data" / "chat" / "valid.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (folder / "old.jsonl").write_text("\n".join(old), encoding="utf-8")
    return f"eval.forgetting={{own: {folder / 'old.jsonl'}}}"


def metrics_of(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "final" / "metrics.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_a_run_that_is_held_to_its_start_forgets_less_and_resumes_to_the_bit(tmp_path: Path) -> None:
    words = [*SHORT, "optim.lr=1e-3", "eval.load_best=false", general(tmp_path)]
    resumes_to_the_bit(tmp_path, "kl_to_base", [*words, "objective.kl_to_base=1"], 5)
    train_recipe(tmp_path / "plain", "sft", *words)
    held, plain = (metrics_of(tmp_path / name) for name in ("whole", "plain"))
    assert 0 < held["forget/own"] < 0.7 * plain["forget/own"]
    assert held["forget/kl"] > 0 and "forget/kl" not in plain, "the copy of what trains gives it without a frozen base"
    curve = [event["kl_to_base"] for event in events(tmp_path / "whole")]
    assert curve[0] == pytest.approx(0.0, abs=1e-6) and max(curve) > 0.01


def test_an_adapter_is_held_to_the_base_without_it_and_resumes_to_the_bit(tmp_path: Path) -> None:
    words = [*SHORT, "steps=3", "optim.lr=1e-2", "objective.kl_to_base=1"]
    resumes_to_the_bit(tmp_path, "sft_lora", words, 2)
    train_recipe(tmp_path / "free", "sft_lora", *words[:-1])
    held, free = (learned(tmp_path / name) for name in ("whole", "free"))
    norms: list[Tensor] = [
        torch.stack([t.norm() for n, t in part.items() if "lora_B" in n or ".B" in n]) for part in (held, free)
    ]
    assert norms[0].sum() < norms[1].sum()
    assert events(tmp_path / "whole")[-1]["kl_to_base"] > 0


def test_the_copy_is_counted_where_weights_train() -> None:
    full, adapter = (check(name, ["objective.kl_to_base=0.1", "eval.forgetting={}"]) for name in ("sft", "sft_lora"))
    assert full.memory.auxiliary == 4 * full.trained > 0 and adapter.memory.auxiliary == 0
    assert not full.memory.unpredicted and not adapter.memory.unpredicted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.init=random"], r"objective\.kl_to_base: with model\.init=random"),
        (["runtime.shard=zero3", "runtime.processes=2"], r"objective\.kl_to_base: .*runtime\.shard=zero3"),
        (["objective.kl_to_base=-1"], r"objective\.kl_to_base"),
    ],
)
def test_a_base_that_cannot_answer_is_refused_before_weights(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check("sft_lora", ["objective.kl_to_base=0.1", *words])
