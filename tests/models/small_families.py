"""Small random models of every family of the installed Transformers, found by the names its configs share."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from llmrecipe.models.load import load_model
from llmrecipe.recipe.schema import ModelSection
from tests.models.test_undescribed import CONFIGS, HEADS, MAMBA

LARGEST = 2_000_000
"""Parameters beyond which a family did not become small."""
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "dff", "n_inner", "hidden_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k"), 2),
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "shared_intermediate_size": 32, "chunk_size": 8, "attention_window": 4},
    **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "rotary_dim": 4},
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
"""Lists with the kind of each layer; one layer of each is kept."""
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8},
}
OWN: dict[str, dict[str, Any]] = CONFIGS | {
    "falcon_h1": HEADS | MAMBA | {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "minimax": HEADS
    | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_local_experts": 2, "block_size": 8},
    "gpt_neo": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "qwen3_next": HEADS
    | LINEAR
    | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": HEADS | LINEAR,
    "llama4_text": HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 8},
    "funnel": {"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
}
"""Families whose shape follows from other names."""


def families(head: str) -> list[str]:
    """The families that have a head: `causal` or `masked`."""
    table = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES"}[head]
    return list(getattr(modeling_auto, table))


def small_config(family: str, head: str) -> dict[str, Any]:
    """The values that make a family small."""
    if family in OWN:
        return dict(OWN[family])
    known = CONFIG_MAPPING[family]().to_dict()
    found = {name: size for name, size in SIZES.items() if known.get(name) is not None and not isinstance(known[name], dict)}
    for name in KINDS:
        if isinstance(kinds := known.get(name), list) and kinds:
            found[name] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
            found |= {key: len(found[name]) for key in ("num_hidden_layers", "num_layers") if key in found}
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = 4
    if head == "causal" and "is_decoder" in inspect.signature(CONFIG_MAPPING[family]).parameters:
        found["is_decoder"] = True
    if family == "xmod":
        found["default_language"] = "en_XX"
    return found | IDS


def small_model(family: str, head: str = "causal", **changes: Any) -> Any:
    """A seeded model whose weights are large enough for differences to show; the test skips where none can be built."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in _made(family, head, changes).parameters())
        if size > LARGEST:
            pytest.skip(f"{family} has {size} parameters")
        model = _made(family, head, changes)
    except pytest.skip.Exception:
        raise
    except Exception as error:
        pytest.skip(f"{family}: {type(error).__name__}: {error}")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or (parameter.numel() and float(parameter.abs().max()) == 0):
                parameter.normal_(std=0.3)
    return model.eval()


def _made(family: str, head: str, changes: dict[str, Any]) -> Any:
    config = {"model_type": family, **small_config(family, head), **changes}
    return load_model(ModelSection(init="random", config=config), rows_head=head)
