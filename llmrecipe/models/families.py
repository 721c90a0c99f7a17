"""Names of the parts of each model family: data only.

A row says where the block lists are and what each role is called below a block. Roles are the words of the target grammar
(see `anatomy`). Values are module paths; `a | b` means whichever exists (a family may have both forms); roles a particular
checkpoint lacks are skipped, so one row serves gated and plain, dense and sparse, normed and unnormed variants.

The token embedding and the output head are not listed: Transformers models answer for them themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    """One row: where a family keeps its parts."""

    stacks: dict[str, str]
    """Side (`decoder` or `encoder`) -> ending of the path of its block list."""
    layer: dict[str, str]
    """Role -> path below a block; `decoder:role` names a part only that side has."""
    top: dict[str, str] = field(default_factory=dict)
    """Role -> path below the module that holds the block list; a leading `^` starts one module higher."""
    fused: dict[str, str] = field(default_factory=dict)
    """Role of a fused projection -> layout of its outputs: `blocks` (all of q, then k, then v; gate, then up),
    `heads` (q, k, v of head 0, then of head 1, ...) or `latent` (unrotated key and value of head 0, then of head 1, ...)."""
    pre_norm: bool | str = True
    """Whether norms come before attention and feed-forward; a string names the config value that says so."""
    parallel: bool | str = False
    """Whether attention and feed-forward read the same input; a string names the config value that says so."""
    causal: bool = True
    """Whether the main stack attends only backwards."""


ATTENTION = {
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "norm.q": "self_attn.q_norm",
    "norm.k": "self_attn.k_norm",
}
GATED = {"mlp": "mlp", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
NORMS = {"norm.attn": "input_layernorm", "norm.mlp": "post_attention_layernorm"}
SANDWICH = {
    "norm.attn": "input_layernorm",
    "norm.attn_post": "post_attention_layernorm",
    "norm.mlp": "pre_feedforward_layernorm",
    "norm.mlp_post": "post_feedforward_layernorm",
}
MIXTURE = {
    "experts": "mlp.experts",
    "router": "mlp.gate | mlp.router",
    "shared": "mlp.shared_expert | mlp.shared_experts",
    "shared.gate": "mlp.shared_expert.gate_proj | mlp.shared_experts.gate_proj",
    "shared.up": "mlp.shared_expert.up_proj | mlp.shared_experts.up_proj",
    "shared.down": "mlp.shared_expert.down_proj | mlp.shared_experts.down_proj",
    "shared.router": "mlp.shared_expert_gate",
}
LATENT = {
    "attn": "self_attn",
    "attn.q_a": "self_attn.q_a_proj",
    "attn.q": "self_attn.q_b_proj | self_attn.q_proj",
    "attn.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv": "self_attn.kv_b_proj",
    "attn.o": "self_attn.o_proj",
    "norm.q_a": "self_attn.q_a_layernorm",
    "norm.kv_a": "self_attn.kv_a_layernorm",
}

LLAMA = Family(stacks={"decoder": "layers"}, layer=ATTENTION | GATED | NORMS, top={"norm.final": "norm"})
SPARSE_LLAMA = replace(LLAMA, layer=LLAMA.layer | MIXTURE)
GEMMA_2 = replace(LLAMA, layer=ATTENTION | GATED | SANDWICH)
DEEPSEEK = replace(LLAMA, layer=LATENT | GATED | NORMS | MIXTURE, fused={"attn.kv": "latent"})

PHI = Family(
    stacks={"decoder": "layers"},
    layer=ATTENTION
    | {
        "attn.o": "self_attn.dense",
        "norm.q": "self_attn.q_layernorm",
        "norm.k": "self_attn.k_layernorm",
        "mlp": "mlp",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
        "norm.attn": "input_layernorm",
    },
    top={"norm.final": "final_layernorm"},
    parallel=True,
)

PHI_3 = Family(
    stacks={"decoder": "layers"},
    layer={
        "attn": "self_attn",
        "attn.qkv": "self_attn.qkv_proj",
        "attn.o": "self_attn.o_proj",
        "mlp": "mlp",
        "mlp.gate_up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    }
    | NORMS,
    top={"norm.final": "norm"},
    fused={"attn.qkv": "blocks", "mlp.gate_up": "blocks"},
)

GPT_2 = Family(
    stacks={"decoder": "h"},
    layer={
        "attn": "attn",
        "attn.qkv": "attn.c_attn",
        "attn.o": "attn.c_proj",
        "mlp": "mlp",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "norm.attn": "ln_1",
        "norm.mlp": "ln_2",
    },
    top={"norm.final": "ln_f", "embed.position": "wpe"},
    fused={"attn.qkv": "blocks"},
)

GPT_NEOX = Family(
    stacks={"decoder": "layers"},
    layer={
        "attn": "attention",
        "attn.qkv": "attention.query_key_value",
        "attn.o": "attention.dense",
        "mlp": "mlp",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    | NORMS,
    top={"norm.final": "final_layer_norm"},
    fused={"attn.qkv": "heads"},
    parallel="use_parallel_residual",
)

OUT_PROJECTION = ATTENTION | {"attn.o": "self_attn.out_proj"}
TWO_LINEARS = {"mlp.up": "fc1", "mlp.down": "fc2", "norm.attn": "self_attn_layer_norm", "norm.mlp": "final_layer_norm"}
OPT = Family(
    stacks={"decoder": "layers"},
    layer=OUT_PROJECTION | TWO_LINEARS,
    top={"norm.final": "final_layer_norm", "embed.position": "embed_positions"},
    pre_norm="do_layer_norm_before",
)

BERT = Family(
    stacks={"encoder": "encoder.layer"},
    layer={
        "attn": "attention.self",
        "attn.q": "attention.self.query",
        "attn.k": "attention.self.key",
        "attn.v": "attention.self.value",
        "attn.o": "attention.output.dense",
        "cross": "crossattention.self",
        "cross.q": "crossattention.self.query",
        "cross.k": "crossattention.self.key",
        "cross.v": "crossattention.self.value",
        "cross.o": "crossattention.output.dense",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "norm.attn": "attention.output.LayerNorm",
        "norm.cross": "crossattention.output.LayerNorm",
        "norm.mlp": "output.LayerNorm",
    },
    top={
        "embed.position": "^embeddings.position_embeddings",
        "embed.type": "^embeddings.token_type_embeddings",
        "norm.embed": "^embeddings.LayerNorm",
    },
    pre_norm=False,
    causal=False,
)

DISTILBERT = Family(
    stacks={"encoder": "transformer.layer"},
    layer={
        "attn": "attention",
        "attn.q": "attention.q_lin",
        "attn.k": "attention.k_lin",
        "attn.v": "attention.v_lin",
        "attn.o": "attention.out_lin",
        "mlp": "ffn",
        "mlp.up": "ffn.lin1",
        "mlp.down": "ffn.lin2",
        "norm.attn": "sa_layer_norm",
        "norm.mlp": "output_layer_norm",
    },
    top={"embed.position": "^embeddings.position_embeddings", "norm.embed": "^embeddings.LayerNorm"},
    pre_norm=False,
    causal=False,
)

T5 = Family(
    stacks={"encoder": "encoder.block", "decoder": "decoder.block"},
    layer={
        "attn": "layer.0.SelfAttention",
        "attn.q": "layer.0.SelfAttention.q",
        "attn.k": "layer.0.SelfAttention.k",
        "attn.v": "layer.0.SelfAttention.v",
        "attn.o": "layer.0.SelfAttention.o",
        "cross": "layer.1.EncDecAttention",
        "cross.q": "layer.1.EncDecAttention.q",
        "cross.k": "layer.1.EncDecAttention.k",
        "cross.v": "layer.1.EncDecAttention.v",
        "cross.o": "layer.1.EncDecAttention.o",
        "mlp": "layer.1.DenseReluDense | layer.2.DenseReluDense",
        "mlp.gate": "layer.1.DenseReluDense.wi_0 | layer.2.DenseReluDense.wi_0",
        "mlp.up": "layer.1.DenseReluDense.wi | layer.2.DenseReluDense.wi"
        " | layer.1.DenseReluDense.wi_1 | layer.2.DenseReluDense.wi_1",
        "mlp.down": "layer.1.DenseReluDense.wo | layer.2.DenseReluDense.wo",
        "embed.relative": "layer.0.SelfAttention.relative_attention_bias",
        "norm.attn": "layer.0.layer_norm",
        "norm.mlp": "layer.2.layer_norm | layer.1.layer_norm",
        "decoder:norm.cross": "layer.1.layer_norm",
    },
    top={"norm.final": "final_layer_norm"},
)

BART = Family(
    stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
    layer=OUT_PROJECTION
    | TWO_LINEARS
    | {
        "cross": "encoder_attn",
        "cross.q": "encoder_attn.q_proj",
        "cross.k": "encoder_attn.k_proj",
        "cross.v": "encoder_attn.v_proj",
        "cross.o": "encoder_attn.out_proj",
        "norm.cross": "encoder_attn_layer_norm",
    },
    top={"embed.position": "embed_positions", "norm.embed": "layernorm_embedding"},
    pre_norm=False,
)

NATIVE = Family(
    stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
    layer=ATTENTION
    | GATED
    | {
        "norm.attn": "norm_attn",
        "norm.mlp": "norm_mlp",
        "cross": "cross_attn",
        "cross.q": "cross_attn.q_proj",
        "cross.k": "cross_attn.k_proj",
        "cross.v": "cross_attn.v_proj",
        "cross.o": "cross_attn.o_proj",
        "norm.cross": "norm_cross",
    },
    top={"norm.final": "norm", "embed.position": "positions"},
    pre_norm="pre_norm",
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA_2,
    "gemma3_text": GEMMA_2,
    "phi": PHI,
    "phi3": PHI_3,
    "gpt2": GPT_2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": DISTILBERT,
    "t5": T5,
    "mt5": T5,
    "bart": BART,
    "mbart": replace(BART, top=BART.top | {"norm.final": "layer_norm"}, pre_norm=True),
    "mixtral": SPARSE_LLAMA,
    "qwen2_moe": SPARSE_LLAMA,
    "qwen3_moe": SPARSE_LLAMA,
    "olmoe": SPARSE_LLAMA,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "llmrecipe_native": NATIVE,
}
"""Rows by `config.model_type` of the text model; families that are not here are inferred from module names."""
