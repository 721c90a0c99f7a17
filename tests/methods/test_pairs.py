"""Every pair of wrappers either trains, with right gradients in both parts, or is refused in one line before it starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.data.collate import Batch
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.method import Stage
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.hooks.hook import own_tensors
from llmrecipe.objectives.alignment.dpo import Dpo
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.recipe.compatibility import pairs
from tests.contract import FAMILY, IMAGES, MIXTURES, OPTIONS, PAIRS, Subject, optimizer_of, probe_of
from tests.methods.additive.harness import fill, model_of
from tests.methods.kinds import probe_of as probe_of_model
from tests.methods.kinds import put, refresh, slopes, wide_norms, wrapper_of
from tests.tiny import Tokenizer, tiny_model

ALL = pairs()
LEGAL = [(p.first, p.second) for p in ALL if p.reason is None and not {p.first, p.second} & {*IMAGES}]
"""Pairs that train on models that read text."""
# What quantizes or replaces the update is covered by its own tests; here both parts are trained by gradients.
RULES = {n for n in registry.names("stack") if str(registry.spec("stack", n).facts.get("stage")).endswith("RULE")}
GRADIENT = [(a, b) for a, b in LEGAL if not {a, b} & RULES and a not in FAMILY and b not in FAMILY]


def test_at_least_85_in_100_pairs_train_and_every_refusal_has_a_reason() -> None:
    refused = [p for p in ALL if p.reason]
    assert all(p.reason and "\n" not in p.reason for p in refused)
    # A method that has no place for another, and one that needs the base to train, refuse nearly all by their nature.
    facts = {k: registry.spec("stack", k).facts for k in registry.names("stack")}
    single = {k for k, own in facts.items() if own.get("alone") or own.get("needs_base")}
    between = [p for p in ALL if not {p.first, p.second} & single]
    assert single == {"ewc", "hypertuning", "l2sp"} and sum(p.reason is not None for p in between) <= 0.15 * len(between)


EXACT = {"dora": {"detach_norm": False}, "diff_pruning": {"alpha_init": 0.5, "alpha_lr_scale": 1.0}}
"""Options under which the backward pass is the derivative of the forward one: DoRA treats its norm as a constant, and the
gates of diff pruning would all be shut after one step at this learning rate."""


def together(first: str, second: str, **exact: dict[str, object]) -> Subject:
    """Both on one model, the first under the name `one`, the second under `two`."""
    torch.manual_seed(0)
    model = tiny_model()
    wrappers = [
        registry.load_class("stack", k)(name=n, **{**OPTIONS.get(k, {}), **exact.get(k, {})})
        for k, n in ((first, "one"), (second, "two"))
    ]
    stack = Stack(wrappers)
    torch.manual_seed(1)
    stack.attach(model)
    subject = Subject(model, stack, Roles(Engine(model), stack, Tokenizer(), torch.device("cpu"), True), Sft())
    stack.calibrate(model, probe_of(subject))
    # Comparisons with a reference are trained without dropout; the engine's mode is what `reference` puts back.
    subject.roles.engine.eval()
    return subject


def parts(subject: Subject, name: str) -> set[str]:
    """Trained tensors a wrapper owns or opened."""
    named = [w for w in subject.stack if w.name == name]
    own = {n for w in named for n in (*own_tensors(subject.model, w.name), *w.opened(subject.model))}
    return own & set(subject.trained())


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), GRADIENT)
@pytest.mark.parametrize("order", ["as listed", "reversed"])
def test_both_parts_of_a_legal_pair_are_trained(first: str, second: str, order: str) -> None:
    if order == "reversed":
        first, second = second, first
    subject = together(first, second)
    subject.stack.snapshot_reference(subject.model)
    objective = Dpo(beta=0.3)
    batch: Batch = objective.collate(PAIRS, subject.roles)
    assert float(objective.loss(batch, subject.roles).total.detach()) / 2 == pytest.approx(math.log(2), abs=1e-4)
    optimizer = optimizer_of(subject)
    touched: set[str] = set()
    for step in range(3):
        subject.stack.before_step(subject.model, step)
        (subject.loss() + subject.stack.penalty(subject.model)).backward()
        touched |= {n for n, p in subject.model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
        subject.stack.after_backward(subject.model, step)
        optimizer.step()
        subject.stack.after_step(subject.model, step)
        optimizer.zero_grad(set_to_none=True)
    for wrapper in subject.stack:
        if wrapper.stage in (Stage.INJECT, Stage.SELECT):
            own = parts(subject, wrapper.name)
            assert own and own & touched, f"{wrapper.name} has no gradient"


SMOOTH = [k for k in registry.names("stack") if k not in FAMILY and k not in RULES]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [p for p in GRADIENT if p[0] in SMOOTH and p[1] in SMOOTH])
def test_gradients_of_a_pair_equal_float64(first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directional derivative along the gradient, against a central difference of the loss in float64."""
    # Transformers normalises in float32 whatever the model: noise of 1e-7 in a loss is 1 % of this difference.
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", _norm)
    subject = together(first, second, **EXACT)
    if any(w.stage is Stage.BASE for w in subject.stack):
        pytest.skip("quantized kernels have no float64 form; their gradients are compared with dense layers elsewhere")
    optimizer = optimizer_of(subject)
    subject.step(optimizer, 0)
    subject.stack.before_step(subject.model, 1)
    subject.model.double()
    subject.loss().backward()
    trained = {n: p for n, p in subject.trained().items() if p.grad is not None}
    norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in trained.values()))
    assert float(norm) > 0
    eps = 1e-5
    values = []
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for p in trained.values():
                p.add_(p.grad / norm * (sign * eps))
            _refresh(subject)
        # With a graph, as in training: without one, gates are taken at their middle instead of the step's draw.
        values.append(float(subject.loss().detach()))
    slope = (values[0] - values[1]) / (2 * eps)
    assert slope == pytest.approx(float(norm), rel=2e-3)


ENCODED = [(a, b) for a, b in LEGAL if {a, b} & set(FAMILY) and not {a, b} & RULES]
"""Pairs with a method that is made for encoders."""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), ENCODED)
@pytest.mark.parametrize("order", ["as listed", "reversed"])
def test_both_parts_of_a_pair_on_an_encoder(first: str, second: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have gradients, and those are the slope of the loss in float64."""
    kinds = (second, first) if order == "reversed" else (first, second)
    trained_together(monkeypatch, *((kind, EXACT.get(kind, {})) for kind in kinds))


def home_of(*kinds: str) -> str:
    """Return the model that one of the kinds is made for."""
    named = [FAMILY[k] for k in kinds if k in MIXTURES] or [FAMILY[k] for k in kinds if k in FAMILY]
    return named[0] if named else "gpt2"


def trained_together(monkeypatch: pytest.MonkeyPatch, *chosen: tuple[str, dict[str, Any]]) -> None:
    """Train two kinds with their options on a model that one of them is made for."""
    wrappers = [wrapper_of(kind, name, **options) for (kind, options), name in zip(chosen, ("one", "two"), strict=True)]
    made = put(model_of(home_of(*(kind for kind, _ in chosen))), *wrappers)
    made.stack.before_step(made.model, 0)
    fill(made.model)
    refresh(made.stack, made.model)
    grads = made.gradients()
    for wrapper in made.stack:
        own = (set(own_tensors(made.model, wrapper.name)) | wrapper.opened(made.model)) & grads.keys()
        brings = wrapper.stage in (Stage.INJECT, Stage.SELECT)
        assert not brings or any(bool(grads[n].any()) for n in own), f"{wrapper.name} has no gradient"
    # Quantized kernels have no float64 form; their gradients are compared with dense layers elsewhere.
    if not any(w.stage is Stage.BASE for w in made.stack):
        wide_norms(monkeypatch, made.model)
        slope, wanted = slopes(made)
        assert wanted > 0.5 and slope == pytest.approx(wanted, rel=1e-5)


BY_DEFAULT: dict[tuple[str, str], tuple[dict[str, list[str]], dict[str, list[str]]]] = {
    ("esft", "ia3"): ({}, {"scaled": ["key", "value"]}),
    ("bitfit", "bitfit"): ({"terms": ["intermediate"]}, {"terms": ["output"]}),
    ("bitfit", "s4"): ({}, {"tuned": ["G1", "G2"]}),
}
"""Pairs that the table refuses for what their default options do -> the options of each under which both train."""


def test_pairs_that_are_refused_by_default_alone_are_known() -> None:
    declared = {k: registry.spec("stack", k).facts.get("conflicts_by_default") or {} for k in registry.names("stack")}
    assert {tuple(sorted((one, other))) for one, others in declared.items() for other in others} == set(BY_DEFAULT)


@pytest.mark.parametrize("pair", BY_DEFAULT, ids="-".join)
def test_a_pair_refused_by_default_is_refused_by_the_run_and_trains_with_the_options_it_names(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = [p for p in ALL if (p.first, p.second) == pair]
    changed = BY_DEFAULT[pair]
    said = str(found.reason)
    for kind, options in zip(pair, changed, strict=True):
        assert all(
            f"{kind}'s {key}=[{','.join(value)}]" in said or f"and {key}=[{','.join(value)}]" in said
            for key, value in options.items()
        )
    for order in ((0, 1), (1, 0)):
        # A stack is judged by the options it has, so that its declaration alone refuses nothing.
        stack = [wrapper_of(pair[i], f"n{i}") for i in order]
        with pytest.raises(ModelError, match=r"as well; leave them out|trains the same biases"):
            put(model_of(home_of(*pair)), *stack)
        trained_together(monkeypatch, *((pair[i], changed[i]) for i in order))


SIZES = {"block", "budget", "depths", "hidden", "n_tokens", "num_batches", "num_samples", "num_virtual_tokens", "p", "r"}
"""Options of the small models' table that say how much, and not what is trained."""
MODELS = ("llama", "gpt2", "bert", "native-mixture")


def attached(family: str, kinds: tuple[str, ...]) -> bool:
    """Whether kinds share a model, each with its own defaults up to sizes."""
    chosen = [{k: v for k, v in OPTIONS.get(kind, {}).items() if k in SIZES} for kind in kinds]
    wrappers = [registry.load_class("stack", kind)(name=f"{kind}_{i}", **chosen[i]) for i, kind in enumerate(kinds)]
    try:
        put(model_of(family), *wrappers)
    except UserError:
        return False
    return True


@pytest.fixture(scope="module")
def homes() -> dict[str, list[str]]:
    """Kind -> the models it takes by itself."""
    return {kind: [f for f in MODELS if attached(f, (kind,))] for kind in registry.names("stack")}


@pytest.mark.slow
@pytest.mark.parametrize("first", registry.names("stack"))
def test_what_the_table_says_trains_is_attached_with_packaged_defaults(first: str, homes: dict[str, list[str]]) -> None:
    """On some model that takes each of the two alone; both orders."""
    for one, second in LEGAL:
        both = [family for family in homes[one] if one == first and family in homes[second]]
        for kinds in ((one, second), (second, one)) if both else ():
            assert any(attached(family, kinds) for family in both), f"{kinds} share none of {both}"


FORWARD = sorted({a if b == "mezo" else b for a, b in LEGAL if "mezo" in (a, b)} - {"mezo"})
"""Kinds that share a stack with the rule that trains by forward passes."""


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "ia3" else pytest.mark.slow) for k in FORWARD])
def test_a_pair_with_a_rule_without_gradients_moves_what_the_other_trains(kind: str, tmp_path: Path) -> None:
    from tests.methods.memory.mezo_support import Next, make_run

    quantizes = str(registry.spec("stack", kind).facts.get("stage")).endswith("BASE")
    if quantizes:
        pytest.skip("quantized while it is loaded: see the recipes of the family")
    model = model_of(FAMILY.get(kind, "llama"))
    if kind in FAMILY:
        pytest.skip("made for encoders, which have no next token")
    run = make_run(model, tmp_path, (wrapper_of(kind, "one"),), run={"objective": Next()}, eps=1e-2)
    run.learning_rate = 1e-3
    run.stack.calibrate(model, probe_of_model(model, Engine(model)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    result = run.step([torch.tensor([[3, 9, 4, 33, 7, 20, 2]])])
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert result.finite and moved and all(p.grad is None for p in model.parameters())


def test_the_table_on_the_command_line_is_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    from llmrecipe.cli.app import main

    with pytest.raises(SystemExit) as stopped:
        main(["list", "--pairs", "--json"])
    assert not stopped.value.code
    rows = json.loads(capsys.readouterr().out)
    assert [(r["first"], r["second"], r["reason"]) for r in rows] == [(p.first, p.second, p.reason) for p in ALL]


def _norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """g * x / sqrt(mean x^2 + eps) in the dtype of x."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _refresh(subject: Subject) -> None:
    """Methods that write what they learned into base weights do so after a step."""
    for wrapper in subject.stack:
        refresh = getattr(wrapper, "refresh", None)
        if callable(refresh):
            refresh(subject.model)
