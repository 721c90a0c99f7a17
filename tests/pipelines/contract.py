"""Every registered step through the same promises: options are checked, dry runs have examples, a second start reuses.

A step of a plugin keeps them too (see `tests/contract.py`). It is run on built-in rows and the embedded model where its options
take the results of stages; the tables below say what else a kind needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError, UserError
from llmrecipe.data import prepare
from llmrecipe.models.checkpoint_path import TINY
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.pipelines.steps.workspace import SPLITS
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.recipe.step_spec import Buildable, compose_step

STEPS = registry.names("step")
OPTIONS: dict[str, list[str]] = {"search": ["recipe=search_lora"], "leaderboard": ["runs=['${stage:x}']"]}
"""Required options that take no result of a stage."""
RUN: dict[str, list[str]] = {"generate": ["limit=2", "max_new_tokens=4"]}
"""Options with which a step of the package runs within seconds; steps of plugins run with theirs as they are."""
INPUTS = {"rows": "builtin:prompts", "model": "tiny"}
RUNNABLE = [n for n in STEPS if n in RUN or not registry.spec("step", n).module.startswith("llmrecipe.")]


def words_of(name: str, inputs: dict[str, str]) -> list[str]:
    """Options of a step: each that is required and takes the result of a stage gets one of its kind."""
    spec, needs = registry.spec("step", name), registry.load_class("step", name).needs
    taken = [f"{option}='{inputs[kind]}'" for option, kind in needs.items() if spec.options[option].default is ...]
    return [*taken, *OPTIONS.get(name, [])]


def built(name: str, folder: Path) -> Buildable:
    """A step whose inputs are results of stages that have not run."""
    unfinished = dict.fromkeys(INPUTS, "${stage:x}")
    return compose_step(name, [*words_of(name, unfinished), f"run.dir={folder}"]).build()


@pytest.mark.parametrize("name", STEPS)
def test_options_are_explained_and_a_wrong_one_is_named(name: str, tmp_path: Path) -> None:
    spec = registry.spec("step", name)
    assert spec.doc and all(option.doc for option in spec.options.values())
    option = next(iter(spec.options))
    wrong = option[:-1] + option[-1] * 2
    with pytest.raises(UserError, match=f"did you mean '{option}'"):
        compose_step(name, [f"{wrong}=1", f"run.dir={tmp_path}"])


@pytest.mark.parametrize("name", STEPS)
def test_what_it_needs_are_options_and_what_it_gives_is_known(name: str) -> None:
    cls = registry.load_class("step", name)
    assert cls.gives in ("rows", "model", "metrics") and set(cls.needs.values()) <= {"rows", "model"}
    assert set(cls.needs) <= set(registry.spec("step", name).options)


@pytest.mark.parametrize("name", STEPS)
def test_a_dry_run_has_what_later_trainings_need(name: str, tmp_path: Path) -> None:
    """Before any stage has run: the check passes, example rows are rows that a training reads, a model has its section."""
    step = built(name, tmp_path / "step")
    step.check(name)
    gives = registry.load_class("step", name).gives
    if gives == "rows":
        rows = step.example()
        assert rows.get("train") and set(rows) <= set(SPLITS)
        for split, given in rows.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given)
            (tmp_path / SPLITS[split]).write_text(text, encoding="utf-8")
        assert trainable(tmp_path), "no row type can be made of the example rows"
    if gives == "model":
        ModelSection.model_validate(dict(step.model_section()))


def trainable(folder: Path) -> list[str]:
    """Row types that every example row becomes."""
    section = DataSection(path=str(folder), cache=False, max_dropped=0.0)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    found = []
    for rows in registry.names("row_type"):
        try:
            data = prepare(section, tokenizer, rows, mask="completion", seed=0)
        except DataError:
            continue
        found += [rows] if data is not None and len(data) else []
    return found


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_finished_step_is_reused(name: str, tmp_path: Path) -> None:
    words = [*words_of(name, INPUTS), *RUN.get(name, []), f"run.dir={tmp_path / 'step'}", "log.live=off"]
    folder = run_step(compose_step(name, words)).path
    assert json.loads((folder / "final" / "metrics.json").read_text())
    rows = folder / "train.jsonl"
    if registry.load_class("step", name).gives == "rows":
        assert rows.read_bytes() and trainable(folder)
    files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    run_step(compose_step(name, words))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files} == files
