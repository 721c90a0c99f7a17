"""Two processes whose rollouts a server samples learn what one process learns; what the server does wrong ends both."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.models.checkpoint_path import TINY
from tests.objectives.vllm_stand_in import serving
from tests.runtime.test_process_matrix import LORA, SAMPLED, Matrix, results
from tests.trainings import events

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_two_processes_learn_what_one_learns(objective: str, tmp_path: Path) -> None:
    with serving(base()) as (address, state):
        state.by_prompt = True
        answers = [word for word in SAMPLED if objective != "ppo" or "answers" not in word]
        words = [objective, *LORA, *answers, f"objective.sampler={address}", "objective.sampler_correction=sequence"]
        Matrix(tmp_path, {objective: words}).compare(objective)
        assert state.loads == 2 * 3, "the checks of step 0 and each of two updates, whatever the number of processes"
    for number in (1, 2):
        for step in events(tmp_path / str(number) / objective / "run"):
            assert step["sampler/logprob_diff"] < 1e-4


def test_a_server_that_keeps_old_weights_ends_both_processes(tmp_path: Path) -> None:
    """The main process alone asks the server for proof, and the other one does not wait for it."""
    with serving(base()) as (address, state):
        state.stale_after = 1
        words = ["grpo", *LORA, *SAMPLED, f"objective.sampler={address}", "optim.lr=0.3", "eval.at_start=false"]
        began = time.monotonic()
        results({"stale": words}, tmp_path / "2", 2)
        assert time.monotonic() - began < 200
    said = [json.loads((tmp_path / "2" / "stale" / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert "objective.sampler: the server at" in said[0]["error"]
    assert "another process of this run has ended" in said[1]["error"]
