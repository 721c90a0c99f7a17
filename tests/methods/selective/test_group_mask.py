"""Structured selection: groups, scores, budgets, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.sparse_method import base_weights, sparse_hooks
from llmrecipe.methods.selective._engines.weight_groups import chosen_of, families, pick
from llmrecipe.methods.selective.group_mask import GroupMask
from tests.methods.probe import language_probe
from tests.tiny import tiny_model


def masked(model: nn.Module, **options: Any) -> Stack:
    stack = Stack([GroupMask(name="groups", **{"num_samples": 3, **options})])
    stack.attach(model)
    stack.calibrate(model, language_probe(model))
    return stack


def held(model: nn.Module) -> dict[str, Any]:
    return {hook.source: hook for _, _, hook in sparse_hooks(model, "groups")}


def all_of(found: list[Any]) -> list[torch.Tensor]:
    return [torch.ones(f.count, dtype=torch.bool) for f in found]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", ["tensor", "row", "column", "head", "neuron", "layer"])
def test_groups_are_disjoint_and_add_up(family: str, kind: str):
    model = tiny_model(family)
    found = families(model, kind)  # type: ignore[arg-type]
    chosen = chosen_of(found, all_of(found))
    sizes = {}
    for name, selected in chosen.items():
        assert selected.idx.unique().numel() == selected.idx.numel()
        weight = base_weights(model)[name]
        axis = {"entries": weight.numel, "rows": weight.shape[0], "columns": weight.shape[-1]}[selected.layout]
        sizes[name] = selected.idx.numel() * weight.numel // axis
    assert sum(sizes.values()) == sum(f.count * f.size for f in found)
    total = sum(w.numel for w in base_weights(model).values())
    if kind == "tensor":
        assert sum(sizes.values()) == total
    if kind == "layer":
        assert [f.layer for f in found] == [0, 1]


def test_head_groups_follow_the_key_value_heads():
    (first, _) = families(tiny_model("llama"), "head")
    # 4 query heads of 8 on 2 key/value heads: each group owns 16 rows of q and columns of o, 8 rows of k and of v.
    assert first.count == 2 and first.size == 16 * 32 + 16 * 32 + 8 * 32 + 8 * 32
    by_name = {m.weight.name.split(".")[-2]: m for m in first.members}
    assert by_name["q_proj"].index[1].tolist() == list(range(16, 32)) and by_name["o_proj"].layout == "columns"
    assert by_name["k_proj"].index.tolist() == [list(range(8)), list(range(8, 16))]


def test_fused_and_transposed_projections():
    (first, _) = families(tiny_model("gpt2"), "head")
    weight = next(m for m in first.members if m.weight.name.endswith("c_attn.weight"))
    bias = next(m for m in first.members if m.weight.name.endswith("c_attn.bias"))
    assert weight.layout == "columns" and bias.layout == "entries"
    want = [*range(0, 8), *range(32, 40), *range(64, 72)]
    assert weight.index[0].tolist() == want and bias.index[0].tolist() == want
    assert next(m for m in first.members if m.weight.name.endswith("c_proj.weight")).layout == "rows"
    (first, _) = families(tiny_model("phi3"), "neuron")
    fused = next(m for m in first.members if "gate_up" in m.weight.name)
    assert fused.index[5].tolist() == [5, 48 + 5]


@pytest.mark.parametrize("kind", ["row", "column", "head", "neuron", "tensor", "layer"])
def test_scores_of_groups_are_sums_of_entry_scores(kind: str):
    model = tiny_model("llama")
    entries = selection.score_entries(model, language_probe(model), base_weights(model), 3)
    found = families(model, kind)  # type: ignore[arg-type]
    for family in (found[0], found[-1]):
        for which in (0, family.count - 1):
            keep = torch.arange(family.count) == which
            want = 0.0
            for name, selected in chosen_of([family], [keep]).items():
                score = entries[name].view(base_weights(model)[name].shape).double()
                flat = {"entries": score.reshape(-1), "rows": score, "columns": score.transpose(0, -1)}[selected.layout]
                want += float(flat[selected.idx].sum())
            got = sum(float(m.sums(entries[m.weight.name])[which]) for m in family.members)
            assert got == pytest.approx(want, rel=1e-9)


def test_budget_is_filled_in_order_and_large_groups_are_passed_over():
    found = families(tiny_model("llama"), "tensor", "layers.0.mlp + norm.final")
    sizes = [f.size for f in found]
    assert sizes == [48 * 32, 48 * 32, 32 * 48, 32]
    taken = pick(found, [torch.tensor([s]) for s in (1.0, 4.0, 3.0, 2.0)], 48 * 32 + 40)
    assert [bool(t) for t in taken] == [False, True, False, True]


def test_min_per_layer_comes_first():
    found = families(tiny_model("llama"), "neuron")
    scores = [torch.arange(48.0) + 100, torch.arange(48.0)]
    taken = pick(found, scores, 6 * found[0].size, 2)
    assert [int(t.sum()) for t in taken] == [4, 2] and taken[1][-2:].all()
    assert [int(t.sum()) for t in pick(found, scores, 6 * found[0].size)] == [6, 0]


@pytest.mark.parametrize("kind", ["row", "column", "head", "neuron"])
def test_training_moves_the_groups_only(kind: str):
    model = tiny_model("gpt2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stack = masked(model, group=kind, density=0.3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    probe = language_probe(model)
    for step, batch in enumerate(probe.batches(3)):
        optimizer.zero_grad()
        probe.loss(batch).backward()
        optimizer.step()
        stack.after_step(model, step)
    hooks = held(model)
    trained = sum(p.values.numel() for p in hooks.values())
    stack.wrappers[0].merge(model)
    moved = 0
    for name, old in before.items():
        changed = dict(model.named_parameters())[name] != old
        allowed = torch.zeros_like(changed)
        if name in hooks:
            axis = {"entries": 0, "rows": 0, "columns": changed.dim() - 1}[hooks[name].layout]
            allowed.index_fill_(axis, hooks[name].idx.long(), True)
        assert not (changed & ~allowed).any()
        moved += int(changed.sum())
    assert 0.5 * trained < moved <= trained
    found = families(model, kind)  # type: ignore[arg-type]
    assert trained <= int(0.3 * sum(f.count * f.size for f in found))


@pytest.mark.parity("group_mask", "full fine-tuning")
def test_tensor_groups_at_density_one_equal_full_fine_tuning():
    model, full = tiny_model("llama").double(), tiny_model("llama").double()
    stack = masked(model, group="tensor", score="magnitude", density=1.0)
    probes = (language_probe(model), language_probe(full))
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0) for m in (model, full)
    ]
    for step, batch in enumerate(probes[0].batches(3)):
        for probe, optimizer in zip(probes, optimizers, strict=True):
            optimizer.zero_grad()
            probe.loss(batch).backward()
            optimizer.step()
        stack.after_step(model, step)
    stack.wrappers[0].merge(model)
    for name, parameter in full.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-6, atol=1e-6)


def test_nothing_is_computed_below_the_lowest_selected_layer():
    model = tiny_model("llama")
    masked(model, group="neuron", scope="layers.1.mlp", density=0.2)
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(
        lambda m, i, o: seen.append((o[0] if isinstance(o, tuple) else o).requires_grad)
    )
    probe = language_probe(model)
    probe.loss(next(probe.batches(1))).backward()
    assert seen == [False]


def test_refusals():
    with pytest.raises(RecipeError, match="removes nothing"):
        masked(tiny_model("llama"), remove=True)
    with pytest.raises(ModelError, match="smallest"):
        masked(tiny_model("llama"), group="layer", density=0.01)


def test_layer_groups_and_random_scores():
    picks = []
    for groups in (1, 4):
        model = tiny_model("llama")
        masked(model, group="row", density=0.1, layer_groups=groups)
        picks.append({n: p.idx.tolist() for n, p in held(model).items()})
    assert picks[0] == picks[1]
    model = tiny_model("llama")
    masked(model, group="row", score="random", density=0.1)
    assert {n: p.idx.tolist() for n, p in held(model).items()} != picks[0]


@pytest.mark.slow
def test_dw_flops_fall_with_the_density():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for density in (1.0, 0.25):
        model = tiny_model("llama", hidden_size=128, intermediate_size=256)
        masked(model, group="row", score="magnitude", density=density, scope="layers.0.mlp.up")
        probe = language_probe(model)
        loss = probe.loss(next(probe.batches(1)))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counts.append(counter.get_total_flops())
    tokens = int(next(probe.batches(1)).input_ids.numel())
    assert counts[0] - counts[1] == 2 * tokens * 128 * 192
