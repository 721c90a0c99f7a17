"""Yes or no about values of a device, answered by those of an earlier step, so that the host does not wait in this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmrecipe.data.transfer import Arriving


class LateAnswers:
    """Questions of one module about values, and their answers.

    Values of the host are looked at. So are those of a device outside training, and the first time. After that the answer is
    that of the step before the last one, whose values have arrived when a step ends: which step answers does not depend on how
    fast the device is.
    """

    def __init__(self) -> None:
        self.training = False
        """Whether the forward pass is one of training."""
        self.known: dict[str, bool] = {}
        self.pending: dict[str, Tensor] = {}
        self.coming: tuple[Arriving, list[tuple[LateAnswers, str]]] | None = None
        """Of the first module of a method: the values of the last step, for all its modules in one copy."""

    def answers(self, value: Tensor) -> bool:
        """Return whether a question about values on the device of one is answered late."""
        return self.training and value.device.type != "cpu"

    def answer(self, question: str, value: Tensor) -> bool:
        """Return the answer to a question, by name.

        Args:
            value: what it is in this step, one boolean.
        """
        if not self.answers(value):
            return bool(value)
        self.pending[question] = value.detach()
        if question not in self.known:
            self.known[question] = bool(value)
        return self.known[question]

    def __deepcopy__(self, memo: dict[int, Any]) -> LateAnswers:
        """Return one that has no answers: a copy of a module has values of its own."""
        return LateAnswers()


def arrive(modules: Sequence[LateAnswers]) -> None:
    """Take over the answers of the last step and send for those of this one, for all modules of a method in one copy."""
    if not modules:
        return
    first = modules[0]
    if first.coming is not None:
        arriving, places = first.coming
        for (module, question), value in zip(places, arriving.values(), strict=True):
            module.known[question] = bool(value)
    places = [(module, question) for module in modules for question in module.pending]
    first.coming = (Arriving([module.pending[question] for module, question in places]), places) if places else None
    for module in modules:
        module.pending = {}
