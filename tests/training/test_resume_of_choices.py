"""Methods that decide by data what trains or where it starts, or change it on the way: a resume changes no bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llmrecipe.core import registry
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.runs.checkpoint_io import keep_only
from llmrecipe.runs.run_dir import RunDir
from tests.contract import MIXTURES
from tests.trainings import curve, learned, resume, train_recipe

SHORT = [
    "steps=4", "batch.size=2", "data.limit=8", "data.max_length=48", "save.every=1", "save.keep=4", "optim.lr=1e-2",
    "eval.at_start=false", "eval.batches=1",
]  # fmt: skip
LORA = "lora.target=all-linear lora.r=4 lora.dropout=0.2 lora.init_batches=2"
SPT = "spt.r=2 spt.num_batches=2 spt.batch_size=2"
CASES = {
    "spt": f"spt {SPT} spt.budget=0.02",
    "spt, adapters": f"spt {SPT} spt.budget=0.04 spt.structured=adapter",
    "fishmask": f"lora,fishmask {LORA} fishmask.num_samples=2",
    "group_mask": f"lora,group_mask {LORA} group_mask.num_samples=2",
    "group_mask, gates": f"lora,group_mask {LORA} group_mask.hard_l0=true group_mask.l0_steps=2",
    "child_tuning": f"lora,child_tuning {LORA} child_tuning.num_samples=2 child_tuning.rest=freeze",
    "diff_pruning": f"lora,diff_pruning {LORA} diff_pruning.l0_steps=2",
    "smt": "smt smt.block=16 smt.budget=0.05 smt.warmup_steps=2",
    "freeze": f"lora,freeze {LORA} freeze.mode=dynamic freeze.score=grad_norm freeze.interval=2",
    "eva": f"lora {LORA} lora.init=eva",
    "corda": f"lora {LORA} lora.init=corda",
    "lora_ga": f"lora {LORA} lora.init=lora_ga",
    "adalora": "adalora adalora.init_r=3 adalora.target_r=1 adalora.tinit=0 adalora.tfinal=1 adalora.dropout=0.2",
    "dylora": "dylora dylora.target=all-linear dylora.r=4 dylora.dropout=0.2",
    "noah": "noah noah.lora=[1,2,4] noah.adapter=[1,2,4] noah.prompt=[1,2,4]",
    "unipelt": "unipelt unipelt.hidden=8",
    "s4": "s4 s4.budget=20000",
    "mam": "mam mam.hidden=8 mam.r=4 mam.dropout=0.2",
    "llm_adapters": "llm_adapters llm_adapters.method=lora llm_adapters.r=4 llm_adapters.dropout=0.2",
    "autopeft": "autopeft autopeft.hidden=8",
    "prompt_tuning": f"lora,prompt_tuning {LORA} prompt_tuning.init=vocab",
    "prefix_tuning": f"lora,prefix_tuning {LORA}",
    "ewc": "ewc ewc.num_samples=2 ewc.strength=100",
    "dora": "dora dora.target=all-linear dora.r=4 dora.dropout=0.2",
}


def test_every_method_that_decides_has_a_case() -> None:
    deciding = {
        name
        for name in registry.names("stack")
        if (cls := registry.load_class("stack", name)).calibrate is not Wrapper.calibrate
        or cls.before_step is not Wrapper.before_step
    }
    # esft needs experts; its own tests resume it. hypertuning compares vocabularies and decides nothing.
    assert deciding - {*MIXTURES, "hypertuning"} <= {name for words in CASES.values() for name in words.split()[0].split(",")}


@pytest.mark.parametrize(
    ("case", "steps"),
    [("spt", [1]), ("group_mask", [1]), *(pytest.param(case, [1, 3], marks=pytest.mark.slow, id=case) for case in CASES)],
)
def test_resumed_in_the_middle(case: str, steps: list[int], tmp_path: Path) -> None:
    stack, *options = CASES[case].split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_recipe(whole, "sft", *SHORT, f"stack=[{stack}]", *(f"stack.{word}" for word in options))
    for step in steps:
        shutil.rmtree(parts, ignore_errors=True)
        shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("final", "lock"))
        keep_only(parts / "checkpoints", {step})
        RunDir(parts).status("interrupted", step=step)
        resume(parts)
        assert curve(parts) == curve(whole)
        ours, theirs = learned(parts), learned(whole)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
