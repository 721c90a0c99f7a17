"""The first update, as every training proves it."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.foreign import read_json
from llmrecipe.core.registry import register
from llmrecipe.evaluation.verify.bench import Bench
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification


@register
class UpdateProof(Verification):
    """Frozen tensors unchanged, trained ones changed, hooks called, options read, values of step 0 as declared."""

    order: ClassVar[int] = 0

    def measure(self, bench: Bench) -> Measured:
        """Train a few steps; the training itself refuses what is wrong.

        Raises:
            NotApplicable: no trained tensor moved, since there was nothing to learn from the first update.
        """
        path = bench.run.dir.path / "report.json"
        proved = read_json(path)["proved"]
        frozen, trained, keys = proved["frozen"], proved["trained"], proved["keys"]
        text = (
            f"{frozen['unchanged']} of {frozen['tensors']} frozen tensors unchanged, {trained['changed']} of "
            f"{trained['tensors']} trained ones changed, {proved['hooks']} hooks called, {keys['set']} options read"
        )
        if "step_zero" in proved:
            text += f", {len(proved['step_zero'])} values of step 0"
        if trained["tensors"] and not trained["changed"]:
            raise NotApplicable(f"{text}: the first update had no gradient, as when all rewards of a group are equal")
        return Measured(text, 0.0, 0.0)
