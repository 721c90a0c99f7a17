"""Two-layer random models of every family: nothing is downloaded, nothing is large."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = BASE | {"num_key_value_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT = BASE | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
MIXTURE = GROUPED | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8},
    "gemma3_text": GROUPED | {"head_dim": 8},
    "phi": GROUPED,
    "phi3": GROUPED,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48} | IDS,
    "gpt_neox": BASE,
    "opt": BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": MIXTURE | {"head_dim": 8, "mlp_only_layers": [0]},
    "olmoe": MIXTURE | {"intermediate_size": 16},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}
MASKED: dict[str, dict[str, Any]] = {
    "bert": BASE,
    "roberta": BASE,
    "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    },
}
FAMILIES = [*CAUSAL, *MASKED, *SEQ2SEQ]


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A seeded two-layer model of a family, in evaluation mode."""
    for table, loader in ((CAUSAL, AutoModelForCausalLM), (MASKED, AutoModelForMaskedLM), (SEQ2SEQ, AutoModelForSeq2SeqLM)):
        if family in table:
            torch.manual_seed(0)
            return loader.from_config(AutoConfig.for_model(family, **(table[family] | changes))).eval()
    raise KeyError(family)
