"""The command line: exit codes, messages, verbs that need no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import build_app, run_command
from llmrecipe.cli.arguments import sort_words
from llmrecipe.cli.completion import complete_word
from llmrecipe.core.errors import Interrupted, RecipeError
from llmrecipe.core.registry import PACKAGE


def test_a_typo_is_exit_code_two_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "recipe=dpo_lora", "stack.lora.rr=8"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Error: stack.lora.rr: lora has no option 'rr'; did you mean 'r'? [override stack.lora.rr=8]\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explain"], "no recipe given"),
        (["explain", "dpo_lora"], "did you mean 'llmrecipe explain recipe=dpo_lora'?"),
        (["train"], "no recipe given; write recipe=NAME (`llmrecipe list recipes` names all)"),
        (["train", "recip=dpo_lora", "seed=1"], "did you mean 'recipe=dpo_lora'?"),
        (["check", "recipe=dpo_loar"], "did you mean 'dpo_lora'? (`llmrecipe list recipes` names all)"),
        (["check", "mine.yaml"], "did you mean 'llmrecipe check recipe=mine.yaml'?"),
        (["check", "recipe=dpo_lora", "optim.lrr=1"], "did you mean 'lr'?"),
        (["train", "recipe=dpo_lora", "--typo"], "--typo"),
        (["train", "recipe=dpo_lora", "--steps", "10"], "words without dashes: steps=VALUE"),
        (["train", "recipe=dpo_lora", "--learning_rate", "1e-4"], "words without dashes: optim.lr=VALUE"),
        (["train", "recipe=dpo_lora", "--optim.lr=1"], "words without dashes: optim.lr=VALUE"),
        (["train", "recipe=dpo_lora", "--recipe", "sft"], "words without dashes: recipe=VALUE"),
        (["train", "recipe=dpo_lora", "--lora_r=8"], "words without dashes: stack.lora.r=VALUE"),
        (["train", "recipe=dpo_lora", "--warmup"], "words without dashes: schedule.warmup=VALUE"),
        (["train", "recipe=dpo_lora", "--bf16"], "No such option: --bf16\nKeys of a recipe"),
        (["train", "recipe=dpo_lora", "--steps"], "No such option: --steps\nKeys of a recipe"),
        (["train", "recipe=dpo_lora", "learning_rate=1e-4"], "did you mean 'optim.lr'?"),
        (["train", "recipe=dpo_lora", "batch_size=4"], "did you mean 'batch.size'?"),
        (["train", "recipe=dpo_lora", "optim.name=adamw"], "which optim it is comes before its options: optim=NAME"),
        (["train", "recipe=dpo_lora", "run.dir="], "run.dir: must be text of length at least 1"),
        (["train", "recipe=dpo_lora", "data.path="], "data.path: must be text of length at least 1"),
        (["train", "recipe=dpo_lora", "model.path="], "model.path: must be text of length at least 1"),
        (["train", "recipe=dpo_lora", "steps=1e30"], "got 1e+30 ["),
        (["trian", "recipe=dpo_lora"], "did you mean 'train'?"),
        (["explain", "recipe=sft", "recipe=dpo"], "given twice"),
        (["explain", "recipe="], "needs a name"),
        (["list", "stak"], "did you mean 'stack'?"),
        (["show", "lroa"], "did you mean 'lora'?"),
        (["new", "x", "--stack", "lroa"], "did you mean 'lora'?"),
    ],
)
def test_input_mistakes_are_exit_code_two(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("defaults: [/sft]\n", encoding="utf-8")
    assert run_command(arguments) == 2
    err = capsys.readouterr().err
    assert expected.lower() in err.lower() and "Traceback" not in err


def test_what_other_trainers_call_an_option_is_a_key_of_a_recipe() -> None:
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.key_hints import OTHER_TRAINERS
    from llmrecipe.recipe.provenance import leaves

    known = {".".join(map(str, path)) for path, _ in leaves(compose("sft_lora", []).mapping)}
    assert set(OTHER_TRAINERS.values()) <= known


def fake_train(monkeypatch: pytest.MonkeyPatch, outcome: BaseException | None = None) -> list[Any]:
    """Put a stand-in where the `train` verb finds its work."""
    calls: list[Any] = []

    def train(*given: Any) -> Any:
        calls.append(given)
        if outcome is not None:
            raise outcome
        return types.SimpleNamespace(runtime=types.SimpleNamespace(is_main=False))

    module = types.ModuleType("llmrecipe.training.train")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmrecipe.training.train", module)
    return calls


def test_train_hands_over_its_words_unmangled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_train(monkeypatch)
    source = tmp_path / "a b=c.jsonl"
    source.write_text('{"prompt": "p", "completion": "c"}\n' * 3, encoding="utf-8")
    words = [f'data.path="{source}"', "~stack.lora", '+stack.top={kind: lora, target: "attn.q"}', 'run.name="it\'s"']
    assert run_command(["train", words[0], "recipe=sft_lora", *words[1:]]) == 0
    ((composition, resume),) = calls
    assert (composition.overrides, composition.path.stem, resume) == (words, "sft_lora", None)
    assert composition.recipe.data.path == str(source) and composition.recipe.run.name == "it's"
    assert list(composition.recipe.stack) == ["top"]


def test_resume_takes_the_runs_own_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_train(monkeypatch)
    (tmp_path / "recipe.yaml").write_text("defaults: [/sft_lora, _self_]\nseed: 7\n", encoding="utf-8")
    (tmp_path / "status.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    assert run_command(["train", f"resume={tmp_path}"]) == 0
    ((composition, resume),) = calls
    assert composition.recipe.seed == 7 and resume == str(tmp_path)


def test_a_bug_is_exit_code_one_with_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fake_train(monkeypatch, ZeroDivisionError("our fault"))
    assert run_command(["train", "recipe=sft"]) == 1
    err = capsys.readouterr().err
    assert "bug" in err and "our fault" in err and "Traceback" not in err
    (saved,) = tmp_path.glob("llmrecipe-bug-*.txt")
    assert str(saved) in err
    assert "Traceback" in saved.read_text() and "ZeroDivisionError: our fault" in saved.read_text()


@pytest.mark.parametrize("outcome", [Interrupted("checkpoint written"), KeyboardInterrupt()])
def test_an_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, outcome: BaseException) -> None:
    fake_train(monkeypatch, outcome)
    assert run_command(["train", "recipe=sft"]) == 130


def test_explain_as_json_is_the_whole_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "recipe=sft_lora", "stack.lora.r=3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    values = {row["key"]: row for row in facts["values"]}
    assert values["stack.lora.r"]["value"] == 3
    assert values["stack.lora.r"]["override"] == "stack.lora.r=3"
    assert values["objective.kind"]["file"].endswith("sft.yaml") and values["objective.kind"]["line"] > 0
    assert all(row["source"] in ("file", "override", "default") for row in facts["values"])


def test_explain_prints_dropped_values_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "recipe=sft_lora", "stack=[]"]) == 0
    out, err = capsys.readouterr()
    assert "note: dropped stack.lora" in err and "note:" not in out


def test_list_shows_every_registered_name(capsys: pytest.CaptureFixture[str]) -> None:
    from llmrecipe.core import registry

    assert run_command(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    listed = {(row["group"], row["name"]) for row in rows}
    assert {(g, n) for g in registry.groups() for n in registry.names(g)} <= listed
    assert ("recipes", "dpo_lora") in listed and ("model", "smollm2") in listed
    assert all(row["summary"] for row in rows), "every name has a summary"


def test_show_a_method_tells_its_options_papers_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["show", "lora", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    options = {option["name"]: option for option in card["options"]}
    assert options["r"]["default"] == 8 and options["r"]["allowed"] == "integer > 0, <= 65536" and options["r"]["description"]
    assert "2106.09685" in card["papers"]
    assert {"sft_lora", "dpo_lora", "qlora"} <= set(card["recipes"])
    assert run_command(["show", "lora"]) == 0
    text = capsys.readouterr().out
    assert "B (r, out)" in text or "B" in text
    assert "https://arxiv.org/abs/2106.09685" in text


@pytest.mark.parametrize("name", ["dpo_lora", "data", "stack", "adamw", "smollm2", "optim.pretraining"])
def test_show_knows_recipes_sections_presets_and_components(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["show", name]) == 0
    assert capsys.readouterr().out.strip()


def test_new_writes_a_recipe_that_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["new", "mine", "--objective", "dpo", "--stack", "nf4,lora"]) == 0
    assert run_command(["explain", "recipe=mine", "--json"]) == 0
    out = capsys.readouterr().out
    values = {row["key"]: row["value"] for row in json.loads(out[out.index("{") :])["values"]}
    assert values["objective.kind"] == "dpo" and values["stack.nf4.kind"] == "nf4"
    assert run_command(["new", "mine"]) == 2
    assert run_command(["new", "other", "--extends", "nowhere"]) == 2
    assert not (tmp_path / "recipes" / "other.yaml").exists()


def test_schema_describes_every_key_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    from llmrecipe.core import registry
    from llmrecipe.recipe.schema import Recipe

    assert run_command(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {*Recipe.model_fields, "defaults"}
    assert schema["additionalProperties"] is False and schema["required"] == []
    assert "continue" in schema["$defs"]["ModelSection"]["properties"]
    entries = schema["then"]["properties"]["stack"]
    assert set(entries["properties"]) == set(entries["additionalProperties"]["properties"]["kind"]["enum"])
    assert set(entries["properties"]) == set(registry.names("stack"))
    lora = schema["$defs"]["stack.lora"]
    assert lora["additionalProperties"] is False
    assert lora["properties"]["r"]["anyOf"][0]["exclusiveMinimum"] == 0 and lora["properties"]["r"]["description"]


def test_completion_offers_recipes_groups_and_keys() -> None:
    assert "recipe=dpo_lora" in complete_word("recipe=dpo")
    assert complete_word("optim=ada") == ["optim=adafactor", "optim=adamw", "optim=adamw_8bit"]
    assert "data.max_length=" in complete_word("data.max")
    # Alone it would be followed by a space.
    assert complete_word("data.packi") == ["data.packing=", "data.packing=auto"] or len(complete_word("data.packi")) > 1


def test_words_are_sorted() -> None:
    request = sort_words(["a.b=1", "recipe=x=y", "recipe.z=1"])
    assert (request.recipe, request.overrides) == ("x=y", ["a.b=1", "recipe.z=1"])
    with pytest.raises(RecipeError):
        sort_words(["resume=a", "resume=b"])


def test_every_verb_has_help_and_short_help_works(capsys: pytest.CaptureFixture[str]) -> None:
    app = build_app()
    names = [command.name for command in app.registered_commands]
    assert {"train", "check", "explain", "list", "show", "schema", "new", "doctor"} <= set(names)
    assert all(command.callback is not None and command.callback.__doc__ for command in app.registered_commands)
    assert run_command(["train", "-h"]) == 0
    assert "stack=[nf4,lora]" in " ".join(capsys.readouterr().out.split())


MISTAKES = [
    (["train", "recipe=dpo_lora", "optim.lrr=1"], "did you mean 'lr'?"),
    (["train", "recipe=dpo_lora", "runtime.device=cuda", "model.dtype=bfloat16", "optim.lrr=1"], "did you mean 'lr'?"),
    (["train", "recipe=dpo_lroa"], "did you mean 'dpo_lora'?"),
    (["train", "recipe=dpo_lora", "optim.lr=fast"], "must be a number"),
    (["train", "recipe=dpo_lora", "stack=[lroa]"], "did you mean 'lora'?"),
    (["train", "recipe=dpo_lora", "data.path=gone.jsonl"], "no such file"),
    (["train", "recipe=dpo_lora", "data.path=builtin:sft"], "no preference row"),
    (["train", "recipe=dpo_lora", "data.path=broken.jsonl"], "broken.jsonl:1"),
    (["train", "recipe=dpo_lora", "model.path=./gone"], "there is no folder ./gone"),
    (["train", "recipe=dpo_lora", "model.path=tinny"], "did you mean 'tiny'?"),
    (["train", "recipe=dpo_lora", "tokenizer.path=./gone"], "tokenizer.path"),
    (["train", "resume=runs/gone"], "not a run directory"),
    (["train", "recipe=rlhf", "stages.sft.recipe=sft_lroa"], "did you mean 'sft_lora'?"),
    (["launch", "recipe=dpo_lora", "stack.lora.rr=3"], "did you mean 'r'?"),
    (["launch", "recipe=dpo_lora", "data.path=gone.jsonl"], "no such file"),
    (["check", "recipe=dpo_lora", "model.pth=tiny"], "did you mean 'path'?"),
    (["check", "recipe=dpo_lora", "data.path=gone.jsonl"], "no such file"),
    (["data", "recipe=dpo_lora", "data.columns.prompt=gone"], "gone"),
    (["eval", "./gone"], "there is no folder ./gone"),
    (["eval", "tiny", "data.pth=x"], "did you mean 'path'?"),
    (["eval", "tiny", "--split", "tets"], "did you mean 'test'?"),
    (["chat", "./gone", "-p", "hello"], "there is no folder ./gone"),
    (["chat", "tiny", "-p", "hello", "sed=1"], "did you mean 'seed'?"),
    (["export", "runs/gone", "--to", "peft"], "not a run directory"),
    (["export", "runs/gone", "--to", "pefd"], "did you mean 'peft'?"),
]


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen": \n', encoding="utf-8")
    code = (
        "import contextlib, io, sys\nfrom llmrecipe.cli.app import run_command\n"
        f"for arguments, expected in {MISTAKES!r}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as told:\n"
        "        code = run_command(arguments)\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'bitsandbytes'} & set(sys.modules)\n"
        "    assert not heavy, (arguments, heavy)\n"
        "    assert code == 2 and expected in told.getvalue(), (arguments, code, told.getvalue())\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmrecipe", "explain", "recipe=nope"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == "" and "there is no recipe" in done.stderr and "Traceback" not in done.stderr


def test_one_process_of_a_run_tells_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_command(["explain", "recipe=sft_lora", "stack.lora.rr=2"]) == 2
        told.append("did you mean 'r'" in capsys.readouterr().err)
    assert told == [True, False]
