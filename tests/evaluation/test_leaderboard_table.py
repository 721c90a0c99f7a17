"""A leaderboard is a pure function of finished run directories: names, numbers, order and files are worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.console import number as as_text
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.evaluation.leaderboard_labels import labels_of
from llmrecipe.evaluation.leaderboard_plot import draw_plot
from llmrecipe.evaluation.leaderboard_table import (
    PLAIN,
    Column,
    LeaderboardEntry,
    Tuned,
    cells,
    chosen_values,
    markdown,
    rank,
    read_entries,
)
from llmrecipe.evaluation.paired_differences import compare_rows, difference_column, t_quantile
from llmrecipe.runs.run_record import seconds_of

SFT: dict[str, Any] = {"objective": {"kind": "sft"}, "stack": {}, "seed": 0, "optim": {"lr": 0.1}}
LORA: dict[str, Any] = {**SFT, "stack": {"lora": {"kind": "lora", "r": 4}}}
SCORE = Column("score", "test/accuracy", spread=True)


def finished(folder: Path, recipe: dict[str, Any], accuracy: float, status: str = "done", delta: int | None = 40) -> str:
    """A run directory with the numbers a run leaves: 100 of 1000 parameters, two steps of 20 tokens at 10 and 40 a second."""
    (folder / "final" / "model").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "status.json").write_text(json.dumps({"status": status}))
    (folder / "report.json").write_text(json.dumps({"parameters": 1000, "trained": {"parameters": 100}}))
    steps = [
        {"event": "step", "step": 1, "tokens": 20, "tokens_per_s": 10.0, "peak_mem_mb": 300.0},
        {"event": "step", "step": 2, "tokens": 40, "tokens_per_s": 40.0, "peak_mem_mb": 250.0},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (folder / "final" / "metrics.json").write_text(json.dumps({"test/accuracy": accuracy}))
    files = [folder / "final" / "delta.safetensors"] if delta is not None else []
    files += [folder / "final" / "model" / f"model-{i}.safetensors" for i in range(2)] if delta is None else []
    for file in files:
        file.write_bytes(b"\0" * (delta or 1000))
    return str(folder)


def test_a_run_is_read_into_its_name_and_numbers(tmp_path: Path) -> None:
    paths = [finished(tmp_path / "a", LORA, 0.75), finished(tmp_path / "b", {**SFT, "seed": 3}, 0.5, delta=None)]
    lora, full = read_entries(paths, "test/accuracy")
    # 20 tokens at 10 a second and 20 at 40: 2 s + 0.5 s.
    numbers = {"trained": 100.0, "share": 0.1, "memory": 300.0, "seconds": 2.5}
    assert lora == LeaderboardEntry("lora", "reparameterized", 0, {**numbers, "stored": 40.0, "score": 0.75})
    assert full == LeaderboardEntry("full", "full", 3, {**numbers, "stored": 2000.0, "score": 0.5})


def test_further_metrics_are_columns_of_their_own(tmp_path: Path) -> None:
    path = finished(tmp_path / "a", SFT, 0.5)
    file = tmp_path / "a" / "final" / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "forget/mean": 0.25}))
    (entry,) = read_entries([path], "test/accuracy", more=["forget/mean"])
    assert (entry.facts["score"], entry.facts["forget/mean"]) == (0.5, 0.25)
    with pytest.raises(RunError, match=r"columns: .* has no metric 'forget/own'"):
        read_entries([path], "test/accuracy", more=["forget/own"])


def test_the_score_of_one_run_has_its_interval_and_that_of_several_their_deviation(tmp_path: Path) -> None:
    paths = []
    for name, recipe in (("a", SFT), ("b", LORA), ("c", {**LORA, "seed": 1})):
        paths.append(finished(tmp_path / name, recipe, 0.5))
        ends = {"test/accuracy": 0.5, "test/accuracy/low": 0.25, "test/accuracy/high": 0.625}
        (tmp_path / name / "final" / "metrics.json").write_text(json.dumps(ends))
    entries = read_entries(paths, "test/accuracy", more=["test/accuracy"])
    rows = rank(entries)
    columns = [Column("score", "test/accuracy", 100.0, spread=True), Column("test/accuracy", "again", spread=True)]
    shown = {line[1]: line[3:5] for line in cells(rows, columns)[1:]}
    assert shown == {"full": ["50 [25, 62.5]", "0.5 [0.25, 0.625]"], "lora": ["50 ± 0", "0.5 ± 0"]}
    assert not any(name.endswith(("/low", "/high")) for row in rows if len(row.seeds) > 1 for name in row.mean)


def test_steps_logged_now_and_then_count_the_tokens_between_them() -> None:
    assert seconds_of([{"tokens": 50, "tokens_per_s": 25.0}, {"tokens": 150, "tokens_per_s": 50.0}]) == 4.0
    assert seconds_of([{"rows": 3}, {"tokens": 50, "tokens_per_s": 25.0}]) == 2.0, "steps of other work count no tokens"


def test_rows_are_means_and_sample_deviations_over_seeds_best_first() -> None:
    entries = [
        LeaderboardEntry("a", "x", 0, {"score": 0.5}),
        LeaderboardEntry("b", "y", 0, {"score": 0.65}),
        LeaderboardEntry("a", "x", 1, {"score": 0.75}),
    ]
    rows = rank(entries)
    assert [(r.label, r.seeds) for r in rows] == [("b", [0]), ("a", [0, 1])]
    # deviations -1/8 and 1/8: sqrt((2/64) / 1)
    assert rows[1].mean["score"] == 0.625 and rows[1].spread["score"] == pytest.approx(0.03125**0.5)
    assert rows[0].spread["score"] is None
    assert [r.label for r in rank(entries, "min")] == ["a", "b"]
    broken = [LeaderboardEntry(name, "z", 0, {"score": value}) for name, value in (("c", math.nan), ("d", 0.9), ("e", 0.1))]
    for best, order in (("max", "dbaec"), ("min", "eabdc")):
        assert "".join(r.label for r in rank([*broken, *entries], best)) == order, "what is not a number comes last"
    tried = [LeaderboardEntry("a", "x", 0, {"tuned": t, "by": by, "score": t}) for t, by in ((1.0, math.nan), (2.0, 0.5))]
    assert all([e.facts["tuned"] for e in chosen_values(tried, best)] == [2.0] for best in ("min", "max"))


@pytest.mark.parametrize(
    ("recipes", "names"),
    [
        ([SFT, LORA, {**LORA, "seed": 5}], ["full", "lora", "lora"]),
        ([LORA, {**LORA, "stack": {"lora": {"kind": "lora", "r": 8}}}], ["lora (stack.lora.r=4)", "lora (stack.lora.r=8)"]),
        ([LORA, {**LORA, "objective": {"kind": "dpo"}}], ["sft", "dpo"]),
        ([{**SFT, "stack": {"n": {"kind": "nf4"}, "l": {"kind": "lora"}}}], ["nf4+lora"]),
        (
            [{**SFT, "data": {"path": "a"}}, {**SFT, "data": {"path": {"a": 0.8, "b": 0.25}}}],
            ["full (data.path=a)", "full (data.path=0.8 a + 0.25 b)"],
        ),
        ([{**SFT, "run": {"dir": "x"}}, {**SFT, "run": {"dir": "y"}, "log": {"every": 2}}], ["full", "full"]),
    ],
)
def test_a_row_is_named_by_what_sets_it_apart(recipes: list[dict[str, Any]], names: list[str]) -> None:
    assert [name for name, _ in labels_of(recipes)] == names


ROWS: dict[str, Any] = {"path": "a", "control": {}}
MLM: dict[str, Any] = {"objective": {"kind": "mlm", "prob": 0.15}, "data": ROWS, "seed": 0}
DAE: dict[str, Any] = {"objective": {"kind": "dae", "form": "mse"}, "data": ROWS, "optim": {"lr": 1.0}, "seed": 0}


def test_rows_of_one_task_are_named_by_the_runs_they_go_on_from(tmp_path: Path) -> None:
    """The objective below; its options where two share it, or what else differs; `fresh` of a model that is no run."""
    below = [
        MLM,
        MLM | {"seed": 1},
        MLM | {"data": {"path": "b"}},
        DAE,
        DAE | {"objective": {"kind": "dae", "form": "tsdae"}, "optim": {"lr": 2.0}},
        DAE | {"data": {"path": "a", "control": {"text": "words"}}},
    ]
    paths = []
    for number, recipe in enumerate(below):
        start = finished(tmp_path / f"below{number}", recipe, 0.0)
        paths.append(finished(tmp_path / f"run{number}", SFT | {"model": {"path": start}}, 0.5))
    paths += [finished(tmp_path / "none", SFT | {"model": {"path": "tiny"}}, 0.5)]
    labels = [(entry.label, entry.family) for entry in read_entries(paths, "test/accuracy")]
    assert labels == [
        ("mlm (start.data.path=a)", "pretraining"),
        ("mlm (start.data.path=a)", "pretraining"),
        ("mlm (start.data.path=b)", "pretraining"),
        ("dae (start.objective.form=mse)", "pretraining"),
        ("dae (start.objective.form=tsdae)", "pretraining"),
        ("dae (start.objective.form=mse, start.data.control.text=words)", "pretraining"),
        ("fresh", "fresh"),
    ]
    assert [entry.label for entry in read_entries(paths[:2], "test/accuracy")] != ["mlm", "mlm"], (
        "one objective below is no name"
    )


def test_a_row_is_compared_with_the_baseline_seed_by_seed() -> None:
    """Differences -1/4, -1/2 and 0 over three seeds: mean -1/4, deviation 1/4, so -1/4 +- 4.3027 / (4 sqrt(3))."""
    scores = {"fresh (start.x=1)": [0.5, 0.75, 0.25], "mlm": [0.25, 0.25, 0.25], "clm": [1.0], "dae": []}
    entries = [LeaderboardEntry(n, "x", seed, {"score": v}) for n, found in scores.items() for seed, v in enumerate(found)]
    entries.append(LeaderboardEntry("other", "x", 9, {"score": 9.0}))
    rows = rank(entries, empty=[("dae", "x")])
    compare_rows(rows, entries, "fresh", "score", "baseline")
    half = 4.302653 / (4 * 3**0.5)
    column = difference_column("fresh")
    shown = {line[1]: line[4] for line in cells(rows, [SCORE, column])[1:]}
    assert shown == {
        "mlm": f"-0.25 [{as_text(-0.25 - half)}, {as_text(-0.25 + half)}]",
        "clm": "0.5",
        "other": "-",
        "fresh (start.x=1)": "-",
        "dae": "",
    }
    assert [key for key in rows[-2].mean if key.startswith("difference")] == [
        "difference", "difference/low", "difference/high"
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="baseline: no row is called 'frsh'; did you mean 'fresh"):
        compare_rows(rows, entries, "frsh", "score", "baseline")


def test_a_row_is_compared_with_the_baseline_of_its_own_model() -> None:
    scores = {"fresh (model=a)": (0.5, "a"), "fresh (model=b)": (0.25, "b"), "mlm": (0.75, "a"), "clm": (0.375, "b")}
    entries = [LeaderboardEntry(name, "x", 0, {"score": value}, first) for name, (value, first) in scores.items()]
    rows = rank(entries)
    compare_rows(rows, entries, "fresh", "score", "baseline")
    assert {r.label: r.mean.get("difference") for r in rows} == {
        "mlm": 0.25, "clm": 0.125, "fresh (model=a)": None, "fresh (model=b)": None
    }  # fmt: skip
    other = [replace(e, first="c") if e.label == "mlm" else e for e in entries]
    with pytest.raises(RecipeError, match="2 rows have that name, and none with the model that mlm began with"):
        compare_rows(rows, other, "fresh", "score", "baseline")
    with pytest.raises(RecipeError, match="2 rows have that name, with the model that mlm began with; name one of them"):
        compare_rows(rows, [replace(e, first="a") for e in entries], "fresh", "score", "baseline")


def test_the_model_of_a_chain_is_that_of_its_first_run(tmp_path: Path) -> None:
    model = {"path": "tiny", "config": {"kind": "encoder"}}
    pretext = {"objective": {"kind": "mlm"}, "stack": {}, "seed": 0, "model": model}
    below = finished(tmp_path / "pretext", pretext, 0.5)
    between = finished(tmp_path / "between", {**pretext, "model": {"path": below}}, 0.5)
    tasks = [{**SFT, "model": {"path": path}} for path in (between, below, "other")]
    paths = [finished(tmp_path / f"task{i}", {**task, "seed": i}, 0.5) for i, task in enumerate(tasks)]
    paths.append(finished(tmp_path / "fresh", {**SFT, "model": model}, 0.5))
    first = [entry.first for entry in read_entries(paths, "test/accuracy")]
    assert first[0] == first[1] == first[3] != first[2]


def test_quantiles_go_on_where_the_table_ends() -> None:
    assert t_quantile(1) == 12.706205 and t_quantile(20) == 2.085963
    # 2.0796 at 21, 2.0086 at 50 and 1.9600 without end, as tables of Student's t have them.
    assert [t_quantile(n) for n in (21, 50, 10**6)] == pytest.approx([2.0796, 2.0086, 1.96], abs=1e-3)


def test_the_table_shows_spread_where_there_are_seeds_and_a_dash_where_there_is_no_number() -> None:
    rows = rank(
        [
            LeaderboardEntry("a", "x", 0, {"score": 0.5, "trained": 1234.0}),
            LeaderboardEntry("a", "x", 1, {"score": 0.75, "trained": 1234.0}),
        ]
    )
    columns = [SCORE, *PLAIN[:2]]
    assert cells(rows, columns)[1] == ["1", "a", "x", "0.625 ± 0.18", "1,234", "-", "2"]
    table, notes = markdown(rows, columns)
    assert table.splitlines()[0] == "|  | method | family | test/accuracy | trained | % of all | seeds |"
    assert notes.splitlines() == ["- trained: parameters that train.", "- % of all: of all parameters."]


def test_an_unfinished_run_and_a_metric_nobody_wrote_are_told(tmp_path: Path) -> None:
    done, stopped = finished(tmp_path / "a", SFT, 0.5), finished(tmp_path / "b", SFT, 0.5, "interrupted")
    with pytest.raises(RunError, match="b is interrupted; a leaderboard compares finished runs"):
        read_entries([done, stopped], "test/accuracy")
    with pytest.raises(RunError, match=r"no metric 'test/acuracy'; did you mean 'test/accuracy'"):
        read_entries([done], "test/acuracy")


def test_the_picture_has_a_point_and_a_name_for_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["full", "lora", "bitfit", "ia3"]
    entries = [
        LeaderboardEntry(n, "f" + n[0], s, {"score": 0.1 * i + 0.02 * s, "trained": 10.0**i})
        for i, n in enumerate(names)
        for s in (0, 1)
    ]
    draw_plot(rank(entries), PLAIN[0], SCORE, tmp_path / "board.svg")
    text = (tmp_path / "board.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in names)
    with pytest.raises(RunError, match="cannot write"):
        draw_plot(rank(entries), PLAIN[0], SCORE, tmp_path / "missing" / "board.png")


def tried(label: str, rate: float, seed: int, by: float, score: float = 0.0) -> LeaderboardEntry:
    return LeaderboardEntry(label, "x", seed, {"tuned": rate, "by": by, "score": score})


def test_a_row_has_the_rate_that_is_best_on_the_validation_split_whatever_the_test_split_says() -> None:
    entries = [
        tried("a", 0.1, 0, by=1.0, score=0.5),
        tried("a", 0.1, 1, by=3.0, score=0.5),
        tried("a", 0.2, 0, by=1.5, score=0.9),
        tried("a", 0.2, 1, by=1.5, score=0.9),
        tried("b", 0.1, 0, by=1.0, score=0.1),
        tried("b", 0.2, 0, by=1.25, score=0.9),
    ]
    # a: means 2 and 1.5; b: 1 and 1.25, though 0.2 is better on the test split.
    assert [(e.label, e.facts["tuned"], e.seed) for e in chosen_values(entries, "min")] == [
        ("a", 0.2, 0),
        ("a", 0.2, 1),
        ("b", 0.1, 0),
    ]
    assert [(e.label, e.facts["tuned"]) for e in chosen_values(entries, "max")] == [("a", 0.1), ("a", 0.1), ("b", 0.2)]


def test_rates_with_other_seeds_are_compared_by_those_they_share() -> None:
    """Seed 1 is hard: 0.1, which alone has run it, is better on seed 0."""
    entries = [tried("a", 0.1, 0, by=1.0), tried("a", 0.1, 1, by=9.0), tried("a", 0.2, 0, by=2.0)]
    assert [(e.facts["tuned"], e.seed) for e in chosen_values(entries, "min")] == [(0.1, 0), (0.1, 1)]
    apart = [tried("a", 0.1, 1, by=9.0), tried("a", 0.2, 0, by=2.0)]
    assert [e.facts["tuned"] for e in chosen_values(apart, "min")] == [0.2]


def test_a_value_at_the_edge_of_those_tried_is_marked() -> None:
    """Best at 0.3 of three, at 0.1 of three, between them, and the only one."""
    losses = {"a": (3.0, 2.0, 1.0), "b": (1.0, 2.0, 3.0), "c": (2.0, 1.0, 3.0)}
    entries = [tried(n, rate, 0, by=by) for n, row in losses.items() for rate, by in zip((0.1, 0.2, 0.3), row, strict=True)]
    rows = {r.label: r for r in rank(chosen_values([*entries, tried("d", 0.1, 0, by=1.0)], "min"))}
    column = Column("tuned", "optim.lr")
    shown = {name: cells([row], [column])[1][3] for name, row in rows.items()}
    assert shown == {"a": "0.3 (largest tried)", "b": "0.1 (smallest tried)", "c": "0.2", "d": "0.1"}


def test_runs_of_a_row_may_differ_in_the_key_that_is_tuned(tmp_path: Path) -> None:
    recipes = [{**LORA, "optim": {"lr": rate}} for rate in (0.1, 0.2)]
    paths = [finished(tmp_path / str(i), recipe, 0.5) for i, recipe in enumerate(recipes)]
    entries = read_entries(paths, "test/accuracy", tuned=Tuned("optim.lr", "test/accuracy"))
    assert [(e.label, e.facts["tuned"], e.facts["by"]) for e in entries] == [("lora", 0.1, 0.5), ("lora", 0.2, 0.5)]
    assert [e.label for e in read_entries(paths, "test/accuracy")] == ["lora (optim.lr=0.1)", "lora (optim.lr=0.2)"]


def test_rows_without_a_run_come_last_and_are_empty_in_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries = [LeaderboardEntry("a", "x", 0, {"score": 0.5, "trained": 10.0})]
    rows = rank(entries, empty=[("b", "y"), ("a", "x"), ("b", "y")])
    assert cells(rows, [SCORE, PLAIN[0]])[1:] == [["1", "a", "x", "0.5", "10", "1"], ["", "b", "y", "", "", "0"]]
    draw_plot(rows, [PLAIN[0], SCORE], SCORE, tmp_path / "board.svg")
    text = (tmp_path / "board.svg").read_text()
    # A panel for each cost, each with the name of the one run.
    assert text.count("<!-- a -->") == 2 and "<!-- b -->" not in text
