"""Tiny random models of several families, and a run-free `Roles` around them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.attention import install_attention
from llmrecipe.models.vocabulary import position_offset


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


def tiny_masked_model(family: str = "llmrecipe_native", std: float = 0.2, **more: Any) -> nn.Module:
    """A random masked language model whose weights are large enough for differences to show."""
    from transformers import AutoModelForMaskedLM

    import llmrecipe.models.native  # noqa: F401 (registers the native family)

    own = {"kind": "encoder"} if family == "llmrecipe_native" else {}
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny_config(family, **{**own, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    install_attention(model, "sdpa")
    model.position_offset = position_offset(model)
    return model.eval()


def tiny_span_model(family: str = "llama", std: float = 0.2, **more: Any) -> nn.Module:
    """A random model with a head of spans whose weights are large enough for differences to show."""
    from transformers import AutoModelForQuestionAnswering

    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(tiny_config(family, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=std)
    install_attention(model, "sdpa")
    model.position_offset = position_offset(model)
    return model.eval()


def tiny_vision_model(**more: Any) -> nn.Module:
    """A random native vision encoder for pictures of 8 x 8 pixels and three classes."""
    from llmrecipe.models.native import NativeConfig, NativeForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    model = NativeForImageClassification(NativeConfig(kind="vision", image_size=8, patch_size=4, **shape, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    install_attention(model, "sdpa")
    return model.eval()


class Tokenizer:
    """Just enough of a tokenizer for collation: 64 tokens, the first three and the mask special."""

    pad_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    mask_token_id: int | None = 63
    all_special_ids: ClassVar[list[int]] = [0, 1, 2, 63]

    def __call__(self, first: str, second: str | None = None, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """One or two texts of a single token between special tokens: <1> a <2>, or <1> a <2> b <2>."""
        inner = [10] if second is None else [10, 2, 10]
        return {"input_ids": [1, *inner, 2] if add_special_tokens else [10]}

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(64)}


def roles_for(model: nn.Module, stack: Stack | None = None, packing: bool = True) -> Roles:
    """Roles without a run."""
    return Roles(Engine(model), stack or Stack([]), Tokenizer(), torch.device("cpu"), packing)
