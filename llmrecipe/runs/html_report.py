"""One self-contained HTML page of a run: no scripts, no links, curves as inline SVG."""

from __future__ import annotations

import html
import json
from typing import Any

from llmrecipe.core.console import number
from llmrecipe.core.score_intervals import shown
from llmrecipe.runs.run_record import Record

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid #d8dee4}
table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}th{font-weight:600}
pre{background:#f6f8fa;padding:.8rem;overflow:auto;font-size:13px}.curves{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0}figcaption{font-size:13px;color:#57606a}.done{color:#1a7f37}.failed,.interrupted{color:#cf222e}
svg{background:#f6f8fa}polyline{fill:none;stroke:#0969da;stroke-width:1.5}text{font-size:10px;fill:#57606a}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}pre,svg{background:#161b22}h2{border-color:#30363d}}
"""
WIDTH, HEIGHT, EDGE = 300, 140, 34
FRAME = ' stroke="#cf222e" stroke-width="2"'
POINTS = 400
"""Most points of one curve; longer ones are subsampled."""


def page(record: Record, environment: dict[str, Any], command: str, recipe: str) -> str:
    """Return the HTML of a run's report."""
    state = str(record.status.get("status"))
    parts = [
        f"<h1>{html.escape(record.name)}</h1>",
        f'<p class="{html.escape(state)}">{html.escape(state)}{_error(record)}</p>',
        "<h2>Result</h2>",
        _table([*shown({k: v for k, v in record.facts().items() if v is not None and k != "status"}, number).items()]),
    ]
    curves = "".join(svg(metric, record.curve(metric)) for metric in record.metrics())
    parts += ["<h2>Curves</h2>", f'<div class="curves">{curves}</div>' if curves else "<p>No steps yet.</p>"]
    if grids := _grids(record):
        parts += [
            "<h2>Choices</h2>",
            f'<div class="curves">{"".join(grid_svg(title, made) for title, made in grids.items())}</div>',
        ]
    if record.evaluations:
        parts += ["<h2>Evaluations</h2>", _events(record.evaluations)]
    if record.samples:
        parts += ["<h2>Samples</h2>", _events(record.samples)]
    if record.warnings:
        parts += ["<h2>Warnings</h2>", _table([(f"step {w['step']}", w["message"]) for w in record.warnings])]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(recipe)}</pre>"]
    parts += ["<h2>Command</h2>", f"<pre>{html.escape(command)}</pre>"]
    parts += ["<h2>Environment</h2>", f"<pre>{html.escape(json.dumps(environment, indent=1))}</pre>"]
    return document(record.name, parts)


def document(title: str, parts: list[str]) -> str:
    """Return the parts of a body as one self-contained page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def table(lines: list[list[str]]) -> str:
    """Return a table whose first line is the header."""
    head, *body = lines
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>{rows}</table>"


def _error(record: Record) -> str:
    return f": {html.escape(str(record.status['error']))}" if record.status.get("error") else ""


def _table(rows: list[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _events(events: list[dict[str, Any]]) -> str:
    texts = [shown({k: v for k, v in e.items() if k != "event"}, number) for e in events]
    columns = list(dict.fromkeys(k for row in texts for k in row))
    return table([columns, *([row.get(c, "") for c in columns] for row in texts)])


def svg(metric: str, curve: list[tuple[int, float]]) -> str:
    """Return one curve as SVG with its range at the axes; an empty string when there is nothing to draw."""
    if not curve:
        return ""
    stride = -(-len(curve) // POINTS)
    shown = curve[::stride] if (len(curve) - 1) % stride == 0 else [*curve[::stride], curve[-1]]
    low, high = min(v for _, v in shown), max(v for _, v in shown)
    first, last = shown[0][0], shown[-1][0]
    points = " ".join(
        f"{EDGE + (s - first) / ((last - first) or 1) * (WIDTH - EDGE - 6):.1f},"
        f"{HEIGHT - 18 - (v - low) / ((high - low) or 1) * (HEIGHT - 30):.1f}"
        for s, v in shown
    )
    name = html.escape(metric)
    dot = f'<circle cx="{points.split(",")[0]}" cy="{points.split(",")[1]}" r="2.5"/>' if len(shown) == 1 else ""
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{name}"><polyline points="{points}"/>{dot}'
        f'<text x="2" y="14">{number(high)}</text><text x="2" y="{HEIGHT - 18}">{number(low)}</text>'
        f'<text x="{EDGE}" y="{HEIGHT - 4}">{first}</text><text x="{WIDTH - 40}" y="{HEIGHT - 4}">{last}</text></svg>'
        f"<figcaption>{name}: {number(curve[0][1])} &rarr; {number(curve[-1][1])}</figcaption></figure>"
    )


def _grids(record: Record) -> dict[str, dict[str, Any]]:
    path = record.path / "report.json"
    return json.loads(path.read_text(encoding="utf-8")).get("grids", {}) if path.is_file() else {}


def grid_svg(title: str, made: dict[str, Any]) -> str:
    """Return a table of numbers as SVG: the larger a number, the darker its cell; marked cells have a frame."""
    side, values = 14, made["values"]
    high = max((v for row in values for v in row), default=0.0) or 1.0
    width, height = EDGE + side * max(map(len, values)), 16 + side * len(values)
    cells = "".join(
        f'<rect x="{EDGE + side * j}" y="{side * i}" width="{side - 1}" height="{side - 1}" fill="#0969da" '
        f'fill-opacity="{max(v, 0.0) / high:.2f}"{FRAME if j in made["marked"][i] else ""}>'
        f"<title>{made['rows']} {i}, {made['columns']} {j}: {number(v)}</title></rect>"
        for i, row in enumerate(values)
        for j, v in enumerate(row)
    )
    labels = "".join(f'<text x="2" y="{side * i + 11}">{i}</text>' for i in range(len(values)))
    name = html.escape(title)
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{name}">{cells}{labels}'
        f'<text x="{EDGE}" y="{height - 4}">{html.escape(made["columns"])}s</text></svg>'
        f"<figcaption>{name}: {html.escape(made['rows'])}s down, {html.escape(made['columns'])}s across, "
        f"largest {number(high)}; framed ones train</figcaption></figure>"
    )
