"""Pipelines: a recipe whose `stages` are ordinary recipes, each a run of its own, in the order their results are needed.

    stages:
      sft: {recipe: sft_lora, with: [steps=60]}
      dpo: {recipe: dpo_lora, with: ["model.path=${stage:sft}"], save: {every: 20}}

`with` takes the words of the command line; any other key of a recipe may stand in a stage and is set there too.
`${stage:x}` is the run directory of stage x and decides the order. A stage with `rounds: N` is repeated, and so is a group of
stages; round k adds k - 1 to the seed, so that it draws other samples:

    dpo:     {recipe: dpo_lora, rounds: 3, start: "${stage:sft}", with: ["model.path=${stage:dpo}"]}
    improve: {rounds: 2, start: {ppo: "${stage:sft}"}, stages: {reward: {...}, ppo: {...}}}

Inside a group `${stage:x}` is this round's x where x stands above, else that of the round before; in the first round the text
given under `start`. Outside it is that of the last round. A stage with `each` is written once and run for many values
(`recipe/each.py`); `inherit: [model, data]` passes on what the pipeline's own recipe sets of these keys.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrecipe.errors import RecipeError, did_you_mean
from llmrecipe.recipe.compose import Composition, compose, section_defaults
from llmrecipe.recipe.content_key import REFERENCE, content_key, each_text
from llmrecipe.recipe.each import AXIS, expand
from llmrecipe.recipe.inherit import as_word, inherited, inherited_keys
from llmrecipe.recipe.origins import leaves, origin_of
from llmrecipe.recipe.yaml_file import KeyPath, dotted

NAME = re.compile(r"[A-Za-z_][\w-]*")
PLAIN_PATH = re.compile(r"[\w ./+@%~-]+")
OWN = ("recipe", "with", "inherit", "each", "rounds", "start", "stages")
"""Keys of a stage; the other keys it may hold are those of a recipe."""
SETTABLE = tuple(k for k in section_defaults() if k not in ("stages", "search", "plugins", "run"))
PIPELINE_KEYS = ("stages", "run", "log", "plugins")
"""Top-level keys that mean something to a pipeline by themselves; the others are values for `${...}` in its stages."""


@dataclass(frozen=True)
class Stage:
    """One stage as written, rounds unrolled."""

    name: str
    at: KeyPath
    """Its key in the pipeline's recipe."""
    recipe: str
    words: tuple[str, ...]
    round: int = 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """Stages whose results it names."""
        return tuple(dict.fromkeys(name for word in self.words for name in REFERENCE.findall(word)))


@dataclass(frozen=True)
class Planned:
    """A stage that can be run."""

    stage: Stage
    words: list[str]
    """Words of the command line, directories of its inputs filled in."""
    mapping: dict[str, Any]
    """Its composed mapping, with `${stage:x}` where results of other stages belong."""
    composition: Composition
    """The same with directories filled in."""
    key: str
    dir: Path

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


@dataclass(frozen=True)
class Plan:
    """Every stage in the order it runs."""

    name: str
    folder: Path
    stages: list[Planned] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Planned:
        return next(s for s in self.stages if s.name == name)


def plan(pipeline: Composition) -> Plan:
    """Compose and validate every stage of a pipeline, and find the directory of each.

    Raises:
        RecipeError: every mistake in any stage, in one message.
    """
    _refuse_unused(pipeline)
    stages = in_order(parse(pipeline), pipeline)
    run = pipeline.recipe.run
    folder = Path(run.dir) if run.dir is not None else Path(run.root) / (run.name or pipeline.name)
    if not PLAIN_PATH.fullmatch(str(folder)):
        raise RecipeError(f"run: {folder}: words of the command line name this folder; use letters, digits and . _ - + @ %")
    made = Plan(pipeline.name, folder, notes=list(pipeline.notes))
    dirs: dict[str, Path] = {}
    keys: dict[str, str] = {}
    mistakes: list[str] = []
    for stage in stages:
        try:
            composition = compose_stage(stage)
        except RecipeError as error:
            mistakes += [f"{dotted(stage.at)}: {line}" for line in str(error).split("\n")]
            dirs[stage.name] = folder / stage.name
            keys[stage.name] = ""
            continue
        made.notes.extend(f"{stage.name}: {note}" for note in composition.notes)
        key = keys[stage.name] = content_key(composition.mapping, keys)
        dirs[stage.name] = folder / f"{stage.name}-{key}"
        filled = functools.partial(REFERENCE.sub, lambda m: str(dirs[m[1]]))
        mapping = each_text(composition.mapping, filled)
        made.stages.append(
            Planned(
                stage,
                [filled(word) for word in composition.overrides],
                composition.mapping,
                revalidated(composition, mapping),
                key,
                dirs[stage.name],
            )
        )
    if mistakes:
        # Stages written out from one `each` share their mistakes.
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))
    return made


def compose_stage(stage: Stage) -> Composition:
    """A stage's recipe with its words; rounds after the first draw other samples.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    composition = compose(stage.recipe, stage.words)
    if composition.recipe.stages:
        raise RecipeError(f"recipe={stage.recipe} is itself a pipeline; name its stages here")
    if composition.recipe.run.dir is not None:
        raise RecipeError("run.dir: the pipeline chooses the folders of its stages; set run.root or run.dir of the pipeline")
    if stage.round > 1:
        composition = compose(stage.recipe, [*stage.words, f"seed={composition.recipe.seed + stage.round - 1}"])
    return composition


def revalidated(composition: Composition, mapping: dict[str, Any]) -> Composition:
    """The same recipe with other values."""
    from llmrecipe.recipe.validate import validate

    return dataclasses.replace(composition, mapping=mapping, recipe=validate(mapping, composition.origins))


def for_check(made: Plan, done: set[str]) -> dict[str, Composition]:
    """What of each stage can be built before the ones above it have run.

    A model that an unfinished stage will leave is replaced by the model that stage starts from, which has the same shapes.
    """
    bases: dict[str, dict[str, Any]] = {}
    found = {}
    for planned in made.stages:
        if all(name in done for name in planned.stage.inputs):
            bases[planned.name] = planned.composition.mapping["model"]
            found[planned.name] = planned.composition
            continue
        model = planned.mapping["model"]
        reference = REFERENCE.fullmatch(str(model["path"]))
        if reference:
            below, default = bases[reference[1]], section_defaults()["model"]
            own = {k: v for k, v in model.items() if v != default.get(k)}
            model = {**below, **own, "path": below["path"], "continue": False}
        bases[planned.name] = model
        found[planned.name] = revalidated(planned.composition, {**planned.mapping, "model": model})
    return found


def refuse_stages(mapping: Mapping[str, Any]) -> None:
    """Refuse a recipe that only a pipeline can run.

    Raises:
        RecipeError: it has stages, or names the result of one.
    """
    if mapping.get("stages"):
        raise RecipeError("stages: this recipe is a pipeline; run it with `llmrecipe train` or llmrecipe.training.pipeline.run")
    for key, value in leaves(mapping):
        if isinstance(value, str) and (REFERENCE.search(value) or AXIS.search(value)):
            what = "the result of a stage" if REFERENCE.search(value) else "a value of `each` in a stage"
            raise RecipeError(f"{dotted(key)}: {value} is {what}, and only a recipe with `stages` has stages")


# --- reading the section ----------------------------------------------------------------------------------------------


def parse(pipeline: Composition) -> list[Stage]:
    """The stages as written, rounds unrolled.

    Raises:
        RecipeError: every mistake in the section, in one message.
    """
    expanded = expand(pipeline.recipe.stages or {})
    mistakes = [f"{text}{_where(pipeline, key)}" for key, text in expanded.mistakes]
    stages: list[Stage] = []
    last: dict[str, str] = {}
    for name, written in expanded.bodies.items():
        at: KeyPath = ("stages", expanded.written[name])
        body, wrong = inherited(written, pipeline, at)
        wrong = _wrong(name, body, at) + wrong
        mistakes += [f"{text}{_where(pipeline, key)}" for key, text in wrong]
        if wrong:
            continue
        if "rounds" in body:
            unrolled, ends, wrong = _rounds(name, body, at)
            mistakes += [f"{text}{_where(pipeline, key)}" for key, text in wrong]
            last |= ends
            stages += unrolled
        else:
            stages.append(Stage(name, at, body["recipe"], _words(body)))
    if mistakes:
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))
    stages = [_renamed(s, lambda n: f"${{stage:{last.get(n, n)}}}") for s in stages]
    names = [s.name for s in stages]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise RecipeError(f"stages: two stages are called '{repeated[0]}' (rounds are numbered NAME-1, NAME-2, ...)")
    return stages


def in_order(stages: list[Stage], pipeline: Composition) -> list[Stage]:
    """Stages after the ones they need, otherwise in the order they are written.

    Raises:
        RecipeError: a stage that is not there, or stages that wait for each other.
    """
    known = {s.name: s for s in stages}
    mistakes = [
        f"{dotted(s.at)}: ${{stage:{name}}}: there is no stage '{name}'{did_you_mean(name, known)} "
        f"(stages: {', '.join(known)}){_where(pipeline, s.at)}"
        for s in stages
        for name in s.inputs
        if name not in known
    ]
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    done: dict[str, Stage] = {}

    def visit(stage: Stage, above: tuple[str, ...]) -> None:
        if stage.name in done:
            return
        if stage.name in above:
            circle = " -> ".join([*above[above.index(stage.name) :], stage.name])
            raise RecipeError(
                f"stages: {circle}: each of these waits for the next; `rounds: N` repeats a stage on its own result"
                f"{_where(pipeline, stage.at)}"
            )
        for name in stage.inputs:
            visit(known[name], (*above, stage.name))
        done[stage.name] = stage

    for stage in stages:
        visit(stage, ())
    return list(done.values())


def _wrong(name: str, body: Any, at: KeyPath, inner: bool = False) -> list[tuple[KeyPath, str]]:
    """What is wrong with the form of one stage."""
    if not NAME.fullmatch(name):
        return [(at, f"{dotted(at)}: a stage's name is letters, digits, _ and -, and starts with a letter")]
    if not isinstance(body, Mapping):
        return [(at, f"{dotted(at)}: must be a mapping such as {{recipe: sft_lora, with: [steps=60]}}; got {body!r}")]
    group = "stages" in body
    allowed = (
        ("rounds", "start", "stages")
        if group
        else ("recipe", "with", "inherit", *(() if inner else ("each", "rounds", "start")), *SETTABLE)
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
            found.append((at, f"{dotted(at)}: a group needs rounds: N; stages that run once stand under `stages` itself"))
        for key, value in body["stages"].items():
            found += _wrong(str(key), value, (*at, "stages", str(key)), inner=True)
    elif not isinstance(body.get("recipe"), str) and not any(key[-1] not in allowed for key, _ in found):
        found.append((at, f"{dotted(at)}: names no recipe; write {{recipe: NAME}}"))
    words = body.get("with", [])
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        found.append((at, f"{dotted((*at, 'with'))}: must be a list of words such as [steps=60]; got {words!r}"))
    rounds = body.get("rounds", 1)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        found.append((at, f"{dotted((*at, 'rounds'))}: must be a whole number >= 1; got {rounds!r}"))
    return found


def _rounds(name: str, body: Mapping[str, Any], at: KeyPath) -> tuple[list[Stage], dict[str, str], list[tuple[KeyPath, str]]]:
    """A repeated stage or group: its stages round by round, the last round's name of each, mistakes."""
    inner = body["stages"] if "stages" in body else {name: {k: v for k, v in body.items() if k not in ("rounds", "start")}}
    start = body.get("start") or {}
    start = {name: start} if isinstance(start, str) and "stages" not in body else start
    if not isinstance(start, Mapping):
        text = f"{dotted((*at, 'start'))}: must be a mapping stage -> what stands for its result in round 1; got {start!r}"
        return [], {}, [(at, text)]
    names = [str(n) for n in inner]
    unknown = [n for n in start if n not in names]
    mistakes = [
        ((*at, "start"), f"{dotted((*at, 'start', n))}: the rounds have no stage '{n}'{did_you_mean(str(n), names)}")
        for n in unknown
    ]
    stages: list[Stage] = []
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

            stage = Stage(f"{key}-{number}", where, stage_body["recipe"], _words(stage_body), number)
            stages.append(_renamed(stage, result))
    return stages, {n: f"{n}-{body['rounds']}" for n in names}, mistakes


def _words(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of a stage: `with`, then its other keys."""
    settings = [as_word(key, value) for key, value in leaves({k: v for k, v in body.items() if k not in OWN}) if key]
    return (*body.get("with", []), *settings)


def _renamed(stage: Stage, text: Callable[[str], str]) -> Stage:
    words = tuple(REFERENCE.sub(lambda m: text(m[1]), word) for word in stage.words)
    return dataclasses.replace(stage, words=words)


def _refuse_unused(pipeline: Composition) -> None:
    """Words that reach no stage would be lost without a sound."""
    texts = [origin.word for key, origin in pipeline.origins.items() if key[0] == "stages" and origin.word]
    files = {o.file for key, o in pipeline.origins.items() if key[0] == "stages" and o.file}
    texts += [path.read_text(encoding="utf-8") for path in files]
    used = {name for text in texts for name in re.findall(r"\$\{\s*([A-Za-z_][\w.]*)\s*\}", text)}
    used |= inherited_keys(pipeline.recipe.stages)
    for word in pipeline.overrides:
        key = word.lstrip("+~").split("=")[0]
        top = key.split(".")[0]
        if top in PIPELINE_KEYS or any(f"{u}.".startswith(f"{key}.") or f"{key}.".startswith(f"{u}.") for u in used):
            continue
        first = next(iter(pipeline.recipe.stages or {}), "NAME")
        hint = f"; what its stages take from it: {', '.join(sorted(used))}" if used else ""
        raise RecipeError(
            f"'{word}': a pipeline has no {top} of its own; say it to a stage: stages.{first}.{word.lstrip('+~')}{hint}"
        )


def _where(pipeline: Composition, key: KeyPath) -> str:
    origin = origin_of(pipeline.origins, key)
    return f" [{origin}]" if origin else ""
