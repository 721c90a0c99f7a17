"""Quantized base weights: which linear layers are quantized, how, and the way back to dense ones.

Works on a model in memory; what `from_pretrained` already quantized while loading is only given this package's forward.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.vocabulary import input_embedding

if TYPE_CHECKING:
    from types import ModuleType


HEADS = ("lm_head", "embed_out", "cls", "score", "classifier", "qa_outputs", "task_head")
"""Output and task heads by their names: never quantized, small and either trained or the source of every logit."""

_LIBRARY_STATE = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "state",
    "index",
    "source_cls",
)


def layers() -> ModuleType:
    """Import the module with the quantized layers.

    Raises:
        ModelError: bitsandbytes cannot be imported on this machine.
    """
    try:
        from llmrecipe.methods._engines import bnb_layers
    except ImportError as error:
        raise ModelError(
            f"stack: quantized base weights need bitsandbytes, which cannot be imported here ({error}); "
            "take nf4 or int8 out of the stack"
        ) from error
    return bnb_layers


def bits_of(module: nn.Module) -> int | None:
    """Return 4 or 8 for a quantized linear layer, None for any other module."""
    kinds = {"Linear4bit": 4, "Linear8bitLt": 8}
    return next((kinds[c.__name__] for c in type(module).__mro__ if c.__name__ in kinds), None)


def quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of every quantized linear layer."""
    return ((path, module) for path, module in model.named_modules() if bits_of(module) is not None)


def is_skipped(path: str, skip: Sequence[str]) -> bool:
    """Return whether a path is, lies below, or contains a named part (`lm_head`, `layers.0.mlp`, `o_proj`)."""
    return any(re.search(rf"(?:^|\.){re.escape(name)}(?:\.|$)", path) for name in skip)


def skip_patterns(skip: Sequence[str]) -> list[str]:
    """Return the same choice as `is_skipped`, as the patterns `from_pretrained` matches from the start of a path."""
    return [rf"(?:.*\.)?{re.escape(name)}" for name in (*HEADS, *skip)]


def replace_linears(model: nn.Module, skip: Sequence[str], make: Callable[[nn.Module, Tensor], nn.Module]) -> int:
    """Replace every dense linear layer (`nn.Linear`, GPT-2's `Conv1D`) that may be quantized.

    Output heads, task heads, layers kept in float32 by their family, and layers that share their weight with another module
    (a tied embedding) stay as they are.

    Args:
        make: (module, weight (out, in)) -> the quantized layer; the bias and the training mode are carried over here.

    Returns:
        How many layers were replaced.
    """
    fixed = (*HEADS, *skip, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    head = pretrained(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    uses = Counter(id(m._parameters["weight"]) for m in model.modules() if m._parameters.get("weight") is not None)
    made: dict[int, nn.Module] = {}
    for path, parent in list(model.named_modules()):
        for name, child in parent._modules.items():
            here = f"{path}.{name}" if path else name
            if child is None or not _is_dense(child) or child is head or is_skipped(here, fixed) or uses[id(child.weight)] > 1:
                continue
            if id(child) not in made:
                weight = child.weight.data.t() if type(child).__name__ == "Conv1D" else child.weight.data
                made[id(child)] = _carry(child, make(child, weight))
            parent._modules[name] = made[id(child)]
    return len(made)


def adopt(model: nn.Module, kind: type[nn.Module], skip: Sequence[str]) -> list[Any]:
    """Give every quantized layer, however it was quantized, this package's class and so its forward; nothing of them trains.

    Returns:
        The layers.

    Raises:
        ModelError: there are none.
    """
    found = [module for _, module in quantized(model)]
    if not found:
        raise ModelError(f"the model has no linear layer to quantize\n  skipped: {', '.join(skip)}")
    for module in found:
        module.__class__ = kind
        module.weight.requires_grad_(False)
    return found


def _is_dense(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


class _Linear(Protocol):
    """What is set on linear layers of any class: torch's, Transformers' Conv1D, and the quantized ones."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    nf: int
    nx: int
    source_cls: type[nn.Module]
    """The class of the dense layer that a quantized one came from."""


def _carry(old: nn.Module, new: nn.Module) -> nn.Module:
    given, made = cast(_Linear, old), cast(_Linear, new)
    made.bias = None if given.bias is None else nn.Parameter(given.bias.data, requires_grad=False)
    made.source_cls = type(old)
    return new.train(old.training)


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight (out, in) a linear layer computes with, dequantized in float32 and cast once.

    Args:
        dtype: default: the dtype the weight had before it was quantized (float16 for int8, which does not record it).
    """
    bits = bits_of(module)
    weight: Any = module.weight
    if bits == 4:
        from bitsandbytes.functional import dequantize_4bit

        known: Any = getattr(weight, "quant_state", None) or module.quant_state
        state: Any = copy.copy(known)
        state.dtype = torch.float32
        return dequantize_4bit(weight.data, state).to(dtype or known.dtype)
    if bits == 8:
        layer: Any = module
        scale = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB
        return (weight.data.float() * (scale.float() / 127.0)[:, None]).to(dtype or torch.float16)
    dense = weight.data.t() if type(module).__name__ == "Conv1D" else weight.data
    return dense if dtype is None else dense.to(dtype)


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Turn every quantized layer back into the dense layer it came from, in place; hooks and names stay.

    The weights are the ones training saw, not the original ones: an adapter was fitted to them, so it is merged onto them.

    Args:
        dtype: dtype of the dense weights; default: that of the layer's bias-free neighbours, `model.dtype`.

    Returns:
        How many layers were dequantized.
    """
    found = list(quantized(model))
    wanted = dtype or _float_dtype(model)
    for _, module in found:
        _densify(module, wanted)
    if found:
        _forget_quantization(model)
        # The anatomy records how a weight is stored; Conv1D stores it the other way round.
        model.__dict__.pop("_llmrecipe_anatomy", None)
    return len(found)


def _float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's unquantized base weights."""
    embeddings = input_embedding(model) if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embeddings, "weight", None)
    if weight is not None:
        return weight.dtype
    plain = (p.dtype for p in model.parameters() if p.is_floating_point() and not hasattr(p, "quant_state"))
    return next(plain, torch.float32)


def _densify(module: nn.Module, dtype: torch.dtype) -> None:
    weight, layer = dense_weight(module, dtype), cast(_Linear, module)
    source = module.__dict__.get("source_cls", nn.Linear)
    for name in _LIBRARY_STATE:
        module.__dict__.pop(name, None)
    module._load_state_dict_pre_hooks.clear()
    # The object stays: its hooks and all references to the module stay valid.
    module.__class__ = source
    if source.__name__ == "Conv1D":
        layer.nf, layer.nx = weight.shape
        del layer.in_features, layer.out_features
        weight = weight.t().contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)


def _forget_quantization(model: nn.Module) -> None:
    """Clear the marks Transformers left, so that the model saves and loads as an ordinary one."""
    for part in model.modules():
        config = getattr(part, "config", None)
        for holder, names in (
            (part, ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")),
            (config, ("quantization_config", "_pre_quantization_dtype", "_is_quantized")),
        ):
            for name in names:
                if holder is not None and name in vars(holder):
                    delattr(holder, name)
