"""`check` counts every model that a run holds next to the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from llmrecipe.core import registry
from llmrecipe.interop.load_run import load
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.load import load_model
from llmrecipe.models.tiny import FOLDER
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model
from llmrecipe.training.auxiliary_memory import auxiliary_bytes
from llmrecipe.training.dry_run import check
from llmrecipe.training.memory_estimate import estimate_memory
from llmrecipe.training.shard_estimate import device_bytes
from tests.tiny import tiny_model
from tests.trainings import train_recipe

TINY = ModelSection(path=str(FOLDER))
SHORT = ["data.limit=40"]
JUDGE = ["~objective.reward", f"+objective.reward.judge.judge={{kind: local, path: {FOLDER}}}"]


def held(recipe: str, *words: str) -> float:
    """What a recipe holds besides the policy, in megabytes; the total has it."""
    memory = check(recipe, [*SHORT, *words]).memory_mb
    parts = [size for name, size in memory.items() if name != "total"]
    assert memory["total"] == pytest.approx(sum(parts), abs=0.4)
    return memory.get("auxiliary", 0.0)


def size(model: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_a_model_is_counted_to_the_byte_without_its_weights(tmp_path: Path) -> None:
    """The embedded model, and a run of it with its adapters and its reward head."""
    run = tmp_path / "run"
    train_recipe(run, "reward_lora", "steps=1", "data.limit=40", "batch.size=2", "eval.at_start=false", "eval.batches=1")
    loaded = load(str(run))[0]
    assert auxiliary_bytes([ModelSection(path=str(run))], "cpu") == (size(loaded), [])
    tiny = auxiliary_bytes([TINY], "cpu")[0]
    assert tiny == size(load_model(TINY))
    assert auxiliary_bytes([TINY, TINY], "cpu")[0] == 2 * tiny

    own = round(size(loaded) / 2**20, 1)
    reward = ["~objective.reward", "objective.beta=0"]
    assert held("grpo", *reward, f"+objective.reward={{model: {{path: {run}, share: off}}}}") == own
    shared = f"+objective.reward={{model: {{path: {run}}}}}"
    assert held("grpo", *reward, shared) == 0.0
    assert held("grpo", *reward, shared, "stack=[]") == own, "a base that trains is not shared"


def test_adapter_folders_on_a_base_are_counted(tmp_path: Path) -> None:
    """A PEFT adapter that `model.adapters` names: of a held model to the byte, of the policy in the frozen weights."""
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    words = ["steps=1", "data.limit=40", "batch.size=2", "eval.at_start=false", "eval.batches=1", "stack.lora.r=64"]
    train_recipe(run, "sft_lora", *words)
    export_peft(run, adapter)
    section = ModelSection(path=str(FOLDER), adapters={str(adapter): 1.0})
    loaded = open_model(section, TokenizerSection())
    assert auxiliary_bytes([section], "cpu") == (size(loaded.model), [])
    added = size(loaded.model) - size(load_model(TINY))
    recipe = ["model.path=tiny", *SHORT]
    bare, mounted = (check("sft_lora", [*recipe, *more]) for more in ([], [f"+model.adapters={{{adapter}: 1.0}}"]))
    apart = mounted.memory_mb["weights"] - bare.memory_mb["weights"]
    assert apart == pytest.approx(added / 2**20, abs=0.11) and added > 2**20
    assert mounted.groups == bare.groups, "what is mounted does not train"


@pytest.mark.slow
def test_a_teacher_counts_unless_its_tokens_are_stored_before_or_a_server_has_it() -> None:
    tiny = round(auxiliary_bytes([TINY], "cpu")[0] / 2**20, 1)
    assert tiny > 1
    assert held("distill", f"objective.teacher={FOLDER}") == tiny
    assert held("distill", f"objective.teacher={FOLDER}", "objective.top_k=4") == 0.0
    assert held("gkd", f"objective.teacher={FOLDER}", "objective.top_k=4") == tiny, "answers are sampled as the run goes"
    served = ["objective.teacher=http://127.0.0.1:9/v1/completions", "objective.teacher_model=x", "objective.top_k=4"]
    assert held("distill", *served) == 0.0


def test_a_judge_counts_and_the_policy_of_step_0_where_it_is_copied() -> None:
    tiny = auxiliary_bytes([TINY], "cpu")[0] / 2**20
    trained = check("grpo", [*SHORT, "stack=[]"]).memory_mb["gradients"]
    assert held("grpo", *JUDGE, "objective.beta=0") == pytest.approx(tiny, abs=0.1)
    assert held("grpo", "objective.beta=0") == 0.0
    assert held("grpo", "objective.beta=0.1") == 0.0, "adapters are switched off"
    assert held("grpo", "objective.beta=0.1", "stack=[]") == trained
    assert held("grpo", *JUDGE, "objective.beta=0.1", "stack=[]") == pytest.approx(tiny + trained, abs=0.1)


def test_a_model_that_cannot_be_read_is_named() -> None:
    counted, notes = auxiliary_bytes([TINY, ModelSection(path="nobody/nothing")], "cpu")
    assert counted == auxiliary_bytes([TINY], "cpu")[0]
    assert len(notes) == 1 and notes[0].startswith("the memory of nobody/nothing is not counted: ")


def test_no_stage_of_sharding_divides_it() -> None:
    model = tiny_model("llama")
    memory = estimate_memory(model, Stack([]), registry.load_class("optim", "adamw")(), tokens=8)
    more = type(memory)(**{**vars(memory), "auxiliary": 1000})
    apart = {stage: n - device_bytes(memory, 64, 4)[stage] for stage, n in device_bytes(more, 64, 4).items()}
    assert set(apart.values()) == {1000} and more.total - memory.total == 1000
