"""The memory recipes end to end on the embedded model: they run, resume to the bit, and load again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrecipe.methods.memory._engines.replay import entries
from tests.trainings import resume, stop_after

pytestmark = pytest.mark.slow


def run(recipe: str, folder: Path, *overrides: str):
    from llmrecipe import compose, train

    return train(compose(recipe, [f"run.dir={folder}", "eval.at_start=false", "eval.test=false", *overrides]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_evaluates_inside_training_and_its_adapter_loads_on_the_quantized_base(tmp_path, dtype: str) -> None:
    from llmrecipe.methods._engines.quantized import quantized

    done = run("qlora", tmp_path / "r", "steps=3", "eval.every=1", "eval.batches=1", f"model.dtype={dtype}")
    assert len(list(quantized(done.model))) == 7 * done.model.config.num_hidden_layers
    trained = [p for p in done.model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    from llmrecipe.recipe.schema import ModelSection, TokenizerSection
    from llmrecipe.runs.open_model import open_model

    model = open_model(ModelSection(path=str(tmp_path / "r")), TokenizerSection()).model
    assert len(list(quantized(model))) == len(list(quantized(done.model)))
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, done.model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("recipe", "extra"), [("mezo", ["model.dtype=bfloat16"]), ("mezo_lora", ["stack.mezo.optimizer=adam"])]
)
def test_mezo_resumes_to_the_bit(tmp_path, recipe: str, extra: list[str]) -> None:
    common = ["steps=4", "eval.load_best=false", "batch.size=4", *extra]
    whole = run(recipe, tmp_path / "whole", *common)
    part = tmp_path / "part"
    stop_after(2, part, recipe, "eval.at_start=false", "eval.test=false", *common)
    again = resume(part)
    assert again.first_step == 2 and again.progress.step == 4
    for (name, p), (_, q) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert entries(tmp_path / "whole" / "mezo_history.bin") == entries(part / "mezo_history.bin")
    assert all(p.grad is None for p in whole.model.parameters()) and whole.optimizer is None


def test_mezo_on_an_adapter_lowers_the_loss(tmp_path) -> None:
    from llmrecipe.runs.events import read_events

    run("mezo_lora", tmp_path / "r", "eval.at_start=true", "eval.batches=2", "steps=20")
    evaluations = [e for e in read_events(tmp_path / "r") if e["event"] == "evaluation" and "eval/loss" in e]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 0.1
