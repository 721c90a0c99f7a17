"""A training that is continued from a checkpoint."""

from __future__ import annotations

import contextlib
import io
import shutil
from typing import ClassVar

from safetensors.torch import load_file
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.evaluation.verify.bench import HALF, STEPS, Bench, largest
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.recipe.compose import compose
from llmrecipe.runs.checkpoint_io import keep_only, steps
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.training.train import train


@register
class ResumedRun(Verification):
    """Weights after a stop and a resume = weights after the same steps in one go, bit for bit."""

    order: ClassVar[int] = 90

    def measure(self, bench: Bench) -> Measured:
        """Continue a copy of the short training from its checkpoint and compare what `final/` holds."""
        whole = bench.run.dir.path
        if HALF not in steps(whole / "checkpoints"):
            raise NotApplicable("the objective allows no checkpoint inside so short a run")
        parts = bench.folder / "resumed"
        shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("final", "lock"))
        # The checkpoint of the end would leave nothing to continue.
        keep_only(parts / "checkpoints", {HALF})
        RunDir(parts).status("interrupted", step=HALF)
        with contextlib.redirect_stdout(io.StringIO()):
            train(compose(parts / "recipe.yaml"), parts)
        apart, where = largest(weights_in(str(whole)), weights_in(str(parts)))
        return Measured(f"{HALF} steps, a resume and {STEPS - HALF} more = {STEPS} steps", apart, 0.0, where)


def weights_in(run: str) -> dict[str, Tensor]:
    """Return the tensors a finished run left."""
    folder = run_folder(run)
    assert folder is not None, "the run has finished"
    return {n: t for path in sorted(folder.rglob("*.safetensors")) for n, t in load_file(str(path)).items()}
