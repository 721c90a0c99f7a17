"""The target grammar: a plain string that names sites and can be typed on a command line without quotes.

target  = term { " + " term }                 union
term    = [side "."] ["layers." range "."] names
side    = "encoder" | "decoder"
range   = "*" | index { "|" index }           Python indices and slices: 3, -1, 0:4, 4:, ::2
names   = role with "|" in its last part      attn.q|v, norm, mlp.*, experts.0|5, attn|mlp, all-linear
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmrecipe.core.errors import ModelError

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

TERM = re.compile(r"(?:(?P<side>encoder|decoder)\.)?(?:layers\.(?P<range>[-\d:|*]+)(?:\.|$))?(?P<names>.*)")
INDEX = re.compile(r"-?\d+")
SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")
EXPERTS = re.compile(r"(?P<role>experts(?:\.gate_up|\.down)?)\.(?P<chosen>\d+(?:\|\d+)*)")

LINEAR = ("attn.", "cross.", "mlp.", "shared.")
"""Prefixes of the roles that `all-linear` includes."""


@dataclass(frozen=True)
class Term:
    """One term of a target."""

    text: str
    side: str | None
    layers: str | None
    names: tuple[str, ...]
    """Roles, with alternatives expanded."""
    experts: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def tail(self) -> str:
        """Return what follows side and layers, as typed."""
        return TERM.fullmatch(self.text)["names"]  # type: ignore[index]


def parse_target(target: str) -> list[Term]:
    """Parse a target.

    Raises:
        ModelError: a term is empty, has a malformed range or names a range of layers without a part.

    Examples:
        >>> [term.names for term in parse_target("attn.q|v + layers.0:4.mlp.down")]
        [('attn.q', 'attn.v'), ('mlp.down',)]
    """
    return [_term(part.strip(), target) for part in target.split("+")]


def _term(text: str, target: str) -> Term:
    found = TERM.fullmatch(text)
    if not text or found is None:
        raise ModelError(f"target '{target}': an empty term; terms look like 'attn.q|v' and are joined by ' + '")
    side, layers, names = found["side"], found["range"], found["names"]
    if not names:
        raise ModelError(f"target '{target}': '{text}' names layers but no part of them; write '{text}.block' or '{text}.mlp'")
    if names.startswith("layers"):
        raise ModelError(f"target '{target}': '{text}' has a malformed range; write 'layers.3.mlp' or 'layers.0:4.mlp'")
    if layers is not None and layers != "*":
        for part in layers.split("|"):
            if not INDEX.fullmatch(part) and not SLICE.fullmatch(part):
                raise ModelError(f"target '{target}': '{part}' is neither a layer nor a range such as 0:4")
    experts = EXPERTS.fullmatch(names)
    if experts:
        chosen = tuple(sorted({int(number) for number in experts["chosen"].split("|")}))
        return Term(text, side, layers, (experts["role"],), chosen)
    head, dot, last = names.rpartition(".")
    return Term(text, side, layers, tuple(head + dot + name.strip() for name in last.split("|")))


def select_sites(term: Term, sites: list[Site], blocks: Callable[[str], int]) -> list[Site]:
    """Return the sites a term names, in model order; an empty list where any of its alternatives matches nothing."""
    scope = [site for site in sites if term.side in (None, site.side)]
    if term.layers is not None:
        scope = [site for site in scope if site.layer is not None and _in_range(site.layer, term, blocks(site.side))]
    found: list[Site] = []
    for name in term.names:
        matched = _matching(name, scope)
        if not matched:
            return []
        found += matched
    if term.experts is not None:
        over = [site for site in found if site.experts <= term.experts[-1]]
        if over:
            raise ModelError(f"target '{term}': this model has experts 0 to {over[0].experts - 1}")
        found = [replace(site, chosen=term.experts) for site in found]
    return found


def _matching(name: str, scope: list[Site]) -> list[Site]:
    if name == "all-linear":
        linear = [s for s in scope if s.role.startswith(LINEAR) and s.role != "shared.router"]
        return _whole(linear)
    if name in ("experts.gate_up", "experts.down"):
        return [s for s in scope if s.role == "experts" and s.tensor == f"{name.split('.')[1]}_proj"]
    if name == "*" or name.endswith(".*"):
        return _whole([s for s in scope if s.role.startswith(name[:-1])])
    if name == "norm":
        return [s for s in scope if s.role.startswith("norm.")]
    return [s for s in scope if s.role == name]


def _whole(sites: list[Site]) -> list[Site]:
    """Drop the parts of fused projections, so that each counts once, as a whole."""
    whole = {site.path for site in sites if site.rows is None}
    return [site for site in sites if site.rows is None or site.path not in whole]


def _in_range(layer: int, term: Term, count: int) -> bool:
    if term.layers == "*":
        return True
    for part in str(term.layers).split("|"):
        if INDEX.fullmatch(part):
            index = int(part)
            if layer == (index if index >= 0 else count + index):
                return True
        elif layer in range(count)[slice(*(int(n) if n else None for n in part.split(":")))]:
            return True
    return False
