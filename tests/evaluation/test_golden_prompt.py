"""The golden prompt of an export: kept with the dtype it was computed in, and compared by what rounding in it explains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipe.cli.app import run_command as command
from llmrecipe.evaluation.verify.verify_subject import CheckResult, verify_subject
from llmrecipe.interop.golden import GOLDEN_FILE, Golden, explained_by
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.reparameterized.lora import Lora
from tests.interop.saved_runs import VOCABULARY, base_folder, saved_run
from tests.interop.test_sentence_transformers_folder import SMALL, base
from tests.trainings import train_recipe


def golden_line(folder: Path) -> CheckResult:
    """The line of `verify` about the golden prompt; without the run, the only comparison."""
    without, found = verify_subject(str(folder), [])
    assert without.result == "not applicable" and "--run RUN" in without.reason
    return found


def change(folder: Path, key: str, value: Any) -> None:
    """Write another value into the file."""
    path = folder / GOLDEN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def test_what_a_difference_of_the_logits_explains() -> None:
    """z = (1, 0): log p = (-0.3133, -1.3133). Half of what a log-probability moved, or of how far a token is behind."""
    z = torch.tensor([[1.0, 0.0]])
    lp = [1.0 - math.log(1 + math.e), -math.log(1 + math.e)]
    kept: dict[str, Any] = {"largest": 2.0, "dtype": "bfloat16"}
    share, where = explained_by(Golden(answer_ids=[0], logprobs=[lp[0] + 0.2], **kept), z)
    assert (share, where) == (pytest.approx(0.2 / 2 / 2, abs=1e-6), "token 1")
    share, _ = explained_by(Golden(answer_ids=[1], logprobs=[lp[1]], **kept), z)
    assert share == pytest.approx(1.0 / 2 / 2, abs=1e-6)
    share, where = explained_by(Golden(logits=[[1.0, 0.5]], **kept), z)
    assert (share, where) == (pytest.approx(0.5 / 2, abs=1e-6), "number 2")
    assert explained_by(Golden(vector=[1.0], **kept), z[0])[0] == math.inf
    assert Golden(**kept).bound == 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["merged", "peft", "gguf", "vllm-lora"])
def test_an_export_is_verified_without_its_run(tmp_path: Path, to: str, dtype: str) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora", target="attn.q"), dtype=dtype)
    out = tmp_path / "out"
    assert command(["export", str(tmp_path / "run"), "--to", to, "--out", str(out), "--bound", "0.2"]) == 0
    (tmp_path / "run").rename(tmp_path / "away")
    golden = json.loads((out / GOLDEN_FILE).read_text())
    assert golden["dtype"] == dtype and golden["torch"] == torch.__version__
    assert len(golden["logprobs"]) == len(golden["answer_ids"]) and max(golden["logprobs"]) <= 0.0
    line = golden_line(out)
    assert (line.result, line.bound) == ("ok", {"float32": 1e-4, "bfloat16": 5e-2}[dtype])
    for key, words in (("answer_ids", "token"), ("prompt_ids", "the tokenizer of the folder gives"), ("logprobs", "token 3")):
        value = list(golden[key])
        value[2] = value[2] - 20.0 if key == "logprobs" else (value[2] + 1) % VOCABULARY
        change(out, key, value)
        failed = golden_line(out)
        assert failed.result == "failed" and words in failed.reason
        change(out, key, golden[key])
    change(out, "answer_ids", golden["answer_ids"][:2])
    assert "by the end tokens of the folder" in golden_line(out).reason
    change(out, "answer_ids", [10**9] * 3)
    assert golden_line(out).result == "failed"
    change(out, "dtype", "complex64")
    assert "dtype" in golden_line(out).reason


@pytest.mark.parametrize("to", ["merged", "peft"])
def test_a_classifier_keeps_its_logits(tmp_path: Path, to: str) -> None:
    run = tmp_path / "run"
    saved_run(run, base_folder(tmp_path), Lora(name="lora"), head="classification", labels=["no", "yes", "maybe"])
    assert command(["export", str(run), "--to", to, "--out", str(tmp_path / "out")]) == 0
    golden = json.loads((tmp_path / "out" / GOLDEN_FILE).read_text())
    assert len(golden["logits"][0]) == 3 and "answer_ids" not in golden
    assert golden_line(tmp_path / "out").result == "ok"
    change(tmp_path / "out", "logits", [[*golden["logits"][0][:2], golden["logits"][0][2] + golden["largest"] / 100]])
    assert golden_line(tmp_path / "out").reason == "number 3"


def test_a_text_encoder_keeps_a_vector(tmp_path: Path) -> None:
    folder, run, out = base(tmp_path / "base"), tmp_path / "run", tmp_path / "out"
    words = ["model.config={}", "model.init=pretrained", f"model.path={folder}", "tokenizer.path=null", "stack=[lora]"]
    train_recipe(run, "contrastive", *words, *SMALL, "objective.pool=cls", "objective.mlp_only_train=false")
    assert command(["export", str(run), "--to", "sentence_transformers", "--out", str(out)]) == 0
    assert golden_line(out).result == "ok"
    dense = out / "2_Dense" / "model.safetensors"
    tensors = load_file(str(dense)) if dense.is_file() else load_file(str(out / "model.safetensors"))
    save_file(
        {name: value * 1.5 for name, value in tensors.items()}, str(dense if dense.is_file() else out / "model.safetensors")
    )
    assert golden_line(out).reason.startswith("number ")


def test_a_model_that_fills_in_words_keeps_the_likeliest(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", base(tmp_path / "base"), Lora(name="lora"), head="masked")
    folder = export_merged(tmp_path / "run", tmp_path / "out").path
    golden = json.loads((folder / GOLDEN_FILE).read_text())
    assert len(golden["likeliest_ids"]) == len(golden["prompt_ids"])
    assert golden_line(folder).result == "ok"


def test_the_base_of_an_adapter_may_be_away_or_in_other_codes(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", folder := base_folder(tmp_path), Lora(name="lora"))
    out = export_peft(tmp_path / "run", tmp_path / "out").path
    folder.rename(tmp_path / "moved")
    line = golden_line(out)
    assert line.result == "not applicable" and "is not on this machine" in line.reason
    saved_run(tmp_path / "coded", tmp_path / "moved", Nf4(name="nf4"), Lora(name="lora"))
    line = golden_line(export_peft(tmp_path / "coded", tmp_path / "four").path)
    assert line.result == "not applicable" and "quantized by nf4" in line.reason
