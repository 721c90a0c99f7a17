"""Files of LLaMA-Factory: one flat mapping of model, data, finetuning and trainer arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.foreign import read_json
from llmrecipe.interop.migrate import trainer
from llmrecipe.interop.migrate.account import Account, Only, Rule, Same, To
from llmrecipe.interop.migrate.counterparts import EVERY_LINEAR, lora, stand_in_reward
from llmrecipe.interop.migrate.trainer import rows_of
from llmrecipe.interop.migrate.values import finite_number, flag, text, whole_number, words

STAGES = {"sft": "sft", "pt": "clm", "dpo": "dpo", "kto": "kto", "rm": "reward", "ppo": "ppo"}
PREFERENCES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
"""Loss of preferences -> objective."""
LOW_RANK = "no optimizer here projects gradients; lora, or smt and freeze, save the memory of gradients and states"
PICTURES = Only(
    "pictures: the objectives that read them are caption, vqa and image_classification (`llmrecipe list objective`)"
)
SERVE = Only("this is about using a model: llmrecipe chat RUN, generate, export or the docs page on serving")
EXPORT = Only("export the finished run: llmrecipe export RUN --to merged")
RULES: dict[str, Rule] = trainer.RULES | {
    "model_name_or_path": To("model.path", text),
    "model_revision": To("model.revision", text),
    "adapter_name_or_path": Only("mount it: model.adapters={FOLDER: 1.0}", ()),
    "adapter_folder": Only("mount it: model.adapters={FOLDER: 1.0}", ()),
    "cutoff_len": To("data.max_length", whole_number, 2048),
    "max_samples": To("data.limit", whole_number, note="drawn with the seed; there the first rows of each set"),
    "val_size": To("data.validation", finite_number, note="drawn by a hash of the row: other rows than there"),
    "streaming": To("data.streaming", flag),
    "default_system": To("data.system", text),
    "neat_packing": Same("packed rows never see each other here"),
    "train_on_prompt": Same("see objective.mask"),
    "mask_history": Same("see objective.mask"),
    "flash_attn": Same("the same attention, by the fastest backend there is; model.attention names one"),
    "enable_liger_kernel": Same("logits come in chunks, of targets alone; model.kernels=liger takes other kernels"),
    "use_unsloth": Same("kernels of another library; the same numbers"),
    "use_unsloth_gc": Same("see model.gradient_checkpointing"),
    "use_reentrant_gc": Same("activations are always recomputed the non-reentrant way"),
    "quantization_method": Only("quantizations here are nf4 and int8 of bitsandbytes", ("bnb", "bitsandbytes")),
    "quantization_device_map": Only(trainer.MANY, ()),
    "pure_bf16": Only("trained tensors stay float32; model.dtype=bfloat16 is the computation's"),
    "upcast_layernorm": Only("model.dtype=float32 computes everything in 32 bits", (False,)),
    "upcast_lmhead_output": Same("logits are float32 in every loss"),
    "resize_vocab": Same("rows are added where tokenizer.add_tokens names tokens"),
    "add_tokens": To("tokenizer.add_tokens", words),
    "add_special_tokens": To("tokenizer.add_tokens", words),
    "rope_scaling": Only("set model.config={rope_scaling: {...}} as the model's own configuration writes it", ()),
    "train_from_scratch": Only("set model.init=random", (False,)),
    "use_dft_loss": Same("see objective.loss_type"),
    "loraplus_lr_ratio": To("stack.lora.lr_ratio", finite_number),
    "loraplus_lr_embedding": Same("embeddings have no branch in a LoRA of linear layers"),
    "pissa_convert": Same("the export to PEFT converts it"),
    "create_new_adapter": Same("a recipe always trains a new adapter above what it loads"),
    "additional_target": Only("adapters train alone; new token rows: tokenizer.add_tokens", ()),
    "module_dropout": Only("there is no OFT here; lora with stack.lora.dropout is near", ()),
    "ref_model": To("objective.reference", text, objectives=("dpo", "ipo", "kto")),
    "ref_model_adapters": Only("name a finished run in objective.reference", ()),
    "reward_model": Only("name it as the reward: objective.reward={model: {path: RUN}}", ()),
    "pref_bco_weight": Only("there is no BCO term here", (0.0, 0)),
    "ld_alpha": Only("no length desensitization here; objective.length_norm=true divides by the length", ()),
    "kto_chosen_weight": To("objective.desirable_weight", finite_number, objectives=("kto",)),
    "kto_rejected_weight": To("objective.undesirable_weight", finite_number, objectives=("kto",)),
    "simpo_gamma": To("objective.gamma", finite_number, 0.5, objectives=("simpo",)),
    "dpo_label_smoothing": To("objective.label_smoothing", finite_number, objectives=("dpo",)),
    "pref_ftx": To("objective.nll_coef", finite_number, note="a mean over tokens here, over pairs there", objectives=("dpo",)),
    "early_stopping_steps": To("eval.patience", whole_number),
    "compute_accuracy": Same("accuracy of the next token is always measured"),
    "disable_shuffling": Only("rows are shuffled in every epoch", (False,)),
    "plot_loss": Same("llmrecipe report RUN"),
    "mix_strategy": Only("weights of the sources: data.path={PATH: WEIGHT}", ("concat",)),
    "interleave_probs": Only("weights of the sources: data.path={PATH: WEIGHT}", ()),
    "overwrite_cache": Same("the cache of tokens is keyed by content"),
    "tokenized_path": Same("the cache of tokens is keyed by content"),
    "preprocessing_num_workers": To("data.workers", whole_number),
    "eval_on_each_dataset": Only("one validation set a run", (False,)),
    "tool_format": Only("tools are rendered by the chat template", ()),
    "enable_thinking": Only("thoughts are rendered as the chat template does", (True,)),
    "preserve_thinking": Only("thoughts are rendered as the chat template does", (False,)),
    "media_dir": PICTURES,
    "use_swanlab": Only("trackers here are wandb, mlflow, tensorboard, trackio: log.trackers"),
    "use_muon": Same("see optim"),
    "use_asft_loss": Only("no ASFT loss; objective.loss_type=dft is the part without its KL term"),
    "use_eaft_loss": Only("no EAFT loss; objective.loss_type is nll or dft"),
    "use_llama_pro": Only("no block expansion here; stack=freeze trains some blocks"),
    "mixture_of_depths": Only("no mixture of depths here", ()),
    "shift_attn": Only("no shifted attention here", (False,)),
    "moe_aux_loss_coef": Only("the balance loss of a mixture of experts is not added"),
    "use_fast_tokenizer": Same("tokenizers are the fast ones"),
    "split_special_tokens": Only("special tokens are read as such only where the template puts them", (False,)),
    "low_cpu_mem_usage": Same("weights are read one at a time"),
    "cache_dir": Only("set HF_HOME in the environment", ()),
    "freeze_vision_tower": PICTURES, "freeze_multi_modal_projector": PICTURES, "freeze_language_model": PICTURES,
    **rows_of("image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_fps", PICTURES),
    **rows_of("video_min_pixels video_maxlen use_audio_in_video audio_sampling_rate", PICTURES),
    **rows_of("infer_backend infer_dtype vllm_config vllm_maxlen vllm_gpu_util vllm_enforce_eager max_new_tokens", SERVE),
    **rows_of("use_kv_cache temperature top_p top_k do_sample sample_backend eval_num_beams sglang_maxlen", SERVE),
    **rows_of("export_dir export_size export_device export_quantization_bit export_quantization_dataset", EXPORT),
    **rows_of("export_legacy_format export_hub_model_id export_quantization_nsamples", EXPORT),
    **rows_of("use_galore galore_target galore_rank galore_update_interval galore_scale galore_layerwise", Only(LOW_RANK)),
    **rows_of("use_apollo apollo_target apollo_rank apollo_scale apollo_scale_type apollo_layerwise", Only(LOW_RANK)),
    **rows_of("apollo_update_interval apollo_proj galore_proj_type use_adam_mini", Only(LOW_RANK)),
    **rows_of("use_badam badam_mode badam_switch_mode badam_switch_interval badam_update_ratio badam_verbose",
              Only("blocks that take turns: stack=freeze with stack.freeze.mode=dynamic")),
    **rows_of("oft_rank oft_block_size oft_target", Only("there is no OFT here; lora is set")),
    **rows_of("ray_num_workers ray_run_name use_kt kt_weight_path kt_cpu_activation use_mca use_hyper_parallel",
              Only(trainer.MANY)),
    **rows_of("hf_hub_token ms_hub_token om_hub_token swanlab_api_key",
              Only("a secret belongs to the environment: HF_TOKEN", ())),
    **rows_of("ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards",
              Only("options of PPO have other meanings: `llmrecipe show ppo`", ())),
    **rows_of("fp8 fp8_backend fp8_enable_fsdp_float8_all_gather use_v1_kernels", Only("no 8-bit matrix products here")),
    **rows_of("buffer_size preprocessing_batch_size ignore_pad_token_for_loss data_shared_file_system print_param_status",
              Same("changes nothing that is learned")),
    **rows_of("double_quantization quantization_type pissa_iter", Same("used with the key it belongs to")),
}  # fmt: skip
"""Keys that need no other key to be understood."""


def read_llama_factory(account: Account, command: str | None) -> str:
    """Enter every key of a file; return the objective."""
    objective = _objective(account)
    stack = _quantized(account)
    account.choices["stack"] = stack
    kind = account.read("finetuning_type", text, "lora")
    if kind == "full":
        account.explain("finetuning_type", "no method in the stack: every weight trains")
        for key in [key for key in account.given if key.startswith("lora_")]:
            account.same(key, "unused there: finetuning_type is full")
    elif kind == "lora":
        _lora(account, stack)
    else:
        account.leave(
            "finetuning_type", f"{kind} has no exact counterpart; lora is set (`llmrecipe list method`, stack=freeze)"
        )
        stack.append("lora")
        account.settings["stack.lora.target"] = EVERY_LINEAR
        for key in [key for key in account.given if key.startswith("freeze_trainable")]:
            account.leave(key, "name the blocks at rest: stack=freeze stack.freeze.layers=0:8")
    trainer.read_trainer(account, 5e-5, None, False)
    if account.read("use_muon", flag, False):
        account.chosen("use_muon", "optim", "muon")
    off = account.read("disable_gradient_checkpointing", flag, False)
    account.assume("disable_gradient_checkpointing", "model.gradient_checkpointing", not off)
    account.same("disable_gradient_checkpointing", "see model.gradient_checkpointing")
    _template(account)
    _data(account)
    if objective == "sft":
        _sft(account)
    if account.raw("packing") is not None:
        on = account.read("packing", flag)
        note = "batch.size counts rows, packed or not; there it counted packs: multiply it by the rows of a pack" if on else ""
        account.carry("packing", "data.packing", "on" if on else "off", note)
    account.apply(RULES, objective)
    return objective


def _objective(account: Account) -> str:
    stage = account.read("stage", text, "sft")
    if stage not in STAGES:
        raise RecipeError(f"{account.source.where('stage')}: stage: {stage!r:.60} (known: {', '.join(STAGES)})")
    objective = STAGES[stage]
    if objective != "dpo":
        account.chosen("stage", "objective", objective)
    else:
        loss = account.read("pref_loss", text, "sigmoid")
        objective = PREFERENCES.get(loss, "dpo")
        account.chosen("stage", "objective", objective)
        if loss not in PREFERENCES:
            account.leave("pref_loss", "objective.loss_type: `llmrecipe show dpo` lists the losses; sigmoid is set")
        elif loss == "hinge":
            account.carry("pref_loss", "objective.loss_type", "hinge")
        else:
            account.explain("pref_loss", f"the objective {objective}")
        if objective == "orpo":
            note = "the mean over all tokens of a step here, of each pair's mean there"
            account.assume("pref_loss", "objective.nll_on", "completion", note)
    if objective in ("dpo", "ipo", "orpo", "simpo", "kto"):
        path = "objective.odds_weight" if objective == "orpo" else "objective.beta"
        if account.raw("pref_beta") is None:
            account.assume("pref_beta", path, 0.1)
        else:
            account.carry("pref_beta", path, account.read("pref_beta", finite_number))
    elif account.raw("pref_beta") is not None:
        account.same("pref_beta", f"unused there: stage is {stage}")
    if objective in ("ppo", "grpo"):
        stand_in_reward(account, "reward_model")
    account.choices["objective"] = objective
    return objective


def _quantized(account: Account) -> list[str]:
    bits = account.read("quantization_bit", whole_number)
    if bits == 4:
        account.settings["stack.nf4.double"] = account.read("double_quantization", flag, True)
        account.settings["stack.nf4.type"] = account.read("quantization_type", text, "nf4")
        account.explain("quantization_bit", "stack: nf4 stands under the adapter")
        return ["nf4"]
    if bits == 8:
        account.explain("quantization_bit", "stack: int8 stands under the adapter")
        return ["int8"]
    if bits is not None:
        account.leave("quantization_bit", "quantizations here have 4 bits (nf4) or 8 (int8)")
    return []


def _lora(account: Account, stack: list[str]) -> None:
    dora = account.read("use_dora", flag, False)
    keys = {"r": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "target": "lora_target"}
    rank = account.read("lora_rank", whole_number, 8)
    name = lora(account, keys, {"r": 8, "alpha": 2.0 * rank}, dora, account.raw("lora_target") in (None, "all"))
    stack.append(name)
    account.explain("finetuning_type", f"stack: {name}")
    account.explain("use_dora", f"stack: {name}")
    for key, option in (("use_rslora", "use_rslora"), ("pissa_init", "init")):
        if not account.read(key, flag, False):
            account.same(key, "off")
        elif dora:
            account.leave(key, f"dora has no option {option}")
        elif key == "use_rslora":
            account.carry(key, "stack.lora.use_rslora", True)
        else:
            turns = account.read("pissa_iter", whole_number, 16)
            account.carry(key, "stack.lora.init", f"pissa_niter_{turns}" if turns > 0 else "pissa")


def _template(account: Account) -> None:
    name = account.raw("template")
    if name is None:
        return
    if name in ("alpaca", "chatml"):
        account.carry("template", "tokenizer.chat_template", name, "compare its text once: llmrecipe data recipe=...")
    else:
        note = "the template of the model's own tokenizer; compare it once: llmrecipe data recipe=..."
        account.carry("template", "tokenizer.chat_template", "own", note)


def _sft(account: Account) -> None:
    mask = (
        "all" if account.read("train_on_prompt", flag, False) else "last" if account.read("mask_history", flag, False) else None
    )
    if mask is not None:
        account.carry("train_on_prompt" if mask == "all" else "mask_history", "objective.mask", mask)
    if account.read("use_dft_loss", flag, False):
        account.carry("use_dft_loss", "objective.loss_type", "dft")


def _data(account: Account) -> None:
    names = account.read("dataset", words, [])
    folder = Path(account.read("dataset_dir", text, "data"))
    file = next((one for one in (account.source.path.parent / folder, folder) if (one / "dataset_info.json").is_file()), None)
    known: dict[str, Any] = read_json(file / "dataset_info.json", error=RecipeError) if file is not None else {}
    lost = [name for name in names if not isinstance(known.get(name), dict)]
    if not names:
        account.leave("dataset", "the file names no rows: set data.path=FILE")
    elif file is None or lost:
        where = f"{file}/dataset_info.json has no {', '.join(lost)}" if file else f"no dataset_info.json in {folder}"
        account.leave("dataset", f"{where}; set data.path to the files of {', '.join(names)!r:.200}")
    else:
        places = [_place(known[name], file) for name in names]
        account.carry("dataset", "data.path", places[0] if len(places) == 1 else places, "as its dataset_info.json says")
        _columns(account, [known[name] for name in names], names)
    account.explain("dataset_dir", "read for the places of the data sets")
    if account.raw("eval_dataset") is not None:
        account.leave("eval_dataset", "set data.validation to the file of its rows")


def _place(described: dict[str, Any], folder: Path) -> str:
    if isinstance(hub := described.get("hf_hub_url"), str):
        return f"{hub}:{described['subset']}" if described.get("subset") else hub
    return str(folder / str(described.get("file_name", "")))


def _columns(account: Account, described: list[dict[str, Any]], names: list[str]) -> None:
    """Set the columns of the data sets, where they agree."""
    found = [one.get("columns") or {} for one in described]
    rename = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations", "kto_tag": "label"}
    alpaca = {"prompt": "instruction", "query": "input", "response": "output"}
    columns = {rename.get(key, key): value for key, value in found[0].items() if isinstance(value, str)}
    columns = {key: value for key, value in columns.items() if key != value and key not in ("history",)}
    if any(one != found[0] for one in found[1:]):
        account.leave(
            "dataset", f"the sets {', '.join(names)} name their columns differently: set data.columns, or join the files"
        )
    elif columns and set(found[0]) - set(alpaca) <= {"chosen", "rejected", "messages", "kto_tag", "system"}:
        account.settings["data.columns"] = columns
    for key in ("split", "num_samples", "tags", "folder", "script_url", "ms_hub_url"):
        if any(one.get(key) not in (None, "train") for one in described):
            account.leave("dataset", f"{key} of dataset_info.json: `llmrecipe data` shows how the rows are read")
