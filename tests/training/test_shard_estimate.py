"""The table of `check`: bytes of a device under each stage, against the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe import sharding_rules
from llmrecipe.training.dry_run import check
from llmrecipe.training.memory_estimate import Estimate
from llmrecipe.training.shard_estimate import device_bytes, gathered_bytes, resting, saving, shard_table
from tests.tiny import tiny_model

PSI = 7_500_000_000


def test_the_published_table() -> None:
    """ZeRO, arXiv 1910.02054, figure 1: 7.5e9 parameters, 64 devices, K = 12."""
    memory = Estimate(weights=2 * PSI, trained=PSI, gradients=2 * PSI, optimizer=12 * PSI, activations=0, logits=0)
    gigabytes = {stage: size / 1e9 for stage, size in device_bytes(memory, 0, 64).items()}
    assert gigabytes == pytest.approx({"none": 120.0, "zero1": 31.41, "zero2": 16.64, "zero3": 1.875}, abs=0.005)


def test_activations_logits_and_the_gathered_group_are_whole_on_every_device() -> None:
    memory = Estimate(weights=1000, trained=100, gradients=100, optimizer=200, activations=70, logits=7)
    assert device_bytes(memory, 50, 1) == dict.fromkeys(("none", "zero1", "zero2", "zero3"), 1377)
    assert device_bytes(memory, 50, 4) == {
        "none": 1377, "zero1": 1000 + 100 + 50 + 77, "zero2": 1000 + 75 + 77, "zero3": 325 + 50 + 77,
    }  # fmt: skip


def test_the_gathered_group_is_one_block_and_what_is_outside_of_blocks() -> None:
    model: Any = tiny_model()
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside = {id(p): p.numel() for n, p in model.named_parameters() if ".layers." not in n}
    size = next(model.parameters()).element_size()
    assert gathered_bytes(model) == size * (max(blocks) + sum(outside.values()))
    assert gathered_bytes(torch.nn.Linear(3, 2)) == 4 * 8


def test_frozen_weights_are_named_where_a_stage_does_not_divide_them() -> None:
    memory = Estimate(weights=2**30, trained=2**10, gradients=2**20, optimizer=2**21, activations=0, logits=0)
    model = torch.nn.Linear(2, 2)
    assert "zero2 on 2 devices saves 1.5 MB of 1027.0 MB" in saving(memory, model, "zero2", 2)
    assert "frozen weights" in saving(memory, model, "zero2", 2)
    assert "frozen weights" not in saving(memory, model, "zero3", 2)


def test_what_rests_in_the_memory_of_the_machine() -> None:
    memory = Estimate(weights=2**30, trained=0, gradients=2**21, optimizer=2**20, activations=0, logits=0)
    assert "keeps 513.5 MB of each process" in resting(memory, 2)
    found = check("sft", ["runtime=zero3", "runtime.offload=cpu", "data.limit=8", "data.cache=false"])
    assert any("runtime.offload=cpu keeps" in note for note in found.notes)


def test_check_prints_the_table() -> None:
    found = check("sft", ["runtime=zero1", "data.limit=8", "data.cache=false"])
    assert [row["devices"] for row in found.devices_mb][:4] == [1, 2, 4, 8]
    one, two = found.devices_mb[:2]
    assert one["none"] == pytest.approx(found.memory_mb["total"], abs=0.1)
    assert two["zero1"] == pytest.approx(one["none"] - found.memory_mb["optimizer"] / 2, abs=0.15)
    assert any("zero1 on 2 devices saves" in note for note in found.notes)


def test_the_table_ends_where_more_devices_save_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    small = Estimate(weights=2**20, trained=2**10, gradients=2**10, optimizer=2**11, activations=2**30, logits=0)
    large = Estimate(weights=2**40, trained=2**40, gradients=2**40, optimizer=2**41, activations=2**20, logits=0)
    assert [row["devices"] for row in shard_table(small, model)] == [1, 2, 4, 8]
    assert [row["devices"] for row in shard_table(large, model)] == [1, 2, 4, 8, 16, 64, 256, 1024, 4096]


@pytest.mark.slow
def test_a_reference_that_is_a_copy_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding_rules, "refusal", lambda *_: None)
    words = ["runtime=zero3", "data.limit=8", "data.cache=false"]
    check("dpo_lora", words)
    for recipe, more in (("dpo", ["objective.ref_sync={}"]), ("dpo", ["stack=[bitfit]", "stack.bitfit.missing=add_zero"])):
        with pytest.raises(RecipeError, match=r"runtime\.shard: the policy of step 0"):
            check(recipe, [*words, *more])
        check(recipe, ["runtime=zero1", *words[1:], *more])
