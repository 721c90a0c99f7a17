"""What the command line says about a merger of adapters, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from llmrecipe.interop.merge_method import MergeMethod


FLAGS = ("density", "sign")
"""Options of merge methods that have a flag of their own."""


@dataclass(frozen=True)
class MergeConfig:
    """How changes are merged."""

    kind: str = "cat"
    """Name of a merge method."""
    density: float | None = None
    """Share of the entries that is kept, for the methods that have this option."""
    sign: str = "total"
    """How a sign is elected: by the sum (`total`), or by the number of tensors (`frequency`)."""
    seed: int = 0
    """Of every random draw."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other options of the method, as the words `combine.OPTION=VALUE` give them."""

    def check(self) -> None:
        """Refuse an unknown method and options that are missing, useless or impossible.

        Raises:
            UserError: it says what is allowed.
        """
        known = registry.names("merge_method")
        if self.kind not in known:
            near = did_you_mean(self.kind, known)
            raise UserError(f"--combine: there is no '{self.kind}'{near} (allowed: {', '.join(known)})")
        if self.sign not in ("total", "frequency"):
            raise UserError(f"--sign: there is no '{self.sign}' (allowed: total, frequency)")
        options = registry.spec("merge_method", self.kind).options
        if "density" in options and self.density is None and options["density"].default is ...:
            raise UserError(
                f"--combine {self.kind} needs --density, the share of entries that is kept (TIES keeps 0.2; DARE 0.1 to 0.5)"
            )
        if "density" not in options and self.density is not None:
            having = [n for n in known if "density" in registry.spec("merge_method", n).options]
            raise UserError(f"--density: --combine {self.kind} keeps every entry; it goes with {', '.join(having)}")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise UserError(f"--density: {self.density:g} is no share of the entries; give a number above 0 and up to 1")
        own = [name for name in options if name not in FLAGS]
        for name in self.more:
            if name not in own:
                described = f"(it has: {', '.join(own)})" if own else "(it has none besides --density and --sign)"
                raise UserError(f"combine.{name}: {self.kind} has no such option{did_you_mean(name, own)} {described}")
        try:
            registry.spec("merge_method", self.kind).schema_model(**self._given())
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(map(str, detail["loc"]))
            raise UserError(
                f"combine.{key}: {detail['msg']}; `llmrecipe show merge_method.{self.kind}` has the options"
            ) from None

    def method(self) -> MergeMethod:
        """Return the merge method with its options."""
        return registry.load_class("merge_method", self.kind)(**self._given())

    def _given(self) -> dict[str, Any]:
        """Return those of the options that the method has and that are given."""
        options = registry.spec("merge_method", self.kind).options
        flags = {name: getattr(self, name) for name in FLAGS if name in options}
        return {**{name: value for name, value in flags.items() if value is not None}, **self.more}
