"""A route of packed attention in a recipe that packs nothing is refused before anything is read."""

from __future__ import annotations

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose


@pytest.mark.parametrize("route", ["loop", "varlen", "flash", "flex"])
def test_a_route_of_packed_rows_without_packed_rows_is_refused(route: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose("sft", [f"model.packed_attention={route}", "data.packing=off"])
    text = str(caught.value)
    assert f"model.packed_attention: {route} is never reached, because data.packing=off packs no rows" in text
    assert "leave it at auto, or set data.packing to auto or on" in text


@pytest.mark.parametrize("keys", [("auto", "off"), ("flex", "auto"), ("flex", "on")])
def test_a_route_that_packed_rows_may_take_is_accepted(keys: tuple[str, str]) -> None:
    route, packing = keys
    recipe = compose("sft", [f"model.packed_attention={route}", f"data.packing={packing}"]).recipe
    assert (recipe.model.packed_attention, recipe.data.packing) == keys
