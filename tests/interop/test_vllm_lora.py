"""Adapters for vLLM: what it would refuse is refused before it is written, by the rule; the command serves what was written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import run_command as command
from llmrecipe.core.errors import ModelError
from llmrecipe.interop import vllm_lora
from llmrecipe.interop.peft.layout import Adapter
from llmrecipe.interop.vllm_lora import check_rules, export_vllm_lora
from llmrecipe.methods.additive.ia3 import Ia3
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.checkpoint_path import TINY
from tests.interop.saved_runs import base_folder, saved_run


def test_one_rank_for_all_modules_and_the_command_that_serves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_folder(tmp_path)
    saved_run(tmp_path / "run", base, Lora(name="lora", r=4, rank_pattern={"layers.1.self_attn.q_proj": 20}))
    assert command(["export", str(tmp_path / "run"), "--to", "vllm-lora", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    folder = Path(facts["path"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (20, {}, {})
    words = shlex.split(next(n for n in facts["notes"] if n.startswith("vLLM: ")).removeprefix("vLLM: "))
    assert words == [
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"run={folder}",
        "--chat-template", str(folder / "chat_template.jinja"),
    ]  # fmt: skip


def test_the_base_inside_this_package_is_copied_to_where_a_server_finds_it(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora"))
    done = export_vllm_lora(tmp_path / "run", tmp_path / "out")
    words = shlex.split(next(n for n in done.notes if n.startswith("vLLM: ")))
    assert words[3] == str(tmp_path / "out" / "base")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (Path(words[3]) / name).read_bytes() == (TINY / name).read_bytes()
    done = export_vllm_lora(tmp_path / "run", tmp_path / "named", base="acme/tiny")
    assert "vllm serve acme/tiny" in done.notes[-1] and not (tmp_path / "named" / "base").exists()


@pytest.mark.parametrize(
    ("wrapper", "rule"),
    [
        (Dora(name="dora"), "it has no DoRA"),
        (Lora(name="lora", lora_bias=True), "an adapter has no biases"),
        (Lora(name="lora", target="embed"), "it reads lora_A and lora_B of linear layers"),
        (Ia3(name="ia3"), "it adds low-rank changes of weights alone"),
    ],
    ids=["dora", "biases", "embedding", "ia3"],
)
def test_what_vllm_refuses_is_refused_by_the_rule(tmp_path: Path, wrapper: Any, rule: str) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), wrapper)
    with pytest.raises(ModelError, match=rule) as refusal:
        export_vllm_lora(tmp_path / "run")
    assert "export --to merged" in str(refusal.value)
    assert not (tmp_path / "run" / vllm_lora.NAME).exists()


def test_a_run_without_an_adapter_is_refused_by_the_form_that_was_given(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path))
    with pytest.raises(ModelError, match=r"^export --to vllm-lora: every weight of this run was trained.*use --to merged$"):
        export_vllm_lora(tmp_path / "run")


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"r": 8, "modules_to_save": ["score"]}, "modules_to_save must be empty, and score"),
        ({"r": 513}, "the largest rank is 512"),
        ({"r": 8, "target_parameters": ["mlp.experts.down_proj"]}, "fused expert tensors"),
    ],
)
def test_rules_of_the_configuration(config: dict[str, Any], rule: str) -> None:
    with pytest.raises(ModelError, match=rule):
        check_rules(Adapter(config))


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), Lora(name="lora"), head="classification", labels=["a", "b"])
    with pytest.raises(ModelError, match="models that continue a text"):
        export_vllm_lora(tmp_path / "run")
