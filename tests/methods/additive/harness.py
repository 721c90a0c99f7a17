"""Promises every additive method keeps, checked on tiny models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import checkpoint_contexts
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.attention import install_attention
from llmrecipe.models.hooks.hook import all_hooks, own_tensors
from llmrecipe.runs.delta import Layer, mount_layer, wrapper_mapping
from tests.models.configs import MASKED, SEQ2SEQ, tiny
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2], [8, 1, 44, 12, 30, 6, 21]])


def model_of(family: str, seed: int = 0) -> nn.Module:
    """A tiny random model of any shape: decoder, encoder, encoder-decoder, native."""
    torch.manual_seed(seed)
    if family in MASKED or family in SEQ2SEQ:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout", "attention_dropout")
        model = tiny(family, **dict.fromkeys(names, 0.0))
    elif family.startswith("deepseek"):
        model = tiny(family)
    elif family.startswith("native"):
        model = native(family.partition("-")[2] or "decoder")
    else:
        return tiny_model(family, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            elif "norm" not in name.lower() and not name.startswith("lm_head"):
                parameter.normal_(std=0.1)
    install_attention(model, "sdpa")
    return model.eval()


def native(kind: str) -> nn.Module:
    """The seed's transformer: a kind, or `mixture`, a decoder with experts."""
    from llmrecipe.models.native import heads
    from llmrecipe.models.native.config import NativeConfig

    config = NativeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        kind="decoder" if kind == "mixture" else kind,
        **({"num_experts": 4, "moe_intermediate_size": 24, "num_shared_experts": 1} if kind == "mixture" else {}),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    classes = {"decoder": "NativeForCausalLM", "encoder": "NativeForMaskedLM", "encoder_decoder": "NativeForSeq2SeqLM"}
    model = getattr(heads, classes[config.kind])(config)
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def logits(model: nn.Module, ids: Tensor = IDS, **more: object) -> Tensor:
    """(R, T, V) of a forward pass; encoder-decoders read the ids on both sides."""
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids.flip(1)
    if model.config.model_type not in MASKED:
        more["use_cache"] = False
    return model(input_ids=ids, **more).logits


def base_logits(family: str) -> Tensor:
    """What the untouched model says, frozen as under a stack: position biases that train choose another attention kernel."""
    return logits(model_of(family).requires_grad_(False))


def attached(family: str, *wrappers: Wrapper, seed: int = 0) -> tuple[nn.Module, Stack]:
    """A tiny model with a stack on it."""
    model = model_of(family, seed)
    stack = Stack(list(wrappers))
    stack.attach(model)
    return model, stack


def fill(model: nn.Module, seed: int = 3, scale: float = 0.2) -> None:
    """Move every injected parameter off its start, so that every part of the formula shows."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, _, hook in all_hooks(model):
        for parameter in hook.parameters(recurse=True):
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * scale


def trained(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def checkpointing_changes_no_gradient(make: Callable[[], nn.Module]) -> None:
    """Gradients with activation checkpointing are those without."""
    grads = []
    for checkpointing in (False, True):
        model = make()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        logits(model).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0]
    for name, grad in grads[0].items():
        assert bool(grad.any()), f"{name} has no gradient"
        torch.testing.assert_close(grad, grads[1][name])


def cached_generation_equals_uncached(model: nn.Module, tokens: int = 12) -> None:
    """Greedy generation of a left-padded batch, with and without the KV cache."""
    ids = torch.tensor([[0, 0, 0, 5, 9, 3], [8, 1, 44, 12, 30, 6]])
    mask = (ids != 0).long()
    kwargs = {"attention_mask": mask, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with torch.no_grad():
        outs = [model.generate(input_ids=ids, use_cache=cache, **kwargs) for cache in (True, False)]
    assert torch.equal(*outs)


def survives_a_round_trip(family: str, wrapper: Wrapper) -> None:
    """Delta saved, put on a fresh model, and mounted under another stack: the same logits bit for bit."""
    model, stack = attached(family, wrapper)
    fill(model)
    wanted = logits(model)
    saved = {k: v.clone() for k, v in stack.delta(model).items()}
    # The file holds what was learned and nothing else.
    assert set(saved) == {n for n, p in model.named_parameters() if p.requires_grad} | set(own_tensors(model, wrapper.name))
    again, other = attached(family, wrapper)
    other.restore(again, saved)
    assert torch.equal(logits(again), wanted)
    mounted = model_of(family)
    layer = Layer({wrapper.name: wrapper_mapping(wrapper)}, stack.structures(model), tensors=saved)
    mount_layer(mounted, layer, 0)
    assert torch.equal(logits(mounted), wanted)
    assert not any(p.requires_grad for p in mounted.parameters())


def only_listed_parameters_move(family: str, wrapper: Wrapper) -> None:
    """One AdamW step with weight decay leaves every base tensor bit-equal."""
    model, _ = attached(family, wrapper)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        logits(model).square().mean().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
