"""The device profile of a run: one line at its start, its place in `report.json`, and what a resume makes of it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core import device_profile, registry
from llmrecipe.core.device_profile import DeviceFacts
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.evaluation.evaluate_model import open_subject
from llmrecipe.optim.optimizer import Group, build_optimizer
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.profile_keys import KEYS, choices, profile_for, profile_line
from llmrecipe.training.dry_run import predict_memory
from llmrecipe.training.optimizer_state import optimizer_state, restore_optimizer
from llmrecipe.training.resume_rules import changes_of
from llmrecipe.training.run_profile import PART, decided_profile, finished_profile, stored_profile
from tests.trainings import curve, resume, stop_after, train_recipe

SMALL = [
    "steps=2",
    "batch.size=4",
    "data.limit=8",
    "data.max_length=48",
    "eval.at_start=false",
    "eval.batches=1",
    "save.every=1",
]
GPU = DeviceFacts("cuda", "a GPU", 24 << 30, 20 << 30)


def recipe(*overrides: str) -> Any:
    return compose("sft_lora", list(overrides)).recipe


def test_every_decision_has_a_key() -> None:
    assert not choices(recipe())
    given = ["batch.tokens=64", "runtime.logit_rows=9", "model.packed_attention=loop", "model.compile=blocks"]
    keys = ["model.kernels=off", "runtime.optimizer_kernel=single", "runtime.decoding=static"]
    found = choices(recipe(*given, *keys))
    assert found == {
        "micro_tokens": 64,
        "logit_rows": 9,
        "packed_attention": ("loop",),
        "compile": "blocks",
        "kernels": "off",
        "optimizer": "single",
        "decoding": "static",
    }
    assert found.keys() == KEYS.keys()


def test_a_cut_by_rows_takes_the_place_of_the_cut_by_tokens() -> None:
    assert profile_for(recipe("batch.micro=2"), "cpu").micro_tokens is None
    assert profile_for(recipe("batch.micro=2", "batch.tokens=64"), "cpu").micro_tokens == 64


def test_the_line_names_the_keys_that_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    own = recipe()
    assert profile_line(profile_for(own, "cpu"), own, 32_000, ("loop",)) == (
        "device: cpu; micro-batches of at most 512 tokens, logits of 131 positions at once, packed attention by loop, "
        "compile off, fused optimizer, continuous decoding"
    )
    monkeypatch.setattr(device_profile, "facts_of", lambda device: GPU)
    own = recipe("batch.micro=2", "runtime.logit_rows=2000", "model.compile=blocks", "runtime.decoding=graphs")
    assert profile_line(profile_for(own, "cuda"), own, None, ()) == (
        "device: a GPU; micro-batches of at most 2 rows (batch.micro), compile blocks (model.compile), fused optimizer, "
        "graphs decoding (runtime.decoding)"
    )
    own = recipe("runtime.logit_rows=2000")
    assert profile_line(profile_for(own, "cuda"), own, 128_256, ("flex", "loop")) == (
        "device: a GPU; micro-batches of at most 4,096 tokens, logits of 2,000 positions at once (runtime.logit_rows), "
        "packed attention by flex or loop, compile off, fused optimizer, continuous decoding"
    )


def test_a_run_says_and_keeps_its_profile_and_a_resume_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stored size of micro-batches holds in the rest of the run, where the table has another one."""
    train_recipe(tmp_path / "whole", "sft_lora", *SMALL)
    assert len(re.findall(r"^device: cpu; micro-batches", capsys.readouterr().out, re.MULTILINE)) == 1
    run = tmp_path / "run"
    stop_after(1, run, "sft_lora", *SMALL)
    report = json.loads((run / "report.json").read_text())
    assert report[PART]["decided"]["micro_tokens"] == 512
    report[PART]["decided"]["micro_tokens"] = 100
    (run / "report.json").write_text(json.dumps(report))
    capsys.readouterr()
    again = resume(run)
    assert again.roles.micro_tokens == 100
    assert "micro-batches of at most 100 tokens" in capsys.readouterr().out
    assert json.loads((run / "report.json").read_text())[PART]["decided"]["micro_tokens"] == 100
    for (_, loss, *_), (_, wanted, *_) in zip(curve(run), curve(tmp_path / "whole"), strict=True):
        assert loss == pytest.approx(wanted, rel=1e-4)
    with device_profile.kept_profiles():
        assert open_subject(str(run), []).roles.micro_tokens == 100
        assert open_subject(str(run / "final"), ["batch.tokens=64"]).roles.micro_tokens == 64
    small = predict_memory(run).activations
    report[PART]["decided"]["micro_tokens"] = 1024
    (run / "report.json").write_text(json.dumps(report))
    assert small < predict_memory(run).activations


def test_graphs_are_refused_before_a_model_is_read_where_there_is_no_gpu() -> None:
    with pytest.raises(RecipeError, match=r"runtime\.decoding: graphs needs a CUDA GPU, and the device is cpu; use auto"):
        decided_profile(recipe("runtime.decoding=graphs"), torch.device("cpu"), None)
    with pytest.raises(RecipeError, match=r"runtime\.decoding: graphs needs a CUDA GPU"):
        open_subject("tiny", ["runtime.decoding=graphs"])
    assert profile_for(recipe("runtime.decoding=graphs"), "cpu").decoding == "continuous", "the recipe of a run of a GPU"
    assert decided_profile(recipe("runtime.decoding=static"), torch.device("cpu"), None).decoding == "static"


def test_a_model_that_is_no_run_decides_here(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"profile": []}')
    assert finished_profile("tiny") is None and finished_profile(str(tmp_path / "model")) is None


def test_a_kernel_named_for_a_resume_comes_before_the_one_whose_state_was_saved() -> None:
    """Flags of the implementation are no part of a saved state; its numbers go on under the other one."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]

    def optimizer(parameter: torch.nn.Parameter, *given: str) -> torch.optim.Optimizer:
        device_profile.use(profile_for(recipe(*given), "cpu"))
        group = Group("matrix", 0.1, 0.0, 1.0, ("p",), (parameter,))
        return build_optimizer(registry.load_class("optim", "adamw")(lr=0.1), [group])

    with device_profile.kept_profiles():
        before, after = optimizer(parameters[0]), optimizer(parameters[1], "runtime.optimizer_kernel=single")
        parameters[0].grad = torch.full((3,), 0.5)
        before.step()
        restore_optimizer(after, *optimizer_state(before))
        assert before.param_groups[0]["fused"] and not after.param_groups[0]["fused"]
        assert after.param_groups[0]["foreach"] is False
        parameters[1].data.copy_(parameters[0].data)
        for parameter, own in zip(parameters, (before, after), strict=True):
            parameter.grad = torch.full((3,), -0.2)
            own.step()
    torch.testing.assert_close(parameters[0], parameters[1])


def test_another_device_decides_again_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = recipe()
    stored = profile_for(own, "cpu").to_dict()
    stored["decided"]["micro_tokens"] = 100
    (tmp_path / "report.json").write_text(json.dumps({PART: stored}))
    monkeypatch.setattr(device_profile, "facts_of", lambda device: GPU)
    assert decided_profile(own, "cuda", tmp_path).micro_tokens == 4096  # type: ignore[arg-type]
    assert capsys.readouterr().out == "device: the run began on cpu and continues on a GPU, which decides again\n"


def test_a_run_without_a_profile_decides_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert stored_profile(tmp_path) is None
    (tmp_path / "report.json").write_text("{}")
    assert stored_profile(tmp_path) is None
    for damaged in ('{"kind": 1}', "[]", '{"kind": "cpu", "name": "", "decided": {"words": "x"}}'):
        (tmp_path / "report.json").write_text(f'{{"profile": {damaged}}}')
        with pytest.raises(RunError, match=r"report\.json: profile: .*take it out"):
            stored_profile(tmp_path)


def test_a_run_from_before_a_value_had_its_name_goes_on() -> None:
    composition = compose("sft_lora", [])
    before = copy.deepcopy(composition.mapping)
    for known in (False, "off"):
        before["model"]["compile"] = known
        assert changes_of(before, composition) == {}
    before["model"]["compile"] = "blocks"
    assert changes_of(before, composition) == {("model", "compile"): ("blocks", "auto")}
