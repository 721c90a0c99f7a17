"""The page in a real Chromium without a window: its script runs, nothing is refused, both sizes can be drawn."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from llmrecipe.runs.report.page import run_page
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
