"""Files of torchtune: one mapping a component, each with the class or function it stands for under `_component_`."""

from __future__ import annotations

import re

from llmrecipe.core.errors import RecipeError
from llmrecipe.interop.migrate.account import Account, Only, Rule, Same, To
from llmrecipe.interop.migrate.counterparts import known_targets, lora
from llmrecipe.interop.migrate.torchtune_objectives import (
    SAMPLED,
    choose_objective,
    component,
    enter_batch,
    enter_objective,
    place_at,
)
from llmrecipe.interop.migrate.trainer import LOADING, LOGS, MANY, rows_of
from llmrecipe.interop.migrate.values import compile_choice, finite_number, flag, plain_mapping, text, whole_number, words

OPTIMIZERS = {
    "AdamW": "adamw", "Adam": "adamw", "SGD": "sgd", "PagedAdamW": "paged_adamw_32bit", "PagedAdamW8bit": "paged_adamw_8bit",
    "AdamW8bit": "adamw_8bit",
}  # fmt: skip
FORMATS = {"alpaca_dataset": "alpaca", "alpaca_cleaned_dataset": "alpaca", "text_completion_dataset": "text"} | {
    "instruct_dataset": "prompt_completion", "chat_dataset": "auto", "preference_dataset": "auto"
}  # fmt: skip
"""Last name of the dataset component -> format."""
SOURCES = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}
"""Rows of a component that names none."""
PART = re.compile(r"train\[:([1-9][0-9]?)%\]")
"""The first rows of a split, as a share."""
SHARD = Only(MANY, (1, -1, False))
SAMPLING = Only("this is about sampling: `llmrecipe show grpo` and `llmrecipe show ppo` list the options here", ())
NO_TRAINING = {
    "tasks": "llmrecipe eval RUN",
    "quantizer": "llmrecipe export RUN --to gguf --dtype q8_0",
    "prompt": "llmrecipe chat RUN",
}
"""Key of a file of another command of torchtune -> the command that does that here."""
RULES: dict[str, Rule] = {
    "checkpointer": Same("the files of a model folder are found by themselves, whatever its family"),
    "model": Only("a part of the model's own definition: the model folder says it", (False, 0.0)),
    "tokenizer.max_seq_len": Same("see data.max_length"),
    "tokenizer.prompt_template": Only("set tokenizer.chat_template (`llmrecipe list chat_template`)", ()),
    "tokenizer": Same("the tokenizer of the model folder"),
    "seed": To("seed", whole_number),
    "shuffle": Only("rows are shuffled in every epoch", (True,)),
    "epochs": To("epochs", finite_number),
    "max_steps_per_epoch": Only("set steps: this number times the epochs", ()),
    "clip_grad_norm": To("optim.clip", finite_number),
    "compile": To("model.compile", compile_choice),
    "log_every_n_steps": To("log.every", whole_number),
    "device": Only("set runtime.device", ("cuda",)),
    "enable_activation_checkpointing": To("model.gradient_checkpointing", flag),
    "enable_activation_offloading": Only("set model.gradient_checkpointing=offload, which recomputes too", (False,)),
    "optimizer.fused": Same("the fused kernel is used"),
    "optimizer.lr": To("optim.lr", finite_number),
    "optimizer.weight_decay": To("optim.weight_decay", finite_number),
    "optimizer.eps": To("optim.eps", finite_number),
    "optimizer": Only("set the option under optim (`llmrecipe show adamw`)", ()),
    "optimizer_in_bwd": Only("gradients of all weights are held until the step; smt, freeze or lora hold fewer", (False,)),
    "loss.beta": To("objective.beta", finite_number, objectives=("dpo",)),
    "loss.label_smoothing": To("objective.label_smoothing", finite_number, objectives=("dpo",)),
    "loss.ignore_index": Same("what is trained is a mask, no id"),
    "loss.num_output_chunks": Same("logits are computed in chunks"),
    "loss": Only("options of the objective: `llmrecipe show NAME`", ()),
    "lr_scheduler": Only("options of the schedule: `llmrecipe show cosine`", (0.5,)),
    "dataset": Only("see data: `llmrecipe docs data`", (False,)),
    "dataset_val": Only("set data.validation to a file, or a share such as 0.05", ()),
    "run_val_every_n_steps": To("eval.every", whole_number),
    "batch_size_val": Same("evaluation does not depend on its batch size here"),
    "resume_from_checkpoint": Only("a checkpoint of another tool cannot be continued; a run of this one: resume=RUN", (False,)),
    "save_adapter_weights_only": Same("a run keeps what was trained"),
    "save_every_n_epochs": Only("set save.every=STEPS", ()),
    "metric_logger": Same("see log.trackers"),
    "profiler": Only("there is no profiler; log.mfu measures the utilisation", (False, True, 1, 2, 3, 5)),
    "collate_fn": Only("batches follow from the objective", ()),
    "quantizer": Only("no training for quantized activations here; stack=[nf4,lora] trains above a quantized base", ()),
    "prompt": Only("generate from the finished run: llmrecipe chat RUN", ()),
    "tasks": Only("score a finished run: llmrecipe eval RUN", ()),
    "data_parallel_shard_dim": Only("set runtime.dp_shard", (-1, 1)), "tensor_parallel_dim": Only("set runtime.tp", (1,)),
    "context_parallel_dim": Only("set runtime.cp", (1,)), "data_parallel_replicate_dim": Only("set runtime.dp_replicate", (1,)),
    "name": To("run.name", text),
    "datasets": Only("several sources with their shares: data.path={FILE: 0.8, OTHER: 0.2} (`llmrecipe docs data`)", ()),
    **rows_of("ac_mode ac_option", Only("set model.gradient_checkpointing=true, or selective", ())),
    "early_exit_loss": Only("no objective here trains exits of earlier layers", ()),
    "layer_dropout": Only("layers are never left out here", ()),
    "apply_chat_template": Only("set tokenizer.chat_template (`llmrecipe list chat_template`)", (False,)),
    "use_distributed_state_dict": Same("checkpoints of several processes are one file here"),
    "use_flex": Same("the attention kernel follows from model.attention"),
    **rows_of("policy_model reward_and_value_model ref_policy_model value_model reward_model ref_checkpointer "
              "value_checkpointer reward_checkpointer ref_model_checkpointer ref_policy_checkpointer teacher_model "
              "teacher_checkpointer", Only("other models of a run: roles and objective.reward (`llmrecipe docs tasks`)", ())),
    **rows_of("temperature top_k max_generated_tokens grpo_samples forward_batch_size ppo_epochs ppo_batch_size num_steps "
              "min_response_length penalise_no_eos reward_penalty whiten_rewards gamma lmbda kl_coeff "
              "stop_token_ids", SAMPLING),
    **rows_of("custom_sharded_layers fsdp_cpu_offload fsdp fsdp_reshard_after_forward tensor_parallel_plan "
              "memory_efficient_fsdp_wrap", SHARD),
    **rows_of("log_level log_peak_memory_stats", LOGS),
    **rows_of("base_model_path enable_kv_cache low_cpu_ram dataloader", LOADING),
}  # fmt: skip
"""Keys that need no other key to be understood; a shorter key covers what stands below it."""


def read_torchtune(account: Account, command: str | None) -> str:
    """Enter every key of a file; return the objective.

    Raises:
        RecipeError: it is of a command that trains nothing.
    """
    if account.raw("optimizer") is None and account.raw("loss") is None:
        does = next((verb for key, verb in NO_TRAINING.items() if account.raw(key) is not None), "llmrecipe --help")
        raise RecipeError(
            f"{account.source.where()}: this file of torchtune trains nothing: it has neither an optimizer nor a loss. What it "
            f"does is done here with a run or a model folder: {does}"
        )
    _places(account)
    objective = choose_objective(account, FORMATS.get(component(account, "dataset")) == "text")
    account.choices |= {"objective": objective, "stack": _stack(account, objective)}
    if not account.read("profiler.enabled", flag, False):
        account.same("profiler", "off")
    enter_batch(account, objective)
    enter_objective(account, objective)
    name = component(account, "optimizer")
    ours = OPTIMIZERS.get(name)
    if ours is None:
        account.leave("optimizer._component_", "adamw is chosen instead (`llmrecipe list optim`)")
    else:
        account.explain("optimizer._component_", f"optim: {ours}")
    account.choices["optim"] = ours or "adamw"
    if account.raw("optimizer.weight_decay") is None:
        account.assume("optimizer.weight_decay", "optim.weight_decay", 0.01 if name in ("AdamW", "PagedAdamW") else 0.0)
    elif account.choices["stack"] and account.read("optimizer.weight_decay", finite_number):
        account.assume("optimizer.weight_decay", "optim.decay_adapters", True, "decay there also pulls adapters to zero")
    betas = account.raw("optimizer.betas")
    if isinstance(betas, list) and len(betas) == 2:
        account.carry("optimizer.betas", "optim.beta1", finite_number(betas[0]))
        account.settings["optim.beta2"] = finite_number(betas[1])
    if account.raw("clip_grad_norm") is None:
        account.assume("clip_grad_norm", "optim.clip", 0.0, "gradients are not clipped there")
    _schedule(account)
    _precision(account)
    _data(account, objective)
    account.assume("checkpointer", "eval.load_best", False, "the last weights are kept there")
    account.apply(RULES, objective)
    return objective


def _stack(account: Account, objective: str) -> list[str]:
    name = component(account, "model")
    account.explain("model._component_", "the family and size follow from the model folder")
    if not name.startswith(("lora_", "qlora_")):
        return []
    stack = ["nf4"] if name.startswith("qlora_") or account.read("model.quantize_base", flag, False) else []
    if account.raw("model.quantize_base") is not None:
        account.explain("model.quantize_base", f"stack: {stack}")
    keys = {
        "r": "model.lora_rank",
        "alpha": "model.lora_alpha",
        "dropout": "model.lora_dropout",
        "target": "model.lora_attn_modules",
    }
    dora = account.read("model.use_dora", flag, False)
    method = lora(account, keys, {"r": 8, "alpha": 16.0}, dora, False)
    account.explain("model.use_dora", f"stack: {method}")
    names = account.read("model.lora_attn_modules", words, [])
    if account.read("model.apply_lora_to_mlp", flag, False):
        names += ["gate_proj", "up_proj", "down_proj"]
        account.explain("model.apply_lora_to_mlp", "in the target")
    else:
        account.same("model.apply_lora_to_mlp", "off")
    if account.read("model.apply_lora_to_output", flag, False):
        names.append("lm_head")
        account.explain("model.apply_lora_to_output", "in the target")
    else:
        account.same("model.apply_lora_to_output", "off")
    account.settings[f"stack.{method}.target"] = known_targets(names)[0] or "attn.q|v"
    return [*stack, method]


def _places(account: Account) -> None:
    """Enter the folders, with the keys they refer to written out where the file has them."""
    for key, path, note in (
        ("checkpointer.checkpoint_dir", "model.path", ""),
        ("output_dir", "run.root", "each run is a folder of its own below it"),
    ):
        found = place_at(account, key)
        if found is not None:
            account.carry(key, path, found[0], "; ".join(filter(None, (note, found[1]))))


def _schedule(account: Account) -> None:
    name = component(account, "lr_scheduler")
    if not name:
        account.choices["schedule"] = "constant"
        account.assume("lr_scheduler", "schedule", "constant")
        del account.settings["schedule"]
        return
    account.choices["schedule"] = "cosine"
    if name == "get_cosine_schedule_with_warmup":
        account.explain("lr_scheduler._component_", "schedule: cosine")
    else:
        account.leave("lr_scheduler._component_", "cosine is chosen instead (`llmrecipe list schedule`)")
    if account.raw("lr_scheduler.num_warmup_steps") is not None:
        note = "update n of w rises to n / w here, to (n - 1) / w there: the first update is not at rate 0"
        account.carry(
            "lr_scheduler.num_warmup_steps",
            "schedule.warmup",
            account.read("lr_scheduler.num_warmup_steps", whole_number),
            note,
        )


def _precision(account: Account) -> None:
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(account.raw("dtype")))
    if dtype is not None:
        account.carry("dtype", "model.dtype", dtype, "weights that train stay float32 here; there they have this dtype too")
    elif account.raw("dtype") is not None:
        account.leave("dtype", "model.dtype is auto, float32, bfloat16 or float16")


def _data(account: Account, objective: str) -> None:
    """Enter the rows; the prompt's wording is torchtune's own there."""
    name = component(account, "dataset")
    source = account.raw("dataset.source") or SOURCES.get(name)
    files = account.raw("dataset.data_files")
    kind = FORMATS.get(name, "auto")
    kind = "auto" if objective in SAMPLED else kind
    if isinstance(files, str) and source in ("json", "csv", "parquet", "text", None):
        account.carry("dataset.data_files", "data.path", files)
        account.same("dataset.source", "the kind of file is seen from its name")
    elif isinstance(source, str) and account.raw("dataset.source") is not None:
        account.carry("dataset.source", "data.path", source)
    elif isinstance(source, str):
        account.assume("dataset._component_", "data.path", source)
    else:
        account.leave("dataset", "it names no rows that are known here: set data.path=FILE")
    if name in FORMATS:
        account.settings["data.format"] = kind
        account.explain("dataset._component_", f"data.format: {kind}; compare the prompt once: llmrecipe data recipe=...")
    elif name:
        account.leave(
            "dataset._component_", "a data set of torchtune's own: set data.path, and look: llmrecipe data recipe=..."
        )
    if objective in SAMPLED and account.raw("dataset.column") is not None:
        account.carry("dataset.column", "data.columns", {"prompt": account.read("dataset.column", text)})
    if account.raw("dataset.column_map") is not None:
        names = {"input": "prompt", "output": "completion"} if kind == "prompt_completion" else {}
        found = {names.get(key, key): value for key, value in account.read("dataset.column_map", plain_mapping).items()}
        account.carry("dataset.column_map", "data.columns", found)
    if account.raw("dataset.packed") is not None:
        on = account.read("dataset.packed", flag)
        note = "batch.size counts rows, packed or not; there it counted packs: multiply it by the rows of a pack" if on else ""
        account.carry("dataset.packed", "data.packing", "on" if on else "off", note)
    _split(account)
    if (system := account.raw("dataset.new_system_prompt")) is not None:
        account.carry("dataset.new_system_prompt", "data.system", text(system))
    if objective in ("sft", "distill"):
        default = name.startswith("alpaca")
        on = account.read("dataset.train_on_input", flag, default)
        if account.raw("dataset.train_on_input") is None:
            account.assume("dataset.train_on_input", "objective.mask", "all" if on else "assistant")
        else:
            account.carry("dataset.train_on_input", "objective.mask", "all" if on else "assistant")
    length = account.read("tokenizer.max_seq_len", whole_number)
    if length is not None:
        account.carry("tokenizer.max_seq_len", "data.max_length", length, "longer rows are left out; there their end is cut")
    else:
        account.assume("tokenizer.max_seq_len", "data.max_length", 8192, "rows have no limit there")


def _split(account: Account) -> None:
    """Enter the part of the rows that trains, and the rest of them where `dataset_val` is that rest."""
    split = account.raw("dataset.split")
    part = PART.fullmatch(str(split))
    if split == "train":
        account.same("dataset.split", "the training rows")
    elif part and _is_rest(account, part[1]):
        held_out = round(1 - int(part[1]) / 100, 2)
        account.carry("dataset.split", "data.validation", held_out, "rows are drawn by chance; there they are the last ones")
        account.same("dataset_val", "the rest of these rows, see dataset.split")
    elif split is not None:
        account.leave("dataset.split", "a part of a split: set data.validation=0.05 for the rest, or data.limit=ROWS")


def _is_rest(account: Account, percent: str) -> bool:
    """Return whether `dataset_val` is what the training rows leave of the same split of the same set."""
    training, held_out = account.raw("dataset"), account.raw("dataset_val")
    if not isinstance(held_out, dict) or held_out.get("split") != f"train[{percent}%:]":
        return False
    return all(training.get(key) == value for key, value in held_out.items() if key != "split")
