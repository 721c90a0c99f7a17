"""S4: groups of layers, one budget a layer, a set of strategies a group; and the sizes by layer it is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.stack import Stack, base_parameters
from llmrecipe.methods.additive.p_tuning_v2 import PTuningV2
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.hybrid._engines.design_space import PRESETS, LayerCosts, group_sizes, least, shares, solve
from llmrecipe.methods.hybrid.s4 import S4
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.additive.harness import fill, logits, model_of, survives_a_round_trip
from tests.methods.hybrid.written import on, stands_for, trains_alike
from tests.tiny import tiny_model


def test_spindles_by_hand() -> None:
    assert [group_sizes(n, "spindle") for n in (6, 12, 24, 32)] == [[1, 2, 2, 1], [2, 4, 4, 2], [4, 8, 8, 4], [5, 11, 11, 5]]
    assert [group_sizes(n, "spindle") for n in (2, 4, 5)] == [[1, 0, 1, 0], [1, 1, 1, 1], [2, 1, 1, 1]]
    assert group_sizes(10, "increasing") == [1, 2, 3, 4] == group_sizes(10, "decreasing")[::-1]
    assert group_sizes(12, "bottleneck") == [4, 2, 2, 4] and group_sizes(12, "uniform") == [3, 3, 3, 3]


@pytest.mark.parametrize("shape", ["spindle", "bottleneck", "increasing", "decreasing", "uniform"])
def test_groups_partition_the_layers_of_any_model(shape: str) -> None:
    for layers in range(4, 81):
        a, b, c, d = group_sizes(layers, shape)
        assert a + b + c + d == layers and min(a, b, c, d) >= 1
        if layers >= 8:
            holds = {
                "spindle": a < b == c > d and d >= a,
                "bottleneck": a > b and c < d and abs(b - c) <= 1,
                "increasing": a <= b <= c <= d,
                "decreasing": a >= b >= c >= d,
                "uniform": max(a, b, c, d) - min(a, b, c, d) <= 1,
            }
            assert holds[shape], (layers, a, b, c, d)


def test_a_budget_is_solved_by_hand() -> None:
    costs = LayerCosts({"A": 65, "P": 32, "L": 112}, {"A": 32, "B": 224})
    # 1000 - 224 leaves 388 each: b = (388 - 32) // 65 = 5, P = 388 // 32 = 12; 776 - 357 - 384 = 35 is one more column.
    assert solve(["A", "P", "B"], 1000, costs) == {"A": 5, "P": 13}
    # 500 each: b = 7 (487), r = 4 (448); 65 left is one more unit of b.
    assert solve(["A", "L"], 1000, costs) == {"A": 8, "L": 4}
    assert solve(["B"], 224, costs) == {}
    for letters, needed in ((["A", "L"], 224), (["P", "B", "L"], 448), (["B"], 224)):
        assert least(letters, costs) == needed
        assert min(solve(letters, needed, costs).values(), default=1) >= 1
    assert shares(4, 100, "uniform") == [25] * 4 and shares(4, 100, "increasing") == [10, 20, 30, 40]


def counted(model: nn.Module) -> Counter[int]:
    """Numbers that train, by layer; a flat table counts for the layers it serves."""
    found: Counter[int] = Counter()
    for path, _, _, hook in all_hooks(model):
        if hasattr(hook, "tables"):
            for table in hook.tables.values():
                layers = sorted({int(p.split(".")[2]) for p, _, _, h in all_hooks(model, hook.owner) if hasattr(h, "index")})
                for layer, form in zip(layers, table.shapes, strict=True):
                    found[layer] += form.virtual_tokens * form.width
        elif "layers." in path:
            found[int(path.split(".")[2])] += sum(p.numel() for p in hook.parameters())
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layer_trains_as_much_with_the_strategies_of_its_group(preset: str) -> None:
    with torch.device("meta"):
        model = tiny_model("llama", num_hidden_layers=12)
    budget = 0.3
    limit = int(budget * base_parameters(model)) // 12
    stack = Stack([S4(name="s4", budget=budget, assign=preset)])
    stack.attach(model)
    counts = counted(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(counts.values()) == trained and sorted(counts) == list(range(12))
    # Less than one unit of the cheapest strategy of each group is left over: a column here, or one more of the bottleneck.
    groups = [g for g, n in zip(PRESETS[preset], (2, 4, 4, 2), strict=True) for _ in range(n)]
    units = {"A": 65, "P": 32, "L": 112}
    for layer, group in enumerate(groups):
        letters = PRESETS[preset][group]
        assert 0 <= limit - counts[layer] < min(units[a] for a in letters if a in units)
    own = {"adapter": "A", "lora": "L", "prefix_tuning": "P", "bitfit": "B"}
    for wrapper in stack:
        letter = own[wrapper.name.removeprefix("s4_")]
        layers = {int(p.split(".")[2]) for p, _, _, h in all_hooks(model, wrapper.name) if "layers." in p}
        assert layers == {i for i, group in enumerate(groups) if letter in PRESETS[preset][group]}


TEXT = """
s4_adapter: {kind: adapter, placement: pfeiffer, sizes: {'0': 4, '1': 2}}
s4_lora: {kind: lora, sizes: {'0': 2, '1': 0}}
s4_prefix_tuning: {kind: prefix_tuning, reparam: flat, sizes: {'0': 0, '1': 5}}
s4_bitfit: {kind: bitfit, missing: add_zero, layers: '1'}
"""


def test_it_is_the_stack_it_prints() -> None:
    """1100 over two layers is 550: G1 has 4 (2 d + 1) + d and 2 of LoRA, G3 its 224 biases, 2 of b and 5 columns."""
    model = stands_for("llama", S4(name="s4", budget=1100.0), TEXT)
    assert counted(model) == {0: 4 * 65 + 32 + 2 * 112, 1: 224 + 2 * 65 + 32 + 5 * 32}


def test_options_of_the_space() -> None:
    only = {"G1": ["L"], "G3": ["B"]}
    _, stack = on("llama", [S4(name="s4", budget=1100.0, assign=only, tuned=["G1"])])
    assert [w.name for w in stack] == ["s4_lora"] and dict(stack.wrappers[0].sizes) == {"0": 1100 // 112, "1": 0}
    _, stack = on("llama", [S4(name="s4", budget=1100.0, assign=only, grouping=[0, 0, 2, 0])])
    assert [w.name for w in stack] == ["s4_bitfit"]
    _, stack = on("llama", [S4(name="s4", budget=1200.0, allocation="increasing", assign={"G1": ["L"], "G3": ["L"]})])
    assert dict(stack.wrappers[0].sizes) == {"0": 400 // 112, "1": 800 // 112}
    for options, told in (
        ({"grouping": [1, 1, 1, 1]}, "grouping: needs four numbers that add up to 2 layers"),
        ({"assign": {"G2": ["A"]}}, "assign: no group of this model has a strategy"),
        ({"tuned": []}, "tuned: no group is named"),
        ({"tuned": ["G2"]}, "tuned: G2 has no layer of this model"),
        ({"budget": 300.0}, r"budget: 300 numbers leave 150 for layer 0, too few for A, L, which need at least 224 there"),
    ):
        with pytest.raises(RecipeError, match=rf"stack\.s4\.{told}"):
            on("llama", [S4(name="s4", **{"budget": 1100.0, **options})])


@pytest.mark.parametrize("allocation", ["uniform", "increasing", "decreasing"])
def test_a_budget_that_is_too_small_names_one_that_is_enough(allocation: Any) -> None:
    """One number less than it says is too few again: it is the smallest budget that pays for every layer."""
    with pytest.raises(RecipeError, match=r"stack\.s4\.budget: 300 numbers leave .*; give \d+ or more") as told:
        on("llama", [S4(name="s4", budget=300.0, allocation=allocation)])
    enough = int(str(told.value).split("give ")[1].split()[0])
    on("llama", [S4(name="s4", budget=float(enough), allocation=allocation)])
    with pytest.raises(RecipeError, match=f"give {enough} or more"):
        on("llama", [S4(name="s4", budget=float(enough - 1), allocation=allocation)])


@pytest.mark.parametrize("scope", ["per_stack", "concat"])
def test_encoder_and_decoder_have_groups_of_their_own_or_one_row(scope: str) -> None:
    model, stack = on("t5", [S4(name="s4", budget=4000.0, scope=scope)])
    names = [w.name for w in stack]
    assert "s4_encoder_adapter" in names and "s4_decoder_lora" in names
    sides = {side: {w.name.split(f"{side}_")[1] for w in stack if f"_{side}_" in w.name} for side in ("encoder", "decoder")}
    every = {"adapter", "lora", "prefix_tuning", "bitfit"}
    assert sides == (
        dict.fromkeys(sides, every)
        if scope == "per_stack"
        else {"encoder": {"adapter", "lora", "prefix_tuning"}, "decoder": every}
    )
    fill(model)
    logits(model).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_run_of_it_is_a_run_of_that_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
s4_adapter: {kind: adapter, placement: pfeiffer, sizes: {'0': 17, '1': 16, '2': 14, '3': 0}}
s4_lora: {kind: lora, sizes: {'0': 10, '1': 0, '2': 0, '3': 9}}
s4_prefix_tuning: {kind: prefix_tuning, reparam: flat, sizes: {'0': 0, '1': 53, '2': 45, '3': 44}}
s4_bitfit: {kind: bitfit, missing: add_zero, layers: 2|3}
"""
    trains_alike(tmp_path, "s4", text, capsys=capsys)


# --- sizes by layer ---------------------------------------------------------------------------------------------------


def columns(model: nn.Module, owner: str) -> list[torch.Tensor]:
    """Keys and values of each layer of a wrapper's table."""
    hook: Any = next(h for _, _, _, h in all_hooks(model, owner) if hasattr(h, "tables"))
    return [t for pair in hook.tables["attn"]() for t in pair]


@pytest.mark.parity("prefix_tuning", "one wrapper a layer")
@pytest.mark.parametrize("kind", [PrefixTuning, PTuningV2])
def test_columns_by_layer_are_those_of_one_wrapper_a_layer(kind: Any) -> None:
    model, _ = on("llama", [kind(name="w", reparam="flat", sizes={"0": 2, "1": 5})])
    fill(model)
    plain, _ = on(
        "llama",
        [kind(name=f"w{i}", reparam="flat", num_virtual_tokens=n, target=f"layers.{i}.attn") for i, n in ((0, 2), (1, 5))],
    )
    own = columns(model, "w")
    assert [t.shape for t in own] == [(1, 2, n, 8) for n in (2, 2, 5, 5)]
    with torch.no_grad():
        for i in range(2):
            hook: Any = next(h for _, _, _, h in all_hooks(plain, f"w{i}") if hasattr(h, "tables"))
            table = hook.tables["attn"]
            table.flat.copy_(table.join([(own[2 * i], own[2 * i + 1])]))
    assert torch.equal(logits(model), logits(plain))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 2 * 8 * (2 + 5)


def test_an_mlp_makes_columns_by_layer_and_is_dropped_exactly() -> None:
    wrapper = PrefixTuning(name="w", hidden=6, sizes={"0": 0, "1": 3})
    model, stack = on("llama", [wrapper])
    fill(model)
    before = logits(model)
    stack.finish(model)
    assert torch.equal(logits(model), before)
    assert {n.rsplit(".", 1)[1]: p.numel() for n, p in stack.delta(model).items()} == {"flat": 2 * 2 * 8 * 3}
    survives_a_round_trip("llama", PrefixTuning(name="w", reparam="flat", sizes={"0": 4, "1": 3}))


def test_sizes_that_cannot_be() -> None:
    for options, told in (({"positions": "shift"}, "positions: shift"), ({"reparam": "flat", "init": "text"}, "init: text")):
        with pytest.raises(RecipeError, match=rf"sizes: {told} needs as many"):
            on("llama", [PrefixTuning(name="w", sizes={"0": 1}, **options)])
    with pytest.raises(RecipeError, match="every layer of 'attn' has size 0"):
        on("llama", [PrefixTuning(name="w", sizes={"0": 0, "1": 0})])


@pytest.mark.parametrize(("family", "layers"), [("bert", "1"), ("llama", "1:"), ("t5", "decoder.0")])
def test_biases_of_some_layers(family: str, layers: str) -> None:
    model, stack = on(family, [Bitfit(name="b", missing="add_zero", layers=layers)])
    side, _, number = layers.rstrip(":").rpartition(".")
    hosts = [path for path, _, _, _ in all_hooks(model)]
    assert hosts and all(f".{number}." in path and side in path for path in hosts)
    costs = stack.wrappers[0].costs(model_of(family))
    assert sum(costs.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if family == "bert":
        assert costs == {("encoder", 1): 7 * 32 + 48}  # q, k, v, o, both linear layers, both norms
