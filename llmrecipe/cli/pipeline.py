"""`train` and `check` for a recipe that has stages."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.cli.findings import show_findings
from llmrecipe.core.console import console, print_json, say
from llmrecipe.recipe.step_spec import StepComposition

if TYPE_CHECKING:
    from llmrecipe.pipelines.run_stages import Result
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.recipe.pipeline_plan import Planned
    from llmrecipe.training.dry_run import Findings


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
    """Print what each stage of a pipeline would do."""
    from llmrecipe.pipelines.run_stages import check_stages
    from llmrecipe.recipe.pipeline_plan import plan

    made = plan(composition)
    found = check_stages(made)
    if as_json:
        print_json({s.name: _facts(found.get(s.name), s) for s in made.stages})
        return
    for planned in made.stages:
        needs = f", after {', '.join(planned.stage.inputs)}" if planned.stage.inputs else ""
        say(f"[{planned.name}] {planned.dir}{needs}")
        facts = found.get(planned.name)
        if isinstance(facts, StepComposition):
            say(f"step {facts.kind}: " + ", ".join(f"{k} {v}" for k, v in facts.options.items() if v not in (None, [], {})))
        elif facts is not None:
            show_findings(facts)
        else:
            print("finished: will be reused")
        print()


def _facts(found: Findings | StepComposition | None, planned: Planned) -> dict[str, Any]:
    if found is None:
        return {"done": str(planned.dir)}
    return {"step": found.mapping} if isinstance(found, StepComposition) else asdict(found)
