"""The page of a run: sections, numbers, safety, contrast, and what its script says of a chart."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.runs.events import Events
from llmrecipe.runs.report.charts import axis, chart
from llmrecipe.runs.report.outcome import judge, outcome
from llmrecipe.runs.report.page import SECTIONS, run_page
from llmrecipe.runs.report.render import SCRIPT, STYLE, own_text
from llmrecipe.runs.report.series import MetricCurves, Series, grouped, metric_curves, thinned
from llmrecipe.runs.run_record import read_run
from tests.pages import charts, checked, contrast, read_page

HEADINGS = [heading for _, heading in SECTIONS]
EVIL = "<script>alert(1)</script>"


def make_run(folder: Path, recipe: dict[str, Any] | None = None, status: str = "done") -> Path:
    """A run of four steps with an evaluation before and after, a test score with its interval, and evil texts."""
    folder.mkdir(parents=True)
    given = recipe or {"model": {"path": "tiny"}, "data": {"path": "builtin:preference"}, "objective": {"kind": "dpo"}}
    (folder / "recipe.yaml").write_text(json.dumps(given))
    (folder / "status.json").write_text(json.dumps({"status": status, "time": "2026-01-02T10:03:20+0000"}))
    (folder / "command.txt").write_text(f"llmrecipe train 'recipe={EVIL}'\n")
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "started": "2026-01-02T10:00:00+0000", "packages": {EVIL: EVIL}})
    )
    report = {
        "stack": {"lora": "lora"}, "base_parameters": 900, "parameters": 1000, "steps": 4,
        "trained": {"parameters": 100, "tensors": 2}, "data": {"kept": 9, "read": 10, "tokens": 1234, "format": "preference"},
        "grids": {"esft: score": {
            "rows": "layer", "columns": "expert", "values": [[0.5, 0.25], [0.0, 1.0]], "marked": [[0], [1]],
        }},
        "proved": {
            "step_zero": {"loss": math.log(2)}, "step": 1, "hooks": 2, "keys": {"set": 3, "read": 3},
            "frozen": {"tensors": 8, "unchanged": 8}, "trained": {"tensors": 2, "changed": 1, "waiting": ["A"]},
        },
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    events = Events(folder, live="off")
    events.evaluation(step=0, **{"eval/loss": 0.7, "eval/rewards/margins": 0.0})
    for step, loss in enumerate([0.69, float("nan"), 0.5, 0.25], 1):
        events.step(
            step=step, loss=loss, lr=1e-4, grad_norm=10.0**step, tokens=100 * step, tokens_per_s=50.0, peak_mem_mb=10.0 + step,
            **{"rewards/margins": step / 2},
        )  # fmt: skip
    events.evaluation(step=4, **{"eval/loss": 0.3, "eval/rewards/margins": 2.0})
    events.evaluation(step=4, **{"test/loss": 0.31, "test/loss/low": 0.29, "test/loss/high": 0.33, f"test/{EVIL}": 1.0})
    events.sample(step=4, prompt=EVIL, answer='"><img src=x onerror=alert(2)>')
    events.warning(f"mind & this {EVIL}")
    events.close()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "<b>one&only")


def test_every_section_is_there_in_order_and_nothing_of_the_run_is_markup(run: Path) -> None:
    text = run_page(run)
    page = checked(text, HEADINGS)
    assert page.one("h1").text() == "<b>one&only"
    assert EVIL not in text and "<img" not in text and not page.all("b", class_="x")
    for part in (EVIL, '"><img src=x onerror=alert(2)>', "mind & this"):
        assert part in page.one("main").text()


def test_the_outcome_comes_first_and_says_what_was_won_and_what_it_cost(run: Path) -> None:
    section = read_page(run_page(run)).one("section", id="outcome")
    assert "eval/loss 0.7 → 0.3 better by 0.4, on the test split 0.31 [0.29, 0.33]" in section.text()
    facts = dict(
        zip((e.text() for e in section.one("dl").all("dt")), (e.text() for e in section.one("dl").all("dd")), strict=True)
    )
    assert facts["Best step"] == "4 of 4"
    assert facts["Duration"] == "8 s of training steps, 3 min 20 s from start to end", "400 tokens at 50 a second"
    assert facts["Cost"] == "400 tokens, 14 MB at the peak"
    assert facts["Model"] == "tiny, 900 parameters; lora trains 100 (10.00%)"
    assert facts["Data"] == "builtin:preference, 9 of 10 rows, 1,234 tokens, format preference"
    assert facts["Proved before step 1"].startswith("loss 0.6931, ") and "8 of 8 frozen" in facts["Proved at step 1"]
    assert facts["Warnings"] == "1, below" and facts["Intervals"].startswith("95%")
    rows = [[cell.text() for cell in row.children if not isinstance(cell, str)] for row in section.one("table").all("tr")]
    assert rows[1] == ["loss", "0.7", "0.3", "0.3", "0.31 [0.29, 0.33]"], "the monitored metric leads"
    assert ["rewards/margins", "0", "2", "2", ""] in rows


def test_training_and_evaluation_of_a_metric_are_one_chart_with_the_numbers_of_the_events(run: Path) -> None:
    page = read_page(run_page(run))
    drawn = charts(page)
    assert drawn["loss"] == {
        "train": [[1, 0.69], [3, 0.5], [4, 0.25]],
        "evaluation": [[0, 0.7], [4, 0.3]],
        "test": [[4, 0.31]],
    }
    assert drawn["rewards/margins"] == {
        "train": [[1, 0.5], [2, 1.0], [3, 1.5], [4, 2.0]],
        "evaluation": [[0, 0.0], [4, 2.0]],
    }
    assert "train: 1 without a finite number" in page.one("section", id="curves").text()
    svg = next(s for s in page.all("svg", role="img") if str(s.attributes["aria-label"]).startswith("loss"))
    assert "train 0.69 → 0.25, lowest 0.25 at step 4" in str(svg.attributes["aria-label"])
    grad = next(f for f in page.all("figure") if f.one("figcaption").text().startswith("grad_norm, log scale"))
    assert [t.text() for t in grad.one("div", class_="y").all("span")] == ["10,000", "1,000", "100", "10"]


def test_groups_stand_in_order_and_what_is_no_curve_is_a_number(run: Path) -> None:
    section = read_page(run_page(run)).one("section", id="curves")
    assert [h.text() for h in section.all("h3")] == ["Loss", "Scores", "Rewards", "Speed", "Memory"]
    folded = section.one("details", **{"data-name": "group Everything else"})
    assert "grad_norm" in folded.text() and "peak_mem_mb" not in folded.text() and "open" not in folded.attributes
    tiles = {d.one("dt").text(): d.one("dd").text() for dl in section.all("dl") for d in dl.all("div")}
    assert tiles == {
        EVIL: "test 1 (step 4)",
        "tokens_per_s": "train 50 at all of 4 points",
        "lr": "train 1.00e-04 at all of 4 points",
    }


def test_runs_of_earlier_versions_and_of_steps_have_a_page(tmp_path: Path) -> None:
    """Their reports and events lack what is newer, or what only a training has."""
    old = checked(run_page(Path(__file__).parents[2] / "fixtures" / "old_run"), HEADINGS)
    assert "done" in old.one("section", id="outcome").text()
    made = make_run(tmp_path / "run", {"kind": "sample", "n": 3})
    (made / "recipe.yaml").rename(made / "step.yaml")
    (made / "report.json").unlink()
    (made / "events.jsonl").write_text('{"event": "step", "step": 1, "rows": 3}\n{"event": "step", "step": 2, "rows": 5}\n')
    page = checked(run_page(made), HEADINGS)
    assert charts(page) == {"rows": {"train": [[1, 3], [2, 5]]}} and "Nothing was measured yet." in page.text()


def test_a_table_of_choices_says_every_number_and_which_were_chosen(run: Path) -> None:
    table = read_page(run_page(run)).one("table", class_="map")
    cells = [(td.text(), td.attributes.get("class"), td.attributes.get("title")) for td in table.one("tbody").all("td")]
    assert cells == [
        ("0.5*", "h3 chosen", "layer 0, expert 0: 0.5"),
        ("0.25", "h1", "layer 0, expert 1: 0.25"),
        ("0", "h0", "layer 1, expert 0: 0"),
        ("1*", "h5 chosen", "layer 1, expert 1: 1"),
    ]


@pytest.mark.parametrize(
    ("recipe", "best", "verdict"),
    [
        ({"eval": {"monitor": "eval/rewards/margins", "mode": "max"}}, 4, "better by 2"),
        ({"eval": {"monitor": "eval/rewards/margins", "mode": "min"}}, 0, "unchanged"),
        ({"eval": {"monitor": "eval/rewards/margins"}}, None, ""),
        ({"eval": {"monitor": "eval/loss", "mode": "max"}}, 0, "unchanged"),
    ],
)
def test_the_best_step_is_that_of_the_monitored_metric(
    tmp_path: Path, recipe: dict[str, Any], best: int | None, verdict: str
) -> None:
    record = read_run(make_run(tmp_path / "run", recipe))
    metrics = metric_curves(record)
    assert judge(record, metrics).step == best and outcome(record, metrics, {}).verdict == verdict
    (record.path / "checkpoints" / "step-000004").mkdir(parents=True)
    (record.path / "checkpoints" / "step-000004" / "judge.json").write_text('{"mode": "max", "best_step": 4}')
    assert judge(record, metrics).step == (4 if best is None else best), "a checkpoint knows where the recipe does not say"
    (record.path / "final").mkdir()
    (record.path / "final" / "metrics.json").write_text('{"best_step": 3}')
    assert judge(record, metrics).step == 3, "what a finished run kept decides"


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("seed: 0\n")
    (folder / "status.json").write_text('{"status": "failed", "error": "no data"}')
    assert run_command(["report", str(folder), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "failed"
    page = checked((tmp_path / "page.html").read_text(), HEADINGS)
    assert "No steps yet." in page.text() and "failed, step 0: no data" in page.text()


@pytest.mark.parametrize(
    "values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-5.0, 5.0], [1e-7, 3.0], [0.9, 1.1], [1e5, 4e9], [-1e-9, 0.0]]
)
def test_a_scale_holds_every_value_between_evenly_spaced_labels(values: list[float]) -> None:
    made = axis(values)
    assert all(-1e-9 <= made.place(v) <= 1 + 1e-9 for v in values)
    assert made.low < made.high and 2 <= len(made.ticks) <= 8 and len(set(made.ticks)) == len(made.ticks)
    assert made.log == (min(values) > 0 and max(values) / min(values) >= 50)


def test_a_thinned_curve_keeps_its_ends_and_its_spikes() -> None:
    points = [(s, math.sin(s / 50)) for s in range(1, 5001)]
    points[1234] = (1235, 99.0)
    points[3210] = (3211, -99.0)
    kept = thinned(points)
    assert len(kept) <= 400 and {points[0], points[-1], points[1234], points[3210]} <= set(kept)
    assert [s for s, _ in kept] == sorted({s for s, _ in kept}) and set(kept) <= set(points)
    metric = MetricCurves("loss", {"train": Series("train", points)})
    drawn = chart(metric)
    assert drawn.lines[0].path.count("L") == len(kept) - 1 and drawn.lines[0].marks == "" and len(drawn.table) <= 12


def test_metrics_are_grouped_by_what_they_are() -> None:
    names = {
        "loss": "Loss", "auxiliary_loss": "Loss", "perplexity": "Loss", "accuracy": "Scores", "rewards/chosen": "Rewards",
        "reward": "Rewards", "logps/chosen": "Everything else", "lora/rank": "Everything else", "mfu": "Speed",
    }  # fmt: skip
    made = [MetricCurves(n, {"train": Series("train", [(1, 1.0)])}) for n in names]
    made[list(names).index("accuracy")].one("evaluation").points.append((1, 1.0))
    found = grouped(made, first="perplexity")
    assert {m.name: group for group, members in found.items() for m in members} == names
    assert [m.name for m in found["Loss"]] == ["perplexity", "loss", "auxiliary_loss"]


def palettes() -> list[dict[str, str]]:
    light, dark = re.findall(r":root\{(.*?)\}", own_text(STYLE), re.DOTALL)
    parse = lambda text: dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", text))  # noqa: E731
    assert set(parse(light)) == set(parse(dark))
    return [parse(light), parse(dark)]


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_texts_and_lines_stand_out_from_what_is_behind_them(palette: dict[str, str]) -> None:
    """WCAG 2.1 AA: 4.5 for text, 3 for lines of a chart and borders that mean something."""
    for text in ("fg", "muted", "accent", "good", "bad"):
        for behind in ("bg", "panel"):
            assert contrast(palette[text], palette[behind]) >= 4.5, (text, behind)
    assert contrast(palette["fg"], palette["mark"]) >= 4.5
    for level in range(6):
        assert contrast(palette[f"h{level}"], palette[f"t{level}"]) >= 4.5, level
        assert contrast(palette[f"s{level + 1}"], palette["panel"]) >= 3, level
    assert contrast(palette["edge"], palette["bg"]) >= 3
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )


def test_the_style_uses_only_colours_of_the_palettes() -> None:
    rest = re.sub(r":root\{.*?\}", "", own_text(STYLE), flags=re.DOTALL)
    assert not re.search(r"#[0-9a-f]{3,6}\b(?![^{]*\{)|rgba?\(|hsl", rest)
    assert set(re.findall(r"var\(--(\w+)\)", rest)) == set(palettes()[0])
    for wanted in ("prefers-color-scheme:dark", "@media print", ":focus-visible", "max-width:36rem", "overflow-x:auto"):
        assert wanted in own_text(STYLE)


NODE = shutil.which("node")
STUB = r"""
const fs = require("fs"), vm = require("vm");
const [script, charts] = [fs.readFileSync(process.argv[1], "utf8"), JSON.parse(process.argv[2])];
class Node { constructor() { this.set = {}; this.on = {}; this.children = {}; this.dataset = {}; this.hidden = true; }
  setAttribute(n, v) { this.set[n] = v; } removeAttribute(n) { delete this.set[n]; } hasAttribute(n) { return n in this.set; }
  addEventListener(n, f) { this.on[n] = f; }
  dispatchEvent(e) { this.on[e.type](e); } querySelector(n) { return (this.children[n] ??= new Node()); }
  getBoundingClientRect() { return { left: 10, width: 200 }; } }
const figures = charts.map((data) => { const f = new Node(); f.dataset.chart = data; return f; });
const folded = [new Node(), new Node()], on = {};
const document = { body: new Node(), querySelectorAll: (q) => (q.startsWith("figure") ? figures : folded) };
class Event { constructor(type) { this.type = type; } }
vm.runInNewContext(script, { document, Event, addEventListener: (n, f) => (on[n] = f), JSON, Math, Set, String });
const said = figures.map((f) => {
  const box = f.querySelector(".read"), input = box.querySelector("input"), output = box.querySelector("output");
  const lines = [output.value];
  f.querySelector(".plot svg").on.pointermove({ clientX: 10 + 200 * 0.3 }); lines.push(output.value);
  input.value = "0"; input.on.input(); lines.push(input.set["aria-valuetext"]);
  const moved = input.dataset.step; input.read(2.2); lines.push(output.value);
  return { lines, shown: !box.hidden, moved, max: input.max, cursor: f.querySelector(".cursor").set };
});
on.beforeprint(); const printed = folded.map((d) => d.open); on.afterprint();
console.log(JSON.stringify({ said, printed, after: folded.map((d) => d.open) }));
"""


@pytest.mark.skipif(NODE is None, reason="needs node, which runs the page's script without a browser")
def test_the_script_reads_values_under_the_pointer_and_the_slider(run: Path) -> None:
    page = read_page(run_page(run))
    figure = next(f for f in page.all("figure") if f.one("figcaption").all("b")[0].text() == "loss")
    path = Path(__file__).resolve().parents[3] / "llmrecipe" / "assets" / "report" / SCRIPT
    done = subprocess.run(
        [str(NODE), "-e", STUB, str(path), json.dumps([figure.attributes["data-chart"]])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (chart_said,) = said["said"]
    assert chart_said["lines"] == [
        "step 4: train 0.25, evaluation 0.3, test 0.31",
        "step 1: train 0.69, evaluation 0.7 (step 0), test 0.31 (step 4)",
        "step 0: train 0.69 (step 1), evaluation 0.7, test 0.31 (step 4)",
        "step 3: train 0.5, evaluation 0.3 (step 4), test 0.31 (step 4)",
    ]
    assert chart_said["moved"] == 0, "a page that is read again returns to the step that was read"
    assert chart_said["shown"] and chart_said["max"] == 3 and chart_said["cursor"] == {"x1": 750, "x2": 750}
    assert said["printed"] == [True, True] and said["after"] == [False, False]
