"""Files of TRL's command line (`trl sft --config FILE`): one flat mapping of script, model and trainer arguments."""

from __future__ import annotations

from llmrecipe.core.errors import RecipeError
from llmrecipe.interop.migrate import trainer
from llmrecipe.interop.migrate.account import Account, Only, Rule, Same, To
from llmrecipe.interop.migrate.counterparts import carry_sampling, lora
from llmrecipe.interop.migrate.trainer import rows_of
from llmrecipe.interop.migrate.values import finite_number, flag, text, whole_number

OBJECTIVES = {"sft": "sft", "dpo": "dpo", "kto": "kto", "reward": "reward", "grpo": "grpo", "rloo": "rloo"}
"""Command of TRL -> objective."""
RATES = {"sft": 2e-5, "reward": 1e-4}
"""Command -> learning rate of a file without one; 1e-6 for the others."""
SIGNS = {
    "sft": ("assistant_only_loss", "completion_only_loss", "packing", "dataset_text_field", "packing_strategy"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "reward": ("center_rewards_coefficient",),
    "grpo": ("scale_rewards", "epsilon_high", "importance_sampling_level"),
    "dpo": ("precompute_ref_log_probs", "ld_alpha", "f_divergence_type", "use_weighting", "rpo_alpha"),
}
"""Command -> keys that only its trainer has."""
DPO_LOSSES = {"sigmoid": "sigmoid", "robust": "robust", "hinge": "hinge", "exo_pair": "exo", "nca_pair": "nca"} | {
    "apo_zero": "apo_zero", "apo_down": "apo_down", "sppo_hard": "sppo"
}  # fmt: skip
VLLM = Only(
    "answers are sampled by the model that trains, with continuous batching; objective.sampler names a vLLM server instead"
)
CORRECTION = Only(
    "objective.sampler_correction=token or sequence, objective.sampler_cap: by default only the difference is reported"
)
REFERENCE = Only("the reference can follow the policy: objective.ref_sync={alpha, steps}, for full fine-tuning")
DPO = ("dpo",)
RL = ("grpo", "rloo")
RULES: dict[str, Rule] = trainer.RULES | {
    "model_name_or_path": To("model.path", text),
    "model_revision": To("model.revision", text),
    "dtype": Same("weights that do not train are in model.dtype, trained ones in float32"),
    "attn_implementation": Same("the same attention, by the fastest backend there is; model.attention names one"),
    "max_length": To("data.max_length", whole_number, 1024),
    "truncation_mode": Only("set data.truncation (`llmrecipe list truncation`)", ("keep_start",)),
    "packing_strategy": Same("rows are laid end to end and never see each other"),
    "eval_packing": Same("packing does not change a row's loss here"),
    "padding_free": Same("packing does not change a row's loss here"),
    "pad_to_multiple_of": Same("padding does not change a row's loss here"),
    "chat_template_path": To("tokenizer.chat_template", text, note="a file with the Jinja text, no folder"),
    "eos_token": Only("the tokenizer's own end token is used; a template may end turns with another"),
    "pad_token": To("tokenizer.pad_token", text),
    "dataset_streaming": To("data.streaming", flag),
    "dataset_train_split": Only("name the rows themselves: data.path=FILE or a folder with train and test files", ("train",)),
    "dataset_test_split": Same("the folder's or hub set's own test split is scored once, after training"),
    "shuffle_dataset": Same("rows are shuffled in every epoch"),
    "model_init_kwargs": Only("set model.config, model.dtype or model.attention"),
    "router_aux_loss_coef": Only("the balance loss of a mixture of experts is not added"),
    "lora_task_type": Same("follows from the objective"),
    "lora_target_parameters": Only("name the experts' weights in stack.lora.target: `llmrecipe check` lists the sites"),
    "lora_modules_to_save": Only("adapters train alone; new token rows: tokenizer.add_tokens"),
    "bnb_4bit_quant_type": To("stack.nf4.type", text),
    "use_bnb_nested_quant": Same("see load_in_4bit"),
    "bnb_4bit_quant_storage": Same("packed as the sharding needs it (stack.nf4.storage)"),
    "use_peft": Same("follows from stack"),
    "ignore_bias_buffers": Same("not needed"),
    "disable_dropout": Only("preference objectives have no dropout here, sft has the model's own", (True,)),
    "precompute_ref_log_probs": Same("the reference's scores are kept where that saves work"),
    "label_smoothing": To("objective.label_smoothing", finite_number, objectives=DPO),
    "use_weighting": Only("no WPO weights here", (False,)),
    "f_divergence_type": Only("the divergence is the reverse KL", ("reverse_kl",)),
    "ld_alpha": Only("no length desensitization here; objective.length_norm=true divides by the length", ()),
    "loss_weights": Only("one loss a run; objective.nll_coef adds the likelihood of the chosen answer", ()),
    "discopop_tau": Only("there is no discopop loss here", (0.05,)),
    **rows_of("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", REFERENCE),
    "desirable_weight": To("objective.desirable_weight", finite_number, objectives=("kto",)),
    "undesirable_weight": To("objective.undesirable_weight", finite_number, objectives=("kto",)),
    "center_rewards_coefficient": To("objective.center", finite_number, objectives=("reward",)),
    "num_generations": Same("the same objective has no answers to sample"),
    "max_completion_length": To("objective.max_new_tokens", whole_number, 512, objectives=RL),
    "temperature": To("objective.temperature", finite_number, objectives=RL),
    "num_iterations": To("objective.epochs", whole_number, objectives=RL),
    "epsilon": To("objective.clip", finite_number, objectives=("grpo",)),
    "epsilon_high": To("objective.clip_high", finite_number, objectives=("grpo",)),
    "reward_funcs": Only("write the reward here: objective.reward={...} (`llmrecipe list reward`)", ()),
    "reward_weights": Only("each reward has its weight: objective.reward={NAME: {weight: 1.0}}", ()),
    "scale_rewards": Only("objective.scale is group, batch or none", ("group", True)),
    "importance_sampling_level": To("objective.ratio", text, objectives=("grpo",)),
    "top_p": Only("sampling is from the whole distribution", (1.0, 1)),
    "top_k": Only("sampling is from the whole distribution", (0,)),
    "min_p": Only("sampling is from the whole distribution", ()),
    "repetition_penalty": Only("sampling is from the whole distribution", (1.0, 1)),
    "mask_truncated_completions": Only("objective.missing_end gives answers without an end a score", (False,)),
    "log_completions": Same("objective.show prints answers at each evaluation"),
    **rows_of("use_vllm", VLLM),
    **rows_of("vllm_mode vllm_server_host vllm_server_port vllm_gpu_memory_utilization", Same(VLLM.remedy)),
    "vllm_importance_sampling_cap": To("objective.sampler_cap", finite_number, objectives=RL),
    "vllm_importance_sampling_clip_max": To("objective.sampler_cap", finite_number, objectives=RL),
    **rows_of("vllm_importance_sampling_correction vllm_importance_sampling_mode", CORRECTION),
    "env": Only("variables of the environment: set them in the shell"),
}  # fmt: skip


def read_trl(account: Account, command: str | None) -> str:
    """Enter every key of a file; return the objective.

    Raises:
        RecipeError: nothing says which trainer the file is for.
    """
    command = command or _command(account)
    objective = OBJECTIVES[command]
    stack = trainer.carry_quantization(account, account.read("use_bnb_nested_quant", flag, False))
    account.choices["stack"] = stack
    if account.read("use_peft", flag, False):
        _adapter(account, stack)
    else:
        for key in [key for key in account.given if key.startswith("lora_") or key in ("use_rslora", "use_dora")]:
            account.same(key, "unused there, because use_peft is not set")
    trainer.read_trainer(account, RATES.get(command, 1e-6), None if _says_dtype(account) else "bfloat16", True)
    if account.raw("load_in_4bit") is None:
        account.same("bnb_4bit_quant_type", "unused without load_in_4bit")
    _data(account)
    objective = _objective(account, objective)
    account.choices["objective"] = objective
    account.apply(RULES, objective)
    return objective


def _says_dtype(account: Account) -> bool:
    return account.raw("bf16") is not None or bool(account.raw("fp16"))


def _command(account: Account) -> str:
    hits = [name for name, keys in SIGNS.items() if any(key in account.given for key in keys)]
    if len(hits) != 1:
        raise RecipeError(
            f"{account.source.where()}: a TRL file does not say which command it is for; say it: "
            f"--trainer {'|'.join(OBJECTIVES)} (as in `trl sft --config`)"
        )
    return hits[0]


def _adapter(account: Account, stack: list[str]) -> None:
    dora = account.read("use_dora", flag, False)
    keys = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target": "lora_target_modules"}
    name = lora(account, keys, {"r": 16, "alpha": 32.0, "dropout": 0.05}, dora, False)
    stack.append(name)
    if account.read("use_rslora", flag, False):
        if dora:
            account.leave("use_rslora", "dora divides alpha by the rank; leave use_dora out to scale by its root")
        else:
            account.carry("use_rslora", "stack.lora.use_rslora", True)
    else:
        account.same("use_rslora", "off")
    account.explain("use_dora", f"stack: {name}")


def _data(account: Account) -> None:
    name = account.raw("dataset_name")
    if name is None:
        account.leave("dataset_name", "the file names no rows: set data.path=FILE")
    else:
        config = account.raw("dataset_config")
        account.carry("dataset_name", "data.path", f"{name}:{config}" if config else text(name))
        account.explain("dataset_config", "the configuration of the hub set stands behind its name, NAME:CONFIG")
    if (field := account.raw("dataset_text_field")) not in (None, "text"):
        account.carry("dataset_text_field", "data.columns", {"text": text(field)})


def _objective(account: Account, objective: str) -> str:
    if objective == "sft":
        only = [key for key in ("assistant_only_loss", "completion_only_loss") if account.read(key, flag, False)]
        if only:
            account.carry(only[0], "objective.mask", "assistant")
        else:
            note = "every token is trained there unless rows have a prompt and a completion: then objective.mask=completion"
            account.assume("assistant_only_loss", "objective.mask", "all", note)
        for key in ("assistant_only_loss", "completion_only_loss"):
            account.same(key, "see objective.mask")
        loss = account.read("loss_type", text, "nll")
        if loss in ("nll", "dft", "chunked_nll"):
            account.settings["objective.loss_type"] = "dft" if loss == "dft" else "nll"
            account.explain("loss_type", "logits are computed in chunks either way" if loss == "chunked_nll" else "")
        _packing(account)
    elif objective == "dpo":
        return _dpo(account)
    elif objective in ("kto", "grpo", "rloo"):
        beta = {"kto": 0.1, "grpo": 0.0, "rloo": 0.05}[objective]
        _or(account, "beta", "objective.beta", beta)
        _sampled(account, objective)
    if account.raw("loss_type") is not None and "loss_type" not in account.claimed:
        account.leave("loss_type", f"objective.loss_type of {objective}: `llmrecipe show {objective}` lists them")
    return objective


def _or(account: Account, key: str, path: str, default: float) -> None:
    if account.raw(key) is None:
        account.assume(key, path, default)
    else:
        account.carry(key, path, account.read(key, finite_number))


def _packing(account: Account) -> None:
    on = account.read("packing", flag, False)
    note = "batch.size counts rows, packed or not; there it counted packs: multiply it by the rows of a pack" if on else ""
    if account.raw("packing") is not None:
        account.carry("packing", "data.packing", "on" if on else "off", note)


def _dpo(account: Account) -> str:
    given = account.raw("loss_type")
    name = given[0] if isinstance(given, list) and len(given) == 1 else given
    _or(account, "beta", "objective.beta", 0.1)
    if name == "ipo":
        account.chosen("loss_type", "objective", "ipo", "log-ratios are means over an answer's tokens in both")
        return "ipo"
    if name is None or str(name) in DPO_LOSSES:
        if name is not None:
            account.carry("loss_type", "objective.loss_type", DPO_LOSSES[str(name)])
    else:
        account.leave("loss_type", "objective.loss_type: `llmrecipe show dpo` lists the losses; sigmoid is set")
    return "dpo"


def _sampled(account: Account, objective: str) -> None:
    if objective == "kto":
        return
    carry_sampling(account, "num_generations", 8 if objective == "grpo" else 2)
    loss = account.read("loss_type", text, "dapo")
    if objective == "grpo" and loss in ("dapo", "grpo", "dr_grpo"):
        if account.raw("loss_type") is None:
            account.assume("loss_type", "objective.loss_type", loss)
        else:
            account.carry("loss_type", "objective.loss_type", loss)
