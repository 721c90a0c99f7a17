"""How the base of a chain of runs is stored: dense, in 8 bits or in 4, and how a run continues from another way of storing it.

Each run of a chain may quantize its base in another way. An adapter was fitted to the weights as they were stored, so a change
goes through these: dequantize, then quantize again. Opening the chain goes the same way, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines.quantized import dequantize_model
from llmrecipe.runs import delta

if TYPE_CHECKING:
    from torch import nn


def base_wrappers(wrappers: Sequence[Wrapper]) -> list[Wrapper]:
    """Return the wrappers that determine how the base is stored."""
    return [w for w in wrappers if w.stage is Stage.BASE]


def storages(layers: Sequence[delta.Layer]) -> list[list[Wrapper]]:
    """Return the ways in which the base of saved stacks was stored, one after the other; a stack without one keeps the last."""
    found: list[list[Wrapper]] = []
    for layer in layers:
        own = base_wrappers([delta.build_wrapper(name, mapping, layer.source) for name, mapping in layer.wrappers.items()])
        if own and not (found and alike(found[-1], own)):
            found.append(own)
    return found


def alike(first: Sequence[Wrapper], second: Sequence[Wrapper]) -> bool:
    """Return whether two ways of storing the base hold the same numbers; they may compute with them differently."""
    return _stored(first) == _stored(second)


def _stored(wrappers: Sequence[Wrapper]) -> list[dict[str, Any]]:
    mappings = [{k: v for k, v in delta.wrapper_mapping(w).items() if k not in w.compute_options} for w in wrappers]
    return sorted(mappings, key=lambda mapping: str(mapping["kind"]))


def convert(model: nn.Module, wrappers: Sequence[Wrapper]) -> None:
    """Store a quantized base in another way, from the weights it is computed with. Call before anything is mounted on it."""
    dequantize_model(model)
    for wrapper in wrappers:
        wrapper.attach(model)


def storage_below(layers: Sequence[delta.Layer], wrappers: Sequence[Wrapper]) -> list[Wrapper]:
    """Return what stores the base where a stack is trained on saved ones: its own wrappers, else those of the last of them."""
    known = storages(layers)
    return base_wrappers(wrappers) or (known[-1] if known else [])


def check_change(layers: Sequence[delta.Layer], wrappers: Sequence[Wrapper], path: str) -> None:
    """Refuse, before weights are read, a way of storing the base that the stacks on it cannot follow.

    Args:
        layers: saved stacks.
        wrappers: the recipe's own.
        path: of the run they come from, for the message.

    Raises:
        RecipeError: the codes of the base were learned together with an adapter.
    """
    known, own = storages(layers), base_wrappers(wrappers)
    if not own or (known and alike(known[-1], own)):
        return
    for layer in layers:
        for name, mapping in layer.wrappers.items():
            if mapping.get("init") == "loftq":
                kinds = ", ".join(delta.kind_name(w) for w in (known[-1] if known else []))
                raise RecipeError(
                    f"stack.{own[0].name}: {name} of {path} was initialized together with the codes of its base ({kinds}); "
                    f"keep them (leave {own[0].name} out), or quantize a merged export: llmrecipe export {path} --to merged"
                )
