"""The sparse-delta engine: gradients, trajectories, bit-equality, sizes, modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods.selective._engines.base_weight import Selected
from llmrecipe.methods.selective._engines.sparse_delta import SparseDelta
from llmrecipe.methods.selective._engines.sparse_kernels import embedding_gradient, product_gradient
from llmrecipe.methods.selective._engines.sparse_method import (
    SparseMethod,
    attach_chosen,
    base_weights,
    chosen_from,
    restore_chosen,
    sparse_hooks,
    structure_of,
)
from llmrecipe.models.hooks.hook import all_hooks
from tests.tiny import tiny_model


class Hooks(SparseMethod):
    name = "picked"


def pick(model: nn.Module, density: float, layout: str = "entries", seed: int = 0, scope: str = "all") -> dict[str, Selected]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in base_weights(model, scope).items():
        size = {"entries": weight.numel, "rows": weight.shape[0], "columns": weight.shape[-1]}[layout]
        if layout != "entries" and len(weight.shape) == 1:
            continue
        count = max(1, int(density * size))
        found[name] = Selected(torch.randperm(size, generator=generator)[:count].sort()[0], layout)  # type: ignore[arg-type]
    return found


def freeze(model: nn.Module) -> list[nn.Parameter]:
    values = {id(hook.values) for _, _, hook in sparse_hooks(model, "picked")}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in values)
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=ids).logits
    if logits.dtype != torch.float64:
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def gather(tensor: torch.Tensor, chosen: Selected) -> torch.Tensor:
    if chosen.layout == "entries":
        return tensor.reshape(-1)[chosen.idx]
    return tensor[chosen.idx] if chosen.layout == "rows" else tensor[..., chosen.idx]


def set_values(model: nn.Module, scale: float = 0.1) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for _, _, hook in sparse_hooks(model, "picked"):
            hook.values.copy_(torch.randn_like(hook.values) * scale)


@pytest.mark.parametrize("layout", ["entries", "rows", "columns"])
def test_product_gradient_equals_dense_by_hand(layout: str):
    # a = [[1, 2], [3, 4]], b = [[5, 6, 7], [8, 9, 10]]: a^T b = [[29, 33, 37], [42, 48, 54]]
    a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6, 7], [8, 9, 10]])
    idx, want = {
        "entries": ([1, 3], [33.0, 42.0]),
        "rows": ([1], [[42.0, 48.0, 54.0]]),
        "columns": ([0, 2], [[29.0, 37.0], [42.0, 54.0]]),
    }[layout]
    got = product_gradient(a, b, torch.tensor(idx), layout, (2, 3), torch.float32)  # type: ignore[arg-type]
    assert torch.equal(got, torch.tensor(want))


def test_embedding_gradient_leaves_out_padding_and_absent_rows():
    ids, g = torch.tensor([2, 0, 2, 3]), torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    # Rows: 0 is padding, 1 absent, 2 = [6, 8], 3 = [7, 8]; flat entries 0, 3, 4, 5, 7.
    got = embedding_gradient(ids, g, torch.tensor([0, 3, 4, 5, 7]), "entries", (5, 2), torch.float32, 0)
    assert got.tolist() == [0, 0, 6, 8, 8]
    assert embedding_gradient(ids, g, torch.tensor([1, 3]), "rows", (5, 2), torch.float32, 0).tolist() == [[0, 0], [7, 8]]
    got = embedding_gradient(ids, g, torch.tensor([1]), "columns", (5, 2), torch.float32, 0)
    assert got.flatten().tolist() == [0, 0, 8, 8, 0]


@pytest.mark.parity("sparse-delta engine", "dense autograd, float64")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma2", "qwen3_moe", "t5"])
@pytest.mark.parametrize("density", [0.004, 0.3])
def test_gradients_equal_dense_autograd_in_float64(family: str, density: float):
    if family == "t5":
        model, loss = t5()
    else:
        model, loss = tiny_model(family, **moe(family)).double(), loss_of
        model.config._experts_implementation = "eager"
    dense = copy.deepcopy(model)
    chosen = pick(model, density)
    attach_chosen(model, "picked", chosen)
    freeze(model)
    torch.testing.assert_close(loss(model), loss(dense), rtol=0, atol=0)
    loss(model).backward()
    loss(dense).backward()
    reference = dict(dense.named_parameters())
    checked = 0
    for _, _, hook in sparse_hooks(model, "picked"):
        want = reference[hook.source].grad
        if want is None:
            assert hook.values.grad is None or not hook.values.grad.any()
            continue
        torch.testing.assert_close(hook.values.grad, gather(want, chosen[hook.source]), rtol=1e-12, atol=1e-13)
        checked += 1
    assert checked >= len(chosen) - 2
    assert all(p.grad is None for n, p in model.named_parameters() if ".picked" not in n)


def moe(family: str) -> dict[str, Any]:
    if family != "qwen3_moe":
        return {}
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "head_dim": 8}


def t5() -> tuple[nn.Module, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).double().eval()

    def loss(m: nn.Module, seed: int = 0) -> torch.Tensor:
        ids = torch.randint(2, 60, (2, 8), generator=torch.Generator().manual_seed(seed))
        return m(input_ids=ids, labels=ids.flip(1)).loss

    return model, loss


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_group_gradients_equal_dense_autograd(layout: str, family: str):
    model = tiny_model(family).double()
    dense = copy.deepcopy(model)
    chosen = pick(model, 0.2, layout)
    attach_chosen(model, "picked", chosen)
    freeze(model)
    loss_of(model).backward()
    loss_of(dense).backward()
    reference = dict(dense.named_parameters())
    for _, _, hook in sparse_hooks(model, "picked"):
        want = gather(reference[hook.source].grad, chosen[hook.source])
        torch.testing.assert_close(hook.values.grad, want, rtol=1e-12, atol=1e-13)


def test_tied_embedding_sums_both_uses():
    model = tiny_model("llama", tie_word_embeddings=True).double()
    dense = copy.deepcopy(model)
    chosen = {"model.embed_tokens.weight": Selected(torch.tensor([3, 64, 200, 777]))}
    attach_chosen(model, "picked", chosen)
    freeze(model)
    loss_of(model).backward()
    loss_of(dense).backward()
    (values,) = [hook.values for _, _, hook in sparse_hooks(model, "picked")]
    want = dense.model.embed_tokens.weight.grad.reshape(-1)[[3, 64, 200, 777]]
    assert want.abs().min() > 0
    torch.testing.assert_close(values.grad, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parity("sparse-delta engine", "AdamW under a dense mask, float64")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trajectory_equals_masked_dense_adamw(family: str):
    model = tiny_model(family).double()
    dense = copy.deepcopy(model)
    chosen = pick(model, 0.02)
    attach_chosen(model, "picked", chosen)
    sparse_adam = torch.optim.AdamW(freeze(model), lr=1e-2, weight_decay=0.0)
    masks = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in dense.named_parameters()}
    for name, selection in chosen.items():
        masks[name][selection.idx] = True
    dense_adam = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(8):
        sparse_adam.zero_grad()
        dense_adam.zero_grad()
        a, b = loss_of(model, step), loss_of(dense, step)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        a.backward()
        b.backward()
        for name, parameter in dense.named_parameters():
            parameter.grad.mul_(masks[name].view_as(parameter))
        sparse_adam.step()
        dense_adam.step()
    loss_of(model)
    Hooks().merge(model)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-10, atol=1e-12)


def test_frozen_entries_stay_bit_equal_under_weight_decay_and_state_has_the_masks_size():
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = pick(model, 0.01)
    attach_chosen(model, "picked", chosen)
    optimizer = torch.optim.AdamW(freeze(model), lr=1e-2, weight_decay=0.1)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    loss_of(model)
    k = sum(c.idx.numel() for c in chosen.values())
    moments = sum(s.numel() for state in optimizer.state.values() for s in state.values() if s.dim())
    assert moments == 2 * k
    Hooks().merge(model)
    after = dict(model.named_parameters())
    moved = 0
    for name, old in before.items():
        changed = (after[name].reshape(-1) != old.reshape(-1)).nonzero().squeeze(1).tolist()
        assert set(changed) <= set(chosen[name].idx.tolist())
        moved += len(changed)
    assert moved > 0.5 * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_role_sees_the_base_bit_for_bit_and_back(dtype: torch.dtype):
    model = tiny_model("llama", tie_word_embeddings=True).to(dtype)
    start = loss_of(model)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach_chosen(model, "picked", pick(model, 0.05))
    set_values(model)
    moved = loss_of(model)
    assert not torch.equal(moved, start)
    with torch.no_grad(), activate(Context(role="reference")):
        assert torch.equal(loss_of(model), start)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in state.items())
    assert torch.equal(loss_of(model), moved)


def test_a_reference_pass_between_forward_and_backward_does_not_change_the_gradient():
    grads = []
    for between in (False, True):
        model = tiny_model("llama").double()
        attach_chosen(model, "picked", pick(model, 0.3))
        freeze(model)
        set_values(model, 0.3)
        loss = loss_of(model)
        if between:
            with torch.no_grad(), activate(Context(role="reference")):
                loss_of(model)
        loss.backward()
        grads.append([hook.values.grad for _, _, hook in sparse_hooks(model, "picked")])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").double().train()
        attach_chosen(model, "picked", pick(model, 0.02))
        freeze(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model).backward()
        grads.append([hook.values.grad for _, _, hook in sparse_hooks(model, "picked")])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("layout", ["entries", "rows", "columns"])
def test_term_mode_equals_inplace_mode(layout: str):
    outputs, grads = [], []
    for force in (False, True):
        model = tiny_model("bert").double()
        attach_chosen(model, "picked", pick(model, 0.05, layout, scope="all-linear"), force_term=force)
        assert {p.mode for _, _, p in sparse_hooks(model, "picked")} - {"vector"} == {"term" if force else "inplace"}
        freeze(model)
        set_values(model)
        loss = loss_of(model)
        loss.backward()
        outputs.append(loss.detach())
        grads.append([hook.values.grad for _, _, hook in sparse_hooks(model, "picked")])
        Hooks().merge(model)
        torch.testing.assert_close(loss_of(model), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_two_selections_of_one_tensor_add_up_wherever_they_overlap():
    model = tiny_model("llama").double()
    name = "model.layers.0.mlp.up_proj.weight"
    start = dict(model.named_parameters())[name].detach().clone()
    for owner, idx, value in (("picked", [1, 2, 3], 1.0), ("other", [3, 4], 10.0), ("third", [2, 3], 100.0)):
        attach_chosen(model, owner, {name: Selected(torch.tensor(idx))})
        with torch.no_grad():
            for _, _, hook in sparse_hooks(model, owner):
                hook.values.fill_(value)
    for _ in range(2):
        loss_of(model)
        moved = (dict(model.named_parameters())[name] - start).reshape(-1)[:6]
        assert moved.round(decimals=6).tolist() == [0, 1, 101, 111, 10, 0]
        with torch.no_grad(), activate(Context(off=frozenset({"other"}))):
            loss_of(model)
            moved = (dict(model.named_parameters())[name] - start).reshape(-1)[:6]
            assert moved.round(decimals=6).tolist() == [0, 1, 101, 101, 0, 0]


def test_saved_selection_restores_bit_for_bit_and_refuses_another_base():
    model = tiny_model("llama")
    attach_chosen(model, "picked", pick(model, 0.02))
    set_values(model)
    want = loss_of(model)
    structure = structure_of(model, "picked")
    delta = {
        f"{p}.{n}.{k}": v.detach().clone() for p, _, n, hook in all_hooks(model, "picked") for k, v in hook.state_dict().items()
    }
    again = tiny_model("llama")
    attach_chosen(again, "picked", chosen_from(structure))
    restore_chosen(again, "picked", delta)
    assert torch.equal(loss_of(again), want)
    other = tiny_model("llama", seed=1)
    attach_chosen(other, "picked", chosen_from(structure))
    with pytest.raises(ModelError, match="not the tensor this delta was trained on"):
        restore_chosen(other, "picked", delta)


def test_deepcopy_is_independent():
    model = tiny_model("llama")
    attach_chosen(model, "picked", pick(model, 0.05))
    set_values(model)
    want = loss_of(model)
    twin = copy.deepcopy(model)
    assert torch.equal(loss_of(twin), want)
    with torch.no_grad():
        for _, _, hook in sparse_hooks(twin, "picked"):
            hook.values.zero_()
    assert not torch.equal(loss_of(twin), want)
    assert torch.equal(loss_of(model), want)


def test_bfloat16_base_accumulates_in_float32_values():
    model = tiny_model("llama").to(torch.bfloat16)
    attach_chosen(model, "picked", pick(model, 0.05))
    optimizer = torch.optim.SGD(freeze(model), lr=1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    values = torch.cat([p.values.detach().reshape(-1) for _, _, p in sparse_hooks(model, "picked")])
    assert values.dtype == torch.float32
    assert 0 < values.abs().max() < 1e-3


def test_fused_and_experts_use_flat_indices_of_the_whole_tensor():
    model = tiny_model("qwen3_moe", **moe("qwen3_moe"))
    weight = base_weights(model, "experts")["model.layers.0.mlp.experts.gate_up_proj"]
    assert weight.shape == (4, 32, 32)
    with pytest.raises(ModelError, match="part of"):
        base_weights(tiny_model("gpt2"), "attn.q")


def test_direct_kernel_keeps_no_dense_weight_gradient():
    """What the backward pass allocates at once stays far below one dense dW."""
    layer = nn.Linear(1024, 1024, bias=False)
    model = nn.Sequential(layer)
    chosen = Selected(torch.arange(0, 1024 * 1024, 1024 * 4))
    attach_chosen(model, "picked", {"0.weight": chosen})
    freeze(model)
    hook = next(p for _, _, p in sparse_hooks(model, "picked"))
    assert isinstance(hook, SparseDelta) and hook.kernel == "direct"
    x = torch.randn(64, 1024)
    y = model(x)
    biggest = largest_allocation(lambda: y.sum().backward())
    assert hook.values.grad is not None
    assert biggest < 1024 * 1024 * 4 / 2


def largest_allocation(action: Any) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    return max(event.self_cpu_memory_usage for event in seen.events())


def test_a_delta_on_top_of_a_mounted_one_reloads():
    """sft -> dpo without a merge: the second delta's base is the first one's result, whatever was written meanwhile."""
    from llmrecipe.methods._base.stack import Stack
    from llmrecipe.methods.selective.fishmask import Fishmask
    from llmrecipe.runs.delta import Layer, mount_layer, rename_tensor

    def layer(chosen: dict[str, Selected], seed: int, below: list[Layer]) -> Layer:
        model = tiny_model("llama")
        for index, lower in enumerate(below):
            mount_layer(model, lower, index)
        attach_chosen(model, "fish", chosen)
        torch.manual_seed(seed)
        with torch.no_grad():
            for _, _, hook in sparse_hooks(model, "fish"):
                hook.values.normal_(std=0.1)
        results.append(loss_of(model).detach())
        stack = Stack([Fishmask(name="fish")])
        tensors = {n: t.clone() for n, t in stack.wrappers[0].delta(model).items()}
        found = Layer({"fish": {"kind": "fishmask"}}, {"fish": structure_of(model, "fish")}, tensors=tensors)
        torch.testing.assert_close(loss_of(model), results[-1], rtol=0, atol=0)
        return found

    results: list[torch.Tensor] = []
    model = tiny_model("llama")
    first = layer(pick(model, 0.05), 1, [])
    second = layer(pick(model, 0.05, seed=3), 2, [first])
    for index, saved in enumerate((first, second)):
        mount_layer(model, saved, index)
    assert torch.equal(loss_of(model), results[1]) and not torch.equal(results[0], results[1])
    assert rename_tensor("a.fish.values", {"fish": "mounted1_fish"}) == "a.mounted1_fish.values"


@pytest.mark.parametrize("listed", [("diff_pruning", "fishmask"), ("fishmask", "diff_pruning"), ("child_tuning", "fishmask")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_deltas_in_one_tensor_reload_to_the_bit(listed: tuple[str, str], dtype: torch.dtype):
    """A run selects when it does (before step 0, or in a later phase), a reload in the order of the stack."""
    from llmrecipe.core import registry
    from llmrecipe.methods._base.stack import Stack
    from tests.methods.kinds import put

    options: dict[str, Any] = {
        "diff_pruning": {"l0_steps": 1, "density": 0.6, "scope": "attn.q"},
        "fishmask": {"density": 0.6, "num_samples": 2, "scope": "attn.q"},
        "child_tuning": {"variant": "d", "p": 0.6, "num_samples": 2},
    }

    def wrappers() -> list[Any]:
        return [registry.load_class("stack", kind)(name=kind, **options[kind]) for kind in listed]

    made = put(tiny_model("llama").to(dtype), *wrappers())
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        made.stack.before_step(made.model, step)
        with torch.no_grad():
            for parameter in made.trained().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)
        made.stack.after_step(made.model, step)
    saved = {name: value.clone() for name, value in made.stack.delta(made.model).items()}
    structures = made.stack.structures(made.model)
    made.loss()

    again = tiny_model("llama").to(dtype)
    stack = Stack(wrappers())
    stack.attach(again, structures)
    stack.restore(again, saved)
    loss_of(again)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    one, two = ({i for _, _, h in sparse_hooks(made.model, n) if h.source == names[0] for i in h.idx.tolist()} for n in listed)
    assert len(one & two) > 100, "entries that both change would show another order of rounding"
    for name in names:
        assert torch.equal(again.get_parameter(name), made.model.get_parameter(name)), name


def test_zeroth_order_steps_reach_the_values():
    from llmrecipe.methods.memory._engines.perturbation import moved

    model = tiny_model("llama")
    attach_chosen(model, "picked", pick(model, 0.05))
    start = loss_of(model)
    for _, _, hook in sparse_hooks(model, "picked"):
        hook.values.data.add_(0.1)
        moved(hook.values)
    assert not torch.equal(loss_of(model), start)
