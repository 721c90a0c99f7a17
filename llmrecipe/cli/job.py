"""Job files of `llmrecipe launch --to`: from a command line to a file, and to the client of an engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from llmrecipe.cli.arguments import PROCESSES, VerbWords, need_recipe, processes_word, tell
from llmrecipe.core.console import say
from llmrecipe.core.errors import RecipeError, UserError
from llmrecipe.core.redact import name_variable, variables_in


def make_job(request: VerbWords, engine: str, out: Path | None, submit: bool, options: dict[str, Any]) -> int:
    """Print, write or submit the job file of a recipe; return the exit code.

    Args:
        out: the file; default: standard output, of a job that is submitted NAME.sbatch or NAME.yaml.
        options: those of `llmrecipe launch`, by name.

    Raises:
        UserError: the recipe or an option is wrong, or the engine's client is missing or refuses the job.
    """
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.pipeline_plan import refuse_stages
    from llmrecipe.recipe.recipe_paths import CONFIG_DIR
    from llmrecipe.runtime.job_files import ENGINES, Job, write_job

    if request.resume is not None:
        raise RecipeError("launch --to: leave resume= out; the job continues its run by itself where it has begun")
    if any(word.startswith("run.dir=") for word in request.overrides):
        raise RecipeError(
            "launch --to: leave run.dir= out; the run is in --checkpoints FOLDER, in a folder of the job's --name"
        )
    recipe = need_recipe(request, "launch")
    gpu, gpus = _gpus(options.pop("gpus"))
    nproc = options.pop("nproc") or gpus or PROCESSES
    processes = processes_word(request.overrides, nproc * options["nodes"])
    # Files are where the job runs: here the recipe alone is checked.
    composition = compose(recipe, [*request.overrides, *processes])
    refuse_stages(composition.mapping)
    tell(composition.notes)
    further = [CONFIG_DIR] if CONFIG_DIR in os.environ else []
    names = dict.fromkeys([*variables_in(composition.mapping), *options.pop("env"), *further])
    for name in names:
        name_variable(name)
    title = options.pop("name") or re.sub(r"[^a-z0-9]+", "-", composition.name.lower()).strip("-")[:40]
    settings = dict(map(_setting, options.pop("set")))
    words = (f"recipe={recipe}", *request.overrides)
    job = Job(title, words, nproc=nproc, gpus=gpus, gpu=gpu, variables=tuple(names), options=settings, **options)
    text = write_job(engine, job)
    if out is None and not submit:
        print(text, end="")
        return 0
    path = out or Path(job.name + ENGINES[engine].suffix)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror or error}") from error
    command = ENGINES[engine].submit(job, str(path))
    say(f"written: {path}" + ("" if submit else f"; submit it with: {shlex.join(command)}"))
    if submit:
        _submit(command)
    return 0


def _gpus(text: str | None) -> tuple[str | None, int]:
    """Return (type, number) of `8` or `H100:8`."""
    if text is None:
        return None, 0
    kind, _, count = text.rpartition(":")
    if not count.isdecimal() or int(count) < 1 or (kind == "") != (":" not in text):
        raise RecipeError(f"--gpus: must be a number, or TYPE:NUMBER such as H100:8; got '{text}'")
    return kind or None, int(count)


def _setting(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key:
        raise RecipeError(f"--set: must be KEY=VALUE; got '{text}'")
    return key.removeprefix("--"), value


def _submit(command: list[str]) -> None:
    """Hand a job file to the engine's client.

    Raises:
        UserError: the client is not installed here, or refuses the job.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"--submit: {command[0]} is not installed here; submit the file where it is: {shlex.join(command)}")
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"--submit: {command[0]} refused the job (exit code {code}): {shlex.join(command)}")
