"""model.kernels: the losses of the stock model, what is said of it, and what `verify` finds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import device_profile
from llmrecipe.core.device_profile import DeviceFacts, Profile, decide
from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.evaluation.evaluate_model import open_subject
from llmrecipe.evaluation.verify.verify_subject import bench_of, judged, verifications
from llmrecipe.models import fused_kernels
from llmrecipe.models.fused_kernels import Kernel
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.profile_keys import profile_for, profile_line
from tests.models.test_fused_kernels import count, use_stand_ins, wrong
from tests.trainings import curve, events, resume, stop_after, train_recipe

SMALL = ["steps=4", "batch.size=4", "data.limit=16", "eval.at_start=false", "eval.batches=1", "eval.test=false", "save.every=2"]
LINE = "kernels: 4 rotary embeddings and 4 gated activations by liger-kernel"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """Stand-ins, as `tests.models.test_fused_kernels` has them."""
    return use_stand_ins(monkeypatch)


def decided(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Have a CPU decide for itself what no CPU does yet."""
    table = {**device_profile.TABLE, "cpu": dataclasses.replace(device_profile.TABLE["cpu"], **values)}
    monkeypatch.setattr(device_profile, "TABLE", table)


def test_a_run_has_the_losses_of_the_stock_model_and_a_resume_goes_on_with_its_kernels(
    tmp_path: Path, kernels: dict[str, Kernel], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_recipe(tmp_path / "plain", "sft_lora", *SMALL)
    assert "kernels" not in capsys.readouterr().out
    calls = count(kernels)
    train_recipe(tmp_path / "fused", "sft_lora", *SMALL, "model.kernels=liger")
    said = capsys.readouterr().out
    assert LINE in said and "kernels liger (model.kernels)" in said and calls["rotary"] == calls["silu"] > 0
    for plain, fused in zip(curve(tmp_path / "plain"), curve(tmp_path / "fused"), strict=True):
        assert fused[1:3] == pytest.approx(plain[1:3], rel=1e-4)
    # They belong to the training: what it leaves is evaluated on any machine.
    with monkeypatch.context() as patch:
        patch.setattr(fused_kernels, "kernels_lacking", lambda device: "needs another machine")
        assert open_subject(str(tmp_path / "fused"), []).composition.recipe.model.kernels == "liger"
    # A device that decides for kernels is remembered, whatever the table says when the run goes on.
    decided(monkeypatch, kernels="liger")
    stop_after(2, tmp_path / "stopped", "sft_lora", *SMALL)
    decided(monkeypatch, kernels="off")
    assert json.loads((tmp_path / "stopped" / "report.json").read_text())["profile"]["decided"]["kernels"] == "liger"
    capsys.readouterr()
    resume(tmp_path / "stopped")
    assert LINE in capsys.readouterr().out
    assert curve(tmp_path / "stopped") == curve(tmp_path / "fused")


def test_kernels_of_the_device_s_choice_that_fail_are_a_warning(
    tmp_path: Path, kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(monkeypatch, kernels="liger")
    kernels["silu"] = wrong(kernels["silu"], backward=True)
    train_recipe(tmp_path, "sft_lora", *SMALL)
    said = [event["message"] for event in events(tmp_path, "warning")]
    assert "model.kernels: liger gives other numbers than this model's gated activation; the run goes on without" in said


def test_kernels_by_key_that_the_machine_lacks_are_an_error_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match=r"model\.kernels: liger needs a CUDA GPU, and the device is cpu; use auto or off"):
        train_recipe(tmp_path / "run", "sft_lora", *SMALL, "model.kernels=liger")
    assert not (tmp_path / "run").exists()


def test_verify_compares_kernels_with_the_stock_forward(tmp_path: Path, kernels: dict[str, Kernel]) -> None:
    check = dict(verifications())["stock_forward"]
    bench = bench_of("sft_lora", ["data.limit=64", "model.kernels=liger"], tmp_path)
    calls = count(kernels)
    assert judged("stock_forward", lambda: check.measure(bench)).result == "ok" and calls["rotary"] and calls["silu"]
    for name in ("silu", "rotary"):
        for backward in (False, True):
            own = kernels[name]
            kernels[name] = wrong(own, backward, 1.05)
            assert judged("stock_forward", lambda: check.measure(bench)).result == "failed", (name, backward)
            kernels[name] = own


# --- what decides ----------------------------------------------------------------------------------------------------


def profile(**values: Any) -> Profile:
    return Profile("cuda", "a GPU", dataclasses.replace(decide(DeviceFacts("cuda", "a GPU")), **values))


def test_kernels_are_off_until_a_key_or_a_device_says_otherwise_and_beside_compiled_blocks() -> None:
    for kind in device_profile.TABLE:
        assert Profile(kind, "", decide(DeviceFacts(kind))).kernels == "off"
    assert profile(kernels="liger").kernels == "liger"
    both = profile(compile="blocks", kernels="liger")
    assert (both.compiled, both.kernels) == ("blocks", "off")
    # What a key says comes before what the device decides.
    by_key = Profile("cuda", "", both.decided, {"kernels": "liger"})
    assert (by_key.compiled, by_key.kernels) == ("off", "liger")
    by_key = Profile("cuda", "", both.decided, {"compile": "off"})
    assert (by_key.compiled, by_key.kernels) == ("off", "liger")


def test_the_line_names_kernels_where_they_compute_or_a_key_decides() -> None:
    for words, part in (
        (["model.kernels=liger"], ", kernels liger (model.kernels), "),
        (["model.kernels=off"], ", kernels off ("),
    ):
        own = compose("sft_lora", words).recipe
        assert part in profile_line(profile_for(own, "cpu"), own, 100, ())
    own = compose("sft_lora", []).recipe
    assert "kernels" not in profile_line(profile_for(own, "cpu"), own, 100, ())


def test_kernels_inside_compiled_blocks_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"model\.kernels: liger is for blocks that are not compiled, and model\.compile=blocks"
    ):
        compose("sft_lora", ["model.kernels=liger", "model.compile=blocks"])
    compose("sft_lora", ["model.kernels=liger", "model.compile=off"])
    compose("sft_lora", ["model.kernels=off", "model.compile=blocks"])
