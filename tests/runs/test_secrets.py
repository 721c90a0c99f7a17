"""Recipes are kept byte for byte; the values of environment variables they name are in no file and on no screen."""

from __future__ import annotations

import json
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import _save_traceback
from llmrecipe.cli.app import run_command as cli
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.http_client import Client, check_address
from llmrecipe.core.redact import HIDDEN, name_variable, name_variables, redact, redact_text
from llmrecipe.evaluation.eval_recipe import recipe_of
from llmrecipe.recipe.compose import compose, to_yaml
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.step_spec import compose_step
from llmrecipe.runs.run_dir import RunDir
from tests.servers import server

VARIABLE = "NAME_OF_THE_TEST"
SECRET = "plain-words-of-the-test"
ORDINARY = (
    "Never ask for the password: the customer types it.",
    "token: abc, api_key=zzz hub_token=1",
    "Read https://user:password@host/x first.",
    "A key looks like hf_abcdefghijklmnopqrst or sk-abcdefghijklmnopqrst, not <redacted>.",
)
TEXTS = {ORDINARY[0]: ORDINARY[0], " ".join(ORDINARY): " ".join(ORDINARY), r"Write \${oc.env:HOME}.": "Write ${oc.env:HOME}."}
"""As written on the command line -> as it is meant."""


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret in a variable whose name does not tell."""
    monkeypatch.setenv(VARIABLE, SECRET)


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_run_keeps_is_what_ran(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored as composed, and read back equal by the run itself, by resume, by eval, and as a recipe."""
    monkeypatch.setenv("A_TOKEN", "password")
    ran = compose("sft_lora", [as_word(("data", "system"), text), f"run.dir={tmp_path / 'run'}"])
    run = RunDir.create(ran)
    run.unlock()
    assert (run.path / "recipe.yaml").read_text(encoding="utf-8") == to_yaml(ran.mapping)
    assert run.recipe() == ran.mapping
    assert compose(run.path / "recipe.yaml").mapping == ran.mapping
    (run.path / "final").mkdir()
    (run.path / "final" / "stack.yaml").touch()
    assert recipe_of(str(run.path), []).recipe.data.system == ran.recipe.data.system
    assert ran.recipe.data.system == TEXTS[text]


@pytest.mark.parametrize("how", ["key: '${oc.env:%s}'", "key_env: %s"])
def test_a_variable_stays_a_name_wherever_a_recipe_goes(how: str, tmp_path: Path) -> None:
    """Composed, stored, and composed again from the run; a plain text that looks like one stays plain text."""
    path = tmp_path / "mine.yaml"
    reward = "{http: {url: 'http://localhost:1', " + how % VARIABLE + "}}"
    path.write_text(f"defaults: [/ppo, _self_]\nobjective: {{reward: {reward}}}\n")
    plain = as_word(("data", "system"), "say \\${oc.env:HOME}")
    ran = compose(path, [f"run.dir={tmp_path / 'run'}", plain])
    run = RunDir.create(ran)
    run.unlock()
    again = compose(run.path / "recipe.yaml")
    assert run.recipe() == ran.mapping == again.mapping
    given = again.mapping["objective"]["reward"]["http"]
    assert {k: v for k, v in given.items() if k.startswith("key")} in (
        {"key": f"${{oc.env:{VARIABLE}}}"},
        {"key_env": VARIABLE},
    )
    assert again.recipe.data.system == "say ${oc.env:HOME}"
    assert redact_text(f"it said {SECRET}") == "it said <redacted>"


def test_a_variable_is_named_where_a_secret_is_wanted_and_nowhere_else(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"oc\.env:HOME\} is not allowed"):
        compose("sft_lora", ["data.system=${oc.env:HOME}"])
    path = tmp_path / "mine.yaml"
    path.write_text("model: {path: '${oc.env:HOME}/x'}\n")
    with pytest.raises(RecipeError, match=r"oc\.env:HOME\} is not allowed"):
        compose(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"key": SECRET}, r"judge\.key: do not write a key into a recipe.*judge\.key_env=NAME"),
        ({"key": f"x${{oc.env:{VARIABLE}}}"}, "do not write a key into a recipe"),
        ({"url": f"http://me:{SECRET}@host/v1"}, r"judge\.url: do not write a user and password"),
        ({"key": "${oc.env:NOT_SET_HERE}"}, r"judge\.key: the environment variable NOT_SET_HERE is not set"),
        ({"key_env": "NOT_SET_HERE"}, r"judge\.key_env: the environment variable NOT_SET_HERE is not set"),
        ({"key": f"${{oc.env:{VARIABLE}}}", "key_env": VARIABLE}, "given twice"),
    ],
)
def test_a_secret_that_is_written_out_is_refused(options: dict[str, Any], expected: str) -> None:
    given = {"url": "http://host/v1", "key": None, "key_env": None, **options}
    with pytest.raises(RecipeError, match=expected) as caught:
        check_address(**given, where="judge")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("how", ['key: "${oc.env:%s}"', "key_env: %s"])
def test_a_secret_is_in_no_file_and_on_no_screen(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that answers with the key it was given, and ends the step by it."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"]}) + "\n")
    with server((403, lambda body: f"who are you, {SECRET}?".encode())) as (url, asked):
        judge = f"judge={{kind: http, url: '{url}', model: judge, {how % VARIABLE}}}"
        words = ["step", "label_ai", f"answers={pairs}", judge, "constitution=manners", "principles=[polite]"]
        words += [f"run.dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", ["llmrecipe", *words, SECRET])
        assert cli(words) == 2
    assert asked[0]["key"] == f"Bearer {SECRET}"
    out, err = capfd.readouterr()
    assert SECRET not in out + err and "<redacted>" in err
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"step.yaml", "command.txt", "status.json", "events.jsonl"} <= {file.name for file in files}
    assert all(SECRET not in file.read_text(encoding="utf-8") for file in files)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"
    assert "<redacted>" in (tmp_path / "out" / "command.txt").read_text()


def test_a_step_takes_up_its_folder_under_ordinary_words_and_named_variables(tmp_path: Path) -> None:
    from llmrecipe.pipelines.steps.run_step import taken

    judge = f'judge={{kind: http, url: "http://h/v1", model: "password: x", key: "${{oc.env:{VARIABLE}}}"}}'
    words = ["answers=rows.jsonl", judge, f"run.dir={tmp_path / 'out'}"]
    made = compose_step("label_ai", words)
    folder = RunDir(made.dir)
    folder.path.mkdir()
    folder.describe("step.yaml", to_yaml(made.mapping))
    folder.status("interrupted")
    assert taken(folder, compose_step("label_ai", words)) == "interrupted"


def test_the_file_of_a_bug_is_private_and_holds_no_secret() -> None:
    name_variables({"judge": {"key_env": VARIABLE}})
    path = _save_traceback(ValueError(f"no {SECRET}"), ["train", SECRET])
    assert path is not None
    text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode & 0o777
    path.unlink()
    assert SECRET not in text and text.count("<redacted>") == 2 and mode == 0o600


def test_only_values_of_named_variables_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_OTHER_KEY", "customer")
    monkeypatch.setenv("SHORT_ONE", "a")
    name_variables({"x": [{"key": f"${{oc.env:{VARIABLE}}}", "short_env": "SHORT_ONE"}]})
    text = "the customer's password: a token=abc hf_abcdefghijklmnopqrst https://u:p@h/"
    assert redact_text(text) == text
    assert redact({"api_key": "abc", "list": [SECRET, 5]}) == {"api_key": "abc", "list": ["<redacted>", 5]}


@pytest.mark.parametrize(
    "value", ['sk"a\\b-xyz', "sk'a\"b-xyz", "sk-tab\tbed-xyz", "sk-line-xyz\r\n", "sk-ö-xyz", "sk/a+b=%-xyz"]
)
def test_a_secret_is_found_however_a_message_escapes_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_SECRET", value)
    name_variable("ODD_SECRET")
    quoted = urllib.parse.quote(value, safe="")
    for text in (value, repr(value), repr(value.encode()), json.dumps(value), json.dumps({"k": value}), quoted, value.strip()):
        shown = redact_text(f"before {text} after")
        assert HIDDEN in shown and "xyz" not in shown and shown.startswith("before ") and shown.endswith(" after"), shown


@pytest.mark.parametrize("value", ["sk-line-xyz\r", "sk-line-xyz\n", " sk-xyz", "sk-\x07-xyz", "sk-ö-xyz"])
def test_a_key_that_no_header_carries_is_refused_without_being_shown(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_SECRET", value)
    with pytest.raises(RecipeError, match=r"judge.key_env: the environment variable ODD_SECRET holds a line end") as found:
        check_address("http://localhost:1/v1", None, "ODD_SECRET", "judge")
    with pytest.raises(RunError, match=r"judge: the environment variable ODD_SECRET holds a line end") as later:
        Client("http://localhost:1/v1", "judge", "reply", key_env="ODD_SECRET", retries=0).post({})
    assert "xyz" not in f"{found.value}{later.value}"
