"""Modules a method keeps once for the model, not once at every site: state of an allocator, a table that all hooks read.

Such a module derives from `SharedModule`, is added by `add_shared` and becomes a child of the model itself. Its tensors are
saved with those of the hooks, under `<wrapper>_shared.<tensor>`. That it belongs to a wrapper is declared by its class, never
read off its name: a base model may have a child of any name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

SUFFIX = "_shared"


class SharedModule(nn.Module):
    """Base of a module that a wrapper keeps once for the whole model."""

    owner: str
    """Name of the wrapper it belongs to; set by `add_shared`."""


def shared_name(owner: str) -> str:
    """Return the name of a wrapper's shared module, which its saved tensors begin with."""
    return f"{owner}{SUFFIX}"


def owner_of_name(part: str) -> str | None:
    """Return the wrapper whose shared module has this name in a file of saved tensors, None where it cannot be one's."""
    return part.removesuffix(SUFFIX) if part.endswith(SUFFIX) else None


def add_shared(model: nn.Module, module: SharedModule, owner: str) -> None:
    """Add a wrapper's shared module to a model.

    Raises:
        ValueError: the model already has a child of that name.
    """
    name = shared_name(owner)
    if hasattr(model, name):
        raise ValueError(f"{type(model).__name__} already has a child called '{name}'")
    module.owner = owner
    model.add_module(name, module)


def remove_shared(model: nn.Module, owner: str) -> None:
    """Remove a wrapper's shared modules from a model."""
    for name, _ in list(shared_modules(model, owner)):
        delattr(model, name)


def shared_modules(model: nn.Module, owner: str | None = None) -> Iterator[tuple[str, SharedModule]]:
    """Yield (name, module) for every shared module of a model, or for those of one wrapper."""
    for name, child in model.named_children():
        if isinstance(child, SharedModule) and owner in (None, child.owner):
            yield name, child


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of everything in a model but the shared modules of wrappers."""
    added = {name for name, _ in shared_modules(model)}
    for path, module in model.named_modules():
        if path.partition(".")[0] not in added:
            yield path, module
