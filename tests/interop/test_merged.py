"""Merged export: plain folders with the run's logits, proven before they are in place; what cannot be folded is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmrecipe import load
from llmrecipe.cli.app import run_command as command
from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, RunError
from llmrecipe.interop import merged, verify_logits
from llmrecipe.interop.golden import GOLDEN_FILE
from llmrecipe.interop.merged import export_merged
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models import stored_heads, task_heads
from llmrecipe.models.weight_headers import DTYPES, headers
from tests.contract import MIXTURES, OPTIONS
from tests.interop.saved_runs import base_folder, hooks, saved_run
from tests.methods.kinds import CHANGES
from tests.support import shared

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2]])


def reloaded(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


CASES = [
    ("llama", Lora(name="lora", target="all-linear"), {}),
    ("llama", Lora(name="lora", target="embed + head"), {"tie_word_embeddings": True}),
    ("gpt2", Bitfit(name="bitfit"), {}),
    ("gpt2", Lora(name="lora", target="attn.q|v"), {}),
    ("mixtral", Lora(name="lora", target="experts"), {}),
]


@pytest.mark.parametrize(("family", "wrapper", "more"), CASES)
def test_a_plain_transformers_load_gives_the_logits_of_the_run(
    tmp_path: Path, family: str, wrapper: object, more: dict
) -> None:
    model = saved_run(tmp_path / "run", base_folder(tmp_path, family, **more), wrapper)
    wanted = model(input_ids=IDS).logits
    done = export_merged(tmp_path / "run")
    got = reloaded(done.path)
    assert hooks(got) == 0
    assert got.config._attn_implementation == "sdpa"
    torch.testing.assert_close(got(input_ids=IDS).logits, wanted, atol=2e-5 * done.difference.scale, rtol=0)
    base = reloaded(tmp_path / f"base-{family}")(input_ids=IDS).logits
    assert (wanted - base).abs().max() > 0.05


def test_the_golden_answer_is_reproduced_from_the_folder_alone(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    saved_run(tmp_path / "run", "tiny", Lora(name="lora"))
    folder = export_merged(tmp_path / "run", tmp_path / "out").path
    golden = json.loads((folder / GOLDEN_FILE).read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": golden["prompt"]}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(ids) == golden["prompt_ids"]
    out = reloaded(folder).generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    assert out[0, len(ids) :].tolist() == golden["answer_ids"]


def test_a_quantized_base_is_dequantized_to_what_training_saw(tmp_path: Path) -> None:
    from llmrecipe.methods.memory.nf4 import Nf4

    model = saved_run(tmp_path / "run", base_folder(tmp_path), Nf4(name="nf4"), Lora(name="lora"))
    wanted = model(input_ids=IDS).logits
    done = export_merged(tmp_path / "run")
    assert "dequantized" in done.notes[0]
    got = reloaded(done.path)(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, atol=1e-4 * done.difference.scale, rtol=0)


def test_a_chain_of_runs_folds_every_stack(tmp_path: Path) -> None:
    saved_run(tmp_path / "first", base_folder(tmp_path), Lora(name="lora", target="attn.q"))
    model = saved_run(tmp_path / "second", tmp_path / "first", Lora(name="lora", target="attn.q|v"), seed=8)
    wanted = model(input_ids=IDS).logits
    done = export_merged(tmp_path / "second")
    torch.testing.assert_close(reloaded(done.path)(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    loaded, _ = load(tmp_path / "second", device="cpu")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, wanted)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_merge_that_moves_the_logits_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), Lora(name="lora"))
    monkeypatch.setattr(Lora, "merge", lambda self, model: _drop(model, self.name))
    with pytest.raises(ModelError, match="largest logit difference"):
        export_merged(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["final"]


def _drop(model: torch.nn.Module, owner: str) -> None:
    from llmrecipe.models.hooks.hook import all_hooks
    from llmrecipe.models.hooks.host import remove_hook

    for _, module, name, _ in list(all_hooks(model, owner)):
        remove_hook(module, name)


def test_what_cannot_be_folded_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), Lora(name="lora"))
    monkeypatch.setattr(Lora, "merges", lambda self: False)
    monkeypatch.setattr(merged, "write_model", lambda *_: pytest.fail("written"))
    with pytest.raises(ModelError, match="'lora' cannot be folded"):
        export_merged(tmp_path / "run")


def test_an_existing_folder_and_an_unfinished_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("x")
    with pytest.raises(RunError, match="exists already"):
        export_merged(tmp_path / "run", tmp_path / "out")
    with pytest.raises(RunError, match="not a run directory"):
        export_merged(tmp_path)


def test_lower_precision_is_reported_and_allowed_within_its_bound(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), Lora(name="lora"))
    done = export_merged(tmp_path / "run", dtype="bfloat16", bound=1.0)
    assert done.difference.largest > 1e-4
    with pytest.raises(ModelError, match="allowed is 1e-06"):
        export_merged(tmp_path / "run", tmp_path / "two", dtype="bfloat16", bound=1e-6)


def test_a_bfloat16_base_written_in_float32_keeps_the_whole_change(tmp_path: Path) -> None:
    """The change is added in float32 to the widened weights: adding it in bfloat16 first would round most of it away."""
    base = base_folder(tmp_path)
    plain = reloaded(base).to(torch.bfloat16)
    plain.save_pretrained(base)
    run = saved_run(tmp_path / "run", base, Lora(name="lora", target="attn.q"))
    host = run.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = (p.detach().double() for n, p in host.named_parameters() if n.rsplit(".", 1)[-1] in ("A", "B"))
    wanted = host.weight.detach().double() + 2.0 * b @ a
    done = export_merged(tmp_path / "run", dtype="float32")
    got = reloaded(done.path).get_submodule("model.layers.0.self_attn.q_proj").weight
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)
    assert (wanted.to(torch.bfloat16).double() - wanted).abs().max() > 1e-4, "the values would survive rounding"
    assert done.difference.largest <= 1e-5 * done.difference.scale


MERGEABLE = [k for k in CHANGES if registry.spec("stack", k).facts.get("mergeable")]
ADDED = {"bitfit": ".bias"}
"""Ending of what a method adds to the architecture itself, with its flag in the config."""


@pytest.mark.parametrize("kind", MERGEABLE)
def test_a_merged_folder_holds_the_tensors_of_the_base_and_no_others(tmp_path: Path, kind: str) -> None:
    base = base_folder(tmp_path, "olmoe" if kind in MIXTURES else "llama")
    options = {**OPTIONS.get(kind, {}), **({"l0_steps": 1} if kind == "diff_pruning" else {})}
    saved_run(tmp_path / "run", base, registry.load_class("stack", kind)(name="one", **options), steps=2)
    found, own = headers(export_merged(tmp_path / "run", bound=1.0).path), headers(base)
    assert {n: h.shape for n, h in found.items() if n in own} == {n: h.shape for n, h in own.items()}
    assert all(kind in ADDED and n.endswith(ADDED[kind]) for n in found.keys() - own.keys())


def test_scalar_heads_are_written_next_to_the_architecture(tmp_path: Path) -> None:
    from llmrecipe.models.load import load_model
    from llmrecipe.recipe.schema import ModelSection

    base = base_folder(tmp_path)
    saved_run(tmp_path / "run", base, Lora(name="lora"), prepare=lambda model: task_heads.add_head(model, "reward"))
    folder = export_merged(tmp_path / "run").path
    assert headers(folder).keys() == headers(base).keys()
    assert load_file(str(folder / stored_heads.FILE))["task_head.reward.weight"].any()
    assert load_model(ModelSection(path=str(folder))).config.model_type == "llama"


def written(folder: Path) -> set[str]:
    """The dtypes of a folder: of its tensors, and the one its config names."""
    kinds = {one.dtype for one in headers(folder).values()}
    return {DTYPES[kind] for kind in kinds} | {json.loads((folder / "config.json").read_text())["dtype"]}


@pytest.mark.parametrize("said", [True, False], ids=["config says it", "tensors alone say it"])
def test_auto_keeps_the_dtype_of_a_base_that_was_trained_in_another(tmp_path: Path, said: bool) -> None:
    base = base_folder(tmp_path)
    reloaded(base).to(torch.bfloat16).save_pretrained(base)
    if not said:
        config = json.loads((base / "config.json").read_text())
        del config["dtype"]
        (base / "config.json").write_text(json.dumps(config))
    model = saved_run(tmp_path / "run", base, Lora(name="lora", target="attn.q"))
    assert next(model.parameters()).dtype == torch.float32
    done = export_merged(tmp_path / "run")
    assert written(done.path) == {"bfloat16"}
    assert done.difference.bound == verify_logits.BOUNDS[torch.bfloat16]
    assert written(export_merged(tmp_path / "run", tmp_path / "wide", dtype="float32").path) == {"float32"}


def test_a_dtype_the_recipe_names_is_kept_whatever_the_base_is_stored_in(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    reloaded(base).to(torch.bfloat16).save_pretrained(base)
    saved_run(tmp_path / "run", base, Lora(name="lora", target="attn.q"), dtype="float32")
    assert written(export_merged(tmp_path / "run").path) == {"float32"}


def test_the_shared_case_of_a_bfloat16_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared("cases", "merged-dtype")
    words = f"""data.path={folder / "sft.jsonl"} model.path={folder / "m_llama"} batch.size=8 steps=2 epochs=null
        eval.at_start=false eval.test=false run.dir={tmp_path / "run"} log.live=off data.cache=false"""
    assert command(["train", "recipe=sft_lora", *words.split()]) == 0
    assert command(["export", str(tmp_path / "run"), "--to", "merged", "--out", str(tmp_path / "out")]) == 0
    assert written(tmp_path / "out") == written(folder / "m_llama") == {"bfloat16"}


def test_the_verb_proves_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), Lora(name="lora"))
    assert command(["export", str(tmp_path / "run"), "--to", "merged", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["largest"] <= facts["bound"] * facts["scale"]
    card = (Path(facts["path"]) / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card and "pipeline('text-generation', model='FOLDER')" in card
    assert command(["export", str(tmp_path / "run"), "--to", "merge"]) == 2
    assert "did you mean 'merged'" in capsys.readouterr().err
    assert command(["export", str(tmp_path / "run"), "--to", "peft", "--rank", "2"]) == 2
    assert "dylora" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "modifier"), [("awq", "AWQModifier()"), ("gptq", "GPTQModifier(targets=")])
def test_a_format_of_another_tool_is_refused_with_the_commands(
    name: str, modifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["export", "runs/mine", "--to", name]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "llmrecipe export runs/mine --to merged --out FOLDER" in message
    assert "pip install llmcompressor" in message and modifier in message
