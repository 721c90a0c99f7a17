"""Every registered step through the same promises: options are explained and checked, a second start reuses what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.recipe.step_spec import compose_step

STEPS = registry.names("step")


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


def test_a_finished_step_is_reused(tmp_path: Path) -> None:
    words = ["model=tiny", "prompts=builtin:prompts", "limit=2", "max_new_tokens=4", f"run.dir={tmp_path}", "log.live=off"]
    folder = run_step(compose_step("generate", words)).path
    rows = (folder / "train.jsonl").read_bytes()
    assert len(rows.splitlines()) == 2 and json.loads((folder / "final" / "metrics.json").read_text())
    stamp = (folder / "train.jsonl").stat().st_mtime_ns
    run_step(compose_step("generate", words))
    assert (folder / "train.jsonl").read_bytes() == rows and (folder / "train.jsonl").stat().st_mtime_ns == stamp
