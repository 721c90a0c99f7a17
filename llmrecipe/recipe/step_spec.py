"""Steps as they are written: a kind and its options, in a stage of a pipeline or as overrides on the command line.

    stages:
      rows: {kind: generate, model: "${stage:sft}", prompts: "builtin:prompts", n: 2, seed: 3}

    llmrecipe step generate model=runs/... prompts=builtin:prompts n=2 seed=3 run.dir=rows

The fields of the registered class are the options; in addition there are `seed` and `plugins`, and on the command line the
sections `run` and `log` of a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, ValidationError

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.redact import name_variables
from llmrecipe.recipe.content_key import REFERENCE, content_key
from llmrecipe.recipe.renames import new_words
from llmrecipe.recipe.schema import LogSection, RunSection
from llmrecipe.recipe.section import Section

GROUP = "step"
RESULTS = ("model", "rows", "metrics")
"""Kinds of result that a stage may produce for others; a training produces a model."""


class Buildable(Protocol):
    """What the recipe layer needs of a built step (see the interface `Step`); whoever runs it knows the whole of it."""

    def check(self, where: str) -> None:
        """Refuse what would stop it, before anything starts."""

    def stands_on(self) -> Mapping[str, Any]:
        """Return JSON of what its result depends on in addition to its options."""

    def example(self) -> Mapping[str, Sequence[dict[str, Any]]]:
        """Return example rows like those it will write."""

    def model_section(self) -> Mapping[str, Any]:
        """Return the `model` section that its result is based on."""


class Frame(Section):
    """What every step has in addition to its own options."""

    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    run: RunSection = RunSection()
    log: LogSection = LogSection()
    plugins: list[str] = []


OWN = tuple(Frame.model_fields)


@dataclass(frozen=True)
class StepComposition:
    """A composed and validated step."""

    kind: str
    overrides: list[str]
    """Its overrides."""
    mapping: dict[str, Any]
    """kind, seed and every option, defaults included."""
    frame: Frame
    notes: list[str] = field(default_factory=list)

    @property
    def gives(self) -> str:
        """Return the kind of its result: one of `RESULTS`."""
        return gives(self.kind)

    @property
    def options(self) -> dict[str, Any]:
        """Return the step's own options."""
        return {k: v for k, v in self.mapping.items() if k not in ("kind", "seed", "plugins")}

    def key(self, keys: Mapping[str, str]) -> str:
        """Return the key of its result (see `content_key`).

        Raises:
            RecipeError: the step refuses its options, or a recipe it names is wrong.
        """
        return content_key({**self.mapping, **self.build().stands_on()}, keys, named=tuple(needs(self.kind)))

    @property
    def dir(self) -> Path:
        """Return `run.dir`, or a folder named after the key, so that the same overrides find their earlier result."""
        run = self.frame.run
        return Path(run.dir) if run.dir is not None else Path(run.root) / (run.name or self.kind) / self.key({})

    def build(self, where: str | None = None) -> Buildable:
        """Build the step.

        Raises:
            RecipeError: the step refuses its options.
        """
        from llmrecipe.recipe.validate import build_object

        step: Buildable = build_object(GROUP, {"kind": self.kind, **self.options}, where or self.kind)
        return step


def gives(kind: str) -> str:
    """Return the kind of result of a kind of step."""
    return str(registry.spec(GROUP, kind).facts.get("gives") or "metrics")


def result(kind: str) -> str:
    """Return the folder, within a step's own, that contains its result."""
    return str(registry.spec(GROUP, kind).facts.get("result") or "")


def needs(kind: str) -> dict[str, str]:
    """Return the options of a kind that may name another stage's result -> what that result must be."""
    return dict(registry.spec(GROUP, kind).facts.get("needs") or {})


def compose_step(kind: str, words: Sequence[str]) -> StepComposition:
    """Validate the overrides of a step.

    Raises:
        RecipeError: everything that is wrong, in one message.
    """
    from llmrecipe.recipe.mistakes import report, translate
    from llmrecipe.recipe.overrides import parse_overrides
    from llmrecipe.recipe.validate import check_component

    tree: dict[str, Any] = {}
    for word in parse_overrides(list(words), reserved=("hydra", "resume")):
        node = tree
        for part in word.key[:-1]:
            inner = node.setdefault(str(part), {})
            if not isinstance(inner, dict):
                raise RecipeError(f"'{word.text}': {part} is {inner!r}, which has no keys below it")
            node = inner
        if word.delete:
            raise RecipeError(f"'{word.text}': a step has nothing to remove; leave the option out")
        node[str(word.key[-1])] = word.value
    for package in tree.get("plugins") or [] if isinstance(tree.get("plugins"), list) else []:
        registry.add_plugin(str(package))
    registry.spec(GROUP, kind, "kind")
    frame = {k: tree.pop(k) for k in OWN if k in tree}
    notes: list[str] = []
    checked, mistakes = check_component(GROUP, new_words({"kind": kind, **tree}, notes), ())
    made = Frame()
    try:
        made = Frame.model_validate(frame)
    except ValidationError as error:
        mistakes += translate(error, frame, Frame, ())
    if mistakes:
        raise RecipeError(report(mistakes, {}))
    options = {k: v for k, v in checked.items() if k != "kind"}
    name_variables(options)
    named = {"plugins": made.plugins} if made.plugins else {}
    return StepComposition(kind, list(words), {"kind": kind, "seed": made.seed, **named, **options}, made, notes)


def unfinished(value: object) -> bool:
    """Return whether a text names the result of an unfinished stage (`${stage:x}`)."""
    return isinstance(value, str) and REFERENCE.search(value) is not None
