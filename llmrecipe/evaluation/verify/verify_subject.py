"""Verification of a recipe, a run or an exported folder: every registered comparison, each with what it found."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.console import lasting
from llmrecipe.core.errors import ProofError, RunError
from llmrecipe.evaluation.eval_recipe import recipe_of
from llmrecipe.evaluation.verify.bench import Bench, short_words
from llmrecipe.evaluation.verify.exported import compare_export, is_export
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification
from llmrecipe.models.checkpoint_path import STACK_FILE, run_folder
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.recipe.pipeline_plan import refuse_stages


@dataclass(frozen=True)
class CheckResult:
    """What one verification found."""

    check: str
    result: str
    """`ok`, `failed` or `not applicable`."""
    compared: str
    difference: float | None = None
    bound: float | None = None
    reason: str = ""
    """Why it does not apply, or what is wrong and where."""

    def facts(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def verify_subject(subject: str, overrides: list[str], run: str | None = None) -> Iterator[CheckResult]:
    """Yield a line per verification, as each ends.

    Args:
        subject: a recipe (name or file), a run directory, or a folder that `export` wrote.
        run: of an exported folder, the run it was made from; default the folder above it.

    Raises:
        UserError: the subject cannot be trained or opened at all.
    """
    if is_export(subject):
        yield from (judged(name, one) for name, one in compare_export(Path(subject), run, overrides))
        return
    folder = Path(tempfile.mkdtemp(prefix="llmrecipe-verify-"))
    try:
        yield from verify_bench(bench_of(subject, overrides, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verify_bench(bench: Bench) -> Iterator[CheckResult]:
    """Yield a line per verification of a short training, which the first of them begins."""
    for name, verification in verifications():
        line = judged(name, lambda v=verification: v.measure(bench))  # type: ignore[misc]
        yield line
        if line.result == "failed" and "run" not in vars(bench):
            # Without a finished short training there is nothing to compare.
            return


def verifications() -> list[tuple[str, Verification]]:
    """Return every registered verification by name, in the order in which they run."""
    found = [(name, registry.load_class("verification", name)()) for name in registry.names("verification")]
    return sorted(found, key=lambda pair: (pair[1].order, pair[0]))


def judged(name: str, measure: Callable[[], Measured]) -> CheckResult:
    """Run a verification and return its line."""
    about = registry.spec("verification", name).summary if name in registry.names("verification") else ""
    try:
        with lasting(f"verifying: {name}"):
            found = measure()
    except NotApplicable as why:
        return CheckResult(name, "not applicable", about, reason=str(why))
    except (ProofError, RunError) as error:
        return CheckResult(name, "failed", about, reason=str(error))
    if found.passes:
        return CheckResult(name, "ok", found.compared, found.difference, found.bound)
    return CheckResult(name, "failed", found.compared, found.difference, found.bound, found.culprit)


def bench_of(subject: str, overrides: list[str], folder: Path) -> Bench:
    """Return the bench of a recipe, or of a run: its recipe on its own weights, its adapters trained further."""
    finished = run_folder(subject)
    if finished is None:
        given = compose(subject, overrides)
        refuse_stages(given.mapping)
        return Bench(compose(subject, [*overrides, *short_words(given, folder)]), folder, None, given)
    given = _given(subject, overrides)
    further = (finished / STACK_FILE).is_file()
    words = [*overrides, f"model.continue={str(further).lower()}", *short_words(given, folder)]
    return Bench(recipe_of(subject, words), folder, Path(subject), given)


def _given(run: str, overrides: list[str]) -> Composition:
    """Return the recipe a run was trained with, on the model it started from."""
    path = Path(run) / "recipe.yaml"
    return compose(path if path.is_file() else Path(run).parent / "recipe.yaml", overrides, foreign=True)
