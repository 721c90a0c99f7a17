"""From a model to the map of its modules: worked out once, kept on the model, worked out anew where modules were replaced."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from llmrecipe.models.anatomy import Anatomy
from llmrecipe.models.site import Site


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a model: from the family table, else by inference from names; `model.anatomy` of a recipe wins.

    Kept on the model; worked out again when modules were replaced.

    Raises:
        ModelError: no block list or no attention could be found; the message says how to name the parts by hand.
    """
    kept = model.__dict__.get("_llmrecipe_anatomy")
    if isinstance(kept, Anatomy) and _current(model, kept.sites):
        return kept
    from llmrecipe.models.site_finder import build

    fresh = build(model, model.__dict__.get("_llmrecipe_anatomy_names"))
    model.__dict__["_llmrecipe_anatomy"] = fresh
    return fresh


def name_by_hand(model: nn.Module, names: dict[str, str] | None) -> None:
    """Give site names by hand (`model.anatomy` of a recipe): role -> path below a block, or below the model for
    `layers`, `encoder.layers`, `decoder.layers`, `norm.final` and `embed.position`."""
    if names:
        model.__dict__["_llmrecipe_anatomy_names"] = dict(names)
        model.__dict__.pop("_llmrecipe_anatomy", None)


def _current(model: nn.Module, sites: Iterable[Site]) -> bool:
    try:
        return all(model.get_submodule(site.path) is site.module for site in sites)
    except AttributeError:
        return False
