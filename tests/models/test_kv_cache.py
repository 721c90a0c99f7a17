"""Keys and values with columns to spare: what Transformers' own layer holds, copied only where it has to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from llmrecipe.models import kv_cache
from llmrecipe.models.kv_cache import SPARE, SpareLayer
from tests.models.test_native import native


def states(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 2, columns, 4, generator=generator) for _ in range(2))
    return keys, values


@torch.no_grad()
def test_it_holds_what_transformers_own_layer_holds() -> None:
    own, stock = SpareLayer(), DynamicLayer()
    rows = 4
    for step in range(100):
        new = states(rows, 7 if step == 0 else 1, step)
        for mine, wanted in zip(own.update(*new), stock.update(*new), strict=True):
            assert torch.equal(mine, wanted)
        if step == 5:
            # Two columns are cut off, then a row leaves, as in continuous batching.
            for layer in (own, stock):
                layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
        if step == 9:
            rows = 3
            for layer in (own, stock):
                layer.batch_select_indices(torch.tensor([3, 0, 1]))
        assert own.get_seq_length() == stock.get_seq_length()


@torch.no_grad()
def test_a_step_writes_its_column_and_copies_nothing() -> None:
    layer = SpareLayer()
    layer.update(*states(3, 10 * SPARE - 1, 0))
    places = {(layer.update(*states(3, 1, 1 + step))[0].data_ptr(), layer.values.data_ptr()) for step in range(11)}
    assert len(places) == 1
    assert layer.update(*states(3, 1, 99))[0].data_ptr() not in {keys for keys, _ in places}


@torch.no_grad()
def test_a_view_that_was_returned_before_keeps_its_numbers() -> None:
    layer = SpareLayer()
    layer.update(*states(2, 3, 0))
    seen, _ = layer.update(*states(2, 1, 1))
    before = seen.clone()
    layer.crop(-1)
    layer.update(*states(2, 1, 2))
    assert torch.equal(seen, before)


def test_gradients_reach_what_is_appended() -> None:
    layer = SpareLayer()
    first, second = (states(2, 3, seed)[0].requires_grad_() for seed in (0, 1))
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    keys.sum().backward()
    assert first.grad is not None and second.grad is not None


def test_both_names_of_a_cache_are_read() -> None:
    """Transformers 5.24 calls `cache` what was `past_key_values`; an empty cache is one."""
    empty = DynamicCache()
    assert len(empty) == 0
    for name in ("cache", "past_key_values"):
        assert kv_cache.cache_of({name: empty}) is empty
        scope: dict[str, Any] = {}
        exec(f"def forward(input_ids, {name}=None): ...", scope)
        assert kv_cache.cache_name(scope["forward"]) == name
    assert kv_cache.cache_of({"use_cache": True}) is None and kv_cache.cache_of({"cache": None}) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_native_model_takes_its_cache_by_both_names(name: str) -> None:
    model = native()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], use_cache=True, **{name: kv_cache.cache_of(first)}).logits
    torch.testing.assert_close(rest, whole[:, 3:], atol=1e-5, rtol=1e-4)
