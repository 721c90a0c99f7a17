"""Methods that change attention are refused where attention would never call them, before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmrecipe.cli import app
from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import load
from llmrecipe.models.attention import install_attention
from llmrecipe.models.hooks.hook import all_hooks, hook_kind
from llmrecipe.models.module_map import anatomy
from llmrecipe.runs import open_model
from llmrecipe.training.dry_run import check
from tests.models.configs import FAMILIES, GROUPED, tiny

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
UNROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("GPTJAttention", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8}),
    "falcon_h1": (
        "FalconH1Attention",
        GROUPED | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
    "qwen3_next": ("Qwen3NextAttention", GROUPED | LINEAR | EXPERTS | {"num_hidden_layers": 4}),
    "qwen3_5_text": ("Qwen3_5Attention", GROUPED | LINEAR | {"num_hidden_layers": 4}),
    "gpt_neo": ("GPTNeoSelfAttention", {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
                | {"attention_types": [[["global", "local"], 1]]}),
    "minimax": ("MiniMaxLightningAttention", GROUPED | {"num_local_experts": 4, "head_dim": 8}),
}  # fmt: skip
"""Family -> the class of attention that never asks, and a small shape. In minimax every other layer does ask."""
WRAPPERS: dict[str, dict[str, Any]] = {
    "prefix_tuning": {},
    "p_tuning_v2": {},
    "apt": {},
    "coda": {"causal": "prompt_only"},
    "parallel_adapter": {"form": "multihead", "sites": ["attn"]},
}
"""Methods, and options under which they change attention."""


def words(family: str, kind: str) -> list[str]:
    """Overrides of a recipe: a random model of the family under one wrapper."""
    shape = {k: v for k, v in UNROUTED[family][1].items() if k not in ("vocab_size", "max_position_embeddings")}
    shape |= {"vocab_size": 1024} | ({"max_position_embeddings": 512} if "n_positions" not in shape else {})
    config = [f"model.config.{k}={str(v).replace(' ', '')}" for k, v in {"model_type": family, **shape}.items()]
    options = [f"stack.{kind}.{k}={str(v).replace(' ', '')}".replace("'", "") for k, v in WRAPPERS[kind].items()]
    return [f"stack=[{kind}]", "model.init=random", *config, *options, "data.limit=8", "data.cache=false"]


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("family", UNROUTED)
def test_attention_that_never_asks_takes_no_wrapper(family: str, kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{"vocab_size": 64, **UNROUTED[family][1]}))
    if load.routes_attention(type(model), "sdpa"):
        install_attention(model, "sdpa")
    # Beside attention a branch needs a sublayer in every block, which a linear layer of a hybrid does not have.
    with pytest.raises(ModelError, match=rf"stack\.{kind}: .*({UNROUTED[family][0]}|begins and ends)"):
        Stack([registry.load_class("stack", kind)(name=kind, **WRAPPERS[kind])]).attach(model)


@pytest.mark.parametrize(("family", "kind"), zip(UNROUTED, [*WRAPPERS, "prefix_tuning"], strict=True))
def test_check_refuses_it(family: str, kind: str) -> None:
    with pytest.raises(ModelError, match=rf"stack\.{kind}: .*{UNROUTED[family][0]}.* lora"):
        check("sft_lora", words(family, kind))


@pytest.mark.parametrize("family", ["qwen3_next", "minimax"])
def test_train_refuses_it_before_weights_and_leaves_no_folder(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reads(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(open_model, "load_model", reads)
    code = app.run_command(["train", "recipe=sft_lora", *words(family, "apt"), f"run.dir={tmp_path / 'run'}"])
    assert code == 2 and UNROUTED[family][0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_methods_on_linear_layers_are_welcome_there() -> None:
    for family in ("gptj", "qwen3_next"):
        trained = check("sft_lora", [*words(family, "prefix_tuning"), "stack=[lora]", "stack.lora.target=attn.q|v"]).trained
        assert trained > 0


def test_flash_attention_is_told_from_sdpa() -> None:
    """Its kernels take no columns in front, so the loader does not route it."""
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match=r"stack\.p: .*model\.attention=sdpa"):
        Stack([registry.load_class("stack", "p_tuning_v2")(name="p")]).attach(model)


def test_a_part_that_is_routed_takes_it() -> None:
    """Linear attention is named by no target here: only the layers named take the prefix."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("minimax", **{"vocab_size": 64, **UNROUTED["minimax"][1]})
        )
    install_attention(model, "sdpa")
    Stack([registry.load_class("stack", "p_tuning_v2")(name="p", target="layers.0.attn")]).attach(model)
    assert [path for path, _, _, hook in all_hooks(model) if hook_kind(hook) == "attention"] == ["model.layers.0.self_attn"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_of_the_families_table_asks(family: str) -> None:
    """The structural reading agrees with a pass: each attention module calls the function that is installed."""
    model = tiny(family)
    install_attention(model, "sdpa")
    Stack([registry.load_class("stack", "p_tuning_v2")(name="p", num_virtual_tokens=2, target="attn")]).attach(model)
    called: list[str] = []
    for path, _, _, hook in all_hooks(model):
        if hook_kind(hook) == "attention":

            def note(attend: Any, q: Any, k: Any, v: Any, path: str = path) -> Any:
                called.append(path)
                return attend(q, k, v)

            object.__setattr__(hook, "attention", note)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    assert called == [site.path for site in anatomy(model).at("attn")]
