"""What `accelerate launch` puts into the environment is obeyed or refused by name."""

from __future__ import annotations

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.runtime.accelerate_environment import check_environment

PLAIN = {
    "ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_CPU_AFFINITY": "1",
}  # fmt: skip
"""What `accelerate launch` sets without any configuration."""
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_FORWARD_PREFETCH": "false", "FSDP_USE_ORIG_PARAMS": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_SYNC_MODULE_STATES": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false",
}  # fmt: skip
"""What it sets for FSDP 2, without loading on one process."""


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {}),
        ([], PLAIN),
        (["runtime.device=cpu"], {"ACCELERATE_USE_CPU": "True"}),
        (["model.dtype=bfloat16"], {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        (["runtime=zero3"], {**PLAIN, **FSDP}),
        (["runtime=zero2"], {**PLAIN, **FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}),
        (["runtime=zero3", "runtime.state_dict=sharded"], {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
        (["runtime=zero3", "model.gradient_checkpointing=true"], {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        (["runtime=zero3", "runtime.offload=cpu"], {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}),
        ([], {"FSDP_OFFLOAD_PARAMS": "true", "PARALLELISM_CONFIG_TP_SIZE": "2", "MEGATRON_LM_TP_DEGREE": "2"}),
        (
            ["runtime=hsdp", "runtime.processes=4"],
            {
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
                "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
                "PARALLELISM_CONFIG_TP_SIZE": "1",
            },
        ),
    ],
)
def test_what_agrees_with_the_recipe_is_obeyed(words: list[str], given: dict[str, str]) -> None:
    check_environment(compose("sft", words).recipe, {"PATH": "/bin", **given})


@pytest.mark.parametrize(
    ("words", "given", "named"),
    [
        ([], {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true: set runtime.shard"),
        (["runtime=zero2"], FSDP, "FSDP_RESHARD_AFTER_FORWARD=true: set runtime.shard=zero3"),
        (["runtime=zero3"], {**FSDP, "FSDP_VERSION": "1"}, "FSDP_VERSION=1"),
        (["runtime=zero3"], {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "set runtime.state_dict=sharded"),
        (["runtime=zero3", "runtime.state_dict=sharded"], FSDP, "set runtime.state_dict=full"),
        (["runtime=zero3"], {**FSDP, "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, "runtime.state_dict is full or sharded"),
        (["runtime=zero3"], {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true: set runtime.offload=cpu"),
        (["runtime=zero3", "runtime.offload=cpu"], FSDP, "FSDP_OFFLOAD_PARAMS=false: set runtime.offload=none"),
        (["runtime=zero3"], {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "FSDP_CPU_RAM_EFFICIENT_LOADING=true"),
        (["runtime=zero3"], {**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}, "FSDP_TRANSFORMER_CLS_TO_WRAP=Block"),
        (["runtime=zero3"], {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing=true"),
        (["runtime=zero3"], {"ACCELERATE_USE_FSDP": "false"}, "the recipe has runtime.shard=zero3"),
        ([], {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true"),
        (
            [],
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "ACCELERATE_DEEPSPEED_ZERO_STAGE=3",
        ),
        ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "set model.dtype=bfloat16"),
        (["model.dtype=bfloat16"], {"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8"),
        ([], {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "model.compile=blocks"),
        ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "batch.micro"),
        ([], {"ACCELERATE_USE_CPU": "true"}, "runtime.device=cpu"),
        ([], {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ([], {"ACCELERATE_OF_TOMORROW": "1"}, "ACCELERATE_OF_TOMORROW=1: nothing here reads it"),
        (
            ["runtime=zero3", "runtime.processes=4"],
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "PARALLELISM_CONFIG_TP_SIZE=2",
        ),
        (
            ["runtime=zero3", "runtime.processes=4"],
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
            "set runtime.dp_replicate=2",
        ),
    ],
)
def test_what_differs_is_refused_by_name(words: list[str], given: dict[str, str], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_environment(compose("sft", words).recipe, given)
    assert named in str(caught.value)
