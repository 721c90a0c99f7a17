"""Additive methods against the `adapters` library (adapter-hub): the same weights give its logits, loss and gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmrecipe.interop.adapter_hub.hub_adapters import LEAVES, homes
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.ia3 import Ia3
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.models.attention import install_attention
from tests.methods.additive.fixtures import adapter_hub as hub

FILES = Path(hub.__file__).parent


def wrapper_of(case: str) -> Wrapper:
    """Our name for a configuration of the library."""
    prefix = {"name": "w", "num_virtual_tokens": 4}
    return {
        "double_seq_bn": Adapter(name="w", r=8, activation="silu"),
        "seq_bn": Adapter(name="w", r=8, placement="pfeiffer"),
        # The library's branch reads the residual stream, also in front of a norm.
        "par_bn": ParallelAdapter(name="w", r=8, input="residual"),
        "prefix_flat": PrefixTuning(**prefix, reparam="flat"),
        "prefix_mlp": PrefixTuning(**prefix, reparam="mlp", hidden=6, width=32),
        "ia3_kv": Ia3(name="w", scaled=["key", "value"]),
    }[case]


def their_prefix(part: str) -> str:
    """A parameter of the table -> the end of the library's name."""
    return {
        "flat": "control_trans",
        "small": "wte.weight",
        "inner.weight": "control_trans.0.weight",
        "inner.bias": "control_trans.0.bias",
        "outer.weight": "control_trans.2.weight",
        "outer.bias": "control_trans.2.bias",
    }[part]


def their_name(name: str, case: str, family: str) -> str:
    """The library's name of one of our parameters."""
    if case.startswith("prefix"):
        host = "bert.encoder.layer.0.attention.self" if family == "bert" else "model.layers.0.self_attn"
        part = re.search(r"(flat|small|inner\.\w+|outer\.\w+)$", name)[1]
        return f"{host}.prefix_tuning.pool.prefix_tunings.a.self_prefix.{their_prefix(part)}"
    return f"{name.rsplit('.w.', 1)[0]}.loras.a.lora_B"


def built(case: str, family: str) -> tuple[nn.Module, dict[str, str]]:
    """Our model under the case's wrapper with the weights of the fixture, and our names -> theirs."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    make = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    model = make.from_config(AutoConfig.for_model(family, **hub.SHAPE, **hub.MORE[family]))
    hub.fill(model.named_parameters())
    install_attention(model, "sdpa")
    wrapper: Any = wrapper_of(case)
    Stack([wrapper]).attach(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    if case.endswith("_bn"):
        # The names an export writes.
        places = [(home, stem) for _, home, stem in homes(model, wrapper)]
        every = {f"{home}.{ours}": f"{stem}.adapters.a.{leaf}" for home, stem in places for leaf, ours in LEAVES.items()}
        return model.eval(), {n: every[n] for n in trained}
    return model.eval(), {n: their_name(n, case, family) for n in trained}


def case_of(case: str) -> Any:
    """A case with the method it belongs to."""
    names = {"double_seq_bn": "adapter", "seq_bn": "adapter", "par_bn": "parallel_adapter", "ia3_kv": "ia3"}
    return pytest.param(case, marks=pytest.mark.parity(names.get(case, "prefix_tuning"), "adapters library"))


@pytest.mark.parametrize("case", map(case_of, hub.CASES))
@pytest.mark.parametrize("family", hub.FAMILIES)
def test_logits_loss_and_gradients_equal_adapter_hub(family: str, case: str) -> None:
    wanted = {
        k.removeprefix(f"{case}/"): v
        for k, v in load_file(FILES / f"adapter_hub_{family}.safetensors").items()
        if k.startswith(f"{case}/")
    }
    model, names = built(case, family)
    own = dict(model.named_parameters())
    assert {f"grad/{n}" for n in names.values()} == {k for k in wanted if k.startswith("grad/")}
    with torch.no_grad():
        for name, theirs in names.items():
            shape = wanted[f"grad/{theirs}"].shape
            own[name].copy_(hub.weight_of(theirs, shape).view(own[name].shape))
    more: dict[str, Any] = {} if family == "bert" else {"use_cache": False}
    logits = model(input_ids=hub.IDS, **more).logits
    loss = hub.loss_of(logits)
    loss.backward()
    torch.testing.assert_close(logits, wanted["logits"], atol=1e-5, rtol=1e-5)
    assert float(loss.detach()) == pytest.approx(float(wanted["loss"]), abs=1e-5)
    for name, theirs in names.items():
        grad: Tensor = own[name].grad
        torch.testing.assert_close(grad.reshape(wanted[f"grad/{theirs}"].shape), wanted[f"grad/{theirs}"], atol=1e-5, rtol=1e-4)
        assert bool(grad.any())
