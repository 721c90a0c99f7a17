"""What the parts of a model are called: data only.

A `PartNames` says where the block lists are and what each role is called below a block. Roles are the words of the target
grammar (see `anatomy`). Values are module paths; `a | b` means whichever exists (a family may have both forms); roles a
particular checkpoint lacks are skipped, so one family serves gated and plain, dense and sparse, normed and unnormed variants.

The token embedding and the output head are not listed: Transformers models answer for them themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PartNames:
    """Where a family of models keeps its parts."""

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
OUT_PROJECTION = ATTENTION | {"attn.o": "self_attn.out_proj"}
TWO_LINEARS = {"mlp.up": "fc1", "mlp.down": "fc2", "norm.attn": "self_attn_layer_norm", "norm.mlp": "final_layer_norm"}

LLAMA = PartNames(stacks={"decoder": "layers"}, layer=ATTENTION | GATED | NORMS, top={"norm.final": "norm"})

BART = PartNames(
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
