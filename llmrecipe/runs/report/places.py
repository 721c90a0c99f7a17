"""Numbers by place of a model, as a table of layers and what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def place_table(places: Mapping[str, float], note: str) -> dict[str, Any]:
    """Return numbers of modules or tensors by name as a table: `rows` layer -> place in it, `outside` what is in no layer.

    Args:
        note: what the numbers are.

    Examples:
        >>> place_table({"model.layers.3.mlp.up_proj": 2, "lm_head": 1}, "rank")
        {'note': 'rank', 'rows': {'3': {'mlp.up_proj': 2}}, 'outside': {'lm_head': 1}}
    """
    rows: dict[str, dict[str, float]] = {}
    outside: dict[str, float] = {}
    split = {name: place_in_layer(name) for name in places}
    sides = {found[0] for found in split.values() if found is not None}
    for name, value in places.items():
        found = split[name]
        if found is None:
            outside[name] = value
        else:
            side, layer, rest = found
            rows.setdefault(f"{side} {layer}" if len(sides) > 1 else layer, {})[rest] = value
    return {"note": note, "rows": rows, "outside": outside}


def place_in_layer(name: str) -> tuple[str, str, str] | None:
    """Return what a layer is part of, its number, and the place in it that a name ends with; None outside of the layers.

    Examples:
        >>> place_in_layer("model.layers.3.mlp.up_proj"), place_in_layer("lm_head")
        (('model.layers', '3', 'mlp.up_proj'), None)
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :]) or "block")
