"""The outcome of a run with the chart of its score, as one SVG: for a README or a model card."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from llmrecipe.core.printable import shortened
from llmrecipe.runs.report.charts import chart
from llmrecipe.runs.report.outcome import outcome
from llmrecipe.runs.report.render import STYLE, own_text, templates
from llmrecipe.runs.report.series import metric_curves
from llmrecipe.runs.run_record import read_run, run_document

FACTS = ("Best step", "Duration", "Cost", "Model", "Data", "Objective")
"""Facts of the outcome that the card shows, in its order."""
LONGEST = 84
"""Characters of a fact that fit into one line."""
LINES = 3
"""Series that the legend has room for."""


def report_card(run: Path) -> str:
    """Return the card of a run; it follows the light or dark theme of whatever shows it.

    Raises:
        RunError: there is no run at the path, or one of its files is damaged.
    """
    record, report = read_run(run), run_document(run, "report.json")
    metrics = metric_curves(record)
    found = outcome(record, metrics, report)
    curves = [metric for metric in metrics if metric.is_curve]
    curve = next((m for m in curves if m.name == found.judged.metric), None) or next(iter(curves), None)
    if curve is not None:
        curve.series = dict(list(curve.series.items())[:LINES])
    headline, score = f"{found.state}, {found.progress}", found.headline
    if score is not None:
        after = score.best or score.last
        headline = f"{found.headline_name} {score.before + ' → ' if score.before else ''}{after}"
        headline += f", {found.verdict}" if found.verdict else ""
        # Its interval stands in the legend: one line holds no more.
        headline += f", test {score.test.partition(' [')[0]}" if score.test else ""
    drawn, known = chart(curve) if curve is not None else None, dict(found.facts)
    facts = [(name, shortened(known[name], LONGEST)) for name in FACTS if name in known]
    name = str((report.get("recipe") or {}).get("name") or record.name)
    return templates().get_template("card.svg").render(
        title=name, headline=headline, chart=drawn, facts=facts, style=Markup(own_text(STYLE)),
        summary="; ".join([headline, *([drawn.summary] if drawn is not None else []), *(f"{n} {t}" for n, t in facts)]),
    )  # fmt: skip
