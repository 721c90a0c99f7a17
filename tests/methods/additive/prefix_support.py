"""What the tests of prefixes and prompts share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.stack import Stack
from tests.tiny import tiny_config, tiny_model

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])
"""One document."""


def adapted(wrapper: Any, family: str = "llama", **more: Any) -> nn.Module:
    """A tiny model under one wrapper, with the same base and start values at every call."""
    model = tiny_model(family, **more) if family not in PAIRS else pair_model(family)
    torch.manual_seed(1)
    Stack([wrapper]).attach(model)
    return model.eval()


PAIRS = ("t5", "bart")


def pair_model(family: str) -> nn.Module:
    """A two-layer encoder-decoder of width 32."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from llmrecipe.models.attention import install_attention

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "dropout_rate": 0.0}
    shape |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    shape |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **shape, decoder_start_token_id=0, pad_token_id=0))
    install_attention(model, "sdpa")
    return model.eval()


def bert_classifier() -> nn.Module:
    """A tiny BERT with a pooler and a head of three classes."""
    from transformers import AutoModelForSequenceClassification

    from llmrecipe.models.attention import install_attention

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
    install_attention(model, "sdpa")
    return model.eval()


def greedy_cached(
    model: nn.Module, prompts: list[list[int]], new: int, context: Context | None = None, **more: Any
) -> list[list[int]]:
    """Left-padded greedy generation with a cache."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None
    with activate(context or Context()):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **more
        )
    return out[:, width:].tolist()


@torch.no_grad()
def greedy_whole(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    """Greedy generation by a whole pass over one unpadded row a token; the prompt stays the prompt."""
    ids = list(prompt)
    for _ in range(new):
        with activate(Context(prompt_lengths=torch.tensor([len(prompt)]))):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, checkpointing: bool) -> dict[str, Tensor]:
    """Gradients of a training pass with and without activation checkpointing, dropout included."""
    from llmrecipe.core.forward_context import checkpoint_contexts

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    model.train()
    torch.manual_seed(7)
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in trained(model).items() if p.grad is not None}
