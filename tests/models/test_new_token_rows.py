"""Added tokens: identity at start, only their rows move, tied and untied, stored with a delta, folded exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.core.registry import load_class as component
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import new_token_rows
from llmrecipe.models.load import load_model
from llmrecipe.recipe.schema import ModelSection
from tests.models.configs import tiny
from tests.models.test_load import words

IDS = torch.tensor([[3, 64, 7, 65, 9, 64]])


def grown(folder: Path, family: str = "llama", **more: Any) -> Any:
    """A model whose last two rows belong to added tokens."""
    tiny(family, **more).save_pretrained(folder)
    tokenizer = words()
    tokenizer.add_tokens(["a1", "a2"])
    return load_model(ModelSection(path=str(folder)), tokenizer=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lora", None])
def test_only_the_rows_of_added_tokens_move(tmp_path: Path, tied: bool, kind: str | None) -> None:
    model = grown(tmp_path, tie_word_embeddings=tied)
    if kind:
        stack = Stack([component("stack", kind)(name=kind)])
        stack.attach(model)
        assert any("new_rows" in name for name in stack.delta(model))
    else:
        model.requires_grad_(False)
        for path in model.new_heads:
            model.get_submodule(path).requires_grad_(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and (kind is None or kind not in name)}
    expected = {"model.embed_tokens.new_rows.difference"} | (set() if tied else {"lm_head.new_rows.difference"})
    assert trained == expected
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert all(now[name].abs().min() > 0 for name in expected)


@pytest.mark.parametrize(
    ("family", "more"), [("llama", {"tie_word_embeddings": False}), ("gemma", {}), ("gemma3_text", {}), ("gpt2", {})]
)
def test_starts_as_it_was_and_folds_exactly(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    """Also where the family scales its embeddings: the folded model gives the same logits."""
    model = grown(tmp_path, family, **more)
    with activate(Context(role="reference")):
        bare = model(IDS).logits
    assert torch.equal(model(IDS).logits, bare)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "new_rows" in name:
                parameter.normal_(std=0.5)
    moved = model(IDS).logits
    assert (moved - bare).abs().max() > 0.1
    with activate(Context(role="reference")):
        assert torch.equal(model(IDS).logits, bare)
    assert new_token_rows.fold_token_rows(model) == 2
    assert not [name for name, _ in model.named_parameters() if "new_rows" in name] and model.new_heads == ()
    assert torch.allclose(model(IDS).logits, moved, atol=1e-5)


def test_gradients_are_those_of_the_rows_themselves(tmp_path: Path) -> None:
    """dL/dD equals the last rows of dL/dW of a model that trains the whole tied matrix."""
    model = grown(tmp_path, tie_word_embeddings=True)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    own = model.model.embed_tokens.new_rows.difference.grad
    assert torch.allclose(own, model.model.embed_tokens.weight.grad[64:], atol=1e-6)


def test_a_delta_restores_them(tmp_path: Path) -> None:
    def with_lora() -> tuple[Any, Stack]:
        model = grown(tmp_path, tie_word_embeddings=True)
        stack = Stack([component("stack", "lora")(name="lora")])
        stack.attach(model)
        return model, stack

    model, stack = with_lora()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    again, other = with_lora()
    other.restore(again, {name: value.clone() for name, value in stack.delta(model).items()})
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert dataclasses.is_dataclass(stack.wrappers[0])
