"""Learned vectors added to outputs, and where they go when they are folded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.errors import ModelError


def shifted(y: Tensor, vector: Tensor, rows: Tensor | None) -> Tensor:
    """y + vector, at all outputs or at the listed ones."""
    return y + vector if rows is None else y.index_add(-1, rows, vector.expand(*y.shape[:-1], -1).contiguous())


def add_to_bias(module: nn.Module, vector: Tensor, rows: Tensor | None) -> None:
    """b <- b + vector, in the wider of their dtypes, rounded once; the module must have a bias (`make_room`)."""
    bias: Any = module.bias
    place = slice(None) if rows is None else rows
    bias.data[place] = (bias.data[place] + vector.to(bias.device)).to(bias.dtype)


def make_room(model: nn.Module, hosts: list[tuple[str, nn.Module]], owner: str) -> None:
    """Give hosts without a bias one of zeros, with all modules that the config's flag for it gives one, and set the flag.

    Args:
        hosts: (path, module); those that have a bias, their own or one that another method was given, keep it.
        owner: the wrapper that asks, for the message.

    Raises:
        ModelError: the family has no flag that gives these modules a bias.
    """
    bare = [path for path, module in hosts if getattr(module, "bias", None) is None]
    if not bare:
        return
    config = model.config
    flags = [f for f in ("attention_bias", "mlp_bias") if getattr(config, f, None) is False]
    fresh: dict[str, Any] = {}
    for flag in flags:
        wanted = copy.deepcopy(config)
        setattr(wanted, flag, True)
        with torch.device("meta"):
            fresh[flag] = {path for path, m in type(model)(wanted).named_modules() if getattr(m, "bias", None) is not None}
    lost = [path for path in bare if not any(path in paths for paths in fresh.values())]
    if lost:
        raise ModelError(
            f"stack.{owner}: {model.config.model_type} has no config flag for a bias at {lost[0]}; keep the adapter unmerged"
        )
    for flag, paths in fresh.items():
        if not any(path in paths for path in bare):
            continue
        setattr(config, flag, True)
        for path in paths:
            module = model.get_submodule(path)
            if getattr(module, "bias", None) is None:
                weight: Any = module.weight
                dtype = weight.dtype if weight.is_floating_point() else torch.float32
                module.bias = nn.Parameter(
                    torch.zeros(int(module.out_features), device=weight.device, dtype=dtype), requires_grad=False
                )
