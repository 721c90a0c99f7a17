"""The families of Transformers that a GGUF file is written for here, their metadata and their tensors.

A GGUF file names an architecture (`general.architecture`) that fixes the forward pass of llama.cpp; its numbers stand under
`ARCHITECTURE.*`. Tensors have the names of the `gguf` library's own map. One thing is more than a name: llama.cpp rotates
neighbouring pairs of a head in the architecture `llama`, Transformers a number of its first half with one of its second, so the
rows of q and k are put into the other order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmrecipe.core.errors import ModelError
from llmrecipe.core.lazy import load_module

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Class in Transformers -> architecture of a GGUF file."""
ROTARY = ("default", "linear", "llama3")
"""Kinds of rotary scaling that are written."""
BEYOND_READER = ("rope_parameters", "head_dim", "attention_bias", "mlp_bias")
"""Settings of a model that the file holds, in numbers or as tensors, and that the reader of Transformers does not look for."""
FREQUENCIES = "rope_freqs.weight"
"""Tensor (E/2,) by which llama.cpp divides the rotary frequencies."""


def refuse_family(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that has no counterpart among the architectures written here.

    Args:
        name: its class in Transformers.

    Raises:
        ModelError: naming the part that a file written here would not have.
    """
    rotary = _rotary(config)
    kind = rotary.get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings
    reason = None
    if name not in ARCHITECTURES:
        reason = f"{name} is none of the classes written here ({', '.join(ARCHITECTURES)})"
    elif config.hidden_act != "silu":
        reason = f"its activation is {config.hidden_act}, and these architectures have silu"
    elif windowed:
        reason = f"it attends to the last {window} tokens alone (sliding_window), and these architectures to all"
    elif kind not in ROTARY:
        reason = f"its rotary frequencies are scaled by '{kind}' (written here: {', '.join(ROTARY)})"
    elif rotary.get("partial_rotary_factor", 1.0) != 1.0:
        reason = "only a part of each head is rotated"
    elif kind == "llama3" and ARCHITECTURES[name] != "llama":
        reason = (
            f"llama.cpp reads rotary frequencies scaled by 'llama3' in its architecture llama, and not in {ARCHITECTURES[name]}"
        )
    elif ARCHITECTURES[name] == "qwen3" and config.attention_bias:
        reason = "its attention has biases (attention_bias), and llama.cpp's qwen3 has none"
    elif ARCHITECTURES[name] == "qwen2" and width_of_head(config) * config.num_attention_heads != config.hidden_size:
        reason = "the widths of its heads do not add up to hidden_size, and in llama.cpp's qwen2 they do"
    if reason is not None:
        raise ModelError(
            f"export --to gguf: {reason}; llama.cpp's own converter knows more families: install llama.cpp so that "
            "convert_hf_to_gguf.py is on the PATH, or name it with --converter"
        )


def _rotary(config: PreTrainedConfig) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def width_of_head(config: PreTrainedConfig) -> int:
    """Return the width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_numbers(writer: Any, config: PreTrainedConfig) -> None:  # noqa: ANN401 (a `gguf.GGUFWriter`)
    """Add the numbers of an architecture to a file."""
    rotary, width = _rotary(config), width_of_head(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rotary.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if writer.arch == "llama":
        writer.add_rope_dimension_count(width)
    if rotary.get("rope_type") == "linear":
        writer.add_rope_scaling_type(load_module("gguf").RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))


def more_tensors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return tensors that the file has and the model does not: the divisors of scaled rotary frequencies."""
    if _rotary(config).get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = width_of_head(config)
    plain = float(_rotary(config)["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    return {FREQUENCIES: plain / scaled}


def as_stored(name: str, tensor: Tensor, config: PreTrainedConfig, architecture: str) -> Tensor:
    """Return a tensor with its rows as the architecture stores them.

    Args:
        name: of the tensor in the file.
        tensor: (H E, D) or (H E,) for q and k of H heads of width E; any shape for the others.
    """
    if architecture != "llama" or not (".attn_q." in name or ".attn_k." in name):
        return tensor
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
