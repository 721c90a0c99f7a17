"""Optuna's studies and samplers, as a search uses them: each trial has a study and a sampler of its own."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.core.console import say_progress
from llmrecipe.core.errors import RunError
from llmrecipe.core.lazy import is_installed
from llmrecipe.pipelines.search import space
from llmrecipe.recipe.search_section import SearchSection

if TYPE_CHECKING:
    import optuna

POPULATION = 10
"""Trials of one generation of NSGA-II. The first generation is random, and few searches train much more than 50 models."""


INSTALL = "pip install 'llmrecipe[botorch]'"


def resolve_sampler(section: SearchSection, journal: Path) -> SearchSection:
    """Return a section with a sampler in the place of `auto`: that of an earlier start, else the best that is installed."""
    if section.sampler != "auto":
        return section
    here = "saas_map" if is_installed("botorch") else "gp"
    found = _sampler_of(journal) or here
    if found == "gp":
        say_progress(
            f"search.sampler: gp ({'as this search began' if here != found else 'BoTorch is not installed: ' + INSTALL})"
        )
    return section.model_copy(update={"sampler": found})


def _sampler_of(journal: Path) -> str | None:
    """Return the sampler of the trials of a journal, where it has a readable first line."""
    if not journal.is_file():
        return None
    with open(journal, encoding="utf-8", errors="replace") as file:
        try:
            found = json.loads(file.readline())["search"]["sampler"]
        except (ValueError, KeyError, TypeError):
            return None  # what is wrong with it is said when its trials are read
    return found if found in ("gp", "saas_map") else None


def check_sampler(section: SearchSection) -> None:
    """Refuse a sampler whose library is absent.

    Raises:
        RunError: naming what to install, and a sampler that needs nothing more.
    """
    if section.sampler == "saas_map" and not is_installed("botorch"):
        raise RunError(
            f"search.sampler: saas_map needs BoTorch: {INSTALL}; without it use search.sampler=gp, or auto, which takes "
            "saas_map where BoTorch is installed"
        )


def new_study(section: SearchSection, mode: str) -> optuna.Study:
    """Create an empty study.

    Raises:
        RunError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise RunError("search needs Optuna: pip install 'llmrecipe[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "off": optuna.pruners.NopPruner,
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "median": optuna.pruners.MedianPruner,
    }
    better = optuna.study.StudyDirection
    directions = [better.MINIMIZE if mode == "min" else better.MAXIMIZE, *(better.MINIMIZE for _ in section.against)]
    return optuna.create_study(directions=directions, pruner=pruners[section.prune]())


def sample_trial(study: optuna.Study, section: SearchSection, number: int) -> optuna.Trial:
    """Sample the next trial with a sampler seeded by (seed, number)."""
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence([section.seed, number]).generate_state(1)[0])
    axes = space.distributions(section)
    if section.sampler == "saas_map":
        from llmrecipe.pipelines.search.saas_map import SaasMap

        if number >= len(section.start):
            study.enqueue_trial(SaasMap(section, seed).propose(study))
        return study.ask(axes)
    samplers: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "nsga2": functools.partial(optuna.samplers.NSGAIISampler, population_size=POPULATION),
    }
    study.sampler = samplers.get(section.sampler, optuna.samplers.RandomSampler)(seed=seed)
    return study.ask(axes)
