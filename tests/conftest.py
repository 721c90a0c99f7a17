"""Fixtures that several folders share; what they stand on is imported when one is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deviations", metavar="FOLDER", help="write there how far marked tests were from their references")
    told = "packages whose components take part, comma-separated"
    parser.addoption("--plugins", dest="component_packages", metavar="PACKAGES", default="", help=told)
    parser.addoption("--deviations-reason", metavar="TEXT", default="", help="why some of them may have grown tenfold")


def pytest_configure(config: pytest.Config) -> None:
    # Before any test file is read: what is registered decides which tests there are.
    for package in filter(None, config.getoption("component_packages").split(",")):
        from llmrecipe.core import registry

        registry.add_plugin(package)
    if folder := config.getoption("--deviations"):
        from tests.deviations import Deviations

        config.pluginmanager.register(Deviations(folder, config.getoption("--deviations-reason")))


@pytest.fixture(autouse=True)
def fixed_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices decide by their kind alone, whatever memory a machine has free, and no test leaves a profile behind."""
    from tests.fixed_profile import fix_profile

    fix_profile(monkeypatch)


@pytest.fixture
def own_rules() -> Iterator[None]:
    """Judge rules that a test registers are gone after it."""
    from llmrecipe.feedback.judges.rule import RULES

    kept = dict(RULES)
    yield
    RULES.clear()
    RULES.update(kept)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages run inside this process; their names in the order they were started."""
    from llmrecipe.cli import app
    from llmrecipe.pipelines import run_stages
    from llmrecipe.pipelines.subprocesses import command_of

    names: list[str] = []

    def here(child: Any, planned: Any, continued: bool, enough: Any = None) -> int:
        names.append(planned.name)
        return app.run_command(command_of(planned, continued))

    monkeypatch.setattr(run_stages, "execute", here)
    return names
