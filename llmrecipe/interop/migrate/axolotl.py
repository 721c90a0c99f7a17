"""Files of axolotl: model, data sets, adapter and training in one mapping."""

from __future__ import annotations

from typing import Any

from llmrecipe.interop.migrate import trainer
from llmrecipe.interop.migrate.account import Account, Only, Rule, Same, To
from llmrecipe.interop.migrate.axolotl_data import read_datasets
from llmrecipe.interop.migrate.counterparts import (
    adapters_decay,
    batch,
    carry_sampling,
    every,
    lora,
    optimizer,
    precision,
    schedule,
    stop_after,
    warmup,
)
from llmrecipe.interop.migrate.trainer import LOADING, LOGS, MANY, rows_of
from llmrecipe.interop.migrate.values import compile_choice, finite_number, flag, text, whole_number

OBJECTIVES = {"dpo": "dpo", "ipo": "ipo", "orpo": "orpo", "kto": "kto", "simpo": "simpo", "grpo": "grpo", "gdpo": "grpo"}
"""`rl` -> objective."""
DPO_LOSSES = {"sigmoid": "sigmoid", "robust": "robust", "hinge": "hinge", "exo_pair": "exo", "nca_pair": "nca"} | {
    "apo_zero": "apo_zero", "apo_down": "apo_down", "sppo_hard": "sppo"
}  # fmt: skip
BACKEND = Same("the same attention, by the fastest backend there is; model.attention names one")
KERNEL = Same("a faster way to the same numbers, which needs no key here")
EXPERTS = Only("experts are trained as the model's family writes them: `llmrecipe check` lists the sites")
TRACKER = Only("a name or an account of the tracker: set it in its environment variable (WANDB_PROJECT, ...)", (None,))
PICTURES = Only(
    "pictures: the objectives that read them are caption, vqa and image_classification (`llmrecipe list objective`)"
)
RULES: dict[str, Rule] = trainer.RULES | {
    "base_model": To("model.path", text),
    "base_model_config": Only("the configuration is the model's own; model.config sets values", ()),
    "revision_of_model": To("model.revision", text),
    "overrides_of_model_config": Only("set model.config={...}", ()),
    "model_config": Only("set model.config={...}", ()),
    "tokenizer_config": To("tokenizer.path", text),
    "reinit_weights": Only("set model.init=random", (False,)),
    "sequence_len": To("data.max_length", whole_number, 512),
    "excess_length_strategy": Only("set data.truncation (`llmrecipe list truncation`)", ("drop",)),
    "val_set_size": Same("see data.validation"),
    "default_system_message": To("data.system", text),
    "shuffle_merged_datasets": Only("rows of all sources are shuffled in every epoch", (True,)),
    "min_sample_len": Only("no row is too short here; take the short ones out of the file", (2,)),
    "early_stopping_patience": To("eval.patience", whole_number),
    "neftune_noise_alpha": To("objective.neftune_alpha", finite_number, objectives=("sft",)),
    "max_grad_norm": To("optim.clip", finite_number, 1.0),
    "weight_decay": To("optim.weight_decay", finite_number),
    "seed": To("seed", whole_number, 42, "the same number draws other rows and weights here"),
    "loraplus_lr_ratio": To("stack.lora.lr_ratio", finite_number),
    "loraplus_lr_embedding": Same("embeddings have no branch in a LoRA of linear layers"),
    "lora_rank_pattern": Only("set stack.lora.rank_pattern: expressions for the end of a site's path", ()),
    "lora_alpha_pattern": Only("set stack.lora.alpha_pattern: expressions for the end of a site's path", ()),
    "lora_model_dir": Only(
        "mount it, model.adapters={FOLDER: 1.0}; a run of this tool: model.path=RUN model.continue=true", ("",)),
    "lora_modules_to_save": Only("adapters train alone; new token rows: tokenizer.add_tokens", ()),
    "lora_target_parameters": EXPERTS,
    "lora_fan_in_fan_out": Same("known from the layer"),
    "lora_on_cpu": Same("not needed"),
    "peft_layers_to_transform": Only("name layers in the target: stack.lora.target='layers.0|1.attn.q'", ()),
    "peft_layers_pattern": Only("name layers in the target: stack.lora.target='layers.0|1.attn.q'", ()),
    "unfrozen_parameters": Only("name what rests instead: stack=freeze stack.freeze.layers=0:8; now every weight trains", ()),
    "relora": Only("there is no ReLoRA here; lora is set", (False,)),
    "loss_watchdog_threshold": Only("run.on_nan stops a run whose loss is no number; eval.patience one that gets worse"),
    "loss_watchdog_patience": Only("see loss_watchdog_threshold"),
    "lr_quadratic_warmup": Only("the warm-up is linear", (False,)),
    "cosine_constant_lr_ratio": Only("the cosine ends at the end of the run; schedule=wsd holds a rate", (0, 0.0)),
    "cosine_min_lr_ratio": To("schedule.min_ratio", finite_number, note="for the cosine schedule"),
    "eta_min": Only("set schedule.min_ratio to this rate over optim.lr"),
    "center_rewards_coefficient": To("objective.center", finite_number, objectives=("reward",)),
    "kto_desirable_weight": To("objective.desirable_weight", finite_number, objectives=("kto",)),
    "kto_undesirable_weight": To("objective.undesirable_weight", finite_number, objectives=("kto",)),
    "simpo_gamma": To("objective.gamma", finite_number, 0.5, objectives=("simpo",)),
    "cpo_alpha": Only("objective=cpo has the likelihood term: objective.bc_weight", (0, 0.0)),
    "dpo_label_smoothing": To("objective.label_smoothing", finite_number, objectives=("dpo",)),
    "precompute_ref_log_probs": Same("the reference's scores are kept where that saves work"),
    "reward_model": Same("see objective"),
    "process_reward_model": Only("rewards are for whole answers here", (False,)),
    "num_labels": Only("one score a text (reward), or as many classes as the rows have (classification)", (1,)),
    "generate_samples": Only("set eval.samples=N"),
    "eval_table_size": Only("set eval.samples=N"),
    "plugins": Only("plugins of axolotl; those of kernels need no counterpart, others: `llmrecipe docs plugins`", ([],)),
    "strict": Same("keys are always checked"),
    "special_tokens.pad_token": To("tokenizer.pad_token", text),
    "special_tokens": Only("the tokenizer's own are used; a new one is added by tokenizer.add_tokens", ()),
    "tokens": Only("added by tokenizer.add_tokens=[...]", ([],)),
    "added_tokens_overrides": Only("added by tokenizer.add_tokens=[...]", ()),
    "eot_tokens": Same("turns end as the chat template ends them, and the end is trained with the answer"),
    "fsdp_config": Only(MANY, ()), "fsdp_version": Same("FSDP is version 2"),
    "fsdp": Only(MANY, ([], "")),
    "use_tensorboard": Only("set log.trackers=[tensorboard]"),
    "trl.use_vllm": Only("answers are sampled by the model that trains; objective.sampler names a vLLM server instead"),
    "trl.max_completion_length": To("objective.max_new_tokens", whole_number, objectives=("grpo",)),
    "trl.temperature": To("objective.temperature", finite_number, objectives=("grpo",)),
    "trl.num_iterations": To("objective.epochs", whole_number, objectives=("grpo",)),
    "trl.epsilon": To("objective.clip", finite_number, objectives=("grpo",)),
    "trl.epsilon_high": To("objective.clip_high", finite_number, objectives=("grpo",)),
    "trl.scale_rewards": Only("objective.scale is group, batch or none", (True, "group")),
    "trl.loss_type": To("objective.loss_type", text, objectives=("grpo",)),
    "trl.reward_funcs": Only("write the reward here: objective.reward={...} (`llmrecipe list reward`)", ()),
    "trl.reward_weights": Only("each reward has its weight: objective.reward={NAME: {weight: 1.0}}", ()),
    "trl": Only("no counterpart; `llmrecipe show grpo` lists the options of GRPO"),
    "vllm": Only("answers are sampled by the model that trains; objective.sampler names a vLLM server instead", ()),
    "ebft": Only("there is no EBFT here; sft is chosen", ()),
    "qat": Only("no training for quantized activations here; stack=[nf4,lora] trains above a quantized base", ()),
    "quantization": Only("quantize the exported model with another tool", ()),
    "bnb_config_kwargs": Only("options of the quantized base: `llmrecipe show nf4`", ()),
    "gptq": Only("bases quantized by GPTQ are read as Transformers reads them", (False,)),
    "load_in_4bit": Same("see stack"), "load_in_8bit": Same("see stack"),
    "adapter": Same("see stack"),
    "dataset_prepared_path": Same("the cache of tokens is keyed by content"),
    "dataset_shard_num": Only("set data.limit"), "dataset_shard_idx": Only("set data.limit"),
    "dataset_exact_deduplication": Only("`llmrecipe data` counts equal rows; take them out of the file"),
    "push_dataset_to_hub": Only("rows are not pushed", ()),
    "hf_use_auth_token": Same("a token in the environment (HF_TOKEN) is used"),
    "tensor_parallel_size": Only("set runtime.tp", (1,)), "context_parallel_size": Only("set runtime.cp", (1,)),
    "sequence_parallel_degree": Only("set runtime.cp", (1,)), "dp_shard_size": Only("set runtime.dp_shard", (1,)),
    "dp_replicate_size": Only("set runtime.dp_replicate", (1,)), "expert_parallel_size": Only("experts are not spread", (1,)),
    "torch_compile": To("model.compile", lambda value: value if value == "auto" else compile_choice(value)),
    "gpu_memory_limit": Only(MANY, ()), "max_memory": Only(MANY, ()), "device_map": Only(MANY, ("auto",)),
    "group_by_length": Only("rows come in random order; data.packing avoids padding", (False,)),
    "curriculum_sampling": Only("rows come in random order", (False,)),
    "do_bench_eval": Only("score the finished run: llmrecipe eval RUN"),
    "resize_token_embeddings_to_32x": Only("the vocabulary keeps its size", (False,)),
    "max_packed_sequence_len": Only("data.max_length is the longest row and the longest pack", ()),
    "use_eaft": Only("no EAFT loss; objective.loss_type is nll or dft", (False,)),
    "lisa_n_layers": Only("blocks by chance: stack=freeze with stack.freeze.mode=dynamic and its scores", ()),
    "lisa_step_interval": Only("see lisa_n_layers", ()), "lisa_layers_attribute": Only("see lisa_n_layers", ()),
    "peft": Only("options of PEFT: `llmrecipe show lora`", ()),
    "diffusion": Only("there is no diffusion objective here", ()),
    "llmcompressor": Only("there is no pruning recipe here", ()),
    "cls_model_config": Same("classes are chosen from the model's configuration"),
    "evaluation_strategy": Only("set eval.every=STEPS", ("no",)),
    "use_ray": Only(MANY), "ray_num_workers": Only(MANY, (1,)), "fp8": Only("no 8-bit matrix products here", (False,)),
    "use_pose": Only("there is no PoSE here"),
    "flash_attn_cross_entropy": KERNEL, "scaling_softmax": Only("the attention is the model's own", (False,)),
    **rows_of("wandb_name wandb_project wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode", TRACKER),
    **rows_of("use_swanlab swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_log_completions",
              TRACKER),
    **rows_of("mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts comet_project_name", TRACKER),
    **rows_of("trackio_project_name trackio_run_name", TRACKER),
    **rows_of("attn_implementation flash_attention sdp_attention xformers_attention flex_attention eager_attention", BACKEND),
    **rows_of("flex_attn_compile_kwargs sage_attention gemma4_hybrid_attn_impl flash_optimum s2_attention sdpa_varlen",
              BACKEND),
    **rows_of("lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm use_kernels",
              KERNEL),
    **rows_of("liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy liger_cross_entropy liger_rms_norm_gated",
              KERNEL),
    **rows_of("cut_cross_entropy chunked_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm fused_attn_kernel tiled_mlp",
              KERNEL),
    **rows_of("pad_to_sequence_len pad_to_multiple_of sample_packing_group_size sample_packing_bin_size eval_sample_packing",
              Same("padding and packing do not change a row's loss here")),
    **rows_of("multipack_real_batches streaming_multipack_buffer_size pretrain_multipack_buffer_size batch_flattening",
              Same("padding and packing do not change a row's loss here")),
    **rows_of("dataset_processes dataset_num_proc dataset_keep_in_memory skip_prepare_dataset", LOADING),
    **rows_of("debug include_tkps profiler_steps is_preprocess gc_steps logging_steps_ratio", LOGS),
    **rows_of("experts_implementation quantize_moe_experts use_scattermoe use_sonicmoe llama4_linearized_experts", EXPERTS),
    **rows_of("processor_type processor_kwargs freeze_mm_modules image_size image_resize_algorithm", PICTURES),
    **rows_of("model_type tokenizer_type type_of_model is_llama_derived_model is_falcon_derived_model is_mistral_derived_model",
              Same("classes are chosen from the model's configuration")),
    **rows_of("tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common tokenizer_save_jinja_files",
              Same("the tokenizer is read as its files say")),
    **rows_of("low_cpu_mem_usage experimental_skip_move_to_device qlora_sharded_model_loading torchdistx_path gptq_groupsize "
              "gptq_model_v1 fp32_norms embeddings_skip_upcast peft_autocast_adapter_dtype merge_lora save_first_step",
              Same("changes nothing that is learned")),
    **rows_of("model_quantization_config model_quantization_config_kwargs", Only("a model is read as its own files say", ())),
}  # fmt: skip
"""Keys that need no other key to be understood."""


def read_axolotl(account: Account, command: str | None) -> str:
    """Enter every key of a file; return the objective."""
    objective = _objective(account)
    account.choices["stack"] = _stack(account)
    batch(account, "micro_batch_size", "gradient_accumulation_steps")
    if account.raw("batch_size") is not None:
        account.leave("batch_size", "rows of a step are micro_batch_size x gradient_accumulation_steps: check batch.size")
    account.same("eval_batch_size", "evaluation does not depend on its batch size here")
    if objective == "grpo":
        carry_sampling(account, "trl.num_generations", 8)
    optimizer(account, "optimizer", "adamw_torch_fused")
    adapters_decay(account)
    account.carry("learning_rate", "optim.lr", account.read("learning_rate", finite_number))
    _schedule(account)
    precision(account)
    checkpointing = account.raw("gradient_checkpointing")
    if checkpointing is not None:
        moved = checkpointing in ("offload", "offload_disk")
        note = "inputs of blocks are moved to the memory of the machine, no further" if checkpointing == "offload_disk" else ""
        form = "offload" if moved else account.read("gradient_checkpointing", flag)
        account.carry("gradient_checkpointing", "model.gradient_checkpointing", form, note)
    stop_after(account, "max_steps", "num_epochs", 1.0)
    for kind, path in (("eval", "eval.every"), ("save", "save.every")):
        every(account, kind, path, None)
        _per_epoch(account, f"{kind}s_per_epoch", path)
    if any(account.raw(key) for key in ("wandb_project", "use_wandb")):
        account.settings["log.trackers"] = ["wandb"]
        account.explain("use_wandb", "log.trackers: [wandb]")
        if account.raw("wandb_project") is not None:
            note = "log.trackers=[wandb] is set (pip install 'llmrecipe[wandb]'); the name goes into WANDB_PROJECT"
            account.leave("wandb_project", note)
    share = account.read("val_set_size", finite_number, 0.0)
    if 0 < share < 1:
        account.carry("val_set_size", "data.validation", share, "drawn by a hash of the row: other rows than there")
    elif share >= 1:
        account.leave("val_set_size", "a number of rows; set a share, data.validation=0.05, or a file")
    read_datasets(account, objective)
    account.apply(RULES, objective)
    return objective


def _per_epoch(account: Account, key: str, path: str) -> None:
    if account.read(key, finite_number):
        account.leave(key, f"steps are counted here, and the rows decide how many an epoch has: set {path}=STEPS")
    else:
        account.same(key, "not during training")


def _objective(account: Account) -> str:
    kind = account.raw("rl")
    if kind is not None:
        objective = OBJECTIVES.get(str(kind))
        if objective is None:
            account.leave("rl", f"no objective here is {kind!s:.40} (`llmrecipe list objective`); sft is chosen")
            account.choices["objective"] = "sft"
            return "sft"
        account.chosen("rl", "objective", objective)
        _preference(account, objective)
        return objective
    if account.read("reward_model", flag, False):
        account.chosen("reward_model", "objective", "reward")
        return "reward"
    plain = account.raw("pretraining_dataset") is not None or account.raw("datasets[0].type") in ("completion", "pretrain")
    objective = "clm" if plain else "sft"
    account.choices["objective"] = objective
    return objective


def _preference(account: Account, objective: str) -> None:
    """Set the options of an objective of preferences or rewards."""
    paths = {"orpo": ("orpo_alpha", "objective.odds_weight", 0.1), "simpo": ("rl_beta", "objective.beta", 0.1)}
    key, path, default = paths.get(objective, ("rl_beta", "objective.beta", 0.0 if objective == "grpo" else 0.1))
    used = next((one for one in ("trl.beta", "rl_beta", "dpo_beta", key) if account.raw(one) is not None), None)
    if used is None:
        account.assume(key, path, default)
    else:
        account.carry(used, path, account.read(used, finite_number))
    names = account.raw("dpo_loss_type")
    if names is not None:
        name = names[0] if isinstance(names, list) and len(names) == 1 else names
        if objective == "dpo" and str(name) in DPO_LOSSES:
            account.carry("dpo_loss_type", "objective.loss_type", DPO_LOSSES[str(name)])
        else:
            account.leave("dpo_loss_type", "objective.loss_type: `llmrecipe show dpo` lists the losses; the default is set")
    if objective == "orpo":
        account.assume("rl", "objective.nll_on", "all")


def _stack(account: Account) -> list[str]:
    adapter = account.raw("adapter")
    stack: list[str] = []
    if adapter is None:
        for key in [key for key in account.given if key.startswith(("lora_", "peft_")) and account.raw(key) is not None]:
            account.same(key, "unused there, because adapter is not set")
        if account.read("load_in_4bit", flag, False) or account.read("load_in_8bit", flag, False):
            account.leave("adapter", "a quantized base without an adapter cannot train: add one, stack=[nf4,lora]")
        return stack
    four = account.read("load_in_4bit", flag, False) or (adapter == "qlora" and account.raw("load_in_4bit") is None)
    eight = account.read("load_in_8bit", flag, False) and not four
    if four:
        stack = ["nf4"]
        account.settings["stack.nf4.double"] = _double(account)
        account.explain("load_in_4bit", "stack: nf4 stands under the adapter")
    elif eight:
        stack = ["int8"]
        account.explain("load_in_8bit", "stack: int8 stands under the adapter")
    if adapter not in ("lora", "qlora", "dora"):
        account.leave("adapter", f"no method here is {adapter!s:.40}; lora is set (`llmrecipe list method`)")
    keys = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target": "lora_target_modules"}
    dora = account.read("peft_use_dora", flag, False) or adapter == "dora"
    name = lora(account, keys, {}, dora, account.read("lora_target_linear", flag, False))
    account.explain("lora_target_linear", f"stack.{name}.target: every linear layer of a block")
    account.explain("peft_use_dora", f"stack: {name}")
    rooted = account.read("peft_use_rslora", flag, False)
    if rooted and not dora:
        account.carry("peft_use_rslora", "stack.lora.use_rslora", True)
    elif rooted:
        account.leave("peft_use_rslora", "dora divides alpha by the rank")
    account.explain("adapter", f"stack: {name}")
    start = account.raw("peft_init_lora_weights")
    if start is not None and start is not True:
        account.leave("peft_init_lora_weights", f"set stack.{name}.init (`llmrecipe show {name}`)")
    account.same("peft_init_lora_weights", "B starts at zero")
    return [*stack, name]


def _double(account: Account) -> bool:
    given: Any = account.raw("bnb_config_kwargs.bnb_4bit_use_double_quant")
    if given is not None:
        account.explain("bnb_config_kwargs.bnb_4bit_use_double_quant", "stack.nf4.double")
    return given is None or flag(given)


def _schedule(account: Account) -> None:
    """Set schedule and warm-up: a file that names none rises over 3 % of the run there, 100 steps at most."""
    warm = warmup(account, "warmup_steps", "warmup_ratio", 0.03)
    if account.raw("warmup_steps") is not None or account.raw("warmup_ratio") is not None:
        warm = 0 if not account.raw("warmup_steps") and not account.raw("warmup_ratio") else warm
    else:
        account.assume("warmup_ratio", "schedule.warmup", warm, "100 steps at most there")
    if warm == 1:
        warm = account.settings["schedule.warmup"] = 2
        account.explain("warmup_steps", "one step of warm-up is made two there")
    schedule(account, "lr_scheduler", "cosine", warm)
