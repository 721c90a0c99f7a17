"""A model without weights is set up as the one that trains."""

from __future__ import annotations

import pytest
from torch import nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.chunked_ffn import ROWS
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.validate import instantiate
from llmrecipe.training.build_model import on_meta, open_for


def blocks(model: nn.Module) -> dict[str, tuple[bool, int | None]]:
    """Modules that are recomputed or work in chunks."""
    found = {p: (getattr(m, "gradient_checkpointing", False), m.__dict__.get(ROWS)) for p, m in model.named_modules()}
    return {path: how for path, how in found.items() if any(how)}


def test_blocks_without_weights_compute_as_those_with_them() -> None:
    recipe = compose("sft_lora", ["model.gradient_checkpointing=true", "runtime.ffn_rows=64"]).recipe
    parts = instantiate(recipe)
    shown = blocks(on_meta(recipe, parts.objective, Stack(parts.wrappers), None, "cpu"))
    trained = blocks(open_for(recipe, parts.objective, Stack(instantiate(recipe).wrappers), None, "cpu").model)
    assert shown == trained
    assert {how[0] for how in trained.values()} == {True, False} and {how[1] for how in trained.values()} == {None, 64}


def test_recomputation_without_a_backward_pass_is_refused_before_weights_are_read() -> None:
    recipe = compose("mezo", ["model.gradient_checkpointing=true"]).recipe
    parts = instantiate(recipe)
    with pytest.raises(RecipeError, match="zeroth-order training keeps no activations"):
        on_meta(recipe, parts.objective, Stack(parts.wrappers), None, "cpu")
