"""`verify` passes on what is sound and names the culprit of what is not, on the screen, as JSON and by its exit code."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmrecipe.cli.app import run_command as command
from llmrecipe.core.forward_context import Layout, Segment
from llmrecipe.data.collate import Batch, Sequence, pack, pad
from llmrecipe.engine import role_models
from llmrecipe.evaluation.verify.bench import Bench, largest
from llmrecipe.evaluation.verify.checks import cached_generation
from llmrecipe.evaluation.verify.checks.update_proof import UpdateProof
from llmrecipe.evaluation.verify.documents import documents_of
from llmrecipe.evaluation.verify.exported import value_difference
from llmrecipe.evaluation.verify.verify_subject import CheckResult, bench_of, judged, verifications, verify_subject
from llmrecipe.interop.merged import export_merged
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.objectives.alignment._engines import rollout
from llmrecipe.recipe.recipe_paths import all_recipes
from llmrecipe.training import save_run
from tests.training.test_first_step import Spare, aside
from tests.training.test_first_update import NORM, after_step, nudge
from tests.trainings import train_recipe

CHECKS = dict(verifications())
SINGLE = sorted(n for n, path in all_recipes().items() if n != "base" and "\nstages:" not in path.read_text(encoding="utf-8"))
"""Recipes of one training; those of several are in `tests/pipelines/test_verify_stages.py`."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A sound LoRA training."""
    return bench_of("sft_lora", ["data.limit=64"], tmp_path_factory.mktemp("bench"))


def line(name: str, bench: Bench) -> CheckResult:
    return judged(name, lambda: CHECKS[name].measure(bench))


def failed(lines: Iterator[CheckResult]) -> CheckResult:
    """The first line that is not ok."""
    return next(one for one in lines if one.result == "failed")


# --- what is sound ---------------------------------------------------------------------------------------------------


def test_a_sound_recipe_passes_everything_that_applies(bench: Bench) -> None:
    found = {name: line(name, bench) for name in CHECKS}
    assert {name for name, one in found.items() if one.result == "not applicable"} == {"shared_prompt"}
    assert not [one for one in found.values() if one.result == "failed"]
    assert found["resumed_run"].difference == 0.0 and found["resumed_run"].bound == 0.0
    assert 0.0 < found["row_layouts"].difference < 1e-4  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SINGLE)
def test_every_packaged_recipe_passes(recipe: str) -> None:
    lines = list(verify_subject(recipe, []))
    assert not [one for one in lines if one.result == "failed"]
    assert len(lines) == len(CHECKS) and sum(one.result == "ok" for one in lines) >= 4
    assert all(one.reason for one in lines if one.result == "not applicable")


@pytest.mark.slow
def test_a_finished_run_and_its_exports_pass(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(bench.run.dir.path, run)
    assert not [one for one in verify_subject(str(run), []) if one.result == "failed"]
    for kind in ("merged", "peft"):
        assert command(["export", str(run), "--to", kind]) == 0
        assert command(["verify", str(run / kind)]) == 0


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [pack, lambda s: pad(s, 0), lambda s: pad(s, 0, "left")])
def test_documents_are_found_in_every_layout(layout: Any) -> None:
    """A shared prompt stands before each answer; a target is predicted by the token before it."""
    sequences = [
        Sequence([5, 6, 7], [0, 0, 0]),
        Sequence([8, 9], [1, 1], parent=0),
        Sequence([10], [1], parent=0),
        Sequence([11, 12, 13, 14], [0, 0, 1, 1], prompt=2),
    ]
    batch: Batch = layout(sequences)
    found = {tuple(d.ids): [(int(batch.target[i]), p) for i, p in d.places] for d in documents_of(batch)}
    assert found == {
        (5, 6, 7, 8, 9): [(8, 2), (9, 3)],
        (5, 6, 7, 10): [(10, 2)],
        (11, 12, 13, 14): [(13, 1), (14, 2)],
    }


def test_the_largest_difference_is_a_share_of_the_largest_value_and_nan_is_one() -> None:
    one = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([2.0])}
    assert largest(one, {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([1.0])}) == (0.25, "b")
    assert largest(one, {"a": one["a"]}) == (float("inf"), "b is on one side only")
    apart, where = largest(one, {**one, "b": torch.tensor([float("nan")])})
    assert apart != apart and where == "b"


# --- planted faults --------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Lora.attach

    def attach(self: Lora, model: nn.Module, structure: Any = None) -> None:
        original(self, model, structure)
        add_hook(aside(model), "lora__spare", Spare(), self.name)

    monkeypatch.setattr(Lora, "attach", attach)
    lines = list(verify_subject("sft_lora", ["data.limit=64"]))
    assert [one.result for one in lines] == ["failed"] and "never called: aside.lora__spare" in lines[0].reason


def test_a_frozen_tensor_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    after_step(monkeypatch, nudge)
    assert f"frozen tensors moved: {NORM}" in failed(verify_subject("sft_lora", ["data.limit=64"])).reason


def test_a_key_that_nothing_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["verify", "recipe=sft_lora", "+roles.reward.path=x", "data.limit=64", "--json"]) == 3
    given = json.loads(capsys.readouterr().out)
    assert given["passed"] is False and "roles.reward.path" in given["lines"][0]["reason"]


def test_packed_rows_that_see_each_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(*arguments: Any) -> Batch:
        batch = pack(*arguments)
        columns = batch.input_ids.shape[1]
        return dataclasses.replace(batch, layout=Layout((Segment(0, 0, columns),), 1, columns))

    assert bench.run.roles.packing
    monkeypatch.setattr(role_models, "pack", leaking)
    found = line("row_layouts", bench)
    assert found.result == "failed" and found.reason.startswith("packed: ") and found.difference > 0.01  # type: ignore[operator]


def test_a_fast_path_that_computes_something_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench.run.roles.engine
    monkeypatch.setattr(engine, "post", dataclasses.replace(engine.post, scale=1.01))
    assert line("stock_forward", bench).result == "failed"


def drifted(model: nn.Module) -> nn.Module:
    """A copy whose adapters are what they once were."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("lora.B"):
                parameter.add_(0.05)
    return other


def test_a_sampler_with_other_weights(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stale, original = drifted(bench.run.model), cached_generation.generate
    monkeypatch.setattr(cached_generation, "generate", lambda model, *rest, **more: original(stale, *rest, **more))
    found = line("cached_generation", bench)
    assert found.result == "failed" and "the sampler's weights or cache differ" in found.reason


@pytest.mark.slow
def test_an_objective_whose_sampler_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = bench_of("grpo", ["data.limit=16"], tmp_path)
    assert line("cached_generation", other).result == "ok"
    stale, original = drifted(other.run.model), rollout.generate_scored
    monkeypatch.setattr(rollout, "generate_scored", lambda model, *rest, **more: original(stale, *rest, **more))
    assert line("cached_generation", other).result == "failed"


def copied(bench: Bench, folder: Path) -> Path:
    """A copy of the bench's finished run."""
    shutil.copytree(bench.run.dir.path, folder)
    return folder


def test_a_template_that_is_not_the_one_of_training(bench: Bench, tmp_path: Path) -> None:
    run = copied(bench, tmp_path / "run")
    other = dataclasses.replace(bench, finished=run)
    other.__dict__["run"] = bench.run
    assert line("template_tokens", other).result == "ok"
    template = run / "final" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:")
    found = line("template_tokens", other)
    assert found.result == "failed" and "part at token" in found.reason and str(run / "final") in found.reason


def test_files_that_do_not_hold_what_was_trained(bench: Bench, tmp_path: Path) -> None:
    other = dataclasses.replace(bench, folder=tmp_path)
    other.__dict__["run"] = bench.run
    delta = copied(bench, tmp_path / "run") / "final" / "delta.safetensors"
    tensors = load_file(str(delta))
    name = next(n for n in tensors if n.endswith(".B"))
    save_file({**tensors, name: tensors[name] + 0.1}, str(delta))
    found = line("saved_model", other)
    assert found.result == "failed" and "delta.safetensors has changed since it was written" in found.reason
    (delta.parent / "checksums.json").unlink()
    assert line("saved_model", other).result == "failed"


def test_a_resume_that_forgets_the_optimizer(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(bench, folder=tmp_path)
    other.__dict__["run"] = bench.run
    monkeypatch.setattr(save_run, "restore_optimizer", lambda *_: None)
    found = line("resumed_run", other)
    assert found.result == "failed" and found.reason.endswith((".A", ".B"))


def test_a_merged_export_with_one_tensor_off(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = tmp_path / "merged", str(bench.run.dir.path)
    export_merged(run, folder)
    assert command(["verify", str(folder), "--run", run, "--json"]) == 0
    weights = folder / "model.safetensors"
    tensors = load_file(str(weights))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] += tensors[name].abs().max() * 0.1
    save_file(tensors, str(weights), {"format": "pt"})
    capsys.readouterr()
    assert command(["verify", str(folder), "--run", run, "--json"]) == 3
    given = json.loads(capsys.readouterr().out)["lines"][0]
    assert (given["result"], given["reason"]) == ("failed", name) and given["difference"] > given["bound"]


def test_a_small_value_that_is_off_is_not_excused_by_a_large_one(bench: Bench, tmp_path: Path) -> None:
    folder, run = tmp_path / "merged", str(bench.run.dir.path)
    export_merged(run, folder, dtype="bfloat16")
    weights = folder / "model.safetensors"
    tensors = load_file(str(weights))
    w = tensors["model.layers.1.mlp.up_proj.weight"]
    at = (w.abs() - w.abs().max() * 4e-3).abs().argmin()  # half of it is 0.2 % of the largest, below the rounding of bfloat16
    w.view(-1)[at] *= 1.5
    save_file(tensors, str(weights), {"format": "pt"})
    lines = list(verify_subject(str(folder), [], run))
    assert [one.reason for one in lines if one.result == "failed"] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("wanted", "found", "rounding", "share"),
    [([2.0, 1.0], [2.0, 1.5], 1e-6, 0.5 / 3), ([4.0, 0.0], [4.0, 1e-3], 0.5, 1e-3 / 8e-6), ([0.0], [0.0], 1e-6, 0.0)],
)
def test_apart_by_hand(wanted: list[float], found: list[float], rounding: float, share: float) -> None:
    assert value_difference(torch.tensor(wanted), torch.tensor(found), rounding) == pytest.approx(share, rel=1e-5)


def test_an_export_is_made_again_with_its_own_options(bench: Bench, tmp_path: Path) -> None:
    """Options that change every value: half of the run, one rank for all, another dtype."""
    run = str(bench.run.dir.path)
    for number, words in enumerate(
        (["--to", "merged", "--weight", "0.5", "--dtype", "float32"], ["--to", "peft", "--uniform"])
    ):
        folder = tmp_path / str(number)
        assert command(["export", run, *words, "--out", str(folder)]) == 0
        assert {one.result for one in verify_subject(str(folder), [], run)} == {"ok"}
        (folder / "export.json").unlink()
        assert "failed" in {one.result for one in verify_subject(str(folder), [], run)}


def test_an_exported_encoder_and_its_pooling(tmp_path: Path) -> None:
    words = ["steps=1", "batch.size=2", "data.limit=6", "eval.at_start=false", "eval.batches=1", "save.end=false"]
    train_recipe(tmp_path / "run", "contrastive", *words)
    folder = tmp_path / "run" / "sentence_transformers"
    assert command(["export", str(tmp_path / "run"), "--to", "sentence_transformers"]) == 0
    assert [(one.check, one.result) for one in verify_subject(str(folder), [])] == [
        (name, "ok") for name in ("exported_tensors", "exported_template", "exported_pooling", "golden_prompt")
    ]
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace("true", "TRUE").replace("false", "true").replace("TRUE", "false"))
    assert "1_Pooling/config.json" in failed(verify_subject(str(folder), [])).reason


def test_an_export_whose_run_is_unknown_asks_for_it(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_merged(str(bench.run.dir.path), tmp_path / "merged")
    assert command(["verify", str(tmp_path / "merged")]) == 0
    assert "--run RUN" in capsys.readouterr().out
    assert command(["verify", str(tmp_path / "merged"), "--run", str(tmp_path)]) == 2
    (tmp_path / "merged" / "golden.json").rename(tmp_path / "golden.json")
    (tmp_path / "merged" / "export.json").write_text("{}")
    assert command(["verify", str(tmp_path / "merged")]) == 2
    assert "--run RUN" in capsys.readouterr().err


@pytest.mark.parametrize(("changed", "status"), [(0, "not applicable"), (3, "ok")])
def test_an_update_in_which_nothing_that_trains_moved_proves_nothing(tmp_path: Path, changed: int, status: str) -> None:
    facts = {"frozen": {"unchanged": 5, "tensors": 5}, "trained": {"changed": changed, "tensors": 4}, "keys": {"set": 9}}
    (tmp_path / "report.json").write_text(json.dumps({"proved": {**facts, "hooks": 4}}), encoding="utf-8")
    bench: Any = SimpleNamespace(run=SimpleNamespace(dir=SimpleNamespace(path=tmp_path)))
    result = judged("update_proof", lambda: UpdateProof().measure(bench))
    assert result.result == status and (status == "ok" or "had no gradient" in result.reason)
