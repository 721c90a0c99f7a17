"""Adapters of several runs on one base: switched, mixed in one batch, scored and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe import load
from llmrecipe.cli.app import run_command as command
from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation import open_several
from llmrecipe.evaluation.chat import Chat
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.ia3 import Ia3
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.additive.prompt_tuning import PromptTuning
from llmrecipe.methods.reparameterized.adalora import Adalora
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model
from tests.interop.saved_runs import base_folder, saved_run
from tests.trainings import train_recipe

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2], [8, 1, 44, 12, 30, 6, 11], [7, 7, 70, 4, 90, 33, 5]])
KINDS: dict[str, Any] = {
    "lora": lambda: Lora(name="lora", target="attn.q|v + mlp.up"),
    "dora": lambda: Dora(name="lora", target="attn.q + mlp.down"),
    "adalora": lambda: Adalora(name="adalora", target="attn.q|v"),
    "ia3": lambda: Ia3(name="ia3"),
    "adapter": lambda: Adapter(name="adapter"),
    "bitfit": lambda: Bitfit(name="bitfit", missing="add_zero"),
    "prefix": lambda: PrefixTuning(name="prefix"),
    "prompt": lambda: PromptTuning(name="prompt"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path)


def alone(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model, _ = load(path, device="cpu")
    return model(input_ids=ids, use_cache=False).logits


def test_every_kind_keeps_its_own_logits_beside_the_others(tmp_path: Path, base: Path) -> None:
    for seed, (name, wrapper) in enumerate(KINDS.items()):
        saved_run(tmp_path / name, base, wrapper(), seed=seed)
    model, _ = load([tmp_path / name for name in KINDS], device="cpu")
    wanted = {name: alone(tmp_path / name) for name in KINDS}
    names = list(KINDS)
    for name in [*names, *reversed(names)]:
        model.use(name)
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted[name], atol=1e-5, rtol=1e-5)
    rows = IDS[[0, 1, 2, 0, 1, 2, 0, 1]]
    mixed = model(input_ids=rows, adapters=names[::-1]).logits
    for row, (i, name) in enumerate(zip([0, 1, 2, 0, 1, 2, 0, 1], names[::-1], strict=True)):
        torch.testing.assert_close(mixed[row], wanted[name][i], atol=1e-5, rtol=1e-5)
    assert (mixed[0] - mixed[3]).abs().max() > 0.1


def test_ia3_runs_share_one_forward_pass_and_each_row_equals_its_run_alone(tmp_path: Path, base: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        saved_run(tmp_path / name, base, Ia3(name=f"scale{seed}"), seed=seed)
    saved_run(tmp_path / "many", base, Ia3(name="ia3", tasks=["sum", "translate"]), seed=7)
    model, _ = load([tmp_path / n for n in ("one", "many", "two")], device="cpu")
    assert list(model.choices) == ["one", "many/sum", "many/translate", "two"]
    assert not any(choice.off for choice in model.choices.values())
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    mixed = model(input_ids=IDS, adapters=["two", "one", "two"]).logits
    assert len(calls) == 1
    for row, name in enumerate(("two", "one", "two")):
        difference = (mixed[row] - alone(tmp_path / name)[row]).abs().max()
        assert difference <= 1e-6 * mixed[row].abs().max().clamp_min(1.0)
    assert (alone(tmp_path / "one") - alone(tmp_path / "two")).abs().max() > 0.1
    other = model(input_ids=IDS[:2], adapters=["many/translate", "many/sum"]).logits
    model.use("many/sum")
    torch.testing.assert_close(model(input_ids=IDS[1:2]).logits[0], other[1], atol=1e-5, rtol=1e-5)
    assert (model(input_ids=IDS[:1]).logits[0] - other[0]).abs().max() > 0.1


def test_generation_gives_each_prompt_its_own_adapter(tmp_path: Path, base: Path) -> None:
    for seed, (name, wrapper) in enumerate({"a": KINDS["lora"], "b": KINDS["ia3"], "c": KINDS["prefix"]}.items()):
        saved_run(tmp_path / name, base, wrapper(), seed=seed)
    model, tokenizer = load([tmp_path / n for n in "abc"], device="cpu")
    prompts, names, sampling = [[5, 9], [8, 1, 44, 12], [5, 9], [5, 9]], ["c", "a", "b", "a"], Sampling(6)
    got = model.generate(prompts, names, sampling)
    for prompt, name, answer in zip(prompts, names, got, strict=True):
        single, _ = load(tmp_path / name, device="cpu")
        assert generate(single, tokenizer, [prompt], sampling)[0] == answer
    assert len({tuple(a) for a in (got[0], got[2], got[3])}) == 3


def test_peft_folders_stand_beside_each_other(tmp_path: Path, base: Path) -> None:
    for seed, name in enumerate(("lora", "ia3")):
        saved_run(tmp_path / name, base, KINDS[name](), seed=seed)
    folders = [export_peft(tmp_path / name, tmp_path / f"{name}-peft").path for name in ("lora", "ia3")]
    model, _ = load(folders, device="cpu")
    mixed = model(input_ids=IDS[:2], adapters=["ia3-peft", "lora-peft"]).logits
    torch.testing.assert_close(mixed[0], alone(tmp_path / "ia3")[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], alone(tmp_path / "lora")[1], atol=1e-5, rtol=1e-5)


def test_what_cannot_stand_side_by_side_is_refused_with_the_reason(tmp_path: Path, base: Path) -> None:
    other = base_folder(tmp_path / "b", seed=5)
    saved_run(tmp_path / "one", base, Lora(name="lora"))
    saved_run(tmp_path / "far", other, Lora(name="lora"))
    saved_run(tmp_path / "norms", base, Adapter(name="adapter", train_norms=True))
    for paths, message in (
        (["one", "far"], "stands on another base than"),
        (["one", "norms"], "also trained .*norm.*cannot be switched"),
        (["one", "one"], "given twice"),
        (["one", str(base)], "is no finished run"),
    ):
        with pytest.raises(ModelError, match=message):
            load([tmp_path / p for p in paths], device="cpu")
    saved_run(tmp_path / "two", base, Lora(name="lora"), seed=4)
    model, _ = load([tmp_path / "one", tmp_path / "two"], device="cpu")
    with pytest.raises(ModelError, match=r"no adapter is called 'twoo'; did you mean 'two'\?"):
        model.use("twoo")
    with pytest.raises(ModelError, match="2 names for 3 rows"):
        model(input_ids=IDS, adapters=["one", "two"])


def test_the_base_is_checked_before_weights_are_read(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path / "one", base, Lora(name="lora"))
    saved_run(tmp_path / "far", base_folder(tmp_path / "b", seed=5), Lora(name="lora"))
    monkeypatch.setattr("llmrecipe.runs.open_model.load_model", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match="another base"):
        load([tmp_path / "one", tmp_path / "far"])


def test_another_dtype_than_the_one_trained_on_is_named(tmp_path: Path, base: Path) -> None:
    saved_run(tmp_path / "one", base, Lora(name="lora"))
    with pytest.raises(ModelError, match=r"model.dtype=bfloat16: .*one.* was trained on its base in dtype auto"):
        open_model(ModelSection(path=str(tmp_path / "one"), dtype="bfloat16"), TokenizerSection())


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("ia3", "ia3"), ("fishmask", "sft_lora")])
def test_the_verbs_score_and_ask_several_runs(
    tmp_path: Path, kinds: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [("yes", "a"), ("no", "b")] * 6
    rows = [{"prompt": f"w{i}?", "completion": word, "by": name} for i, (word, name) in enumerate(pairs)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name, kind, seed in zip("ab", kinds, (1, 2), strict=True):
        words = [f"data.path={tmp_path}/rows.jsonl", f"seed={seed}", "steps=2", "optim.lr=0.1", "batch.size=4"]
        train_recipe(tmp_path / name, kind, *words, "eval.at_start=false")
    paths = [str(tmp_path / name) for name in "ab"]
    capsys.readouterr()
    assert command(["eval", *paths, "--json", "data.validation=0.5", "eval.metrics=[token_f1]"]) == 0
    table = json.loads(capsys.readouterr().out)
    for row in table:
        expected = evaluate_path(row["run"], ["data.validation=0.5", "eval.metrics=[token_f1]"])
        assert row == {"run": row["run"], **{k: pytest.approx(v, rel=1e-5) for k, v in expected.items()}}
    assert table[0]["nll"] != table[1]["nll"]
    for name in "ab":
        own = [json.dumps(row) for row in rows if row["by"] == name]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(own))
    assert command(["eval", *paths, "--by", "by", "--json", f"data.validation={tmp_path}/rows.jsonl"]) == 0
    table = {row["adapter"]: row for row in json.loads(capsys.readouterr().out)}
    for name, path in zip("ab", paths, strict=True):
        expected = evaluate_path(path, [f"data.validation={tmp_path}/{name}.jsonl"])
        assert table[name]["rows"] == 6
        assert table[name]["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert command(["eval", paths[0], "--by", "by"]) == 2
    assert "name more than one" in capsys.readouterr().err
    assert command(["chat", *paths, "-p", "w1?", "-p", "w2?", "--max-new-tokens", "4", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert [(a["prompt"], a["adapter"]) for a in asked] == [(p, n) for p in ("w1?", "w2?") for n in "ab"]
    for answer in asked:
        chat = Chat.open([str(tmp_path / answer["adapter"])], [], Sampling(4))
        assert chat.answer(answer["prompt"], remember=False) == answer["answer"]
    assert command(["chat", *paths, "-p", "w1?", "--use", "c"]) == 2
    assert "(loaded: a, b)" in capsys.readouterr().err


def test_an_override_without_effect_names_what_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_several, "free", lambda path: ["stack.dylora.rank"] if path == "b" else [])
    shared = open_several.share(["a", "b"], ["data.limit=4", "stack.dylora.rank=2", "eval.batches=1"], open_several.SCORED)
    assert shared == {"a": ["data.limit=4", "eval.batches=1"], "b": ["data.limit=4", "stack.dylora.rank=2", "eval.batches=1"]}
    for word in ("stack.dylora.r=4", "optim.lr=1", "model.path=tiny", "~stack.lora"):
        with pytest.raises(UserError, match=rf"'{word}': has no effect .* \(what applies: data.*seed, stack.dylora.rank\)"):
            open_several.share(["a", "b"], [word], open_several.SCORED)
    with pytest.raises(UserError, match=r"'data.limit=4': has no effect .* \(what applies: runtime.*, stack.dylora.rank\)"):
        open_several.share(["a", "b"], ["data.limit=4"], open_several.REQUESTED)


@pytest.mark.slow
def test_overrides_go_to_the_runs_they_apply_to_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"w{i}?", "completion": "yes"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name, recipe in (("a", "sft_lora"), ("b", "dylora")):
        words = [f"data.path={tmp_path}/rows.jsonl", "steps=2", "optim.lr=0.05", "batch.size=4", "eval.at_start=false"]
        words.append("model.dtype=bfloat16")  # the base is opened as training had it
        train_recipe(tmp_path / name, recipe, *words, "stack.dylora.update=full" if name == "b" else "stack.lora.r=2")
    paths = [str(tmp_path / name) for name in "ab"]
    split = "data.validation=0.5"
    capsys.readouterr()
    scores = {}
    for word in ("stack.dylora.rank=1", "eval.batches=1"):
        assert command(["eval", *paths, "--json", split, word]) == 0
        scores[word] = {row["run"]: row["nll"] for row in json.loads(capsys.readouterr().out)}
        for path in paths:
            own = [split] if word.startswith("stack") and path == paths[0] else [split, word]
            assert scores[word][path] == pytest.approx(evaluate_path(path, own)["nll"], rel=1e-5), (word, path)
    whole = evaluate_path(paths[1], [split])["nll"]
    assert scores["stack.dylora.rank=1"][paths[1]] != pytest.approx(whole, rel=1e-4)
    chat = Chat.open(paths, ["runtime.device=cpu", "stack.dylora.rank=1"], Sampling(4))
    assert next(chat.loaded.model.parameters()).dtype == torch.bfloat16
    assert {w.rank for w in chat.loaded.mounted if hasattr(w, "rank")} == {1}
    for verb, word in (("eval", "stack.lora.r=4"), ("eval", "model.dtype=float32"), ("chat", split), ("chat", "~stack.lora")):
        assert command([verb, *paths, word, *(["-p", "w1?"] if verb == "chat" else [])]) == 2
        error = capsys.readouterr().err
        assert f"'{word}': has no effect on several runs side by side" in error and "stack.dylora.rank" in error, error
