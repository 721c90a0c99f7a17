"""The native transformer as a family that Transformers has itself, where its parts are that family's: Llama, Qwen3, Mixtral.

The weights are the same tensors under other names, so the folder loads where this package is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.parts.width_scaling import attention_scale

if TYPE_CHECKING:
    from torch import Tensor

    from llmrecipe.models.pretrained import LanguageModel


NAMES = {
    "norm_attn": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
    "model.decoder.": "model.",
    "mlp.router": "mlp.gate",
}
"""Part of the name of a native tensor -> that of the Llama families."""
HEADS = ("ForCausalLM", "ForSequenceClassification")


def plain_family(config: NativeConfig) -> str | None:
    """Return `Llama`, `Qwen3` or `Mixtral`, whichever has exactly the parts of a native config, or None."""
    shared_parts = config.kind == "decoder" and config.positions == "rotary" and config.norm == "rmsnorm" and config.pre_norm
    extra = config.embed_norm or config.scale_embedding or config.type_vocab_size
    if not shared_parts or extra or not config.gated:
        return None
    if not config.num_experts:
        return "Qwen3" if config.qk_norm and not config.bias else "Llama" if not config.qk_norm else None
    plain_experts = config.norm_topk_prob and not config.num_shared_experts
    return "Mixtral" if plain_experts and not config.bias and not config.qk_norm else None


def as_plain_family(model: LanguageModel) -> LanguageModel | None:
    """Return a model of Transformers' own with the weights of a native one; None where no family has its parts."""
    config = model.config
    head = next((name for name in HEADS if type(model).__name__ == f"Native{name}"), None)
    family = plain_family(config) if isinstance(config, NativeConfig) and head is not None else None
    if family is None:
        return None
    cls = getattr(transformers, f"{family}{head}")
    plain = cls(getattr(transformers, f"{family}Config")(**_values(config))).to(model.dtype)
    folded = _without_width_scaling(model, config) if config.mup_base_width is not None else model.state_dict()
    state = {}
    for name, tensor in folded.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    plain.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain.eval()


def _without_width_scaling(model: LanguageModel, config: NativeConfig) -> dict[str, Tensor]:
    """Return the state of a model that scores 1 / sqrt(E) and has its logits unscaled: both factors go into the weights."""
    state = dict(model.state_dict())
    share = attention_scale(config) * config.sizes()[0] ** 0.5
    for name in [n for n in state if ".q_norm." in n or (".q_proj." in n and not config.qk_norm)]:
        state[name] = state[name] * share
    if "lm_head.weight" in state:
        state["lm_head.weight"] = state["lm_head.weight"] / config.width_ratio()
    return state


def _values(config: NativeConfig) -> dict[str, Any]:
    """Return the config values of the plain family; those that a family lacks have no effect in it."""
    size, groups, width = config.sizes()
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act",
        "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "id2label",
        "label2id",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names} | {
        "num_key_value_heads": groups,
        # A head whose scale goes into its weights is no longer the embedding.
        "tie_word_embeddings": config.tie_word_embeddings and config.mup_base_width is None,
        "head_dim": size,
        "intermediate_size": config.expert_width() if config.num_experts else width,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": config.dropout,
        "attention_bias": config.bias,
    }
    if not config.num_experts:
        return values | {"mlp_bias": config.bias}
    mixture = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    return values | mixture | {"router_aux_loss_coef": config.router_aux_loss_coef}
