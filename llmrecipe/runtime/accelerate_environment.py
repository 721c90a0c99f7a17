"""What `accelerate launch` and a configuration of accelerate put into the environment: obeyed, or refused by name.

The recipe says how a run is computed. Where the environment says the same, or says nothing that matters here, the run goes on;
where it says anything else, the run stops and names the variable and the key that says it here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.sharding_rules import GATHERED, shard_size

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe

YES, NO = {"1", "true", "yes", "on", "y", "t"}, {"", "0", "false", "no", "off", "n", "f", "none"}

HARMLESS = {
    "ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH", "ACCELERATE_DISABLE_RICH",
    "ACCELERATE_CPU_AFFINITY", "ACCELERATE_NUM_PROCESSES", "ACCELERATE_DEBUG_RDV_FILE", "ACCELERATE_CONFIG_DS_FIELDS",
    "FSDP_PYTORCH_VERSION", "FSDP_MODEL_NAME", "FSDP_MIN_NUM_PARAMS",
}  # fmt: skip
"""Variables that change nothing in what is computed: logging, pinning, names inside accelerate, and the size of
groups that are formed by size."""

OFF = {
    "ACCELERATE_USE_DEEPSPEED": "runtime.shard=zero1, zero2 or zero3 has DeepSpeed's stages in torch",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not used here",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker is not used here",
    "ACCELERATE_USE_TPU": "TPUs are not used here",
    "ACCELERATE_IN_TPU_POD": "TPUs are not used here",
    "ACCELERATE_DOWNCAST_BF16": "use model.dtype",
    "ACCELERATE_BYPASS_DEVICE_MAP": "the device is runtime.device",
    "ACCELERATE_ALLOW_CP_STANDALONE": "context parallelism is not used here",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "use model.compile",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "use model.compile",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "use model.compile",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "every process reads the weights; set fsdp_cpu_ram_efficient_loading to false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "use model.gradient_checkpointing=offload",
    "FSDP_FLOAT8_ALL_GATHER": "parameters travel in the dtype they are stored in",
    "FSDP_FORWARD_PREFETCH": "torch decides what is gathered ahead",
}  # fmt: skip
"""Switches that must be off -> what says it here."""

FIXED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ({"1"}, "batch.size and batch.micro give the micro-batches of a step"),
    "ACCELERATE_DYNAMO_MODE": ({"default"}, "use model.compile"),
    "FSDP_VERSION": ({"2"}, "set fsdp_version to 2"),
    "FSDP_AUTO_WRAP_POLICY": ({"transformer_based_wrap"}, "the blocks of the model are the groups"),
    "FSDP_USE_ORIG_PARAMS": (YES, "names of parameters stay as they are"),
    "FSDP_SYNC_MODULE_STATES": (YES, "every process starts from the same weights"),
    "FSDP_BACKWARD_PREFETCH": ({"backward_pre", "no_prefetch"}, "torch decides what is gathered ahead"),
    "FSDP_SHARDING_STRATEGY": ({"1", "full_shard"}, "runtime.shard and runtime.dp_replicate say what is divided"),
    "PARALLELISM_CONFIG_TP_SIZE": ({"1"}, "runtime.tp must be 1"),
    "PARALLELISM_CONFIG_CP_SIZE": ({"1"}, "runtime.cp must be 1"),
    "PARALLELISM_CONFIG_SP_SIZE": ({"1"}, "sequence parallelism is not used here"),
    "PARALLELISM_CONFIG_CP_BACKEND": ({"torch"}, "context parallelism is not used here"),
    "PARALLELISM_CONFIG_CP_COMM_STRATEGY": ({"allgather", "alltoall"}, "context parallelism is not used here"),
    "PARALLELISM_CONFIG_SP_BACKEND": ({"deepspeed"}, "sequence parallelism is not used here"),
}  # fmt: skip
"""Values that may be given -> what says it here."""

DETAILS = {
    "FSDP_": "ACCELERATE_USE_FSDP",
    "PARALLELISM_CONFIG_": "ACCELERATE_USE_PARALLELISM_CONFIG",
    "MEGATRON_LM_": "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_DEEPSPEED_": "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_GRADIENT_CLIPPING": "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_SAGEMAKER_": "ACCELERATE_USE_SAGEMAKER",
}
"""Beginnings of names -> the switch without which they say nothing."""
PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")


def check_environment(recipe: Recipe, environment: Mapping[str, str] | None = None) -> None:
    """Compare accelerate's variables with a recipe.

    Args:
        environment: default: that of this process.

    Raises:
        RecipeError: a variable says something else than the recipe, or nothing here reads it.
    """
    given = {k: v for k, v in (os.environ if environment is None else environment).items() if k.startswith(PREFIXES)}
    wrong = [f"  {name}={value}: {why}" for name, value in sorted(given.items()) if (why := _fault(name, value, recipe, given))]
    if wrong:
        raise RecipeError(
            "runtime: accelerate's configuration is in the environment and differs from the recipe, which says how a run is "
            "computed:\n" + "\n".join(wrong) + "\nChange or unset them; `llmrecipe launch` needs none of them."
        )


def _fault(name: str, value: str, recipe: Recipe, given: Mapping[str, str]) -> str | None:
    """Return why a variable is refused; None where the run does what it says."""
    text = value.strip().lower()
    owner = next((switch for prefix, switch in DETAILS.items() if name.startswith(prefix)), None)
    # Details of an engine that is switched off say nothing.
    if name in HARMLESS or (owner is not None and not _on(given, owner)):
        return None
    if name in OFF:
        return None if text in NO else OFF[name]
    if name in FIXED:
        allowed, why = FIXED[name]
        return None if text in allowed or text == "" else why
    if name in SETTINGS:
        return SETTINGS[name](text, recipe)
    return "nothing here reads it"


def _on(given: Mapping[str, str], name: str) -> bool:
    return given.get(name, "").strip().lower() not in NO


def _device(text: str, recipe: Recipe) -> str | None:
    return None if text in NO or recipe.runtime.device == "cpu" else "set runtime.device=cpu"


def _torch_device(text: str, recipe: Recipe) -> str | None:
    kind = text.partition(":")[0]
    return None if kind == recipe.runtime.device else f"set runtime.device={kind}"


def _precision(text: str, recipe: Recipe) -> str | None:
    wanted = {"bf16": "bfloat16", "fp16": "float16"}.get(text)
    if text in NO or wanted == recipe.model.dtype:
        return None
    return f"set model.dtype={wanted}; what trains stays float32" if wanted else "use model.dtype"


def _compile(text: str, recipe: Recipe) -> str | None:
    if text == "inductor" or text in NO:
        wanted = text == "inductor"
        return None if wanted == (recipe.model.compile == "blocks") else f"set model.compile={'blocks' if wanted else 'off'}"
    return "model.compile uses inductor"


def _checkpointing(text: str, recipe: Recipe) -> str | None:
    wanted = text in YES
    on = recipe.model.gradient_checkpointing is not False
    return None if wanted == on else f"set model.gradient_checkpointing={str(wanted).lower()}"


def _fsdp(text: str, recipe: Recipe) -> str | None:
    shard = recipe.runtime.shard
    if (text in YES) == (shard in GATHERED):
        return None
    return "set runtime.shard=zero3, or zero2" if text in YES else f"the recipe has runtime.shard={shard}"


def _reshard(text: str, recipe: Recipe) -> str | None:
    wanted = "zero3" if text in YES else "zero2"
    return None if recipe.runtime.shard == wanted and text in YES | NO else f"set runtime.shard={wanted}"


def _replicas(text: str, recipe: Recipe) -> str | None:
    return None if text == str(recipe.runtime.dp_replicate) else f"set runtime.dp_replicate={text}"


def _shards(text: str, recipe: Recipe) -> str | None:
    return None if text == str(shard_size(recipe.runtime)) else f"set runtime.dp_shard={text}"


def _offload(text: str, recipe: Recipe) -> str | None:
    wanted = "cpu" if text in YES else "none"
    return None if recipe.runtime.offload == wanted and text in YES | NO else f"set runtime.offload={wanted}"


def _state_dict(text: str, recipe: Recipe) -> str | None:
    kinds = {"full_state_dict": "full", "sharded_state_dict": "sharded"}
    if not text or kinds.get(text) == recipe.runtime.state_dict:
        return None
    return f"set runtime.state_dict={kinds[text]}" if text in kinds else "runtime.state_dict is full or sharded"


def _unset(text: str, recipe: Recipe) -> str | None:
    return None if not text else "the blocks of the model are the groups; leave it out"


SETTINGS: dict[str, "Callable[[str, Recipe], str | None]"] = {
    "ACCELERATE_USE_CPU": _device,
    "ACCELERATE_TORCH_DEVICE": _torch_device,
    "ACCELERATE_MIXED_PRECISION": _precision,
    "ACCELERATE_DYNAMO_BACKEND": _compile,
    "ACCELERATE_USE_FSDP": _fsdp,
    "ACCELERATE_USE_PARALLELISM_CONFIG": lambda text, recipe: None,
    "FSDP_RESHARD_AFTER_FORWARD": _reshard,
    "FSDP_OFFLOAD_PARAMS": _offload,
    "FSDP_ACTIVATION_CHECKPOINTING": _checkpointing,
    "FSDP_TRANSFORMER_CLS_TO_WRAP": _unset,
    "FSDP_IGNORED_MODULES": _unset,
    "FSDP_STATE_DICT_TYPE": _state_dict,
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": _replicas,
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": _shards,
}
"""Variable -> what compares it with the recipe."""
