"""Every registered wrapper through the same promises; other kinds have a contract.py in their own folder.

A plugin's components keep the same promises: from the checkout, with the package on the path and its recipes in ./recipes,

    PYTHONPATH=PROJECT python -m pytest tests/contract.py tests/objectives/contract.py --plugins my_package -k my_component

A wrapper is found by its registration; the tables below only say what a kind needs to run on a two-layer model (options, a
family with the parts it names). A kind that is in no table runs with its defaults on a small Llama.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.data.collate import Batch, Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.method import Probe, Stage
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.alignment.dpo import Dpo
from llmrecipe.objectives.finetuning.image_classification import ImageClassification
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training import build_run
from tests.pictures import held_picture
from tests.tiny import Tokenizer, tiny_model, tiny_vision_model

OPTIONS: dict[str, dict[str, Any]] = {
    "noah": {"depths": [2]},
    "bitfit": {"missing": "add_zero"},
    "ewc": {"num_samples": 4},
    "fishmask": {"density": 0.05, "num_samples": 4},
    "child_tuning": {"variant": "d"},
    "spt": {"num_batches": 2},
    "esft": {"p": 0.5, "n_tokens": 64},
    "smt": {"block": 8, "budget": 0.05, "warmup_steps": 2},
    "group_mask": {"num_samples": 4},
    "adapter": {"r": 8},
    "coda": {"r": 4, "reduction": 2.0, "eps": 1.0, "causal": "prompt_only"},
    "adalora": {"total_step": 50},
    "dylora": {"update": "full"},
    "prefix_tuning": {"num_virtual_tokens": 4, "hidden": 8},
    "p_tuning_v2": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "apt": {"num_virtual_tokens": 4, "summary": "first"},
    "mam": {"num_virtual_tokens": 4, "hidden": 8, "r": 8},
    "llm_adapters": {"r": 8},
    "autopeft": {"adapter": 3, "parallel_adapter": 2, "prefix_tuning": 3, "hidden": 8},
    "s4": {"budget": 13000.0},
    "unipelt": {"num_virtual_tokens": 4, "hidden": 8, "r": 4, "reduction": 4},
    "hypertuning": {"r": 2, "depth": 1, "width": 16},
}
"""Options a kind needs on a model this small."""
BEFORE_MERGE: dict[str, dict[str, Any]] = {"diff_pruning": {"l0_steps": 2}}
"""Options that bring a kind into the phase in which it can be merged."""
FAMILY: dict[str, str] = {"coda": "bert", "esft": "native-mixture"}
"""A family other than Llama, where a method is not defined on decoders."""
MIXTURES = ("esft",)
"""Kinds that need experts."""
KINDS = registry.names("stack")
IMAGES = [k for k in KINDS if registry.spec("stack", k).facts.get("modality") == "images"]
"""Kinds for models that read pictures."""
TRAINED = [
    k
    for k in KINDS
    if registry.spec("stack", k).facts.get("stage") in ("Stage.INJECT", "Stage.SELECT", None) and k not in IMAGES
]
"""Kinds that train on models that read text."""
CAUSAL = [k for k in TRAINED if k not in FAMILY]
ANY = [*CAUSAL, *IMAGES]
"""Kinds on the model each is made for."""
READS_PROMPTS: dict[str, dict[str, Any]] = {"coda": {}, "apt": {"summary": "prompt_mean"}, "loreft": {}, "direft": {}}
"""Kinds whose output depends on where a prompt ends, and options under which it does."""
WITH_EXAMPLES = ("hypertuning",)
"""Kinds that make an adapter for each row from examples."""
EXAMPLES = {
    "example_ids": torch.tensor([[5, 9, 2, 0], [12, 13, 14, 2], [21, 2, 0, 0]]),
    "example_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]),
}
ROWS = [
    {"row": 0, "ids": [1, 5, 6, 7, 8, 9, 2], "trained": [0, 0, 0, 1, 1, 1, 1]},
    {"row": 1, "ids": [1, 12, 13, 2], "trained": [0, 0, 1, 1]},
    {"row": 2, "ids": [1, 20, 21, 22, 23, 24, 25, 26, 2], "trained": [0, 0, 0, 0, 1, 1, 1, 1, 1]},
]
PICTURES: list[dict[str, Any]] = [{"row": i, "features": held_picture(i), "label": i} for i in range(3)]
PAIRS = [
    {"row": 0, "prompt_ids": [1, 5, 6, 7], "chosen_ids": [8, 9, 10, 2], "rejected_ids": [11, 2]},
    {"row": 1, "prompt_ids": [1, 12], "chosen_ids": [13, 2], "rejected_ids": [14, 15, 16, 2]},
]


@dataclass
class Subject:
    """A tiny model under one wrapper, ready for its first step."""

    model: nn.Module
    stack: Stack
    roles: Roles
    objective: Any

    def batch(self) -> Batch:
        batch = self.objective.collate(self.rows(), self.roles)
        return batch.with_extra(**EXAMPLES) if self.reads_examples else batch

    @property
    def reads_examples(self) -> bool:
        return any(wrapper.name in WITH_EXAMPLES for wrapper in self.stack)

    def rows(self) -> list[dict[str, Any]]:
        if isinstance(self.objective, ImageClassification):
            return PICTURES
        return [{**row, "task": row["row"]} for row in ROWS] if self.reads_examples else ROWS

    def loss(self) -> torch.Tensor:
        batch = self.batch()
        return self.objective.loss(batch, self.roles).total / self.objective.weight(batch)

    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        self.stack.before_step(self.model, step)
        loss = self.loss() + self.stack.penalty(self.model)
        loss.backward()
        self.stack.after_backward(self.model, step)
        optimizer.step()
        self.stack.after_step(self.model, step)
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def build(kind: str, packing: bool = True, calibrate: bool = True, family: str | None = None, **options: Any) -> Subject:
    """A subject; data-dependent choices are made on the rows above."""
    torch.manual_seed(0)
    model = bare_model(kind, family)
    wrapper = registry.load_class("stack", kind)(name=kind, **{**OPTIONS.get(kind, {}), **options})
    stack = Stack([wrapper])
    torch.manual_seed(1)
    stack.attach(model)
    subject = subject_of(kind, model, stack, packing)
    if calibrate:
        subject.stack.calibrate(model, probe_of(subject))
    subject.roles.engine.eval()
    return subject


def bare_model(kind: str, family: str | None = None) -> nn.Module:
    """A tiny model of the family, or of the modality, that a kind is made for."""
    torch.manual_seed(0)
    return tiny_vision_model(positions="learned") if kind in IMAGES else tiny_model(family or FAMILY.get(kind, "llama"))


def subject_of(kind: str, model: nn.Module, stack: Stack, packing: bool = True) -> Subject:
    """A model under a stack with the objective of its modality."""
    objective = ImageClassification() if kind in IMAGES else Sft()
    return Subject(model, stack, Roles(Engine(model), stack, Tokenizer(), torch.device("cpu"), packing), objective)


def probe_of(subject: Subject) -> Probe:
    """A probe over the rows above."""

    def batches(n: int, rows: int | None = None) -> Iterator[Batch]:
        given = subject.rows()
        size = rows or len(given)
        for i in range(n):
            yield subject.objective.collate([given[(i * size + j) % len(given)] for j in range(size)], subject.roles)

    def loss(batch: Batch) -> torch.Tensor:
        return subject.objective.loss(batch, subject.roles).total / max(subject.objective.weight(batch), 1e-12)

    return Probe(batches, loss, None, subject.objective.weight, rows=len(ROWS), engine=subject.roles.engine)


def optimizer_of(subject: Subject, decay: float = 0.1) -> torch.optim.Optimizer:
    config = registry.load_class("optim", "adamw")(lr=1e-2, weight_decay=decay)
    return build_optimizer(config, parameter_groups(subject.model, config, subject.stack.groups(subject.model)))


def outputs(subject: Subject) -> torch.Tensor:
    want = "scores" if isinstance(subject.objective, ImageClassification) else "logprobs"
    with torch.no_grad():
        return subject.roles.engine(subject.batch(), want=want)[want]


def run_steps(subject: Subject, steps: int = 3) -> list[float]:
    optimizer = optimizer_of(subject)
    losses = []
    for step in range(steps):
        if subject.stack.before_step(subject.model, step):
            optimizer = build_run.optimizer_for(
                subject.model, registry.load_class("optim", "adamw")(lr=1e-2), subject.stack, keep=optimizer
            )
        losses.append(subject.step(optimizer, step))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_documentation_names_formula_and_source(kind: str) -> None:
    spec = registry.spec("stack", kind)
    assert "=" in spec.doc or "<-" in spec.doc, "the docstring states no formula"
    assert spec.papers, "the docstring names no arXiv id"
    assert all(option.doc for option in spec.options.values()), "an option is not explained"


@pytest.mark.parametrize("kind", ANY)
def test_step_zero_is_the_base_or_the_wrapper_says_it_is_not(kind: str) -> None:
    subject = build(kind)
    base = subject_of(kind, bare_model(kind), Stack([]))
    same = torch.allclose(outputs(subject), outputs(base), atol=2e-5, rtol=1e-5)
    assert same == all(wrapper.starts_at_base() for wrapper in subject.stack)


@pytest.mark.parametrize("kind", ANY)
def test_only_what_is_declared_moves_and_all_of_it_has_gradients(kind: str) -> None:
    subject = build(kind)
    trained = set(subject.trained())
    assert trained, "nothing trains"
    frozen = {n: p.detach().clone() for n, p in subject.model.named_parameters() if n not in trained}
    optimizer = optimizer_of(subject)
    seen: set[str] = set()
    for step in range(3):
        subject.stack.before_step(subject.model, step)
        (subject.loss() + subject.stack.penalty(subject.model)).backward()
        given = {n: p.grad for n, p in subject.model.named_parameters() if p.grad is not None}
        assert given.keys() <= trained, "what is frozen has no gradient at all"
        seen |= {n for n, grad in given.items() if bool(grad.abs().sum() > 0)}
        subject.stack.after_backward(subject.model, step)
        optimizer.step()
        subject.stack.after_step(subject.model, step)
        optimizer.zero_grad(set_to_none=True)
    dead = trained - seen
    # A key bias without positions after it shifts all logits of a query alike; nothing else may be without gradient.
    assert not dead, f"trained but never touched by a gradient in three steps: {sorted(dead)[:5]}"
    if all(wrapper.stage is Stage.INJECT for wrapper in subject.stack):
        now = dict(subject.model.named_parameters())
        assert all(torch.equal(now[n], value) for n, value in frozen.items())


@pytest.mark.parametrize("kind", ANY)
def test_trained_tensors_are_float32(kind: str) -> None:
    assert {p.dtype for p in build(kind).trained().values()} == {torch.float32}


@pytest.mark.parametrize("kind", ANY)
def test_a_saved_delta_gives_the_same_model_bit_for_bit(kind: str) -> None:
    subject = build(kind)
    run_steps(subject)
    structures = copy.deepcopy(subject.stack.structures(subject.model))
    delta = {n: t.clone() for n, t in subject.stack.delta(subject.model).items()}
    states = [copy.deepcopy(w.state()) for w in subject.stack]
    wanted = outputs(subject)
    model = bare_model(kind)
    stack = Stack([registry.load_class("stack", kind)(name=kind, **OPTIONS.get(kind, {}))])
    torch.manual_seed(99)
    stack.attach(model, structures)
    stack.restore(model, delta)
    for wrapper, state in zip(stack, states, strict=True):
        wrapper.load_state(state)
    again = subject_of(kind, model.eval(), stack)
    assert torch.equal(outputs(again), wanted)


@pytest.mark.parametrize("kind", ANY)
def test_merging_keeps_the_outputs_or_is_refused(kind: str) -> None:
    subject = build(kind, **BEFORE_MERGE.get(kind, {}))
    run_steps(subject)
    wanted = outputs(subject)
    fixed = [wrapper for wrapper in subject.stack if not wrapper.merges()]
    for wrapper in fixed:
        with pytest.raises(ModelError):
            wrapper.merge(subject.model)
    if fixed:
        assert torch.equal(outputs(subject), wanted)
        return
    for wrapper in subject.stack:
        wrapper.merge(subject.model)
    merged = subject_of(kind, subject.model, Stack([]))
    torch.testing.assert_close(outputs(merged), wanted, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("steps", [0, 2])
def test_dpo_starts_at_log_two_and_its_reference_never_moves(kind: str, steps: int) -> None:
    subject = build(kind)
    subject.stack.snapshot_reference(subject.model)
    objective = Dpo(beta=0.3)
    batch = objective.collate(PAIRS, subject.roles)
    before = subject.roles.reference_tokens(batch)
    if steps == 0:
        loss = objective.loss(batch, subject.roles).total / 2
        assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-5)
        return
    run_steps(subject, steps)
    assert torch.equal(subject.roles.reference_tokens(batch), before)


@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_rows_give_the_padded_gradients(kind: str) -> None:
    grads = []
    for packing in (True, False):
        subject = build(kind, packing=packing)
        optimizer = optimizer_of(subject)
        subject.step(optimizer, 0)
        subject.stack.before_step(subject.model, 1)
        subject.loss().backward()
        grads.append({n: p.grad for n, p in subject.trained().items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("kind", ANY)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    from llmrecipe.models.load import prepare_for_training
    from llmrecipe.recipe.schema import ModelSection

    grads = []
    for form in (False, True, "selective"):
        subject = build(kind)
        prepare_for_training(subject.model, ModelSection(gradient_checkpointing=form))
        subject.model.train()
        subject.stack.before_step(subject.model, 0)
        subject.loss().backward()
        grads.append({n: p.grad for n, p in subject.trained().items() if p.grad is not None})
    for found in grads[1:]:
        assert grads[0].keys() == found.keys() and grads[0]
        for name, grad in grads[0].items():
            torch.testing.assert_close(grad, found[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_with_a_cache_equals_generation_without(kind: str) -> None:
    from llmrecipe.engine.generation import generate
    from llmrecipe.engine.sampling import Sampling

    subject = build(kind)
    run_steps(subject)
    prompts = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24]]
    batched = generate(subject.model, Tokenizer(), prompts, Sampling(8))
    alone = [generate(subject.model, Tokenizer(), [p], Sampling(8))[0] for p in prompts]
    assert batched == alone
    uncached = [_greedy(subject, p, 8) for p in prompts]
    assert batched == uncached


@pytest.mark.parametrize("kind", [k for k in TRAINED if k not in MIXTURES])
def test_a_model_asked_the_plain_way_is_causal_and_is_the_products(kind: str) -> None:
    """Nobody sets a context: no token reads a later one, and values and answers are those of the product's own passes.

    Where a method asks for the prompt, a plain pass has none, and generation reads one into an empty cache.
    """
    from llmrecipe.core.forward_context import Context, activate
    from llmrecipe.engine.generation import generate
    from llmrecipe.engine.sampling import Sampling

    subject = build(kind, family="llama", **READS_PROMPTS.get(kind, {}))
    run_steps(subject, 2)
    model, engine = subject.model.eval(), subject.roles.engine.eval()
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 12, 30], [1, 13, 14, 15, 16, 0, 0, 0]])
    mask, lengths = (ids != 0).long(), [8, 5]
    changed = ids.index_fill(1, torch.tensor([7]), 44)

    @torch.no_grad()
    def plain(ids: torch.Tensor, prompts: list[int] | None = None) -> torch.Tensor:
        with activate(Context(prompt_lengths=None if prompts is None else torch.tensor(prompts))):
            return model(input_ids=ids, attention_mask=mask).logits

    for prompts in (None, [4, 3]):
        before, after = plain(ids, prompts)[0], plain(changed, prompts)[0]
        torch.testing.assert_close(before[:-1], after[:-1], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(before[-1], after[-1], atol=1e-2), "the last token is read"
        rows = [
            Sequence(ids[i, :n].tolist(), [0] + [1] * (n - 1), prompt=0 if prompts is None else prompts[i])
            for i, n in enumerate(lengths)
        ]
        logits = torch.cat([plain(ids, prompts)[i, : n - 1] for i, n in enumerate(lengths)])
        for batch in (pad(rows, 0), pack(rows)):
            with torch.no_grad():
                own = engine(batch)["logprobs"]
            torch.testing.assert_close(logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0], own, atol=2e-5, rtol=1e-5)
    assert torch.allclose(plain(ids), plain(ids, [4, 3]), atol=1e-4) == (kind not in READS_PROMPTS)

    questions = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24]]
    left = torch.tensor([[0] * (6 - len(q)) + q for q in questions])
    with torch.no_grad():
        answers = model.generate(
            input_ids=left,
            attention_mask=(left != 0).long(),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=63,
        )[:, 6:]
    model.generation_config.eos_token_id = None
    ours = generate(model, NoEnd(), questions, Sampling(4))
    assert [a[: a.index(63) + 1] if 63 in a else a for a in answers.tolist()] == ours


class NoEnd(Tokenizer):
    """A tokenizer whose end token is an ordinary one."""

    eos_token_id = 63


@torch.no_grad()
def _greedy(subject: Subject, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding by a whole forward pass a token, without a cache; the prompt stays the prompt."""
    from llmrecipe.core.forward_context import Context, activate

    out: list[int] = []
    while len(out) < steps and out[-1:] != [Tokenizer.eos_token_id]:
        ids = torch.tensor([prompt + out])
        with activate(Context(attention_mask=torch.ones_like(ids), prompt_lengths=torch.tensor([len(prompt)]))):
            out.append(int(subject.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("name", [n for g in registry.groups() for n in registry.names(g)])
def test_the_source_view_of_a_component_is_its_class(name: str) -> None:
    """Options, types and defaults read from the text equal those of the imported class."""
    import dataclasses

    for spec in registry.find(name):
        cls = registry.load_class(spec.group, spec.name)
        interfaces = [base for base in cls.__mro__[1:] if base.__name__ in registry.INTERFACES]
        inherited = {f.name for base in interfaces if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
        real = {f.name for f in dataclasses.fields(cls)} - inherited
        assert real == set(spec.options)
        optional = {k: v for k, v in spec.defaults().items() if k != "kind"}
        required = [o.name for o in spec.options.values() if o.default is ...]
        if not required:
            instance = cls(**({"name": "x"} if spec.group == "stack" else {}))
            assert {k: getattr(instance, k) for k in optional} == optional
