"""Trained biases: those a model has, vectors added to outputs, and where both go when they are folded.

A bias of the base is trained through a master weight: a float32 copy that stands in its place while the host runs, so the
base's own tensor stays bit-equal and is back as soon as the master's wrapper is disabled.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.excluded import excluded
from llmrecipe.models.hooks.hook import Hook, all_hooks, hooks_of, row_index
from llmrecipe.models.hooks.host import add_hook, remove_hook
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.site_finder import widths
from llmrecipe.models.task_heads import is_head

if TYPE_CHECKING:
    from llmrecipe.models.site import Site


class BiasMaster(Hook):
    """A trained float32 copy of a bias, or of some of its elements, used in its place for the length of a call."""

    # Below every other weight hook (selections -1, scoring -2), which see and change the trained bias.
    order = -3
    tensor = "bias"

    rows: Tensor | None

    def __init__(self, bias: Tensor, rows: Tensor | None, tensor: str = "bias"):
        super().__init__()
        start = bias.detach() if rows is None else bias.detach()[rows]
        self.bias = nn.Parameter(start.to(torch.promote_types(bias.dtype, torch.float32), copy=True))
        self.register_buffer("rows", rows, persistent=False)
        self.tensor = tensor

    def weight(self, value: Tensor) -> Tensor:
        """Return the trained b (out,) in place of b."""
        trained = self.bias.to(value.dtype)
        return trained if self.rows is None else value.index_copy(0, self.rows, trained)

    def merge(self, module: nn.Module) -> None:
        """Set b <- the trained b, rounded once to b's dtype."""
        bias = getattr(module, self.tensor)
        bias.data = self.weight(bias.data).detach().clone()


def every_bias(model: nn.Module, pooler: bool = True) -> list[tuple[nn.Module, str]]:
    """Return (module, tensor name) of every bias the base has and the objective uses, once, at the module that applies it.

    Args:
        pooler: whether the pooler's is among them.
    """
    inside = {id(m) for _, _, _, hook in all_hooks(model) for m in hook.modules()}
    skipped = None if pooler else pooler_of(model)
    owners: dict[int, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        if id(module) in inside or is_head(model, path) or (skipped is not None and module in skipped.modules()):
            continue
        for tensor, value in module._parameters.items():
            # A container may only hold a second name of its child's bias (BERT's prediction head): the later owner applies it.
            if value is not None and tensor.endswith("bias") and not excluded(value):
                owners[id(value)] = (module, tensor)
    return list(owners.values())


def pooler_of(model: nn.Module) -> nn.Module | None:
    """Return the linear layer over the first token that encoders put below a classifier."""
    pooler = getattr(getattr(model, "base_model", model), "pooler", None)
    return getattr(pooler, "dense", pooler) if isinstance(pooler, nn.Module) else None


def train_bias(module: nn.Module, name: str, owner: str, rows: Tensor | None = None, tensor: str = "bias") -> None:
    """Add a master weight for a bias, from the value the module computes with: the base's, or what a run below trained.

    Args:
        name: the hook's child name.
        rows: elements that train; None for all.

    Raises:
        ModelError: another wrapper of the same stack trains this bias.
    """
    value = getattr(module, tensor)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    for hook in hooks_of(module, "weight", active=True):
        if isinstance(hook, BiasMaster) and hook.tensor == tensor and hook.owner != owner:
            if not hook.mounted:
                raise ModelError(f"stack.{owner}: stack.{hook.owner} trains the same biases; let one of the two train them")
            value = hook.weight(value)
    add_hook(module, name, BiasMaster(value, rows, tensor), owner)


def open_biases(model: nn.Module, owner: str, which: str, target: str, sites: list[Site], instead: str = "") -> None:
    """Add master weights for the biases that a low-rank method's `bias` names.

    Args:
        which: `none`, `all` of the base, or `lora_only`: those of the outputs of `sites`, which `target` names.
        instead: what else the recipe could say where there are none.

    Raises:
        ModelError: there are none, or another wrapper of the stack trains one of them.
    """
    if which == "none":
        return
    found: list[tuple[nn.Module, str, Tensor | None]]
    if which == "all":
        found = [(m, f"{owner}__bias", None) for m, tensor in every_bias(model) if tensor == "bias"]
    else:
        have = [s for s in sites if s.tensor is None and isinstance(getattr(s.module, "bias", None), nn.Parameter)]
        found = [(s.module, f"{s.name(owner)}__bias", row_index(s)) for s in have]
    if not found:
        where = "this model" if which == "all" else f"'{target}'"
        raise ModelError(f"stack.{owner}.bias: {where} has no biases to train; {instead or 'leave it at none'}")
    for module, name, rows in found:
        train_bias(module, name, owner, rows)


def masters(model: nn.Module) -> list[tuple[str, nn.Module, str, BiasMaster]]:
    """Return (module path, module, hook name, hook) of every bias's master weight, in stack order at each module."""
    return [(path, m, name, hook) for path, m, name, hook in all_hooks(model) if isinstance(hook, BiasMaster)]


@torch.no_grad()
def finalize_biases(model: nn.Module) -> None:
    """Write the trained value into every bias before anything is added to it."""
    for _, module, name, hook in masters(model):
        hook.merge(module)
        remove_hook(module, name)


def shifted(y: Tensor, vector: Tensor, rows: Tensor | None) -> Tensor:
    """Return y + vector, (..., out), at all outputs or at the listed ones."""
    return y + vector if rows is None else y.index_add(-1, rows, vector.expand(*y.shape[:-1], -1).contiguous())


def add_to_bias(module: nn.Module, vector: Tensor, rows: Tensor | None) -> None:
    """Add b <- b + vector (out,), in the wider of their dtypes, rounded once; the module must have a bias (`make_room`)."""
    bias: Any = module.bias
    place = slice(None) if rows is None else rows
    bias.data[place] = (bias.data[place] + vector.to(bias.device)).to(bias.dtype)


def make_room(model: nn.Module, hosts: list[tuple[str, nn.Module]], owner: str) -> None:
    """Give hosts without a bias one of zeros, with all modules that the config's flag for it covers, and set the flag.

    Args:
        hosts: (path, module); those that have a bias, their own or one that another method was given, keep it.
        owner: the wrapper, for the message.

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
        family = pretrained(model).config.model_type
        raise ModelError(f"stack.{owner}: {family} has no config flag for a bias at {lost[0]}; keep the adapter unmerged")
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
                    torch.zeros(widths(module, 0)[1], device=weight.device, dtype=dtype), requires_grad=False
                )
