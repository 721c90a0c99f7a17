"""`train` and `check` for a recipe that has stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.cli.findings import show_findings, trained_text
from llmrecipe.core.console import console, print_json, say
from llmrecipe.core.verbosity import is_verbose
from llmrecipe.recipe.step_spec import StepComposition
from llmrecipe.recipe.yaml_file import KeyPath, dotted

if TYPE_CHECKING:
    from llmrecipe.pipelines.run_stages import Result
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.recipe.pipeline_plan import Planned
    from llmrecipe.training.dry_run import Findings

WHOLE = 6
"""Most stages of one key, or entries of a list, that are all shown."""
SHOWN = 3
"""How many of more are."""


def run_pipeline(composition: Composition, recipe: str, as_json: bool = False) -> None:
    """Run the stages of a recipe and print one table over them.

    Args:
        recipe: how the user named it, for the messages.
    """
    from llmrecipe.pipelines.run_stages import run_all_stages

    results = run_all_stages(composition, recipe)
    if as_json:
        print_json({"run": results[-1].dir, "stages": [asdict(result) for result in results]})
    else:
        show_results(composition, results)


def show_results(composition: Composition, results: list[Result]) -> None:
    """Print one table over all stages."""
    from rich.table import Table

    table = Table("stage", "", "steps", "metric", "seconds", "directory", box=None, header_style="bold", title_justify="left")
    for r in results:
        table.add_row(r.stage, r.how, str(r.steps), r.metric, f"{r.seconds:.1f}" if r.how != "reused" else "-", r.dir)
    out = console()
    out.print(f"{composition.name}: {len(results)} stages in {Path(results[-1].dir).parent}", soft_wrap=True)
    out.print(table)
    say(f"done: {results[-1].dir}")


def check_pipeline(composition: Composition, as_json: bool) -> None:
    """Print what each stage of a pipeline would do; of many that a `matrix` makes, the axes, the first few and all warnings."""
    from llmrecipe.pipelines.run_stages import check_stages
    from llmrecipe.recipe.pipeline_plan import plan

    made = plan(composition)
    found = check_stages(made)
    if as_json:
        print_json({s.name: _facts(found.get(s.name), s) for s in made.stages})
        return
    groups: dict[KeyPath, list[Planned]] = {}
    for planned in made.stages:
        groups.setdefault(planned.stage.at, []).append(planned)
    say(f"{composition.name}: {len(made.stages)} stages in {made.folder}")
    print()
    for at, stages in groups.items():
        if len(stages) > WHOLE and not is_verbose():
            _show_group(_written(composition, at), stages, found)
        else:
            for planned in stages:
                _show_stage(planned, found.get(planned.name))
        print()


def _written(composition: Composition, at: KeyPath) -> object:
    """Return the stage as the recipe has it."""
    body: Any = {"stages": composition.recipe.stages or {}}
    for key in at:
        body = body.get(key) if isinstance(body, Mapping) else None
    return body


def _show_stage(planned: Planned, facts: Findings | StepComposition | None) -> None:
    needs = f", after {_listed(planned.stage.inputs)}" if planned.stage.inputs else ""
    say(f"[{planned.name}] {planned.dir}{needs}")
    if isinstance(facts, StepComposition):
        say(f"step {facts.kind}: " + ", ".join(f"{k} {_value(v)}" for k, v in facts.options.items() if v not in (None, [], {})))
    elif facts is not None:
        show_findings(facts)
    else:
        print("finished: will be reused")


def _show_group(body: object, stages: list[Planned], found: Mapping[str, Findings | StepComposition]) -> None:
    """Print the stages that one key of the recipe stands for: how many, over what, the first ones, what is to be done."""
    first = stages[0].stage
    say(f"[{dotted(first.at[1:])}] {len(stages)} stages of {first.what}, named {stages[0].name} to {stages[-1].name}")
    matrix = body.get("matrix") if isinstance(body, Mapping) else None
    for axis, values in matrix.items() if isinstance(matrix, Mapping) else ():
        say(f"  {axis}: {len(values)} ({_listed(list(map(str, values)))})")
    done = sum(found.get(planned.name) is None for planned in stages)
    facts = [one for planned in stages if not isinstance(one := found.get(planned.name), StepComposition | None)]
    for planned in stages[:SHOWN]:
        one = found.get(planned.name)
        what = "finished: will be reused" if one is None else _one_line(one)
        say(f"  {planned.name}: {what}")
    say(f"  … and {len(stages) - SHOWN} more; -v shows each of them as `check` shows a training, --json as data")
    seconds = [one.seconds for one in facts if one.seconds is not None]
    if seconds:
        say(f"  time: about {sum(seconds):.0f} s for {len(seconds)} of them one after the other, plus evaluation")
    if done:
        say(f"  finished: {done} of {len(stages)}, which will be reused")
    said = Counter(f"{kind}: {line}" for one in facts for kind in ("warning", "note") for line in getattr(one, f"{kind}s"))
    for line, times in said.items():
        say(f"  {line}" + (f" (in {times} stages)" if times > 1 else ""))


def _one_line(facts: Findings | StepComposition) -> str:
    if isinstance(facts, StepComposition):
        return f"step {facts.kind}"
    return f"{facts.steps} steps, trained: {trained_text(facts)}"


def _listed(names: Sequence[str]) -> str:
    """Return names with commas, of many the first ones and how many more there are."""
    if len(names) <= WHOLE:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN])}, … and {len(names) - SHOWN} more"


def _value(value: object) -> str:
    """Return an option of a step as text; of a long list its beginning."""
    return f"[{_listed(list(map(str, value)))}]" if isinstance(value, list) and len(value) > WHOLE else str(value)


def _facts(found: Findings | StepComposition | None, planned: Planned) -> dict[str, Any]:
    if found is None:
        return {"done": str(planned.dir)}
    return {"step": found.mapping} if isinstance(found, StepComposition) else asdict(found)
