"""Pipelines: a recipe whose `stages` are recipes and steps, each a run of its own, in the order their results are needed.

    stages:
      sft: {recipe: sft_lora, with: [steps=60]}
      rows: {kind: generate, model: "${stage:sft}", prompts: "builtin:prompts"}
      dpo: {recipe: dpo_lora, with: ["model.path=${stage:sft}"], save: {every: 20}}

A stage with a `recipe` is a training: `with` is a list of overrides, and any other key of a recipe may be set in a stage too.
A stage with a `kind` is a step (`llmrecipe list step`) with its options. `${stage:x}` is the run directory of stage x and
determines the order. A stage with `rounds: N` is repeated, and so is a group of stages; round k adds k - 1 to the seed, so that
it draws other samples:

    dpo:     {recipe: dpo_lora, rounds: 3, start: "${stage:sft}", with: ["model.path=${stage:dpo}"]}
    improve: {rounds: 2, start: {ppo: "${stage:sft}"}, stages: {reward: {...}, ppo: {...}}}

Inside a group `${stage:x}` is this round's x where x is listed above, else that of the previous round; in the first round it is
the text given under `start`. Outside it is that of the last round. A stage with `matrix` is written once and run for its values
(`recipe/matrix.py`); `inherit: [model, data]` passes on what the pipeline's own recipe sets of these keys.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.builtin_data import notes_on_own_rows
from llmrecipe.recipe.code_key import code_of
from llmrecipe.recipe.compose import Composition, compose, plugins_of, section_defaults
from llmrecipe.recipe.content_key import REFERENCE, content_key, each_text
from llmrecipe.recipe.matrix import AXIS
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.pipeline_spec import WrittenStage, in_order, origin_text, parse_stages
from llmrecipe.recipe.provenance import leaves
from llmrecipe.recipe.rights import without_rights
from llmrecipe.recipe.run_recipe import inherited_keys
from llmrecipe.recipe.step_spec import StepComposition, compose_step, needs, result, unfinished
from llmrecipe.recipe.yaml_file import dotted

PLAIN_PATH = re.compile(r"[\w ./+@%~-]+")
TRAINING_NEEDS = {"model.path": "model", "data.path": "rows"}
"""Keys of a recipe that accept the result of a stage, and what it must be."""
PIPELINE_KEYS = ("stages", "run", "log", "plugins")
"""Top-level keys that a pipeline reads itself; the others are values for `${...}` in its stages."""


@dataclass(frozen=True)
class Planned:
    """A stage that can be run."""

    stage: WrittenStage
    words: list[str]
    """Overrides, with the results of its inputs filled in."""
    mapping: dict[str, Any]
    """Its composed mapping, with `${stage:x}` in place of the results of other stages."""
    composition: Composition | StepComposition
    """The same with directories filled in."""
    key: str
    dir: Path
    code: Mapping[str, str] = field(default_factory=dict)
    """Digest of the code of each plugin it depends on (see `code_of`)."""

    @property
    def name(self) -> str:
        """Return the stage's name."""
        return self.stage.name

    @property
    def gives(self) -> str:
        """Return the kind of result it produces for other stages."""
        return self.composition.gives if isinstance(self.composition, StepComposition) else "model"

    @property
    def result(self) -> Path:
        """Return the path that `${stage:x}` refers to."""
        return self.dir / result(self.composition.kind) if isinstance(self.composition, StepComposition) else self.dir


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
    if pipeline.foreign:
        raise RecipeError(
            f"stages: {pipeline.path} is in a run or next to a model, and the overrides of its stages could give rights that "
            "only you can give; read it, and copy it elsewhere to make it a recipe of your own"
        )
    from llmrecipe.recipe.hydra_compose import kept_merges

    _refuse_unused(pipeline)
    stages = in_order(parse_stages(pipeline), pipeline)
    run = pipeline.recipe.run
    folder = Path(run.dir) if run.dir is not None else Path(run.root) / (run.name or pipeline.name)
    if not PLAIN_PATH.fullmatch(str(folder)):
        raise RecipeError(f"run: {folder}: this folder is named in overrides; use letters, digits and . _ - + @ %")
    made = Plan(pipeline.name, folder, notes=list(pipeline.notes))
    with kept_merges():
        mistakes = _compose_all(stages, pipeline, made)
    if mistakes:
        # Stages written out from one `matrix` share their mistakes.
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))
    made.notes.extend(_loose_ends(pipeline, made))
    made.notes.extend(notes_on_own_rows({s.name: s.mapping for s in made.stages}))
    return made


def _compose_all(stages: Sequence[WrittenStage], pipeline: Composition, made: Plan) -> list[str]:
    """Add every stage that can be composed to a plan, and return the mistakes of all stages."""
    results: dict[str, Path] = {}
    keys: dict[str, str] = {}
    mistakes: list[str] = []
    for stage in stages:
        try:
            composition = compose_stage(stage)
            if isinstance(composition, StepComposition):
                key = composition.key(keys)
            else:
                key = content_key(composition.mapping, keys)
            keys[stage.name] = key
        except RecipeError as error:
            mistakes += [f"{dotted(stage.at)}{'.' if stage.step else ': '}{line}" for line in str(error).split("\n")]
            results[stage.name] = made.folder / stage.name
            keys[stage.name] = ""
            continue
        made.notes.extend(f"{stage.name}: {note}" for note in composition.notes)
        wrong = _wrong_inputs(stage, composition, made) + _lost_weights(stage, composition)
        mistakes += [text + origin_text(pipeline, stage.at) for text in wrong]
        filled = functools.partial(REFERENCE.sub, lambda m: str(results[m[1]]))
        mapping = each_text(composition.mapping, filled)
        made.stages.append(
            Planned(
                stage,
                [filled(word) for word in composition.overrides],
                composition.mapping,
                (
                    dataclasses.replace(composition, mapping=mapping)
                    if isinstance(composition, StepComposition)
                    else revalidated(composition, mapping)
                ),
                key,
                made.folder / f"{stage.name}-{key}",
                code_of(composition.mapping),
            )
        )
        results[stage.name] = made.stages[-1].result
    return mistakes


def _loose_ends(pipeline: Composition, made: Plan) -> list[str]:
    """Return a line for each result that nobody uses, and for each `with` of the command line that cuts a stage off."""
    used = {name for planned in made.stages for name in planned.stage.inputs}
    found = [
        f"{s.name}: no later stage uses its result; ${{stage:{s.name}}} names it"
        for s in made.stages[:-1]
        if s.gives != "metrics" and s.name not in used
    ]
    replaced = [w for w in pipeline.overrides if re.match(r"\+*stages\.([\w.-]+)\.with=", w)]
    if not replaced:
        return found
    written = parse_stages(compose(pipeline.path, [w for w in pipeline.overrides if w not in replaced]))
    now = {planned.name: planned.stage.inputs for planned in made.stages}
    for stage in written:
        lost = [name for name in stage.inputs if name not in now.get(stage.name, stage.inputs)]
        if lost:
            key = dotted((*stage.at, "with"))
            found.append(
                f"{key}: the override replaces the whole list, and with it {', '.join(f'${{stage:{n}}}' for n in lost)}, which "
                f"this stage was built on; repeat that word, or set single keys: {dotted(stage.at)}.KEY=VALUE"
            )
    return found


def compose_stage(stage: WrittenStage) -> Composition | StepComposition:
    """Compose a stage's recipe or step with its overrides; rounds after the first draw other samples.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    make = compose_step if stage.step else compose
    words = list(stage.words)
    own = [] if stage.step or not stage.plugins else plugins_of(stage.what, words)
    if not set(stage.plugins) <= set(own):
        words.append(as_word(("plugins",), list(dict.fromkeys([*stage.plugins, *own]))))
    composition = make(stage.what, words)
    if isinstance(composition, Composition) and composition.recipe.stages:
        raise RecipeError(f"recipe={stage.what} is itself a pipeline; name its stages here")
    frame = composition.frame if isinstance(composition, StepComposition) else composition.recipe
    if frame.run.dir is not None:
        raise RecipeError("run.dir: the pipeline chooses the folders of its stages; set run.root or run.dir of the pipeline")
    return composition if stage.round == 1 else make(stage.what, [*words, f"seed={frame.seed + stage.round - 1}"])


def _wrong_inputs(stage: WrittenStage, composition: Composition | StepComposition, made: Plan) -> list[str]:
    """Return a message for each result of a stage that is used where another kind of result is expected."""
    wanted = needs(composition.kind) if isinstance(composition, StepComposition) else TRAINING_NEEDS
    gives = {s.name: s.gives for s in made.stages}
    found = []
    for key, value in leaves(composition.mapping):
        want = wanted.get(dotted(key)) or wanted.get(str(key[0]), "") if stage.step else wanted.get(dotted(key), "")
        for text in value if isinstance(value, list) else [value]:
            for name in REFERENCE.findall(text) if unfinished(text) else []:
                if want and gives.get(name, want) != want:
                    found.append(
                        f"{dotted((*stage.at, *key))}: ${{stage:{name}}} produces {gives[name]}, but {want} "
                        f"{'are' if want == 'rows' else 'is'} expected here"
                    )
    return found


def _lost_weights(stage: WrittenStage, composition: Composition | StepComposition) -> list[str]:
    """Return a message where a stage draws fresh weights in place of those that another stage has trained."""
    if isinstance(composition, StepComposition):
        return []
    model = composition.recipe.model
    below = REFERENCE.fullmatch(str(model.path))
    if below is None or model.init != "random":
        return []
    return [
        f"{dotted((*stage.at, 'model', 'init'))}: random draws fresh weights, and what ${{stage:{below[1]}}} has learned would "
        f"be lost; set {dotted(stage.at)}.model.init=pretrained, and model.config={{}} under its `with`"
    ]


def revalidated(composition: Composition, mapping: dict[str, Any]) -> Composition:
    """Return the same recipe with other values, validated."""
    from llmrecipe.recipe.validate import validate

    return dataclasses.replace(composition, mapping=mapping, recipe=validate(mapping, composition.origins))


def for_check(
    made: Plan, done: set[str], example: Callable[[str], Path] | None = None
) -> dict[str, Composition | StepComposition]:
    """Return what of each stage can be built before the stages it depends on have run.

    The model that an unfinished training will produce is replaced by the model that stage trains, which has the same shapes;
    rows that an unfinished step will write are replaced by examples. Steps keep `${stage:x}` for results that do not exist yet.

    Args:
        example: unfinished step -> a folder with rows like those it will write.
    """
    bases: dict[str, dict[str, Any]] = {}
    tokenizers: dict[str, dict[str, Any]] = {}
    found: dict[str, Composition | StepComposition] = {}
    for planned in made.stages:
        if isinstance(planned.composition, StepComposition):
            mapping = each_text(planned.mapping, lambda text: REFERENCE.sub(lambda m: filled(m, made, done), text))
            step = found[planned.name] = dataclasses.replace(planned.composition, mapping=mapping)
            if planned.gives == "model":
                bases[planned.name] = _based(dict(step.build().model_section()), bases)
            continue
        below = REFERENCE.fullmatch(str(planned.mapping["model"]["path"]))
        tokenizer = tokenizers[planned.name] = _with_tokenizer(
            planned.mapping["tokenizer"], tokenizers.get(below[1] if below else "")
        )
        if all(name in done for name in planned.stage.inputs):
            bases[planned.name] = planned.composition.mapping["model"]
            found[planned.name] = planned.composition
            continue
        model = bases[planned.name] = _based(planned.mapping["model"], bases)
        data = _with_examples(planned.mapping["data"], made, done, example)
        mapping = {**planned.mapping, "model": model, "tokenizer": tokenizer, "data": data}
        found[planned.name] = revalidated(planned.composition, mapping)
    return found


def _with_tokenizer(own: dict[str, Any], below: dict[str, Any] | None) -> dict[str, Any]:
    """Return a tokenizer section that reads the tokenizer of the stage a model comes from, unless it names or makes another."""
    if below is None or own["path"] is not None or own["train"] is not None or below["train"] is not None:
        return own
    return {**below, **{k: v for k, v in own.items() if v}}


def _based(model: dict[str, Any], bases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a model section that names an unfinished stage, based on the model which that stage trains."""
    reference = REFERENCE.fullmatch(str(model["path"]))
    if not reference or reference[1] not in bases:
        return model
    below, default = bases[reference[1]], section_defaults()["model"]
    own = {k: v for k, v in model.items() if v != default.get(k)}
    return {**without_rights(below), **own, "path": below["path"], "continue": False}


def filled(reference: re.Match[str], made: Plan, done: set[str]) -> str:
    """Return the result of a finished stage; for another one, the reference itself."""
    return str(made[reference[1]].result) if reference[1] in done else reference[0]


def _with_examples(data: dict[str, Any], made: Plan, done: set[str], example: Callable[[str], Path] | None) -> dict[str, Any]:
    """Return a data section that reads examples where the rows of a step do not exist yet."""

    def folder(reference: re.Match[str]) -> str:
        name = reference[1]
        wanted = example is not None and name not in done and made[name].gives == "rows"
        return str(example(name)) if wanted and example is not None else filled(reference, made, done)

    filled_in = each_text(data, lambda text: REFERENCE.sub(folder, text))
    return filled_in


def refuse_stages(mapping: Mapping[str, Any]) -> None:
    """Refuse a recipe that only a pipeline can run.

    Raises:
        RecipeError: it has stages, or names the result of one.
    """
    if mapping.get("stages"):
        raise RecipeError(
            "stages: this recipe is a pipeline; run it with `llmrecipe train` or llmrecipe.pipelines.run_stages.run_all_stages"
        )
    for key, value in leaves(mapping):
        if isinstance(value, str) and (REFERENCE.search(value) or AXIS.search(value)):
            what = "the result of a stage" if REFERENCE.search(value) else "a value of `matrix` in a stage"
            raise RecipeError(f"{dotted(key)}: {value} is {what}, and only a recipe with `stages` has stages")


def _refuse_unused(pipeline: Composition) -> None:
    """Refuse overrides that reach no stage, which would be lost silently."""
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
            f"'{word}': a pipeline has no {top} of its own; set it for a stage: stages.{first}.{word.lstrip('+~')}{hint}"
        )
