"""The interface of a loss mask: which tokens of a sequence are targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.registry import CONFIG

Span = tuple[int, int]
"""First token, last token + 1."""


@dataclass(frozen=True)
class Encoded:
    """One encoded sequence, as a loss mask sees it."""

    ids: Sequence[int]
    answer: int | None
    """Place of the first token after the prompt; None in a conversation without a separate prompt."""
    turns: Sequence[Span]
    """Assistant turns after the prompt, each with its end-of-turn token. A plain completion is one turn, and so is a text."""


@pydantic_dataclass(config=CONFIG, kw_only=True)
class LossMask:
    """One choice of targets, `objective.mask`. It is made from token ids, never by searching text."""

    group: ClassVar[str] = "loss_mask"
    reads_turns: ClassVar[bool] = True
    """Whether `spans` reads `turns`; they are not looked for otherwise, and no template is needed to find them."""
    turns_of_prompted: ClassVar[bool] = True
    """Whether it reads them of rows with a separate prompt too."""
    last_only: ClassVar[bool] = False
    """Whether the last turn is the only one it reads: a template may then rewrite earlier ones."""

    @property
    def name(self) -> str:
        """Name the mask is registered under."""
        return registry.name_of(type(self))

    def spans(self, encoded: Encoded) -> Sequence[Span]:
        """Return the spans of tokens that are targets; the first token of a sequence never is one."""
        raise NotImplementedError


def loss_mask(name: str) -> LossMask:
    """Return the loss mask of that name.

    Raises:
        RecipeError: there is none; the message lists them.
    """
    found: LossMask = registry.load_class("loss_mask", name, "objective.mask")()
    return found
