"""A function that runs apart: its value, its errors and its end reach the caller, what it loaded does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llmrecipe.core import apart as module
from llmrecipe.core.apart import apart
from llmrecipe.core.errors import Interrupted, ProofError, RecipeError, RunError


@pytest.fixture(autouse=True)
def spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing heavy is loaded yet."""
    monkeypatch.setattr(module, "HEAVY", "a module that is not there")


def test_a_value_comes_back_and_what_was_done_for_it_does_not() -> None:
    seen: list[int] = []

    def work() -> tuple[int, str]:
        seen.append(1)
        return os.getpid(), "x" * 10**6  # more than a pipe holds

    where, text = apart(work, "the work")
    assert where != os.getpid() and len(text) == 10**6 and seen == []


def test_it_runs_here_where_nothing_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAVY", "os")
    assert apart(os.getpid, "the work") == os.getpid()


class Odd(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RecipeError("optim.lr: no"), RecipeError),
        (ProofError("moved"), ProofError),
        (KeyError("k"), KeyError),
        (Odd(1, 2), RuntimeError),
    ],
)
def test_an_error_comes_back_as_it_was(error: Exception, kind: type[Exception]) -> None:
    def work() -> None:
        raise error

    with pytest.raises(kind) as caught:
        apart(work, "the work")
    assert type(caught.value) is kind and str(error) in str(caught.value)
    assert any("in work" in note for note in caught.value.__notes__)


def test_a_process_that_is_ended_is_no_answer() -> None:
    with pytest.raises(RunError, match=r"^the check was ended by SIGKILL \(the system ends processes"):
        apart(lambda: os.kill(os.getpid(), signal.SIGKILL), "the check")

    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the check was stopped"):
        apart(stopped, "the check")


def test_what_supervises_imports_nothing_heavy() -> None:
    modules = "llmrecipe.pipelines.run_stages, llmrecipe.pipelines.search.study, llmrecipe.pipelines.search.display"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
