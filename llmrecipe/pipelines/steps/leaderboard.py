"""`leaderboard`: a table and a plot of finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.console import say
from llmrecipe.core.errors import RecipeError, RunError, did_you_mean
from llmrecipe.core.option_types import ClassVar, Field, Literal, PositiveInt, StopText
from llmrecipe.core.registry import register
from llmrecipe.evaluation.leaderboard_labels import labels_of, recipe_below, start_label
from llmrecipe.evaluation.leaderboard_plot import draw_parts, draw_plot
from llmrecipe.evaluation.leaderboard_table import (
    MEMORY,
    PARTS,
    PLAIN,
    REQUESTED,
    Column,
    LeaderboardEntry,
    Tuned,
    as_json,
    better_of,
    chosen_values,
    markdown,
    memory_column,
    rank,
    read_entries,
)
from llmrecipe.evaluation.paired_differences import compare_rows, difference_column
from llmrecipe.objectives.reward_interface import Rewards
from llmrecipe.pipelines.run_stages import state_of
from llmrecipe.pipelines.step import Step
from llmrecipe.recipe.content_key import REFERENCE
from llmrecipe.recipe.step_spec import StepComposition, unfinished
from llmrecipe.runs.run_record import read_run

if TYPE_CHECKING:
    from llmrecipe.evaluation.win_rate import HeadToHead
    from llmrecipe.pipelines.steps.workspace import Work
    from llmrecipe.recipe.pipeline_plan import Plan


@register
class Leaderboard(Step):
    """Comparison of finished runs: parameters, bytes, memory, time and a score, mean and standard deviation over seeds.

    A row is named by what sets it apart: its stack (`full` where every weight trained), or its objective where these differ.
    With `against` every run also answers prompts: it and the model named there answer the same ones at temperature 1, and the
    table holds win rate, reward, margin on held-out pairs, divergence KL(pi || pi_0) and length, with formulas in
    `llmrecipe.evaluation.win_rate`; the score is then the win rate. A run that was measured is not measured again.

    With `baseline` each row is also compared with one of them, seed by seed.

    With `tuned` the runs of a row may differ in one key, and those with the value that is best on the validation split are its
    result. With `of` the step shows a pipeline as far as it has run: rows without a finished run are empty.

    Left in the folder: leaderboard.md, leaderboard.json, leaderboard.png (with matplotlib), leaderboard.html;
    memory.png, a bar for each row, where columns are parts of the memory.
    """

    gives: ClassVar[str] = "metrics"
    needs: ClassVar[dict[str, str]] = {"against": "model"}

    runs: list[str] = Field(default_factory=list)
    """Directories of finished runs; `${stage:x}` of a stage with `matrix` is all of its runs."""
    of: list[str] = Field(default_factory=list)
    """Instead of `runs`: a recipe with a leaderboard among its stages, and its words; all other options are that stage's."""
    metric: str = "test/accuracy"
    """The score without `against`: a name in the runs' final/metrics.json."""
    columns: list[str] = Field(default_factory=list)
    """Further columns: names in the runs' final/metrics.json (forget/mean of runs with `eval.forgetting`), and memory/held,
    memory/weights, memory/gradients, memory/optimizer, memory/activations, memory/logits and memory/peak."""
    tuned: str | None = None
    """Key of the recipes, such as optim.lr, whose value is chosen for each row."""
    by: str = "eval/loss"
    """With `tuned`: what chooses it, a name in the runs' final/metrics.json measured on the validation split."""
    baseline: str | None = None
    """A row of the table, such as `full` or `fresh`: a further column says by how much the others differ from it, mean over the
    seeds that both have, with its 95 % interval (`llmrecipe.evaluation.paired_differences`). Where models of several shapes
    have a row of that name each, a row is compared with that of the model it began with."""
    across: str | list[str] | None = None
    """What the plot shows the score over, a panel for each: `columns`, trained, share, stored, memory or seconds.

    Default: trained parameters, or KL with `against`.
    """
    best: Literal["min", "max"] | None = None
    """Whether a large or a small score is good; default: as the metric declares."""
    against: str | None = None
    """The model that the runs started from; a run directory or any model."""
    prompts: str | None = None
    """With `against`: prompts that both answer."""
    pairs: str | None = None
    """With `against`: held-out pairs of a better and a worse answer."""
    reward: dict[str, Any] = Field(default_factory=dict)
    """With `against`: rewards that score the answers, as in `objective.reward`."""
    split: Literal["train", "validation", "test"] = "test"
    """With `against`: split of the prompts and the pairs."""
    limit: PositiveInt | None = None
    """With `against`: maximum number of prompts and pairs, from the first."""
    n: PositiveInt = 4
    """With `against`: answers to each prompt."""
    max_new_tokens: PositiveInt = 32
    """With `against`: longest answer in tokens."""
    stop: list[StopText] = Field(default_factory=list)
    """With `against`: texts before which an answer ends."""
    max_length: PositiveInt = 256
    """With `against`: longest prompt, and longest pair, in tokens."""
    words: list[str] = Field(default_factory=list)
    """With `against`: words for the models' own recipes, such as runtime.device=cpu or model.trust_remote_code=true."""
    plot: bool = True
    """Also draw the plot."""

    def check(self, where: str) -> None:
        """Refuse an empty list, a comparison without prompts or reward, and a plot without matplotlib."""
        if self.of:
            self._board(where)
            return
        if not self.runs:
            raise RecipeError(f'{where}.runs: names no run; write ["${{stage:x}}"]')
        if self.against is not None:
            if self.prompts is None:
                raise RecipeError(
                    f"{where}.prompts: no prompts are given for the models to answer; name a file or folder of prompts"
                )
            Rewards(self.reward, f"{where}.reward")
        if self.tuned is not None and not self.by.startswith("eval/"):
            raise RecipeError(
                f"{where}.by: '{self.by}' is not measured on the validation split, and a value chosen on the test split makes "
                "its score too good; name a metric that begins with eval/"
            )
        known = [column.key for column in self._columns()]
        for name in self._across():
            if name not in known:
                raise RecipeError(
                    f"{where}.across: '{name}' is not a column of the table{did_you_mean(name, known)}; it has "
                    f"{', '.join(known)}, and {where}.columns adds others"
                )
        if self.plot:
            from llmrecipe.core.lazy import is_installed

            if not is_installed("matplotlib"):
                raise RunError(f"{where}.plot: needs matplotlib: pip install 'llmrecipe[plots]'; or set plot: false")
        for path in self.runs:
            if not unfinished(path):
                read_run(path)

    def run(self, work: Work) -> dict[str, Any]:
        """Read the runs (and sample their answers), write the files, print the table."""
        if not self.of:
            return self._written(work, self.runs)
        planned, board = self._board("leaderboard")
        names = {stage.result: stage for stage in planned.stages}
        wanted = [names[Path(path)] for path in board.runs]
        starts = [_planned_below(planned, stage.mapping) for stage in wanted]
        labels = labels_of([stage.mapping for stage in wanted], starts, board.tuned_keys())
        made = {str(stage.result): label for stage, label in zip(wanted, labels, strict=True) if state_of(stage) == "done"}
        return board._written(work, list(made), made, labels)

    def stands_on(self) -> Mapping[str, Any]:
        """Return the finished runs of the pipeline that `of` names: the table changes with them."""
        if not self.of:
            return {}
        planned, board = self._board("leaderboard")
        done = [stage.key for stage in planned.stages if str(stage.result) in board.runs and state_of(stage) == "done"]
        return {"done": done, "board": asdict(board)}

    def tuned_keys(self) -> tuple[str, ...]:
        """Return the keys in which runs of one row may differ."""
        return () if self.tuned is None else (self.tuned,)

    def _board(self, where: str) -> tuple[Plan, Leaderboard]:
        """Plan the pipeline that `of` names; return its plan and its leaderboard, whose runs need not exist."""
        from llmrecipe.recipe.compose import compose
        from llmrecipe.recipe.pipeline_plan import plan

        planned = plan(compose(self.of[0], self.of[1:]))
        boards = [s.composition for s in planned.stages if isinstance(s.composition, StepComposition)]
        found = [board for board in (made.build() for made in boards) if isinstance(board, Leaderboard)]
        if not found:
            raise RecipeError(f"{where}.of: no stage of {self.of[0]} is a leaderboard")
        if found[-1].against is not None:
            raise RecipeError(f"{where}.of: the runs of {self.of[0]} answer prompts, which takes all of them; run the pipeline")
        return planned, found[-1]

    def _written(
        self,
        work: Work,
        paths: list[str],
        labels: Mapping[str, tuple[str, str]] | None = None,
        rows_wanted: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Write the files from finished runs; rows that have none are empty."""
        from llmrecipe.evaluation.leaderboard_page import leaderboard_page

        tuned = Tuned(self.tuned, self.by) if self.tuned is not None else None
        entries = read_entries(paths, None if self.against else self.metric, more=self.columns, tuned=tuned, labels=labels)
        if self.against is not None:
            entries = self._requested(work, entries)
        columns = self._columns()
        score = columns[0]
        best = self.best or ("max" if self.against else better_of(self.metric, paths, "best") if paths else "max")
        if tuned is not None and entries:
            entries = chosen_values(entries, better_of(self.by, paths, "by"))
        rows = rank(entries, best, score.key, rows_wanted)
        if self.baseline is not None:
            compare_rows(rows, entries, self.baseline, score.key, "baseline")
        table, notes = markdown(rows, columns)
        say(table)
        work.dir.write("leaderboard.md", f"{table}\n\n{notes}\n")
        work.dir.write("leaderboard.json", json.dumps(as_json(rows, entries), indent=1, ensure_ascii=False) + "\n")
        across = [c for c in columns if c.key in self._across()]
        if self.plot:
            draw_plot(rows, across, score, work.path / "leaderboard.png")
            if parts := [c for c in columns if c.key.removeprefix(MEMORY) in PARTS]:
                draw_parts(rows, parts, work.path / "memory.png")
        work.dir.write("leaderboard.html", leaderboard_page(rows, columns, across))
        top = {"best": rows[0].label, f"best/{score.key}": rows[0].mean[score.key]} if entries else {}
        return {"runs": len(entries), "methods": len(rows), **top}

    def _across(self) -> list[str]:
        """Return what the plot shows the score over."""
        if self.across is None:
            return ["kl" if self.against else "trained"]
        return [self.across] if isinstance(self.across, str) else self.across

    def _columns(self) -> list[Column]:
        more = [memory_column(n) if n.startswith(MEMORY) else Column(n, n, spread=True) for n in self.columns]
        apart = [difference_column(self.baseline)] if self.baseline is not None else []
        if self.against is not None:
            shown = [c for c in REQUESTED if self.pairs or c.key not in ("margin", "preferred")]
            return [*shown[:1], *apart, *shown[1:], *more, *(c for c in PLAIN if c.key in ("memory", "seconds"))]
        chosen = f"the value that is best in {self.by}; beyond the largest and smallest tried a better one may lie"
        value = [Column("tuned", self.tuned, means=chosen)] if self.tuned else []
        return [Column("score", self.metric, spread=True), *apart, *more, *value, *PLAIN]

    def _requested(self, work: Work, entries: list[LeaderboardEntry]) -> list[LeaderboardEntry]:
        """Return the runs with the measurements of their answers, after the model they started from."""
        assert self.against is not None
        referee: list[Any] = []

        def ask(part: list[str], seed: int) -> list[dict[str, float]]:
            if not referee:
                referee.append(self._head_to_head(work.seed))
            return [self._facts(referee[0], path) for path in part]

        values = work.each([self.against, *self.runs], ask, name="asked", count=lambda facts: facts[0])
        start = LeaderboardEntry(start_label(self.against), "start", work.seed, values[0])
        return [
            start,
            *(replace(e, facts={**v, **e.facts}) for e, v in zip(entries, values[1:], strict=True)),
        ]

    def _head_to_head(self, seed: int) -> HeadToHead:
        from llmrecipe.evaluation.evaluate_model import open_subject
        from llmrecipe.evaluation.win_rate import HeadToHead, HeadToHeadConfig

        assert self.against is not None and self.prompts is not None
        config = HeadToHeadConfig(
            self.prompts, self.pairs, self.reward, self.n, self.max_new_tokens, self.max_length, self.split, self.limit, seed,
            stop=tuple(self.stop),
        )  # fmt: skip
        return HeadToHead(open_subject(self.against, self.words), config)

    def _facts(self, referee: HeadToHead, path: str) -> dict[str, float]:
        from llmrecipe.evaluation.evaluate_model import open_subject

        return referee.baseline() if path == self.against else referee.measure(open_subject(path, self.words))


def _planned_below(planned: Plan, mapping: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the recipe of the run that a stage goes on from, be it a stage of the same pipeline that has not run yet."""
    stage = REFERENCE.fullmatch(str(mapping.get("model", {}).get("path")))
    return planned[stage[1]].mapping if stage else recipe_below(mapping)
