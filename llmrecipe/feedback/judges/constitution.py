"""A constitution: the principles by which answers are criticised, revised, compared and rated, in a YAML file of the user's.

    name: mine
    system: You judge answers.                      # optional: system message of every question
    principles:
      - id: kind
        critique: Which words of the answer are unkind?
        revision: Rewrite the answer in kind words.
        comparison: Which answer is kinder?
        rating: How kind is the answer?
    templates: {comparison: "{prompt} ... {request} ... A: {first} B: {second}"}       # optional
    few_shot: {critique: [{prompt, answer, critique, revision}], comparison: [{prompt, first, second, better: A}]}   # optional

A principle may leave out what it is not used for. Examples become earlier turns, and reach no training row.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import Field, ValidationError

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.paths import ASSETS
from llmrecipe.feedback.judges.labeller import Ask, short_hash
from llmrecipe.recipe.section import Section
from llmrecipe.recipe.yaml_file import dotted, read_yaml

FOLDER = ASSETS / "constitutions"
USES = ("critique", "revision", "comparison", "rating")
SLOTS = {
    "critique": ("prompt", "answer", "request"),
    "revision": ("prompt", "answer", "critique", "request"),
    "comparison": ("prompt", "first", "second", "request"),
    "rating": ("prompt", "answer", "request", "scale"),
}
"""Fields that each template may have in braces."""
NEEDED = {"critique": ("answer",), "revision": ("answer",), "comparison": ("first", "second"), "rating": ("answer",)}


class Principle(Section):
    """One principle."""

    id: str = Field(min_length=1)
    critique: str | None = None
    revision: str | None = None
    comparison: str | None = None
    rating: str | None = None


class Templates(Section):
    """The words around a principle's request."""

    critique: str = "Question:\n{prompt}\n\nAnswer:\n{answer}\n\n{request}"
    revision: str = (
        "Question:\n{prompt}\n\nAnswer:\n{answer}\n\nCritique:\n{critique}\n\n{request}\n"
        "Reply with the new answer and nothing else."
    )
    comparison: str = (
        "Question:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n{request}\nReply with one letter, A or B."
    )
    rating: str = (
        "Question:\n{prompt}\n\nAnswer:\n{answer}\n\n{request}\nReply with one number from 1 (worst) to {scale} (best)."
    )
    reasoning: str = "Think it through step by step before you decide."
    """Added to a comparison with a chain of thought."""
    verdict: str = "So which answer is it? Reply with one letter, A or B."
    """Request for the verdict after the chain of thought."""


class Criticised(Section):
    """An example of a critique and a revision."""

    prompt: str
    answer: str
    critique: str
    revision: str


class Compared(Section):
    """An example of a comparison."""

    prompt: str
    first: str
    second: str
    better: Literal["A", "B"]


class FewShot(Section):
    """Examples."""

    critique: list[Criticised] = Field(default_factory=list)
    comparison: list[Compared] = Field(default_factory=list)


class Constitution(Section):
    """The validated file."""

    name: str = "constitution"
    system: str | None = None
    principles: list[Principle] = Field(min_length=1)
    templates: Templates = Templates()
    few_shot: FewShot = FewShot()

    @property
    def id(self) -> str:
        """Return its name and a digest of its content."""
        return f"{self.name}:{short_hash(self.model_dump())}"

    def choose(self, wanted: Sequence[str], uses: Sequence[str], where: str) -> list[Principle]:
        """Select the principles of these ids (all where none is named) that have the texts a step needs.

        Raises:
            RecipeError: an id is unknown, or a principle that was named lacks a text, or none has it.
        """
        known = {p.id: p for p in self.principles}
        for name in wanted:
            if name not in known:
                near = did_you_mean(name, known)
                raise RecipeError(f"{where}: {self.name} has no principle '{name}'{near} (known: {', '.join(known)})")
        lacking = {name: [u for u in uses if getattr(p, u) is None] for name, p in known.items()}
        for name in wanted:
            if lacking[name]:
                raise RecipeError(f"{where}: the principle '{name}' of {self.name} has no {' and no '.join(lacking[name])}")
        found = [p for name, p in known.items() if not lacking[name] and (not wanted or name in wanted)]
        if not found:
            raise RecipeError(f"{where}: no principle of {self.name} has a {' and a '.join(uses)}")
        return found

    # --- questions ------------------------------------------------------------------------------------------------

    def ask_critique(self, principle: Principle, prompt: str, answer: str, columns: Mapping[str, Any]) -> Ask:
        """Build the request for a critique of an answer."""
        turns: list[dict[str, str]] = []
        for shot in self.few_shot.critique:
            words = self._words("critique", principle, prompt=shot.prompt, answer=shot.answer)
            turns += _exchange(words, shot.critique)
        words = self._words("critique", principle, prompt=prompt, answer=answer)
        return self._ask(turns, words, "critique", principle, columns, prompt=prompt, answer=answer)

    def ask_revision(self, principle: Principle, prompt: str, answer: str, critique: str, columns: Mapping[str, Any]) -> Ask:
        """Build the request for a revision of an answer, given its critique."""
        turns: list[dict[str, str]] = []
        for shot in self.few_shot.critique:
            words = self._words("revision", principle, prompt=shot.prompt, answer=shot.answer, critique=shot.critique)
            turns += _exchange(words, shot.revision)
        words = self._words("revision", principle, prompt=prompt, answer=answer, critique=critique)
        return self._ask(turns, words, "revise", principle, columns, prompt=prompt, answer=answer, critique=critique)

    def ask_comparison(
        self, principle: Principle, prompt: str, first: str, second: str, columns: Mapping[str, Any], reasoning: bool = False
    ) -> Ask:
        """Build the request for a comparison: which of two answers is better, A or B."""
        turns: list[dict[str, str]] = []
        for shot in self.few_shot.comparison if not reasoning else ():
            words = self._words("comparison", principle, prompt=shot.prompt, first=shot.first, second=shot.second)
            turns += _exchange(words, shot.better)
        words = self._words("comparison", principle, prompt=prompt, first=first, second=second)
        words = f"{words}\n{self.templates.reasoning}" if reasoning else words
        return self._ask(turns, words, "compare", principle, columns, prompt=prompt, first=first, second=second)

    def ask_verdict(self, reasoned: Ask, rationale: str) -> Ask:
        """Build the request for the verdict letter that follows a chain of thought."""
        turns = (*reasoned.turns, {"role": "assistant", "content": rationale}, _user(self.templates.verdict))
        return Ask(turns, reasoned.task, reasoned.parts)

    def ask_rating(self, principle: Principle, prompt: str, answer: str, scale: int, columns: Mapping[str, Any]) -> Ask:
        """Build the request for a rating of an answer from 1 to `scale`."""
        words = self._words("rating", principle, prompt=prompt, answer=answer, scale=str(scale))
        return self._ask([], words, "rate", principle, columns, prompt=prompt, answer=answer)

    def _words(self, use: str, principle: Principle, **slots: str) -> str:
        return str(getattr(self.templates, use)).format(request=getattr(principle, use) or "", **slots)

    def _ask(
        self, turns: list[dict[str, str]], words: str, task: str, principle: Principle, columns: Mapping[str, Any], **parts: str
    ) -> Ask:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return Ask((*system, *turns, _user(words)), task, {**parts, "principle": principle.id, "columns": dict(columns)})


def _user(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def _exchange(words: str, reply: str) -> list[dict[str, str]]:
    return [_user(words), {"role": "assistant", "content": reply}]


def sample_principles(principles: Sequence[Principle], count: int, *seed: object) -> list[Principle]:
    """Sample `count` different principles (all where there are fewer), seeded by any JSON values."""
    rng = Random(short_hash(*seed))
    return rng.sample(list(principles), min(count, len(principles)))


def shipped() -> list[str]:
    """Return the names of the constitutions inside the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_constitution(name: str, where: str) -> Constitution:
    """Read a constitution of the package by its name, or from a file.

    Raises:
        RecipeError: there is none, or everything that is wrong with it, with file and line.
    """
    path = FOLDER / f"{name}.yaml" if name in shipped() else Path(name).expanduser()
    if not path.is_file():
        near = did_you_mean(name, shipped())
        raise RecipeError(
            f"{where}: there is no file {name} and no constitution of that name{near} (in the package: {', '.join(shipped())})"
        )
    file = read_yaml(path)
    try:
        made = Constitution.model_validate(file.value)
    except ValidationError as error:
        from llmrecipe.recipe.mistakes import translate

        wrong = [(m.key, m.text) for m in translate(error, file.value, Constitution, (), "a constitution")]
        raise RecipeError("\n".join(f"{file.where(*key)}: {dotted(key)}: {text}" for key, text in wrong)) from error
    mistakes = [f"{file.where(*key)}: {dotted(key)}: {text}" for key, text in _mistakes(made)]
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return made


def _mistakes(made: Constitution) -> list[tuple[tuple[str | int, ...], str]]:
    """List mistakes that types alone do not forbid: repeated ids, principles without a request, templates with wrong fields."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    ids = [p.id for p in made.principles]
    for index, principle in enumerate(made.principles):
        at = ("principles", index)
        if principle.id in ids[:index]:
            found.append(((*at, "id"), f"two principles are called '{principle.id}'"))
        if all(getattr(principle, use) is None for use in USES):
            found.append((at, f"the principle '{principle.id}' has no request; give one of {', '.join(USES)}"))
    for use, allowed in SLOTS.items():
        key = ("templates", use)
        try:
            slots = [name for _, name, _, _ in string.Formatter().parse(getattr(made.templates, use)) if name is not None]
        except ValueError as error:
            found.append((key, f"not a template ({error}); a brace that is meant as such is written twice"))
            continue
        for slot in slots:
            if slot not in allowed:
                listed = ", ".join(f"{{{a}}}" for a in allowed)
                found.append((key, f"has no slot {{{slot}}}{did_you_mean(slot, allowed)} (slots: {listed})"))
        if not any(slot not in allowed for slot in slots):
            missing = [f"{{{slot}}}" for slot in (*NEEDED[use], "request") if slot not in slots]
            if missing:
                found.append((key, f"does not say {' and '.join(missing)}"))
    return found
