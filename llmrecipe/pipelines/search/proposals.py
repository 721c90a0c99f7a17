"""The points a search tries next: whose turn it is at once, and each point by what earlier rounds have shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llmrecipe.pipelines.search import space, stepwise
from llmrecipe.pipelines.search.samplers import new_study, sample_trial
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.recipe.search_section import SearchSection

if TYPE_CHECKING:
    import optuna

    from llmrecipe.feedback.directions import Direction

Proposed = tuple[int, dict[str, Any], "optuna.Trial"]
"""(number of a trial, its point, the sampler's own record of it)."""


def rounds(section: SearchSection, count: int) -> Iterator[range]:
    """Yield the numbers of the trials that run at once; a stepwise search decides a key before it goes on to the next."""
    stepped = section.sampler == "stepwise"
    ends = [block.last for block in stepwise.blocks(section)] if stepped else [count]
    for start, end in zip((0, *ends), ends, strict=False):
        for first in range(start, end, section.parallel):
            yield range(first, min(first + section.parallel, end))


def propose(
    section: SearchSection,
    mode: Direction,
    known: list[Trial],
    numbers: range,
    points: list[dict[str, Any]] | None,
    losses: Callable[[Trial], tuple[float, ...]],
) -> list[Proposed]:
    """Choose the points of a round, each by what earlier rounds have shown and what its own tries already.

    Args:
        known: the trials of earlier rounds.
        numbers: those of the round.
        points: every point, where the sampler goes through a grid.
        losses: a trial's score and costs as numbers that are to be small.
    """
    from optuna.trial import TrialState, create_trial

    chosen: list[Proposed] = []
    finished = [_frozen(section, trial) for trial in known]
    axes = space.distributions(section)
    for number in numbers:
        study = new_study(section, mode)
        study.add_trials(finished)
        for _, point, _ in chosen:
            running = space.drawn_of(section, point)
            study.add_trial(create_trial(state=TrialState.RUNNING, params=running, distributions=axes))
        if points is None and number < len(section.start):
            study.enqueue_trial(space.drawn_of(section, section.start[number]))
        drawn = sample_trial(study, section, number)
        point = points[number] if points is not None else space.point_of(section, drawn.params)
        if section.sampler == "stepwise":
            point = stepwise.point(section, known, number, losses)
        chosen.append((number, point, drawn))
    return chosen


def _frozen(section: SearchSection, trial: Trial) -> optuna.trial.FrozenTrial:
    """Convert a trial to Optuna's frozen trial."""
    from optuna.trial import TrialState, create_trial

    states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    drawn = space.drawn_of(section, trial.point)
    values = [trial.value or 0.0, *(trial.costs[key] for key in section.against)] if trial.state == "done" else None
    return create_trial(
        params=drawn, distributions=space.distributions(section), state=states[trial.state], values=values,
        intermediate_values=trial.reports, system_attrs={**trial.rungs, **trial.generations},
    )  # fmt: skip
