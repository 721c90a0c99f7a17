"""The stages of a pipeline as they are written: their form, rounds unrolled, and their order (see `recipe.pipeline_plan`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.compose import Composition, section_defaults
from llmrecipe.recipe.content_key import REFERENCE
from llmrecipe.recipe.matrix import expand
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.provenance import leaves, origin_of
from llmrecipe.recipe.run_recipe import inherited
from llmrecipe.recipe.yaml_file import KeyPath, dotted

NAME = re.compile(r"[A-Za-z_][\w-]*")
OWN = ("recipe", "with", "inherit", "matrix", "rounds", "start", "stages")
"""Keys of a stage; it may also have those of a recipe."""
SETTABLE = tuple(k for k in section_defaults() if k not in ("stages", "search", "plugins", "run"))


@dataclass(frozen=True)
class WrittenStage:
    """One stage as written, rounds unrolled."""

    name: str
    at: KeyPath
    """Its key in the pipeline's recipe."""
    what: str
    """Name of the recipe, or kind of the step."""
    words: tuple[str, ...]
    round: int = 1
    step: bool = False
    plugins: tuple[str, ...] = ()
    """Plugins of the pipeline, which its stages know too."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the stages whose results it names."""
        return tuple(dict.fromkeys(name for word in self.words for name in REFERENCE.findall(word)))


def parse_stages(pipeline: Composition) -> list[WrittenStage]:
    """Parse the stages as written, rounds unrolled.

    Raises:
        RecipeError: every mistake in the section, in one message.
    """
    expanded = expand(pipeline.recipe.stages or {})
    mistakes = [f"{text}{origin_text(pipeline, key)}" for key, text in expanded.mistakes]
    stages: list[WrittenStage] = []
    last: dict[str, str] = {}
    for name, written in expanded.bodies.items():
        at: KeyPath = ("stages", expanded.written[name])
        body, wrong = inherited(written, pipeline, at)
        wrong = _wrong(name, body, at) + wrong
        mistakes += [f"{text}{origin_text(pipeline, key)}" for key, text in wrong]
        if wrong:
            continue
        assert isinstance(body, Mapping)
        if "rounds" in body:
            unrolled, ends, wrong = _rounds(name, body, at)
            mistakes += [f"{text}{origin_text(pipeline, key)}" for key, text in wrong]
            last |= ends
            stages += unrolled
        else:
            stages.append(_stage(name, at, body))
    if mistakes:
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))
    stages = [_renamed(s, lambda n: f"${{stage:{last.get(n, n)}}}") for s in stages]
    stages = [dataclasses.replace(s, plugins=tuple(pipeline.recipe.plugins)) for s in stages]
    names = [s.name for s in stages]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise RecipeError(f"stages: two stages are called '{repeated[0]}' (rounds are numbered NAME-1, NAME-2, ...)")
    return stages


def in_order(stages: list[WrittenStage], pipeline: Composition) -> list[WrittenStage]:
    """Sort stages after the ones they need, otherwise in the order they are written.

    Raises:
        RecipeError: a stage that is not there, or stages that wait for each other.
    """
    known = {s.name: s for s in stages}
    mistakes = [
        f"{dotted(s.at)}: ${{stage:{name}}}: there is no stage '{name}'{did_you_mean(name, known)} "
        f"(stages: {', '.join(known)}){origin_text(pipeline, s.at)}"
        for s in stages
        for name in s.inputs
        if name not in known
    ]
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    done: dict[str, WrittenStage] = {}

    def visit(stage: WrittenStage, above: tuple[str, ...]) -> None:
        if stage.name in done:
            return
        if stage.name in above:
            circle = " -> ".join([*above[above.index(stage.name) :], stage.name])
            raise RecipeError(
                f"stages: {circle}: each of these waits for the next; `rounds: N` repeats a stage on its own result"
                f"{origin_text(pipeline, stage.at)}"
            )
        for name in stage.inputs:
            visit(known[name], (*above, stage.name))
        done[stage.name] = stage

    for stage in stages:
        visit(stage, ())
    return list(done.values())


def _wrong(name: str, body: object, at: KeyPath, inner: bool = False) -> list[tuple[KeyPath, str]]:
    """Return what is wrong with the form of one stage."""
    if not NAME.fullmatch(name):
        return [(at, f"{dotted(at)}: a stage's name is letters, digits, _ and -, and starts with a letter")]
    if not isinstance(body, Mapping):
        return [(at, f"{dotted(at)}: must be a mapping such as {{recipe: sft_lora, with: [steps=60]}}; got {body!r}")]
    group = "stages" in body
    if "kind" in body:
        return _wrong_step(body, at, inner) + _wrong_rounds(body, at)
    allowed = (
        ("rounds", "start", "stages")
        if group
        else ("recipe", "with", "inherit", *(() if inner else ("matrix", "rounds", "start")), *SETTABLE)
    )
    found = [
        ((*at, str(key)), f"{dotted((*at, str(key)))}: a {'group' if group else 'stage'} has no key '{key}'"
         f"{did_you_mean(str(key), allowed)} (keys: {', '.join(k for k in allowed if k in OWN)}"
         f"{'' if group else ', and those of a recipe'})")
        for key in body
        if key not in allowed
    ]  # fmt: skip
    if group:
        if not isinstance(body["stages"], Mapping) or not body["stages"]:
            return [*found, (at, f"{dotted((*at, 'stages'))}: must be a mapping of stages; got {body['stages']!r}")]
        if "rounds" not in body:
            found.append((at, f"{dotted(at)}: a group needs rounds: N; stages that run once belong under `stages` itself"))
        for key, value in body["stages"].items():
            found += _wrong(str(key), value, (*at, "stages", str(key)), inner=True)
    elif not isinstance(body.get("recipe"), str) and not any(key[-1] not in allowed for key, _ in found):
        found.append((at, f"{dotted(at)}: names no recipe; write {{recipe: NAME}}, or {{kind: NAME}} for a step"))
    words = body.get("with", [])
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        found.append((at, f"{dotted((*at, 'with'))}: must be a list of words such as [steps=60]; got {words!r}"))
    return found + _wrong_rounds(body, at)


def _wrong_step(body: Mapping[str, Any], at: KeyPath, inner: bool) -> list[tuple[KeyPath, str]]:
    """Return what is wrong with the form of a step; its options are checked when it is composed."""
    kind, known = body["kind"], registry.names("step")
    if kind not in known:
        near = did_you_mean(str(kind), known)
        return [((*at, "kind"), f"{dotted((*at, 'kind'))}: there is no step '{kind}'{near} (known: {', '.join(known)})")]
    misplaced = ("recipe", "with", "inherit", "stages", *(("matrix", "rounds", "start") if inner else ()))
    return [
        (
            (*at, key),
            f"{dotted((*at, key))}: a step has no key '{key}'; its options are those of `llmrecipe show {kind}`, and seed",
        )
        for key in misplaced
        if key in body and key not in registry.spec("step", kind).options
    ]


def _wrong_rounds(body: Mapping[str, Any], at: KeyPath) -> list[tuple[KeyPath, str]]:
    rounds = body.get("rounds", 1)
    if isinstance(rounds, int) and not isinstance(rounds, bool) and rounds >= 1:
        return []
    return [((*at, "rounds"), f"{dotted((*at, 'rounds'))}: must be a whole number >= 1; got {rounds!r}")]


def _rounds(
    name: str, body: Mapping[str, Any], at: KeyPath
) -> tuple[list[WrittenStage], dict[str, str], list[tuple[KeyPath, str]]]:
    """Return the stages of a repeated stage or group round by round, the last round's name of each, and the mistakes."""
    inner = body["stages"] if "stages" in body else {name: {k: v for k, v in body.items() if k not in ("rounds", "start")}}
    start = body.get("start") or {}
    start = {name: start} if isinstance(start, str) and "stages" not in body else start
    if not isinstance(start, Mapping):
        text = f"{dotted((*at, 'start'))}: must be a mapping stage -> what replaces its result in round 1; got {start!r}"
        return [], {}, [(at, text)]
    names = [str(n) for n in inner]
    unknown = [n for n in start if n not in names]
    mistakes = [
        ((*at, "start"), f"{dotted((*at, 'start', n))}: the rounds have no stage '{n}'{did_you_mean(str(n), names)}")
        for n in unknown
    ]
    stages: list[WrittenStage] = []
    for number in range(1, body["rounds"] + 1):
        for place, (key, stage_body) in enumerate(inner.items()):
            where = (*at, "stages", str(key)) if "stages" in body else at

            def result(wanted: str, number: int = number, place: int = place, where: KeyPath = where) -> str:
                if wanted not in names:
                    return f"${{stage:{wanted}}}"
                if names.index(wanted) < place or number > 1:
                    return f"${{stage:{wanted}-{number if names.index(wanted) < place else number - 1}}}"
                if wanted not in start:
                    text = (
                        f"{dotted(where)}: ${{stage:{wanted}}} is the round before, and round 1 has none; give "
                        f"{dotted((*at, 'start', wanted))}"
                    )
                    mistakes.append((where, text))
                return str(start.get(wanted, wanted))

            stages.append(_renamed(_stage(f"{key}-{number}", where, stage_body, number), result))
    return stages, {n: f"{n}-{body['rounds']}" for n in names}, mistakes


def _stage(name: str, at: KeyPath, body: Mapping[str, Any], number: int = 1) -> WrittenStage:
    """Return a stage with its overrides: those of `with`, then its other keys."""
    if "kind" in body:
        words = [as_word((k,), v) for k, v in body.items() if k not in ("kind", "rounds", "start")]
        return WrittenStage(name, at, str(body["kind"]), tuple(words), number, step=True)
    settings = [as_word(key, value) for key, value in leaves({k: v for k, v in body.items() if k not in OWN}) if key]
    return WrittenStage(name, at, body["recipe"], (*body.get("with", []), *settings), number)


def _renamed(stage: WrittenStage, text: Callable[[str], str]) -> WrittenStage:
    words = tuple(REFERENCE.sub(lambda m: text(m[1]), word) for word in stage.words)
    return dataclasses.replace(stage, words=words)


def origin_text(pipeline: Composition, key: KeyPath) -> str:
    """Return ` [file:line]` (or the override) of a key of the pipeline's recipe."""
    origin = origin_of(pipeline.origins, key)
    return f" [{origin}]" if origin else ""
