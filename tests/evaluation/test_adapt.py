"""`llmrecipe adapt`: the adapter of a few examples is an ordinary run, equal to what the hypermodel does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmrecipe
from llmrecipe.cli.app import run_command
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.evaluation.adapt import adapt
from llmrecipe.interop.load_run import open_run
from llmrecipe.methods.memory.hypertuning import Hypertuning
from tests.trainings import QUIET, learned, train_recipe

SHOTS = [("cat ->", " rich"), ("dog ->", " rich"), ("cup ->", " poor")]


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shots") / "shots.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in SHOTS))
    return path


@pytest.fixture(scope="module", params=["lora", "prefix"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "hyper"
    words = ["steps=2", "data.limit=40", "eval.batches=1", "batch.size=4", f"stack.hypertuning.emit={request.param}"]
    train_recipe(folder, "hypertuning", *words, "stack.hypertuning.depth=1", "stack.hypertuning.r=2")
    return folder


def test_what_it_writes_is_an_ordinary_run_and_the_same_model(trained: Path, shots: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapted"
    folder, facts = adapt(str(trained), [f"data.path={shots}", f"run.dir={out}", *QUIET])
    assert folder == out and facts["examples"] == 3
    assert json.loads((out / "status.json").read_text())["status"] == "done"
    model, tokenizer = llmrecipe.load(out)
    assert not any("hypertuning" in name for name, _ in model.named_parameters()), "the hypermodel stays behind"
    loaded = open_run(str(trained))
    texts = [i for p, c in SHOTS for i in [*tokenizer(p + c, add_special_tokens=False).input_ids]]
    rows = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    assert rows, "the run that was adapted is as it was"
    own = tokens_of(trained, shots)
    assert set(texts) <= set(own)
    ids = tokenizer("bird -> rich", return_tensors="pt").input_ids
    context = Context(examples=(torch.tensor([own]), torch.ones(1, len(own), dtype=torch.long)), computed={})
    with torch.no_grad():
        plain = loaded.model.eval()(input_ids=ids).logits
        with activate(context):
            live = loaded.model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, live, atol=1e-5, rtol=1e-5)
    assert float((live - plain).abs().max()) > 1e-6, "with and without examples must differ for this test to say anything"
    assert facts["loss/base"] == pytest.approx(loss_without(tmp_path / "plain", shots), rel=1e-5)
    assert facts["loss"] != facts["loss/base"]


def loss_without(folder: Path, shots: Path) -> float:
    """The loss of the examples' answers under the model alone, as an evaluation before the first step has it."""
    train_recipe(folder, "sft", f"data.path={shots}", f"data.validation={shots}", "steps=1", "data.max_length=64")
    first = next(json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if '"eval/loss"' in line)
    assert first["step"] == 0
    return float(first["eval/loss"])


def tokens_of(trained: Path, shots: Path) -> list[int]:
    """The examples as hyper_mtf shows them in training: prompts with their answers, read as rows of choices."""
    from llmrecipe.data import prepare
    from llmrecipe.recipe.compose import compose
    from llmrecipe.runs.open_model import tokenizer_of

    recipe = compose(trained, [f"data.path={shots}", "data.validation=null", "data.test=null"]).recipe
    data: Any = prepare(recipe.data, tokenizer_of(recipe.model, recipe.tokenizer), "choices", seed=0)
    return [t for row in data for t in [*row["prompt_ids"], *row["choice_ids"]]]


def test_training_goes_on_from_it(trained: Path, shots: Path, tmp_path: Path) -> None:
    """As the start of ordinary fine-tuning, with the same adapter."""
    out = tmp_path / "adapted"
    adapt(str(trained), [f"data.path={shots}", f"run.dir={out}", *QUIET])
    train_recipe(tmp_path / "more", str(out), f"model.path={out}", "model.continue=true", "steps=1", "batch.size=2")
    before, after = learned(out), learned(tmp_path / "more")
    assert before.keys() == after.keys()
    assert 0.0 < max(float((before[n] - after[n]).abs().max()) for n in before) < 1e-2


def test_the_command(trained: Path, shots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["adapt", str(trained), "--json", f"data.path={shots}", f"run.dir={tmp_path / 'a'}", *QUIET]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["examples"] == 3
    assert run_command(["adapt", str(trained)]) == 2
    assert "data.path=FILE" in capsys.readouterr().err
    train_recipe(tmp_path / "plain", "sft_lora", "steps=1", "data.limit=8", "batch.size=2", "eval.every=null")
    assert run_command(["adapt", str(tmp_path / "plain"), f"data.path={shots}"]) == 2
    assert "stack=[hypertuning]" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_lora_it_wrote_is_exported(shots: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hyper"
    words = ["steps=1", "data.limit=40", "eval.every=null", "batch.size=4", "stack.hypertuning.emit=lora"]
    train_recipe(folder, "hypertuning", *words)
    out, _ = adapt(str(folder), [f"data.path={shots}", f"run.dir={tmp_path / 'a'}", *QUIET])
    assert run_command(["export", str(out), "--to", "peft"]) == 0
    assert (out / "peft" / "adapter_config.json").is_file()
    assert Hypertuning(name="h").unmergeable
    assert run_command(["export", str(folder), "--to", "merged"]) == 2
