"""How far training moved each place of the model: measured once, at the end of a run, and kept in its `report.json`.

Three measures, each in a table of its own (`rows` layer -> place in it -> number, `outside` of the layers name -> number):

    weights  ||W' - W|| / ||W|| of a base tensor. What a method would merge is computed on a copy of its host, exactly; what
             trained in place is compared with a sample of at most `SAMPLE` values a tensor, taken before the first step.
    own      root mean square of theta' - theta over a method's own tensors at a place, for methods that cannot be merged.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.hooks.hook import Hook, all_hooks, hook_kind
from llmrecipe.runs.report.places import place_table

if TYPE_CHECKING:
    from llmrecipe.methods._base.stack import Stack

SAMPLE = 4096
"""Values of a tensor that are kept from before the first step."""
HOST_BYTES = 1 << 29
"""Largest host that is copied to see what a merge would make of it."""
WEIGHTS = "Change of the weights"
WEIGHTS_NOTE = f"norm of the change over the norm of the weight; in place, from {SAMPLE:,} values a tensor"
OWN_NOTE = "root mean square of the change of its tensors"

Places = dict[str, float]
"""Name of a module or of a tensor -> number."""


class StartValues:
    """A sample of a model's tensors before the first step.

    Args:
        own: also of what the methods added; False where it is not what training began with.
    """

    def __init__(self, model: nn.Module, own: bool):
        added = {id(p) for _, _, _, hook in all_hooks(model) for p in hook.parameters()}
        self.own = own
        self.values = {
            name: sampled(parameter)
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not parameter.is_meta and (own or id(parameter) not in added)
        }


def sampled(tensor: Tensor) -> Tensor:
    """Return at most `SAMPLE` values of a tensor as float32 on the CPU, at places that depend on its size alone."""
    flat, count = tensor.detach().reshape(-1), tensor.numel()
    if count > SAMPLE:
        index = torch.randint(count, (SAMPLE,), generator=torch.Generator().manual_seed(count))
        flat = flat[index.to(flat.device)]
    return flat.to("cpu", torch.float32, copy=True)


@torch.no_grad()
def change_tables(model: nn.Module, stack: Stack, start: StartValues) -> dict[str, dict[str, Any]]:
    """Return the tables of a trained model by title; those without a number are left out."""
    hooks = [(path, module, name, hook) for path, module, name, hook in all_hooks(model) if not hook.mounted]
    for _, module, _, hook in hooks:
        if hook.in_place:
            hook.weight(getattr(module, hook.tensor))  # as a forward pass would: the last update stands in the host
    added = {id(p) for _, _, _, hook in hooks for p in hook.parameters()}
    weights: Places = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in added and name in start.values and start.values[name].numel():
            before = start.values[name]
            moved = float((sampled(parameter) - before).norm())
            if moved > 0:
                weights[name.removesuffix(".weight")] = moved / max(float(before.norm()), 1e-12)
    merging = {wrapper.name for wrapper in stack if wrapper.merges()}
    own: dict[str, Places] = defaultdict(dict)
    for path, module, name, hook in hooks:
        if hook.in_place:
            continue  # its change is that of its host
        merged = _merged(path, module, name, hook) if hook.owner in merging else None
        for place, size in (merged or {}).items():
            weights[place] = math.hypot(size, weights.get(place, 0.0))
        if merged is None and start.own:
            change = _own_change(f"{path}.{name}" if path else name, hook, start)
            if change is not None:
                own[hook.owner][f"{path}{name.removeprefix(hook.owner)}"] = change
    tables = {WEIGHTS: place_table(weights, WEIGHTS_NOTE)} if weights else {}
    return tables | {f"{owner}: change": place_table(places, OWN_NOTE) for owner, places in own.items()}


def _merged(path: str, module: nn.Module, name: str, hook: Hook) -> Places | None:
    """Return how far a merge would move each tensor of the host; None where it cannot be merged on its own."""
    plain = {n: p for n, p in module._parameters.items() if p is not None and p.is_floating_point()}
    size = sum(p.numel() * p.element_size() for p in plain.values())
    others = set(module._modules) - set(getattr(module, "_hook_names", ()))
    if not plain or others or size > HOST_BYTES or hook_kind(hook) == "attention":
        return None
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {
        n: None if p is None else nn.Parameter(p.detach().clone(), False) for n, p in module._parameters.items()
    }
    twin.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    try:
        hook.merge(twin)
    except (NotImplementedError, ModelError, AttributeError):
        return None
    found = {}
    for key, before in plain.items():
        after = twin._parameters[key]
        if after is None or after.shape != before.shape:
            continue
        moved = float((after.float() - before.float()).norm())
        if moved > 0:
            place = path if key == "weight" else f"{path}.{key}"
            found[place] = moved / max(float(before.float().norm()), 1e-12)
    return found


def _own_change(prefix: str, hook: Hook, start: StartValues) -> float | None:
    """Return the root mean square of the change of a hook's tensors; None without their values from before."""
    total, count = 0.0, 0
    for key, parameter in hook.named_parameters():
        before = start.values.get(f"{prefix}.{key}")
        now = sampled(parameter)
        if before is not None and before.shape == now.shape and now.numel():
            total += float((now - before).square().mean()) * parameter.numel()
            count += parameter.numel()
    return math.sqrt(total / count) if count else None
