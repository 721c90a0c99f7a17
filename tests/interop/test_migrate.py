"""`llmrecipe migrate`: configurations of other tools as recipes, with an account of every key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.interop.migrate.account import Only, Same, To, bare_key, key_steps, leaf_values
from llmrecipe.interop.migrate.convert import TOOLS, Migration, migrate_file
from llmrecipe.interop.migrate.counterparts import OPTIMIZERS
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.yaml_file import read_yaml

AXOLOTL = """
base_model: tiny
load_in_4bit: true
adapter: qlora
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj, up_proj]
datasets:
  - {path: rows.jsonl, type: alpaca}
val_set_size: 0.1
sequence_len: 256
sample_packing: yes
micro_batch_size: 2
gradient_accumulation_steps: 3
num_epochs: 2
optimizer: paged_adamw_32bit
learning_rate: 2e-4
lr_scheduler: linear
warmup_ratio: 0.1
weight_decay: 0.1
bf16: auto
evals_per_epoch: 4
fsdp_config: {fsdp_version: 2}
wandb_project:
micro_batch_sise: 8
"""
LLAMA_FACTORY = """
model_name_or_path: tiny
stage: dpo
finetuning_type: lora
lora_rank: 4
lora_target: all
pref_loss: simpo
pref_beta: 2.5
simpo_gamma: 1.25
dataset: mine
template: llama3
cutoff_len: 512
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
lr_scheduler_type: cosine
bf16: true
save_steps: 100
use_galore: true
trust_remote_code: true
"""
TRL = """
model_name_or_path: tiny
dataset_name: acme/rows
dataset_config: en
use_peft: true
lora_target_modules: all-linear
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
max_steps: 10
report_to: none
"""
TORCHTUNE = """
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: [q_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 4
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, max_seq_len: 128}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: tiny, model_type: LLAMA3_2}
dataset: {_component_: torchtune.datasets.alpaca_dataset, data_files: rows.jsonl, source: json, packed: false}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
optimizer: {_component_: torch.optim.AdamW, fused: true, lr: 3e-4, weight_decay: 0.05}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 2}
batch_size: 2
gradient_accumulation_steps: 2
epochs: 1
dtype: fp32
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: false}
optimizer_in_bwd: true
"""
FILES = {"axolotl": AXOLOTL, "llama_factory": LLAMA_FACTORY, "trl": TRL, "torchtune": TORCHTUNE}
CHOICES = {
    "axolotl": {"objective": "sft", "stack": ["nf4", "lora"], "optim": "paged_adamw_32bit", "schedule": "linear"},
    "llama_factory": {"objective": "simpo", "stack": ["lora"], "optim": "adamw", "schedule": "cosine"},
    "trl": {"objective": "sft", "stack": ["lora"], "optim": "adamw", "schedule": "linear"},
    "torchtune": {"objective": "sft", "stack": ["lora"], "optim": "adamw", "schedule": "cosine"},
}
EVERY_LINEAR = "attn.q|k|v|o + mlp.gate|up|down"
SETTINGS: dict[str, dict[str, Any]] = {
    "axolotl": {
        "model.path": "tiny", "stack.lora.r": 4, "stack.lora.alpha": 8.0, "stack.lora.dropout": 0.05,
        "stack.lora.target": "attn.q|v + mlp.up", "data.path": "rows.jsonl", "data.format": "alpaca", "data.validation": 0.1,
        "data.max_length": 256, "data.packing": "on", "batch.micro": 2, "batch.size": 6, "epochs": 2.0, "optim.lr": 2e-4,
        "schedule.warmup": 0.1, "optim.weight_decay": 0.1, "optim.decay_adapters": True, "objective.mask": None,
        "tokenizer.chat_template": "alpaca", "seed": 42, "eval.load_best": False,
    },
    "llama_factory": {
        "objective.beta": 2.5, "objective.gamma": 1.25, "stack.lora.r": 4, "stack.lora.alpha": None,
        "stack.lora.target": EVERY_LINEAR, "data.max_length": 512, "batch.size": 8, "batch.micro": 1, "optim.lr": 5e-6,
        "model.dtype": "bfloat16", "save.every": 100, "model.gradient_checkpointing": True, "epochs": 3.0,
        "tokenizer.chat_template": "own", "optim.weight_decay": 0.0,
    },
    "trl": {
        "data.path": "acme/rows:en", "stack.lora.r": 16, "stack.lora.alpha": 32.0, "stack.lora.dropout": 0.05,
        "stack.lora.target": EVERY_LINEAR, "batch.size": 8, "batch.micro": 2, "steps": 10, "optim.lr": 2e-5,
        "model.dtype": "bfloat16", "objective.mask": "all", "model.gradient_checkpointing": True, "save.every": 500,
    },
    "torchtune": {
        "model.path": "tiny", "stack.lora.target": "attn.q|o + mlp.gate|up|down", "stack.lora.r": 4, "data.path": "rows.jsonl",
        "data.format": "alpaca", "data.max_length": 128, "data.packing": "off", "batch.size": 4, "optim.lr": 3e-4,
        "optim.weight_decay": 0.05, "optim.decay_adapters": True, "optim.clip": 0.0, "schedule.warmup": 2, "epochs": 1.0,
        "model.dtype": "float32", "objective.mask": "all",
    },
}  # fmt: skip
"""Settings worked out by hand; None: the recipe's own default says it."""
LEFT = {
    "axolotl": {"evals_per_epoch", "fsdp_config.fsdp_version"},
    "llama_factory": {"dataset", "use_galore", "trust_remote_code"},
    "trl": set(),
    "torchtune": {"optimizer_in_bwd"},
}


def _migrated(folder: Path, text: str, name: str = "old.yaml", **options: Any) -> Migration:
    path = folder / name
    path.write_text(text)
    return migrate_file(path, **options)


def _golden(folder: Path, tool: str) -> Migration:
    return _migrated(folder, FILES[tool], trainer="sft" if tool == "trl" else None)


@pytest.mark.parametrize("tool", FILES)
def test_a_file_is_mapped_as_by_hand(tool: str, tmp_path: Path) -> None:
    found = _golden(tmp_path, tool)
    assert found.tool == TOOLS[tool].title
    assert found.choices == CHOICES[tool]
    for path, value in SETTINGS[tool].items():
        if value is not None:
            assert found.settings[path] == value, path
    assert {entry.key for entry in found.of("left")} == LEFT[tool]
    assert all(entry.note for entry in found.of("left"))


@pytest.mark.parametrize("tool", FILES)
def test_no_key_is_dropped_in_silence(tool: str, tmp_path: Path) -> None:
    found = _golden(tmp_path, tool)
    named = [entry.key for entry in found.entries]
    for key, _ in leaf_values(read_yaml(tmp_path / "old.yaml").value):
        assert any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in named), key


def test_an_unknown_key_is_named_with_its_nearest_spelling(tmp_path: Path) -> None:
    (entry,) = _golden(tmp_path, "axolotl").of("unknown")
    assert entry.key == "micro_batch_sise" and "did you mean 'micro_batch_size'?" in entry.note


@pytest.mark.parametrize("tool", TOOLS)
def test_every_rule_leads_to_a_key_that_exists(tool: str) -> None:
    for name, rule in TOOLS[tool].rules.items():
        assert isinstance(rule, To | Same | Only)
        if not isinstance(rule, To):
            assert (rule.note if isinstance(rule, Same) else rule.remedy).strip(), name
            continue
        section, _, rest = rule.path.partition(".")
        if section in ("objective", "stack", "optim", "schedule"):
            kinds = {"objective": list(rule.objectives), "stack": [rest.partition(".")[0]], "optim": ["adamw"]}
            for kind in kinds.get(section, ["cosine"]):
                assert rest.rpartition(".")[2] in registry.spec(section, kind).options, name
        elif rest:
            assert rest in Recipe.model_fields[section].annotation.model_fields, name  # type: ignore[union-attr]
        else:
            assert section in Recipe.model_fields, name


def test_every_optimizer_exists() -> None:
    assert set(OPTIMIZERS.values()) <= set(registry.names("optim"))


def test_devices_multiply_the_batch(tmp_path: Path) -> None:
    assert _migrated(tmp_path, AXOLOTL, processes=4).settings["batch.size"] == 24


def test_rows_of_a_step_become_prompts(tmp_path: Path) -> None:
    text = "model_name_or_path: tiny\ndataset_name: a/b\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 4\n"
    found = _migrated(tmp_path, text + "num_generations: 4\nscale_rewards: group\n")
    assert found.choices["objective"] == "grpo"
    assert (found.settings["batch.size"], found.settings["objective.answers"]) == (8, 4)
    assert "stand-in" in next(entry.note for entry in found.entries if entry.key == "reward_funcs")


def test_data_sets_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    described = {"mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "response": "say"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(described))
    found = _migrated(tmp_path, LLAMA_FACTORY)
    assert found.settings["data.path"] == str(tmp_path / "data" / "mine.json")
    assert found.settings["data.columns"] == {"instruction": "ask", "output": "say"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"{TORCHTUNE}compile: true\n", "blocks"),
        (f"{AXOLOTL}torch_compile: false\n", "off"),
        (f"{AXOLOTL}torch_compile: auto\n", "auto"),
    ],
)
def test_what_is_compiled_is_carried(text: str, wanted: str, tmp_path: Path) -> None:
    assert _migrated(tmp_path, text).settings["model.compile"] == wanted


OWN_FORMAT = """base_model: tiny
learning_rate: 1e-4
wandb_project: shop
datasets:
  - path: tea.csv
    type: {{field_instruction: Asked, field_output: Answered, format: "{format}", system_prompt: "{system}"}}
"""


@pytest.mark.parametrize(
    ("format", "system", "left"),
    [("{instruction}", "", []), ("Q: {instruction}", "Be kind.", ["format", "system_prompt"])],
)
def test_columns_of_a_prompt_format_of_its_own_are_carried_over(
    format: str, system: str, left: list[str], tmp_path: Path
) -> None:
    found = _migrated(tmp_path, OWN_FORMAT.format(format=format, system=system))
    assert found.settings["data.columns"] == {"prompt": "Asked", "completion": "Answered"}
    lost = {entry.key: entry.note for entry in found.entries if entry.fate in ("left", "unknown")}
    assert sorted(lost) == [*(f"datasets[0].type.{key}" for key in left), "wandb_project"]
    assert "log.trackers=[wandb] is set" in lost["wandb_project"] and found.settings["log.trackers"] == ["wandb"]


def test_a_share_of_a_split_is_the_held_out_share(tmp_path: Path) -> None:
    """Only where `dataset_val` is the rest of the same rows: of another set, or of another part, nothing follows."""
    split = TORCHTUNE.replace("source: json, packed: false", "source: json, packed: false, split: 'train[:95%]'")
    rest = "{_component_: torchtune.datasets.alpaca_dataset, data_files: rows.jsonl, source: json, split: 'train[95%:]'}"
    rest = f"dataset_val: {rest}\n"
    assert _migrated(tmp_path, split + rest).settings["data.validation"] == 0.05
    for other in (rest.replace("95%", "90%"), rest.replace("rows.jsonl", "more.jsonl"), ""):
        found = _migrated(tmp_path, split + other)
        assert "data.validation" not in found.settings
        assert "dataset.split" in {entry.key for entry in found.of("left")}


def test_a_reference_to_another_key_is_written_out(tmp_path: Path) -> None:
    text = "base: /models/small\n" + TORCHTUNE.replace("checkpoint_dir: tiny", "checkpoint_dir: '${base}/hf'")
    assert _migrated(tmp_path, text).settings["model.path"] == "/models/small/hf"
    found = _migrated(tmp_path, text.replace("base:", "other:"))
    assert "checkpointer.checkpoint_dir" in {entry.key for entry in found.of("left")}
    assert "model.path" not in found.settings, "what is not known is not carried too"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)
BAD = {
    "a list": ("- base_model\n", "mapping"),
    "no yaml": ("base_model: [tiny\n", "not valid YAML"),
    "a word for a number": (AXOLOTL.replace("lora_r: 4", "lora_r: four"), "lora_r: 'four' is not a finite number"),
    "half a row": (AXOLOTL.replace("micro_batch_size: 2", "micro_batch_size: 1.5"), "1.5 is not a whole number"),
    "no number": (AXOLOTL.replace("2e-4", ".nan"), "learning_rate"),
    "no learning rate": (AXOLOTL.replace("learning_rate: 2e-4", ""), "does not say the learning rate"),
    "another tool": ("lr: 1\nmodel_id: x\n", "no training file of a tool that is known"),
    "no command": (TRL, "--trainer"),
    "no training": ("checkpointer: {_component_: torchtune.training.X}\ntasks: [mmlu]\n", "trains nothing"),
    "an unknown stage": (LLAMA_FACTORY.replace("stage: dpo", "stage: dop"), "stage: 'dop' (known: sft"),
    "a bomb": (BOMB, "more than"),
    "depth": ("base_model: " + "[" * 5000 + "\n", "nested deeper"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_message(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    with pytest.raises(RecipeError, match=re.escape(message)):
        _migrated(tmp_path, text)


def test_json_is_read_and_bounded(tmp_path: Path) -> None:
    value = read_yaml_text(tmp_path, AXOLOTL)
    assert _migrated(tmp_path, json.dumps(value), "old.json").choices == CHOICES["axolotl"]
    for text in ("{", "[]", '{"base_model": ' + "[" * 400 + "]" * 400 + "}", '{"a": 1, "a": 2}'):
        with pytest.raises(RecipeError, match=r"old\.json"):
            _migrated(tmp_path, text, "old.json")


def read_yaml_text(folder: Path, text: str) -> dict[str, Any]:
    (folder / "text.yaml").write_text(text)
    return read_yaml(folder / "text.yaml").value


def test_names_of_options_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text(AXOLOTL)
    assert run_command(["migrate", str(tmp_path / "old.yaml"), "--from", "axolotel"]) == 2
    assert "did you mean 'axolotl'?" in capsys.readouterr().err


def test_a_value_that_no_recipe_can_have_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(AXOLOTL.replace("lora_r: 4", "lora_r: -4"))
    assert run_command(["migrate", "old.yaml"]) == 2
    assert "stack.lora.r" in capsys.readouterr().err
    assert not Path("recipes/old.yaml").exists()


@pytest.mark.parametrize("tool", ["axolotl", "torchtune"])
def test_the_recipe_trains(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Name number {i}.", "input": "", "output": f"It is {i}."} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Without the quantized base, which wants a GPU to be fast.
    text = FILES[tool].replace("load_in_4bit: true", "load_in_4bit: false").replace("adapter: qlora", "adapter: lora")
    Path("old.yaml").write_text(text.replace("paged_adamw_32bit", "adamw_torch"))
    assert run_command(["migrate", "old.yaml", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recipe"] == "recipes/old.yaml" and {"key", "given", "fate", "here", "note"} == set(facts["keys"][0])
    assert run_command(["migrate", "old.yaml"]) == 2, "a recipe that exists is not overwritten"
    assert run_command(["train", "recipe=old", "steps=2", "run.dir=run"]) == 0
    final = json.loads(Path("run/final/metrics.json").read_text())
    assert final["steps"] == 2


def test_keys_are_split_and_joined() -> None:
    assert key_steps("a.b[1].c[0]") == ("a", "b", 1, "c", 0)
    assert bare_key("a.b[1].c[0]") == "a.b[].c[]"


@pytest.mark.parametrize("trainer", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_each_command_of_trl_gives_a_recipe_that_composes(trainer: str, tmp_path: Path) -> None:
    """The file names no reward, so that objectives of sampled answers get one to be replaced."""
    (tmp_path / "old.yml").write_text(
        "model_name_or_path: tiny\ndataset_name: rows.csv\nlearning_rate: 1e-5\n", encoding="utf-8"
    )
    out = tmp_path / "new.yaml"
    assert run_command(["migrate", str(tmp_path / "old.yml"), "--trainer", trainer, "-o", str(out)]) == 0
    assert type(compose(str(out), []).recipe.objective) is not None
    assert compose(out, []).recipe.objective["kind"] == trainer
    assert ("objective.reward is a stand-in" in out.read_text(encoding="utf-8")) == (trainer in ("grpo", "rloo"))


DISTILLED = (
    TORCHTUNE.replace("loss: ", "kd_ratio: 0.25\nloss: ")
    + """
teacher_model: {_component_: torchtune.models.llama3_2.llama3_2_3b}
base_model_path: /models/large
teacher_checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: "${base_model_path}"}
kd_loss: {_component_: torchtune.modules.loss.ReverseKLWithChunkedOutputLoss, num_output_chunks: 8}
"""
)
GROUPED = (
    TORCHTUNE.replace("modules.loss.LinearCrossEntropyLoss", "dev.grpo.loss.GRPOSimpleLoss, kl_coeff: 0.01, epsilon: 0.2")
    + """
grpo_samples: 6
ppo_epochs: 2
num_steps: 20
max_generated_tokens: 32
temperature: 0.9
"""
)
PROXIMAL = (
    TORCHTUNE.replace("modules.loss.LinearCrossEntropyLoss", "rlhf.loss.PPOLoss, epsilon: 0.3, value_coeff: 0.2").replace(
        "batch_size: 2\n", "batch_size: 16\nppo_batch_size: 4\n"
    )
    + """
reward_checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /models/judge}
policy_model: {_component_: torchtune.models.llama2.llama2, num_layers: 22}
ppo_epochs: 2
num_steps: 100
kl_coeff: 0.02
gamma: 0.9
lmbda: 0.8
penalise_no_eos: true
reward_penalty: -3
min_response_length: 18
"""
)
OWN_OBJECTIVES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    # 0.75 NLL + 0.25 D is 0.25 times D + 3 NLL.
    "distill": (DISTILLED, {
        "objective.teacher": "/models/large", "objective.divergence": "reverse_kl", "objective.nll_coef": 3.0,
        "objective.mask": "all", "batch.size": 4,
    }, {"optimizer_in_bwd"}),
    # 20 rollouts of one optimizer step, twice.
    "grpo": (GROUPED, {
        "objective.answers": 6, "objective.epochs": 2, "steps": 40, "objective.max_new_tokens": 32,
        "objective.temperature": 0.9, "objective.beta": 0.01, "objective.loss_type": "grpo", "objective.kl_correction": False,
        "batch.size": 2,
        "objective.reward": {"length": {"most": 40, "unit": "words"}},
    }, {"optimizer_in_bwd"}),
    # 100 answers are 6 whole rollouts of 16, each of 2 passes in 4 parts.
    "ppo": (PROXIMAL, {
        "objective.epochs": 2, "objective.minibatches": 4, "steps": 48, "objective.beta": 0.02, "objective.gamma": 0.9,
        "objective.lam": 0.8, "objective.clip": 0.3, "objective.value_coef": 0.2, "objective.missing_end": -3.0,
        "batch.size": 16,
    }, {"optimizer_in_bwd", "reward_checkpointer", "min_response_length"}),
}  # fmt: skip
"""Objective -> a file of torchtune, settings worked out by hand, and the keys that have no counterpart."""


@pytest.mark.parametrize("objective", OWN_OBJECTIVES)
def test_objectives_of_torchtune_are_mapped_as_by_hand(objective: str, tmp_path: Path) -> None:
    text, settings, left = OWN_OBJECTIVES[objective]
    found = _migrated(tmp_path, text)
    assert found.choices["objective"] == objective
    assert {path: found.settings.get(path) for path in settings} == settings
    assert {entry.key for entry in found.of("left")} - {"value_checkpointer"} == left and not found.of("unknown")
    out = tmp_path / "new.yaml"
    assert run_command(["migrate", str(tmp_path / "old.yaml"), "-o", str(out)]) == 0
    assert compose(out, []).recipe.objective["kind"] == objective


def test_a_teacher_without_a_folder_and_a_share_of_nothing_are_left(tmp_path: Path) -> None:
    text = DISTILLED.replace(', checkpoint_dir: "${base_model_path}"', "").replace("kd_ratio: 0.25", "kd_ratio: 0.0")
    left = {entry.key for entry in _migrated(tmp_path, text.replace("Reverse", "Symmetric")).of("left")}
    assert {"teacher_checkpointer", "kd_ratio", "kd_loss._component_"} <= left
