"""Runs whose start is learned from data: the reference is that start, also after a stop; the base is found again unchanged."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe import load
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.peft.exporter import export_peft
from tests.trainings import curve, events, learned, resume, stop_after, train_recipe

SHORT = ["steps=5", "batch.size=4", "data.limit=12", "data.max_length=64", "eval.batches=1", "stack.lora.init_batches=2"]
CASES = {
    "loftq": ["dpo_lora", "stack=[nf4,lora]", "stack.lora.init=loftq"],
    "loftq and codes": ["dpo_lora", "stack=[nf4,lora]", "stack.lora.init=loftq", "stack.lora.loftq_iter=3"],
    "eva": ["dpo_lora", "stack.lora.init=eva", "stack.lora.r=4"],
    "lora_ga beside entries": ["dpo_lora", "stack=[lora,fishmask]", "stack.lora.init=lora_ga", "stack.fishmask.num_samples=4"],
    "text prompt": ["dpo", "stack=[prompt_tuning]", "stack.prompt_tuning.init=text", "stack.prompt_tuning.init_text='say it'"],
}


def words(case: str) -> list[str]:
    recipe, *options = CASES[case]
    return [recipe, *(w for w in SHORT if "lora" in recipe or "stack.lora" not in w), *options]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_reference_that_was_learned_survives_a_stop(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the uninterrupted run are not there to help: each run has a cache of its own, gone before the resume."""
    for name in ("whole", "parts"):
        monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / f"cache-{name}"))
        if name == "whole":
            train_recipe(tmp_path / "whole", *words(case))
        else:
            stop_after(3, tmp_path / "parts", *words(case))
            shutil.rmtree(tmp_path / "cache-parts", ignore_errors=True)
            resume(tmp_path / "parts")
    assert events(tmp_path / "whole")[0]["loss"] == pytest.approx(math.log(2), abs=2e-5)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    ours, theirs = learned(tmp_path / "parts"), learned(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def opened_and_exported(folder: Path, export: Callable[[Path], Any], *options: str) -> None:
    """A short run gives the same logits when it is loaded again, and its export nearly those."""
    run = train_recipe(folder, "sft_lora", *SHORT, *options)
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = run.model.eval()(input_ids=ids).logits
        model, _ = load(folder, device="cpu")
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)
    done = export(folder)
    # A merged folder has the dtype the base is stored in, which rounds its weights.
    stored = done.difference.bound if export is export_merged else 1e-3
    assert done.difference.largest < stored * done.difference.scale


@pytest.mark.parametrize("init", ["loftq", "eva", *(pytest.param(i, marks=pytest.mark.slow) for i in ("corda", "lora_ga"))])
def test_a_finished_run_is_opened_and_exported_with_the_start_it_had(init: str, tmp_path: Path) -> None:
    more = ["stack=[nf4,lora]"] if init == "loftq" else []
    opened_and_exported(tmp_path / "run", export_peft, *more, f"stack.lora.init={init}")


def test_a_run_with_codes_of_its_own_is_opened_and_merged_with_them(tmp_path: Path) -> None:
    more = ["stack=[nf4,lora]", "stack.lora.init=loftq", "stack.lora.loftq_iter=2"]
    opened_and_exported(tmp_path / "run", export_merged, *more)
