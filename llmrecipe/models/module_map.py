"""From a model to the map of its modules: computed once, cached on the model, recomputed when modules were replaced."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from llmrecipe.models.anatomy import Anatomy
from llmrecipe.models.site import Site
from llmrecipe.models.site_finder import build_anatomy


def anatomy(model: nn.Module) -> Anatomy:
    """Return the anatomy of a model: from the family table, else inferred from names; `model.anatomy` takes precedence.

    It is cached on the model and recomputed when modules were replaced.

    Raises:
        ModelError: no block list or no attention could be found; the message says how to name the parts by hand.
    """
    kept = model.__dict__.get("_llmrecipe_anatomy")
    if isinstance(kept, Anatomy) and _current(model, kept.sites):
        return kept

    fresh = build_anatomy(model, model.__dict__.get("_llmrecipe_anatomy_names"))
    model.__dict__["_llmrecipe_anatomy"] = fresh
    return fresh


def name_by_hand(model: nn.Module, names: dict[str, str] | None) -> None:
    """Set site names by hand (`model.anatomy` of a recipe).

    Args:
        names: role -> path below a block, or below the model for `layers`, `encoder.layers`, `decoder.layers`, `norm.final` and
            `embed.position`.
    """
    if names:
        model.__dict__["_llmrecipe_anatomy_names"] = dict(names)
        model.__dict__.pop("_llmrecipe_anatomy", None)


def _current(model: nn.Module, sites: Iterable[Site]) -> bool:
    try:
        return all(model.get_submodule(site.path) is site.module for site in sites)
    except AttributeError:
        return False
