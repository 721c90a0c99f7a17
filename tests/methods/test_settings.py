"""Every registered wrapper on every kind of model in the settings that must not change what it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.engine.continuous_batching import padded
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.packing import isolates
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.quantized import dequantize_model, quantized
from llmrecipe.models.load import prepare_for_training
from llmrecipe.models.module_map import anatomy
from llmrecipe.recipe.compatibility import pairs
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training.build_run import autocast_of
from tests.methods.additive.harness import fill, model_of
from tests.methods.kinds import BASES, CHANGES, FAMILIES, GENERATE, Cell, batch_of, cell, matrix, put, refresh, wrapper_of

LEGAL = {frozenset((p.first, p.second)) for p in pairs() if p.reason is None}
SINGLE = tuple(f for f in FAMILIES if f not in ("t5", "bart", "native-encoder_decoder"))


def same(left: dict[str, Tensor], right: dict[str, Tensor], atol: float, rtol: float) -> None:
    """Equal by name."""
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, FAMILIES))
def test_checkpointed_blocks_are_run_again_and_give_the_same_gradients(kind: str, family: str) -> None:
    grads, calls = [], []
    for checkpointing in (False, True):
        made = cell(kind, family, moved=True)
        prepare_for_training(made.model, ModelSection(gradient_checkpointing=checkpointing))
        made.model.train()
        count: list[int] = []
        for site in anatomy(made.model).at("attn.q"):
            site.module.register_forward_pre_hook(lambda *_, c=count: c.append(1))
        grads.append(made.gradients())
        calls.append(len(count))
    # Blocks below everything that trains are not run again.
    assert 2 * calls[0] >= calls[1] > calls[0] > 0
    same(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, SINGLE))
def test_packed_rows_give_the_gradients_of_separate_rows(kind: str, family: str) -> None:
    made = cell(kind, family, moved=True)
    assert isolates(made.engine, torch.device("cpu"))
    packed = made.gradients(batch_of(made.model, packing=True))
    apart: dict[str, Tensor] = {}
    total = batch_of(made.model).target.numel()
    for row in range(3):
        batch = batch_of(made.model, rows=[row])
        share = batch.target.numel() / total
        penalised = made.stack.penalty(made.model)
        made.model.zero_grad(set_to_none=True)
        (made.loss(batch) * share + penalised * (1 / 3)).backward()
        for name, p in made.trained().items():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            apart[name] = apart.get(name, torch.zeros_like(p)) + grad
    same(packed, apart, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, FAMILIES))
def test_a_bfloat16_base_trains_close_to_float32(kind: str, family: str) -> None:
    """The same learned tensors on the same base, stored and computed in bfloat16: 8 bits of the loss and of its gradient."""
    bfloat16_is_close(kind, family)


CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "group gates": ("group_mask", {"hard_l0": True, "l0_steps": 2, "num_samples": 128, "alpha_init": 0.5}),
    "gates of heads": ("group_mask", {"hard_l0": True, "l0_steps": 2, "num_samples": 128, "group": "head", "density": 0.5}),
    "biases": ("lora", {"bias": "all", "lora_bias": True}),
    "biases beside dora": ("dora", {"bias": "all"}),
    "biases beside adalora": ("adalora", {"bias": "lora_only"}),
    "eva": ("lora", {"init": "eva", "r": 4}),
    "lora_ga": ("lora", {"init": "lora_ga", "r": 2}),
    "corda": ("lora", {"init": "corda", "r": 4}),
    "mica": ("lora", {"init": "mica"}),
    "loftq": ("lora", {"init": "loftq", "r": 4}),
    "loftq and codes": ("lora", {"init": "loftq", "r": 4, "loftq_iter": 3}),
}
"""Choices under which a kind is another method."""


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_choice_of_a_method_trains_on_a_bfloat16_base_close_to_float32(choice: str, family: str) -> None:
    kind, options = CHOICES[choice]
    if choice.startswith("biases") and family == "llama":
        family = "bart"
    bfloat16_is_close(kind, family, **options)


def bfloat16_is_close(kind: str, family: str, **options: Any) -> None:
    """The loss within 2 % and the direction of the whole gradient within a cosine of 0.95."""
    below = [wrapper_of("nf4")] if options.get("init") == "loftq" else []
    wide = put(mild(family), *below, wrapper_of(kind, **options), original=lambda: mild(family))
    wide.stack.before_step(wide.model, 0)
    fill(wide.model, scale=0.05)
    model, stack = mild(family).to(torch.bfloat16), Stack([*below, wrapper_of(kind, **options)])
    stack.attach(model, without_digests(wide.stack.structures(wide.model)))
    stack.restore(model, {name: value.clone() for name, value in wide.stack.delta(wide.model).items()})
    stack.before_step(model, 0)
    low = Cell(model, stack, Engine(model, autocast_of("bfloat16", stack)).eval())
    assert {p.dtype for p in low.trained().values()} == {torch.float32} and low.trained().keys() == wide.trained().keys()
    for made in (wide, low):
        refresh(made.stack, made.model)
    losses = [float(made.loss().detach()) for made in (wide, low)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    grads = [torch.cat([g.flatten() for g in made.gradients().values()]) for made in (wide, low)]
    assert bool(torch.isfinite(grads[1]).all())
    assert float(torch.nn.functional.cosine_similarity(*grads, dim=0)) > 0.95


def without_digests(structure: Any) -> Any:
    """A selection is tied to the bytes of its base; these are the same numbers in another dtype."""
    if not isinstance(structure, dict):
        return structure
    return {key: without_digests(value) for key, value in structure.items() if key != "base"}


def mild(family: str) -> nn.Module:
    """A model of the family whose weights are bfloat16 numbers, and small enough for its softmaxes not to saturate."""
    model = model_of(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter / (3 if parameter.dim() > 1 else 1)).to(torch.bfloat16))
    return model


def codes(model: nn.Module) -> dict[str, Tensor]:
    """The stored bytes of quantized weights."""
    return {path: module.weight.detach().clone().view(torch.uint8) for path, module in quantized(model)}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, ("llama", "bert", "t5")))
def test_a_quantized_base_stays_as_it_is_and_everything_on_top_learns(base: str, kind: str, family: str) -> None:
    if frozenset((base, kind)) not in LEGAL:
        pytest.skip("refused, as `list --pairs` says")
    made = put(model_of(family), wrapper_of(base), wrapper_of(kind))
    before = codes(made.model)
    assert before
    config = registry.load_class("optim", "adamw")(lr=1e-2, weight_decay=0.1)
    from llmrecipe.optim.optimizer import build_optimizer, parameter_groups

    optimizer = build_optimizer(config, parameter_groups(made.model, config, made.stack.groups(made.model)))
    reached: set[str] = set()
    for step in range(3):
        made.stack.before_step(made.model, step)
        loss = made.loss() + made.stack.penalty(made.model)
        loss.backward()
        assert bool(torch.isfinite(loss))
        reached |= {n for n, p in made.trained().items() if p.grad is not None and bool(p.grad.any())}
        made.stack.after_backward(made.model, step)
        optimizer.step()
        made.stack.after_step(made.model, step)
        optimizer.zero_grad(set_to_none=True)
    assert set(made.trained()) == reached, sorted(set(made.trained()) - reached)[:5]
    after = codes(made.model)
    assert before.keys() == after.keys() and all(torch.equal(v, after[n]) for n, v in before.items())
    made.stack.before_step(made.model, 3)
    on_codes = made.gradients()
    dequantize_model(made.model)
    assert not list(quantized(made.model))
    same(on_codes, made.gradients(), atol=2e-4, rtol=2e-3)


PROMPTS = [[5, 9, 3], [8, 1, 44, 12, 30, 6], [7]]


@torch.no_grad()
def greedy(model: nn.Module, prompts: list[list[int]], cache: bool, new: int = 8) -> tuple[Tensor, Tensor]:
    """Greedy continuations of a padded batch (R, new) and the logits they were picked from (R, new, V)."""
    ids, mask = padded(model, prompts, 0, torch.device("cpu"))
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    with activate(Context(prompt_lengths=mask.sum(1))):
        out = model.generate(
            input_ids=ids, attention_mask=mask, use_cache=cache, output_logits=True, return_dict_in_generate=True, **settings
        )
    return out.sequences[:, -new:], torch.stack(out.logits, 1)


@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, GENERATE))
def test_a_cached_padded_batch_generates_what_each_prompt_alone_generates_without_a_cache(kind: str, family: str) -> None:
    made = cell(kind, family, moved=True)
    alone = [greedy(made.model, [p], cache=False) for p in PROMPTS]
    ids, logits = greedy(made.model, PROMPTS, cache=True)
    wanted = torch.cat([seen for _, seen in alone])
    torch.testing.assert_close(logits, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    assert torch.equal(ids, torch.cat([tokens for tokens, _ in alone]))
    assert not torch.equal(wanted[0, 0], wanted[1, 0]), "the prompts make no difference"
