"""BitFit in PEFT's layout, and back.

    BEFT         <path>.beft_bias (1, out): added to the output of a linear layer, our trained bias less the base's
    LN_TUNING    <path>.ln_tuning_layers.{weight, bias} (d): a norm as a whole, with the base's weight and our bias

A folder holds one of the two: biases of linear layers, or those of LayerNorms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.interop.peft.layout import PREFIX, Adapter
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._engines.biases import BiasMaster
from llmrecipe.methods.selective.bitfit import TERMS
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy
from llmrecipe.runs.delta import Layer, build_wrapper

KINDS = ("BEFT", "LN_TUNING")
BEFT, NORM = ".beft_bias", ".ln_tuning_layers."


@torch.no_grad()
def bias_adapter(wrapper: Wrapper, model: nn.Module) -> Adapter | None:
    """Return biases of linear layers, or of LayerNorms, by module; None where PEFT cannot hold one, or both in one folder."""
    biases: dict[str, Tensor] = {}
    hosts: dict[str, Any] = {}
    for path, module, _, hook in all_hooks(model, wrapper.name):
        owned: Any = hook
        if owned.rows is not None or (isinstance(hook, BiasMaster) and hook.tensor != "bias"):
            return None
        hosts[path] = module
        biases[path] = owned.bias.detach().float()
    linear = all(isinstance(module, nn.Linear) for module in hosts.values())
    if not linear and not all(isinstance(module, nn.LayerNorm) for module in hosts.values()):
        return None
    if _bitfit(model, set(hosts)) is None:
        return None
    tensors: dict[str, Tensor] = {}
    for path, module in hosts.items():
        if linear:
            base = module.bias if isinstance(module.bias, nn.Parameter) else torch.zeros_like(biases[path])
            tensors[f"{PREFIX}{path}{BEFT}"] = (biases[path] - base.detach().float())[None]
        else:
            tensors[f"{PREFIX}{path}{NORM}weight"] = module.weight.detach()
            tensors[f"{PREFIX}{path}{NORM}bias"] = biases[path]
    kind = KINDS[0] if linear else KINDS[1]
    return Adapter({"peft_type": kind, "target_modules": sorted(hosts), "inference_mode": True}, tensors)


def _bitfit(model: nn.Module, paths: set[str]) -> dict[str, Any] | None:
    """Return options under which BitFit trains the biases of exactly these modules; None where no choice of terms does."""
    roles = {site.role for site in anatomy(model).sites if site.path in paths}
    terms = [term for term, own in TERMS.items() if roles & set(own)]
    terms += ["norm"] * any(role.startswith("norm.") for role in roles)
    for missing in ("existing_only", "add_zero"):
        options = {"kind": "bitfit", "terms": terms, "missing": missing}
        bitfit: Any = build_wrapper("bitfit", options)
        if {site.path for site in bitfit.chosen(model)} == paths:
            return options
    return None


def read_biases(adapter: Adapter, model: nn.Module, where: str) -> Layer:
    """Read a BEFT or LN tuning folder as a `bitfit` layer.

    Raises:
        ModelError: it changes other modules than BitFit's terms name, or the scale of a norm.
    """
    found: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        path, norm, tensor = name.partition(NORM)
        if name.endswith(BEFT):
            path = name.removesuffix(BEFT)
            own = getattr(_module(model, path, where), "bias", None)
            found[path] = value.float()[0] + (0.0 if own is None else own.detach().float())
        elif norm and tensor == "bias":
            found[path] = value.float()
        elif norm:
            scale = _module(model, path, where).get_parameter("weight")
            if not torch.equal(scale.detach().float(), value.float()):
                raise ModelError(f"{where}: it trained the scale of {path} as well, which has no counterpart here")
        else:
            rest[name.replace(".modules_to_save.", ".")] = value
    options = _bitfit(model, set(found))
    if options is None:
        raise ModelError(f"{where}: the biases of {', '.join(sorted(found)[:3])} ... are no set that bitfit's terms name")
    tensors = {f"{path}.bitfit.bias": value for path, value in found.items()}
    return Layer({"bitfit": options}, {}, tensors={**tensors, **rest})


def _module(model: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{where}: it adapts {path}, which this model does not have") from None
