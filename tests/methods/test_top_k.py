"""The exact top k of the scores of many tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipe.core.errors import ModelError
from llmrecipe.methods.selective._engines.top_k import top_k


def reference_top(parts: list[tuple[str, torch.Tensor]], k: int) -> dict[str, list[int]]:
    flat = [(-float(v), order, i, name) for order, (name, t) in enumerate(parts) for i, v in enumerate(t)]
    best = sorted(flat)[:k]
    return {name: sorted(i for _, _, i, n in best if n == name) for name, _ in parts}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1e-38, 1.0, 1.0000001, 2.5, 3e38]), min_size=1, max_size=30), min_size=1, max_size=4
    ),
    st.data(),
)
def test_top_k_is_exact_with_ties_by_lowest_index(values: list[list[float]], data: Any):
    parts = [(f"t{i}", torch.tensor(v, dtype=torch.float32)) for i, v in enumerate(values)]
    k = data.draw(st.integers(0, sum(map(len, values))))
    got = top_k([(n, t, None) for n, t in parts], k)
    assert {n: idx.tolist() for n, idx in got.items()} == reference_top(parts, k)


def test_top_k_matches_torch_on_many_distinct_scores():
    generator = torch.Generator().manual_seed(0)
    parts = [(str(i), torch.rand(5000, generator=generator), None) for i in range(3)]
    got = top_k(parts, 777)
    flat = torch.cat([p[1] for p in parts])
    want = flat.topk(777).indices.sort()[0]
    offset = torch.cat([got[str(i)] + 5000 * i for i in range(3)])
    assert torch.equal(offset, want)


def test_nan_scores_are_refused():
    with pytest.raises(ModelError, match="NaN"):
        top_k([("a", torch.tensor([1.0, float("nan")]), None)], 1)
