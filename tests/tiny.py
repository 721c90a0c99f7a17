"""Tiny random models of several families, and a run-free `Roles` around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.attention import install_attention


def tiny_config(family: str = "llama", **more: Any) -> Any:
    """A two-layer config of width 32 and vocabulary 64."""
    from transformers import AutoConfig

    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gpt2":
        shape = {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif family in ("bert", "roberta"):
        shape.pop("num_key_value_heads")
        shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    elif family == "mixtral":
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    elif family in ("gemma2", "gemma3_text", "qwen3"):
        shape |= {"head_dim": 8}
    return AutoConfig.for_model(family, **{**shape, **more})


def tiny_model(family: str = "llama", seed: int = 0, scale: float = 3.0, **more: Any) -> nn.Module:
    """A random causal model whose weights are large enough for differences to show."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif "norm" not in name and "ln" not in name:
                parameter.normal_(std=0.1)
    install_attention(model, "sdpa")
    return model.eval()


class Tokenizer:
    """Just enough of a tokenizer for collation."""

    pad_token_id = 0
    bos_token_id = 1
    eos_token_id = 2


def roles_for(model: nn.Module, stack: Stack | None = None, packing: bool = True) -> Roles:
    """Roles without a run."""
    return Roles(Engine(model), stack or Stack([]), Tokenizer(), torch.device("cpu"), packing)
