"""S4."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, NonNegativeInt, PositiveFloat
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._base.stack import base_parameters
from llmrecipe.methods.additive._engines.prefix_kv import shape_of
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.hybrid._engines import design_space
from llmrecipe.methods.hybrid._engines.design_space import GROUPS, LayerCosts
from llmrecipe.methods.hybrid._engines.parts import part_of
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn


@register
class S4(Wrapper):
    """S4: layers in four groups, equally many trained numbers in every layer, and a set of strategies for each group.

    sum over the strategies of a layer <= budget N / L; strategies: A adapter, P prefix, B biases, L LoRA at queries and values

    The paper's design: N_1 < N_2 = N_3 > N_4 layers (spindle), and G1 (A, L), G2 (A, P), G3 (A, P, B), G4 (P, B, L). In each
    layer biases cost what they cost; the rest is shared equally and solved for integers: b = (p - d) / (2 d + 1), P = p /
    (2 d_kv), r = p / (in + out of both projections), then what is left is spent greedily. It stands for `adapter`, `lora`,
    `prefix_tuning` and `bitfit` with sizes by layer, which a recipe may write out instead: `check` prints them. Models without
    biases get zero ones (`missing: add_zero`). W_u, B and new biases start at zero; the prefix makes step 0 another model than
    the base. Not mergeable where adapters or prefixes stand. `grouping`, `allocation`, `tuned` and `assign` are the four steps
    of the paper's search (recipe s4_design).

    Paper: Parameter-Efficient Fine-Tuning Design Spaces (arXiv 2301.01821). Departures: the paper gives no group sizes; here
    N_2 = N_3 = ceil(L / 3) and the rest is split with N_4 >= N_1. Prefixes train their columns themselves, since their MLP
    would not be counted. Encoder and decoder are grouped each on its own (`scope: concat` groups both in one row).
    """

    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = False
    identity: ClassVar[bool] = False

    budget: PositiveFloat = 0.005
    """Numbers that train: a share of the model's parameters up to 1, a count above."""
    grouping: Literal["spindle", "uniform", "increasing", "decreasing", "bottleneck"] | list[NonNegativeInt] = "spindle"
    """How many layers each group has: a pattern, or four numbers."""
    allocation: Literal["uniform", "increasing", "decreasing"] = "uniform"
    """How the budget is spread over the layers, from the first to the last."""
    tuned: list[Literal["G1", "G2", "G3", "G4"]] | None = None
    """Groups that train; null takes all, and those that do share the whole budget."""
    assign: Literal["s4", "s4-3b"] | dict[Literal["G1", "G2", "G3", "G4"], list[Literal["A", "P", "B", "L"]]] = "s4"
    """Strategies of each group: the paper's for T5-base or T5-3b, or lists of letters."""
    scope: Literal["per_stack", "concat"] = "per_stack"
    """Whether encoder and decoder are grouped each on its own, or one after the other."""

    def expand(self, model: nn.Module) -> list[Wrapper]:
        """Return the parts with their sizes by layer.

        Raises:
            RecipeError: the budget does not pay for a layer's strategies, or the groups do not add up.
        """
        sides = list(dict.fromkeys(s.side for s in anatomy(model).sites if s.role == "block"))
        sides.sort(key=lambda side: side != "encoder")
        plan = self.plan(model, sides)
        return [part for side in sides for part in self._parts(side if len(sides) > 1 else "", plan[side])]

    def plan(self, model: nn.Module, sides: list[str]) -> dict[str, dict[int, dict[str, int]]]:
        """Return side -> layer -> strategy -> size; biases have size 1, layers that do not train no strategies."""
        parts = anatomy(model)
        base = base_parameters(model)
        budget = int(self.budget * base) if self.budget <= 1 else int(self.budget)
        places = {side: [(side, i) for i in range(parts.blocks(side))] for side in sides}
        rows = list(places.values()) if self.scope == "per_stack" else [[place for side in sides for place in places[side]]]
        chosen = self._strategies()
        letters = {place: chosen[group] for row in rows for place, group in zip(row, self._grouping(len(row)), strict=True)}
        trained = [place for row in rows for place in row if letters[place]]
        if not trained:
            if self.tuned == []:
                raise RecipeError(f"stack.{self.name}.tuned: no group is named, so nothing would train; null takes all four")
            if self.tuned is not None:
                named = ", ".join(self.tuned)
                raise RecipeError(
                    f"stack.{self.name}.tuned: {named} has no layer of this model with a strategy; name other groups"
                )
            raise RecipeError(f"stack.{self.name}.assign: no group of this model has a strategy")
        limits = dict(zip(trained, design_space.shares(len(trained), budget, self.allocation), strict=True))
        costs = self._costs(model)
        self._refuse_too_little(limits, budget, letters, costs)
        found: dict[str, dict[int, dict[str, int]]] = {side: {} for side in sides}
        for side, layer in letters:
            strategies = letters[side, layer]
            sizes = design_space.solve(strategies, limits[side, layer], costs[side, layer]) if strategies else {}
            found[side][layer] = sizes | ({"B": 1} if "B" in strategies else {})
        return found

    def _refuse_too_little(
        self,
        limits: dict[tuple[str, int], int],
        budget: int,
        letters: dict[tuple[str, int], list[str]],
        costs: dict[tuple[str, int], LayerCosts],
    ) -> None:
        """Refuse a budget whose share of a layer does not pay for the layer's strategies, and name one that pays for all.

        Args:
            limits: numbers that each trained layer may train, in the order of the layers.
        """
        least = {place: design_space.least(letters[place], costs[place]) for place in limits}
        short = next((place for place in limits if limits[place] < least[place]), None)
        if short is None:
            return
        weights = design_space.weights(len(limits), self.allocation)
        enough = max(math.ceil(n * sum(weights) / w) for n, w in zip(least.values(), weights, strict=True))
        raise RecipeError(
            f"stack.{self.name}.budget: {budget} numbers leave {limits[short]} for layer {short[1]}, too few for "
            f"{', '.join(letters[short])}, which need at least {least[short]} there; give {enough} or more"
        )

    def _strategies(self) -> dict[str, list[str]]:
        table: Any = design_space.PRESETS[self.assign] if isinstance(self.assign, str) else self.assign
        on = GROUPS if self.tuned is None else self.tuned
        return {group: list(table.get(group, [])) if group in on else [] for group in GROUPS}

    def _grouping(self, layers: int) -> list[str]:
        """Return the group of each layer.

        Raises:
            RecipeError: the numbers given do not add up to the layers.
        """
        sizes = design_space.group_sizes(layers, self.grouping) if isinstance(self.grouping, str) else list(self.grouping)
        if len(sizes) != 4 or sum(sizes) != layers:
            raise RecipeError(f"stack.{self.name}.grouping: needs four numbers that add up to {layers} layers; got {sizes}")
        return [group for group, count in zip(GROUPS, sizes, strict=True) for _ in range(count)]

    def _costs(self, model: nn.Module) -> dict[tuple[str, int], LayerCosts]:
        parts = anatomy(model)
        parts.at("attn.q|v")  # says what is missing where the model has no queries and values of its own
        biases = part_of(self, Bitfit, missing="add_zero").costs(model)
        found = {}
        for side, layer in biases:
            inside = {s.role: s for s in parts.sites if (s.side, s.layer) == (side, layer)}
            low_rank = sum(inside[role].width_in + inside[role].width_out for role in ("attn.q", "attn.v"))
            columns = shape_of(inside["attn"], model, 1).width
            units = {"A": 2 * parts.width + 1, "P": columns, "L": low_rank}
            found[side, layer] = LayerCosts(units, {"A": parts.width, "B": biases[side, layer]})
        return found

    def _parts(self, side: str, plan: dict[int, dict[str, int]]) -> list[Wrapper]:
        def sizes(letter: str) -> dict[str, int]:
            return {str(layer): own.get(letter, 0) for layer, own in plan.items()}

        at = f"{side}." if side else ""
        only: dict[str, Any] = {"side": side} if side else {}
        made: list[Wrapper] = []
        used = {letter for own in plan.values() for letter in own}
        if "A" in used:
            made.append(part_of(self, Adapter, side, placement="pfeiffer", sizes=sizes("A"), **only))
        if "L" in used:
            made.append(part_of(self, Lora, side, target=f"{at}attn.q|v", sizes=sizes("L")))
        if "P" in used:
            made.append(part_of(self, PrefixTuning, side, target=f"{at}attn", reparam="flat", sizes=sizes("P")))
        if "B" in used:
            layers = "|".join(str(layer) for layer, own in plan.items() if "B" in own)
            made.append(part_of(self, Bitfit, side, missing="add_zero", layers=f"{at}{layers}"))
        return made
