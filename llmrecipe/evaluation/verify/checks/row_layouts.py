"""Packed rows, padded rows and one row at a time."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.evaluation.verify.bench import Bench, largest
from llmrecipe.evaluation.verify.verification import Measured, Verification


@register
class RowLayouts(Verification):
    """Loss and gradients of packed rows = those of padded rows = those of one row at a time."""

    order: ClassVar[int] = 10

    def measure(self, bench: Bench) -> Measured:
        """Compare every layout the recipe may use with one row at a time."""
        ways = {"padded": (False, None)} | ({"packed": (True, None)} if bench.run.roles.packing else {})
        single = totals(bench, False, 1)
        worst, culprit = 0.0, ""
        for name, (packing, rows) in ways.items():
            apart, where = largest_of(single, totals(bench, packing, rows))
            if not apart <= worst:
                worst, culprit = apart, f"{name}: {where}"
        what = "loss and gradients" if bench.by_gradient else "loss"
        packed = "" if "packed" in ways else " (rows are not packed)"
        return Measured(f"{what} of {' = '.join(reversed(ways))} = one row at a time{packed}", worst, bench.bound, culprit)


def totals(bench: Bench, packing: bool, rows: int | None) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of the probe rows in one layout, and its gradients by name."""
    with bench.probing(packing, rows) as run:
        micros = bench.micros(run)
        weight = max(sum(run.objective.weight(m) for m in micros), 1e-12)
        total = 0.0
        for micro in micros:
            loss = run.objective.loss(micro, run.roles).total / weight
            total += float(loss.detach())
            if bench.by_gradient and loss.requires_grad:
                loss.backward()
        return total, bench.gradients()


def largest_of(wanted: tuple[float, dict[str, Tensor]], found: tuple[float, dict[str, Tensor]]) -> tuple[float, str]:
    """Return the larger of the differences of two losses and of their gradients, and where it is."""
    loss = abs(wanted[0] - found[0]) / max(1.0, abs(wanted[0]))
    apart, where = largest(wanted[1], found[1])
    return (loss, "loss") if not loss <= apart else (apart, f"gradient of {where}")
