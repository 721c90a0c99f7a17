"""The design space of S4: groups of layers, a budget for each layer, and sizes that spend it.

Letters: L layers of one stack of blocks, N_i layers of group i, p numbers a layer may train, d width, b bottleneck, P virtual
tokens, r rank.

    adapter   (2 d + 1) b + d        prefix   2 d_kv P        lora   (in_q + out_q + in_v + out_v) r        bitfit   its biases
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

GROUPS = ("G1", "G2", "G3", "G4")

PRESETS: dict[str, dict[str, list[str]]] = {
    "s4": {"G1": ["A", "L"], "G2": ["A", "P"], "G3": ["A", "P", "B"], "G4": ["P", "B", "L"]},
    "s4-3b": {"G1": ["P", "L"], "G2": ["A", "L"], "G3": ["P", "B", "L"], "G4": ["A", "P", "B"]},
}
"""What the paper found for T5-base, and for T5-3b."""


def group_sizes(layers: int, shape: str) -> list[int]:
    """Return N_1 .. N_4 of a grouping pattern.

    spindle      N_1 < N_2 = N_3 > N_4, N_2 = ceil(L / 3)
    bottleneck   N_1 > N_2 = N_3 < N_4, N_1 = ceil(L / 3)
    increasing   N_1 <= N_2 <= N_3 <= N_4, in the ratio 1 : 2 : 3 : 4
    decreasing   the reverse
    uniform      equal up to one

    Fewer than six layers are always grouped evenly, fewer than four leave groups out.
    """
    if layers < 6 or shape == "uniform":
        bounds = [-(-layers * i // 4) for i in range(5)]
        return [b - a for a, b in pairwise(bounds)]
    third = -(-layers // 3)
    third -= layers - 2 * third < 2
    rest = layers - 2 * third
    if shape == "spindle":
        return [rest // 2, third, third, rest - rest // 2]
    if shape == "bottleneck":
        return [third, rest // 2, rest - rest // 2, third]
    bounds = [0, *(max(i, round(layers * s / 10)) for i, s in ((1, 1), (2, 3), (3, 6))), layers]
    sizes = sorted(b - a for a, b in pairwise(bounds))
    return sizes if shape == "increasing" else sizes[::-1]


def shares(layers: int, budget: int, allocation: str) -> list[int]:
    """Return how many numbers each layer may train: equal, or rising or falling linearly from first to last."""
    found = weights(layers, allocation)
    return [int(budget * w / sum(found)) for w in found]


def weights(layers: int, allocation: str) -> list[float]:
    """Return the weight of each layer in the budget."""
    if allocation == "uniform":
        return [1.0] * layers
    rising = [float(i + 1) for i in range(layers)]
    return rising if allocation == "increasing" else rising[::-1]


@dataclass(frozen=True)
class LayerCosts:
    """What one unit of each strategy costs in a layer."""

    units: Mapping[str, int]
    """A, P, L -> numbers of one more unit of its size."""
    fixed: Mapping[str, int]
    """A, B -> numbers that do not depend on a size."""


def least(letters: Sequence[str], costs: LayerCosts) -> int:
    """Return the smallest budget of a layer that pays for one unit of each strategy, its rest shared equally."""
    sized = [letter for letter in letters if letter in costs.units]
    dearest = max((costs.units[a] + costs.fixed.get(a, 0) for a in sized), default=0)
    return (costs.fixed["B"] if "B" in letters else 0) + len(sized) * dearest


def solve(letters: Sequence[str], budget: int, costs: LayerCosts) -> dict[str, int]:
    """Return the sizes that spend a layer's budget, `least` of it or more: fixed costs first, the rest shared equally,
    leftovers greedily."""
    sized = [letter for letter in letters if letter in costs.units]
    rest = budget - (costs.fixed["B"] if "B" in letters else 0)
    sizes = {a: (rest // len(sized) - costs.fixed.get(a, 0)) // costs.units[a] for a in sized}
    left = rest - sum(costs.fixed.get(a, 0) + costs.units[a] * n for a, n in sizes.items())
    for letter in sorted(sized, key=lambda a: -costs.units[a]):
        sizes[letter] += left // costs.units[letter]
        left %= costs.units[letter]
    return sizes
