"""IA3, prefix and prompt tuning in PEFT's layout, and back.

    IA3               <path>.ia3_l (out, 1) after a projection, (1, in) before a feed-forward one
    PREFIX_TUNING     prompt_embeddings (P, 2 L d_kv), layer-major [K0, V0, K1, ...]; documents start at position P there
    PROMPT_TUNING     prompt_embeddings (P, d)

A prefix whose documents start at 0 (`positions: free`) is the same function of keys turned by P positions: with rotary
positions (R(t + P) q) . k = (R(t) q) . (R(-P) k), so PEFT's keys are R(P) times ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.interop.peft.layout import PREFIX, Adapter, target_of
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._engines.document_tokens import host_of
from llmrecipe.methods.additive._engines import prefix_kv, virtual_tokens
from llmrecipe.methods.additive.ia3 import ScaleInput, ScaleOutput
from llmrecipe.methods.additive.prompt_tuning import PromptTuning
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.site import Site
from llmrecipe.models.site_finder import widths
from llmrecipe.runs.delta import Layer

PROMPT = "prompt_embeddings"
BEHIND = ("q", "k", "v", "qkv", "kv")
"""Last part of the roles that are scaled at their output."""


def ia3_adapter(wrapper: Wrapper, model: nn.Module) -> Adapter | None:
    """Return the vectors by module; None where a task table, a key norm or fused experts are scaled."""
    vectors: dict[str, Tensor] = {}
    inner: set[str] = set()
    for path, module, _, hook in all_hooks(model, wrapper.name):
        if not isinstance(hook, ScaleInput | ScaleOutput) or hook.l.shape[0] != 1:
            return None
        own = hook.l.detach()[0]
        if isinstance(hook, ScaleInput):
            inner.add(path)
            vectors[path] = own[None]
            continue
        full = vectors.setdefault(path, own.new_ones(widths(module, 0)[1], 1))
        rows = torch.arange(len(full), device=full.device) if hook.rows is None else hook.rows
        full[rows] *= own[:, None]
    config = {
        "peft_type": "IA3",
        "target_modules": sorted(vectors),
        "feedforward_modules": sorted(inner),
        "init_ia3_weights": True,
        "inference_mode": True,
    }
    return Adapter(config, {f"{PREFIX}{path}.ia3_l": value for path, value in vectors.items()})


def prefix_adapter(wrapper: Wrapper, model: nn.Module) -> Adapter | None:
    """Return the table of a decoder's self-attention; None where PEFT would compute something else with it."""
    parts = anatomy(model)
    tables = prefix_kv.tables_of(model, wrapper.name)
    if parts.encoder_decoder or len(tables) != 1 or list(tables[0].tables) != ["attn"]:
        return None
    hook: Any = tables[0]
    table: Any = hook.tables["attn"]
    other = hasattr(table, "gate") or table.uneven or getattr(wrapper, "gate", "none") != "none"
    if len(table.shapes) != parts.layers or other or not (hook.shift or parts.rope):
        return None
    with torch.no_grad():
        columns = table.cut(table.table())
        if not hook.shift:
            columns = [(_turned(model, key, hook.virtual_tokens), value) for key, value in columns]
        flat = table.join(columns)
    config = _prompt_config(model, "PREFIX_TUNING", hook.virtual_tokens)
    config |= {"prefix_projection": False, "encoder_hidden_size": None, "token_dim": parts.kv_heads * parts.head_dim}
    config["num_attention_heads"] = parts.kv_heads
    return Adapter(config, {PROMPT: flat.detach()})


def _turned(model: nn.Module, keys: Tensor, places: int) -> Tensor:
    """Rotate keys k (1, G, P, E) to their places with the model's own rotary module."""
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "forward"))
    where = torch.full((1, keys.shape[2]), places, device=keys.device)
    cos, sin = rotary(keys, where)
    size = cos.shape[-1]
    turning, rest = keys[..., :size], keys[..., size:]
    first, second = turning.chunk(2, -1)
    return torch.cat([turning * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None], rest], -1)


def prompt_adapter(wrapper: PromptTuning, model: nn.Module) -> Adapter | None:
    """Return the virtual tokens before every document; None for encoder-decoders, or virtual tokens after the first token."""
    if wrapper.position != "prefix" or anatomy(model).encoder_decoder:
        return None
    _, rows = virtual_tokens.virtual_rows(model, wrapper.name)
    config = _prompt_config(model, "PROMPT_TUNING", rows.embeddings.shape[0])
    return Adapter(config | {"prompt_tuning_init": "RANDOM"}, {PROMPT: rows.embeddings.detach()})


def _prompt_config(model: nn.Module, kind: str, count: int) -> dict[str, Any]:
    parts = anatomy(model)
    return {
        "peft_type": kind,
        "num_virtual_tokens": count,
        "token_dim": parts.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": parts.heads,
        "num_layers": parts.layers,
        "inference_mode": True,
    }


def read_ia3(adapter: Adapter, model: nn.Module, where: str) -> Layer:
    """Read an IA3 folder as an `ia3` layer.

    Raises:
        ModelError: a module is unknown, or scaled on the other side than here.
    """
    parts = anatomy(model)
    sites: list[Site] = []
    tensors: dict[str, Tensor] = {}
    for key, value in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        path = name.removesuffix(".ia3_l")
        if path == name:
            tensors[name.replace(".modules_to_save.", ".")] = value
            continue
        site = next((s for s in parts.sites if s.path == path and s.rows is None and s.tensor is None), None)
        behind = value.shape[0] != 1
        if site is None or behind != (site.role.rsplit(".", 1)[-1] in BEHIND):
            end = "output" if behind else "input"
            raise ModelError(f"{where}: it scales the {end} of {path}, which has no counterpart here")
        sites.append(site)
        tensors[f"{path}.{site.name('ia3')}.l"] = value.float().reshape(1, -1)
    return Layer({"ia3": {"kind": "ia3", "target": target_of(sites, parts)}}, {}, tensors=tensors)


def read_virtual_tokens(adapter: Adapter, model: nn.Module, where: str) -> Layer:
    """Read a prefix or prompt folder as a layer.

    Raises:
        ModelError: the model is an encoder-decoder pair, or the table was trained for another shape.
    """
    parts = anatomy(model)
    table = adapter.tensors[PROMPT].float()
    rest = {k.removeprefix(PREFIX): v for k, v in adapter.tensors.items() if k != PROMPT}
    side = next(s.side for s in parts.sites if s.role == "block")
    if parts.encoder_decoder:
        raise ModelError(f"{where}: PEFT lays prompts of encoder-decoder models out in a way that has no counterpart here")
    prefix = adapter.config["peft_type"] == "PREFIX_TUNING"
    wanted = 2 * parts.layers * parts.kv_heads * parts.head_dim if prefix else parts.width
    if table.shape[1] != wanted:
        raise ModelError(
            f"{where}: its rows have {table.shape[1]} numbers, this model needs {wanted}; was it trained on another base?"
        )
    host = host_of(model, side)
    paths = {id(module): path for path, module in model.named_modules()}
    count = table.shape[0]
    if prefix:
        options = {"kind": "prefix_tuning", "num_virtual_tokens": count, "reparam": "flat", "positions": "shift"}
        name = f"{paths[id(host)]}.prefix_tuning.tables.attn.flat"
        return Layer({"prefix_tuning": options}, {"prefix_tuning": {"reparam": "flat"}}, tensors={name: table, **rest})
    embedding: Any = pretrained(host).get_input_embeddings()
    name = f"{paths[id(embedding)]}.prompt_tuning.embeddings"
    options = {"kind": "prompt_tuning", "num_virtual_tokens": count, "init": "normal"}
    return Layer({"prompt_tuning": options}, {}, tensors={name: table, **rest})
