"""The arguments of Transformers' trainer, which LLaMA-Factory and TRL pass on."""

from __future__ import annotations

from llmrecipe.interop.migrate.account import Account, Only, Rule, Same, To
from llmrecipe.interop.migrate.counterparts import (
    adapters_decay,
    batch,
    every,
    optimizer,
    precision,
    reports,
    schedule,
    stop_after,
    warmup,
)
from llmrecipe.interop.migrate.values import compile_choice, finite_number, flag, whole_number

HUB = "push when you have looked at the result: llmrecipe push EXPORT --repo OWNER/NAME"
MANY = "a recipe is free of launchers: llmrecipe launch recipe=... --nproc N, with runtime=zero1|zero2|zero3|fsdp"
LOGS = Same("the log of a run is events.jsonl, whatever is shown")
LOADING = Same("how rows are loaded does not change what is learned; data.workers tokenizes in several processes")


def rows_of(names: str, rule: Rule) -> dict[str, Rule]:
    """Return one rule under several names."""
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    "max_grad_norm": To("optim.clip", finite_number, 1.0),
    "seed": To("seed", whole_number, 42, "the same number draws other rows and weights here"),
    "logging_steps": To("log.every", whole_number),
    "save_total_limit": To("save.keep", whole_number, note="the best checkpoint is kept in addition"),
    "load_best_model_at_end": To("eval.load_best", flag, False),
    "label_smoothing_factor": To("objective.label_smoothing", finite_number, objectives=("sft",)),
    "neftune_noise_alpha": To("objective.neftune_alpha", finite_number, objectives=("sft",)),
    "torch_compile": To("model.compile", compile_choice),
    "metric_for_best_model": Only(
        "set eval.monitor: eval/loss is the default, `llmrecipe list metric` names others", ("loss", "eval_loss")),
    "greater_is_better": Same("each metric declares whether a large value is better (eval.mode overrides it)"),
    "per_device_eval_batch_size": Same("evaluation does not depend on its batch size here"),
    "output_dir": To("run.root", str, note="each run is a folder of its own below it"),
    "run_name": To("run.name", str),
    "eval_on_start": Same("a run evaluates before its first step (eval.at_start)"),
    "eval_delay": Only("evaluations begin at once; eval.warmup leaves the first ones out of early stopping"),
    "full_determinism": To("runtime.deterministic", flag),
    "use_cpu": Only("set runtime.device=cpu"),
    "do_train": Same("`llmrecipe train` trains"),
    "do_eval": Same("a split named in data.validation is evaluated"),
    "do_predict": Only("generate from the finished run: llmrecipe generate RUN"),
    "predict_with_generate": Only("add metrics of generated answers: eval.metrics=[rouge_l]"),
    "resume_from_checkpoint": Only("a checkpoint of another tool cannot be continued; a run of this one: resume=RUN"),
    "use_liger_kernel": Same("logits come in chunks, of targets alone; model.kernels=liger takes other kernels"),
    "group_by_length": Only("rows come in random order; data.packing avoids padding", (False,)),
    "train_sampling_strategy": Only("rows come in random order; data.packing avoids padding", ("random",)),
    "optim_args": Only("set the options under optim by hand (`llmrecipe show adamw`)", ()),
    "optim_target_modules": Only("no optimizer here projects gradients (GaLore); lora and smt save its memory another way", ()),
    "lr_scheduler_kwargs": Only("options of a schedule: `llmrecipe show cosine`", ()),
    "deepspeed": Only(MANY, ()),
    "auto_find_batch_size": Only("set batch.micro; `llmrecipe check` says what fits", (False,)),
    "trust_remote_code": Only("a right that only you give, on the command line: model.trust_remote_code=true", (False,)),
    "gradient_checkpointing_kwargs": Same("activations are always recomputed the non-reentrant way"),
    "activation_offloading": Only("set model.gradient_checkpointing=offload, which recomputes too", (False,)),
    "use_cache": Same("no cache is kept while training"),
    "save_only_model": Same("save.end=false keeps no checkpoint to continue from"),
    "average_tokens_across_devices": Only("the loss of a step is a mean over all its tokens, on every device", (True,)),
    **rows_of("push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision", Only(HUB)),
    **rows_of("fsdp fsdp_config accelerator_config parallelism_config ddp_find_unused_parameters", Only(MANY, (False, "", 0))),
    **rows_of("fsdp_transformer_layer_cls_to_wrap local_rank", Only(MANY, (-1, 0))),
    **rows_of("hub_token trackio_space_id", Only("a secret or an account: it belongs to the environment, not into a recipe")),
    **rows_of("ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph", Same("set by the launcher")),
    **rows_of("logging_strategy logging_first_step logging_dir log_level disable_tqdm include_num_input_tokens_seen", LOGS),
    **rows_of("log_level_replica log_on_each_node logging_nan_inf_filter include_tokens_per_second project", LOGS),
    **rows_of("dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers", LOADING),
    **rows_of("remove_unused_columns dataset_num_proc", LOADING),
    "dataloader_drop_last": Only("the last, smaller batch of an epoch is a step of its own", (False,)),
    **rows_of("overwrite_output_dir save_safetensors skip_memory_metrics prediction_loss_only eval_accumulation_steps", Same(
        "has no counterpart and changes nothing that is learned")),
    **rows_of("tf32 torch_empty_cache_steps torch_compile_backend torch_compile_mode fp16_full_eval bf16_full_eval", Same(
        "left to torch; it changes the last digits at most")),
    "weight_decay": To("optim.weight_decay", finite_number),
}  # fmt: skip
"""Keys that need no other key to be understood."""


def read_trainer(account: Account, rate: float, precision_default: str | None, checkpointing: bool) -> None:
    """Enter the keys of the trainer that depend on one another.

    Args:
        rate: learning rate of a file without one.
        precision_default: dtype of a file that names none.
        checkpointing: whether activations are recomputed where nothing is said.
    """
    batch(account, "per_device_train_batch_size", "gradient_accumulation_steps", 8)
    optimizer(account, "optim", "adamw_torch_fused")
    adapters_decay(account)
    if account.raw("learning_rate") is None:
        account.assume("learning_rate", "optim.lr", rate)
    else:
        account.carry("learning_rate", "optim.lr", account.read("learning_rate", finite_number))
    schedule(account, "lr_scheduler_type", "linear", warmup(account, "warmup_steps", "warmup_ratio"))
    precision(account, precision_default)
    reports(account)
    stop_after(account, "max_steps", "num_train_epochs", 3.0)
    every(account, "save", "save.every", 500)
    every(account, "eval", "eval.every", None)
    if account.raw("gradient_checkpointing") is not None:
        account.carry("gradient_checkpointing", "model.gradient_checkpointing", account.read("gradient_checkpointing", flag))
    elif checkpointing:
        account.assume("gradient_checkpointing", "model.gradient_checkpointing", True)


def carry_quantization(account: Account, double_default: bool) -> list[str]:
    """Return the quantization of the base, and enter its keys as TRL and axolotl name them."""
    four = account.read("load_in_4bit", flag, False)
    eight = account.read("load_in_8bit", flag, False)
    for key, on, name in (("load_in_4bit", four, "nf4"), ("load_in_8bit", eight and not four, "int8")):
        if on:
            account.explain(key, f"stack: {name} stands under the adapter")
        else:
            account.same(key, "off")
    if four:
        account.settings["stack.nf4.double"] = double_default
        return ["nf4"]
    return ["int8"] if eight else []
