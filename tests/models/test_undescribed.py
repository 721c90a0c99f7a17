"""Models of families nobody described train plainly; a method takes the sites they have, or is refused by a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.load import load_model
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.optimizations import speed_up
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training.memory_estimate import activation_elements

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = SMALL | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_expand": 2, "mamba_chunk_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": SMALL | {"state_size": 4},
    "mamba2": SMALL | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "jamba": HEADS
    | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_d_state": 4, "use_mamba_kernels": False},
    "bamba": HEADS | MAMBA | {"mamba_n_groups": 1, "attn_layer_indices": [1]},
    "lfm2": HEADS | {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": HEADS
    | MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32},
}
NO_POSITIONS = {name: value for name, value in HEADS.items() if name != "max_position_embeddings"}
SHARED = HEADS | {"num_hidden_layers": 4, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
"""Families whose attention block is one, shared by several layers."""
CONFIGS |= {
    "falcon_mamba": SMALL | {"state_size": 4},
    "rwkv": SMALL | {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64},
    "xlstm": SMALL | {"num_heads": 2, "num_blocks": 2, "chunk_size": 8},
    "zamba": SHARED | {"n_mamba_heads": 2, "mamba_d_state": 4, "use_mamba_kernels": False, "attention_hidden_size": 64},
    "zamba2": SHARED | {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 4, "mamba_ngroups": 1, "chunk_size": 8},
    "recurrent_gemma": NO_POSITIONS
    | {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"], "head_dim": 8},
}
WITHOUT_SITES = ("mamba", "falcon_mamba", "rwkv", "xlstm", "zamba", "zamba2", "recurrent_gemma")
WITH_ATTENTION = ("jamba", "bamba", "lfm2", "granitemoehybrid")
QUICK = ("mamba", "jamba", "bamba", "rwkv")


def some(names: tuple[str, ...] | dict[str, Any]) -> list[Any]:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


def fresh(family: str) -> Any:
    return load_model(ModelSection(init="random", config={"model_type": family, **CONFIGS[family]}))


def batch() -> Any:
    return pad([Sequence([3, 5, 6, 7, 8, 9, 2], [0, 1, 1, 1, 1, 1, 1]), Sequence([3, 9, 2], [0, 1, 1])], 0)


@pytest.mark.parametrize("family", some(CONFIGS))
def test_it_trains_plainly_and_no_optimization_changes_what_it_computes(family: str) -> None:
    """Gated norms of these families look like plain ones until they are given their gate."""
    model = fresh(family).train().requires_grad_(True)
    found = []
    for step in range(2):
        model.zero_grad(set_to_none=True)
        loss = -Engine(model)(batch())["logprobs"].mean()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
        if step == 0:
            speed_up(model)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys() == dict(model.named_parameters()).keys()
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", some(CONFIGS))
def test_an_estimate_never_stops_a_run(family: str) -> None:
    model = fresh(family)
    assert activation_elements(model, 10) == 10 * activation_elements(model, 1) > 0


@pytest.mark.parametrize("family", some(WITH_ATTENTION))
def test_a_hybrid_takes_lora_where_it_has_the_sites(family: str) -> None:
    model = fresh(family)
    stack = Stack([registry.load_class("stack", "lora")(name="lora", target="attn.q|v + head")])
    stack.attach(model)
    assert anatomy(model).layers == 2 and [s.layer for s in anatomy(model).at("attn.q")] == [1]
    (-Engine(model)(batch())["logprobs"].mean()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith("lora.B")}
    assert len(grads) == 3 and all(g is not None and bool(g.any()) for g in grads.values())


@pytest.mark.parametrize("family", some(WITHOUT_SITES))
@pytest.mark.parametrize("kind", ["lora", "prefix_tuning", "adapter", "ia3", "spt"])
def test_without_known_sites_a_method_is_refused_by_a_sentence(kind: str, family: str) -> None:
    model = fresh(family)
    options = {"num_virtual_tokens": 2} if kind == "prefix_tuning" else {}
    with pytest.raises(ModelError, match=rf"stack\.{kind}: {family}: cannot find .*stack=\[\] trains the whole model"):
        Stack([registry.load_class("stack", kind)(name=kind, **options)]).attach(model)
    assert not list(all_hooks(model))
