"""The pages in a real Chromium without a window: scripts run, nothing is refused, both sizes can be drawn, and axe-core finds
nothing that keeps a person from reading them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.evaluation.leaderboard_page import leaderboard_page
from llmrecipe.evaluation.leaderboard_table import PLAIN, Column, LeaderboardRow
from llmrecipe.runs.report.page import run_page
from llmrecipe.runs.report.several import several_page
from llmrecipe.runs.run_record import read_runs
from tests.runs.report.test_page import make_run


def browser() -> str:
    """The path of a Chromium; the test skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell"):
        if (path := shutil.which(name)) is not None:
            return path
    if importlib.util.find_spec("playwright") is not None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as running:
            path = running.chromium.executable_path
        if Path(path).is_file():
            return path
    pytest.skip("needs Chromium: neither chromium nor google-chrome is on the path, and playwright has none installed")


def opened(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a file and wait until its script has run."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    return subprocess.run(
        [browser(), *always, f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "report.html"
    file.write_text(run_page(make_run(tmp_path / "run")), encoding="utf-8")
    return file


def test_the_script_runs_under_the_pages_own_policy(page: Path) -> None:
    done = opened(page, "--dump-dom")
    assert "step 4: train 0.25, evaluation 0.3, test 0.31" in done.stdout or 'aria-valuetext="step 4: train 0.25' in done.stdout
    assert "CONSOLE" not in done.stderr, "no error, no refused style or script"


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_both_sizes_and_themes_are_drawn(page: Path, width: int, dark: bool) -> None:
    picture = page.parent / f"{width}.png"
    theme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    opened(page, f"--screenshot={picture}", f"--window-size={width},2000", *theme)
    from PIL import Image

    with Image.open(picture) as image:
        corner = image.convert("L").getpixel((2, 1990))
        assert image.width == width and len(image.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 8
    assert isinstance(corner, int) and (corner < 40 if dark else corner > 230)


# --- people who see, hear and press differently ----------------------------------------------------------------------


def run_report(folder: Path) -> str:
    run = make_run(folder / "run")
    report = json.loads((run / "report.json").read_text())
    places = [f"{part}.{name}_proj" for part in ("self_attn", "mlp") for name in ("q", "k", "v", "o", "gate", "up", "down")]
    rows = {str(layer): {place: 0.001234 * (layer + i) for i, place in enumerate(places)} for layer in range(4)}
    report["changes"] = {"Change of the weights": {"note": "norm of the change", "rows": rows, "outside": {}}}
    (run / "report.json").write_text(json.dumps(report))
    return run_page(run)


def comparison(folder: Path) -> str:
    runs = [make_run(folder / name, {"optim": {"lr": lr}}) for name, lr in (("first", 1e-4), ("second", 2e-4))]
    return several_page(read_runs([str(run) for run in runs]))


def leaderboard(folder: Path) -> str:
    families = ("reparameterized", "additive", "selective", "hybrid", "memory", "base", "additive")
    rows = [
        LeaderboardRow(
            f"method {i}", family, [0, 1], {**{c.key: 10.0**i for c in PLAIN}, "score": 0.9 - 0.1 * i}, {"score": 0.02}
        )
        for i, family in enumerate(families)
    ]
    return leaderboard_page(rows, [Column("score", "test/accuracy", spread=True), *PLAIN], PLAIN[:1])


PAGES = {"run": run_report, "several": comparison, "leaderboard": leaderboard}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser that a test can ask what it shows."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (dev extra)")
    path = browser()  # before playwright runs: only one of it can
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1200, "light"),
        (400, "dark"),
        pytest.param(1200, "dark", marks=pytest.mark.slow),
        pytest.param(400, "light", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", PAGES)
def test_axe_finds_nothing(kind: str, scheme: str, width: int, chromium: Any, tmp_path: Path) -> None:
    """Contrast, names, roles, order of headings; no message of the console; no page that is wider than its window."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python (dev extra)")
    file = tmp_path / f"{kind}.html"
    file.write_text(PAGES[kind](tmp_path), encoding="utf-8")
    # The page's own policy would refuse the script of the examination.
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width and said == []
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in found] == []
    for cell in page.query_selector_all("table.map td"):
        box = cell.bounding_box()
        assert box is None or box["height"] < 40, "a number is not broken into lines"
    context.close()


def test_axe_would_find_something(chromium: Any, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python (dev extra)")
    file = tmp_path / "bad.html"
    file.write_text("<html><body><img src=a.png><p style='color:#ccc;background:#fff'>pale</p></body></html>", encoding="utf-8")
    page = chromium.new_page()
    page.goto(file.as_uri())
    assert {"image-alt", "color-contrast", "html-has-lang"} <= {v["id"] for v in axe.Axe().run(page).response["violations"]}
    page.close()
