"""`llmrecipe push`: what goes to the hub, how private it is, what its card says; against a stand-in of the hub's API."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llmrecipe.cli.app import run_command
from llmrecipe.core.errors import UserError
from llmrecipe.interop.export_card import name_base, write_card
from llmrecipe.interop.export_options import ExportOptions
from llmrecipe.interop.push_folder import prepare_upload
from llmrecipe.runs.model_card import CardFacts, base_licence, hub_id, model_card, place_name, read_card
from tests.support import ROOT

TOKEN = "hf_thetokenofthistest"
SCORES = {"steps": 6, "eval/loss": 0.25, "eval/accuracy": 0.75, "eval/accuracy/low": 0.5, "eval/accuracy/high": 1.0}
FACTS = CardFacts("zoo", "acme/base", "sft", [("lora", "lora")], 12, 340, ["acme/rows:en"], 90, SCORES)


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that a push uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, Any]] = {"acme/base": {"private": False, "cardData": {"license": "apache-2.0"}}}
        self.commits: list[dict[str, bytes]] = []
        self.tokens: set[str | None] = set()
        self.validated: list[str] = []
        self.refuse = False


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def _answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        name = self.path.partition("?")[0].removeprefix("/api/models/").partition("/revision/")[0]
        if name in self.server.repos:
            self._answer({"id": name, "tags": [], "siblings": [], "sha": "a" * 40, **self.server.repos[name]})
        else:
            self._answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            self.server.repos[name] = {"private": asked.get("private", asked.get("visibility") == "private")}
            self._answer({"url": f"{self.server.url}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            self.server.validated.append(content)
            self._answer({"errors": [], "warnings": []})
        elif self.server.refuse:
            self._answer({"error": "no right to write"}, 403)
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            self.server.commits.append(files)
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            oid = "b" * 40
            self._answer(
                {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", "hookOutput": ""}
            )


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PEFT folder as export writes it, in a run; its base is a folder of this machine."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "zoo"
    (run / "final").mkdir(parents=True)
    (run / "final" / "stack.yaml").write_text("{}")
    (run / "final" / "README.md").write_text(model_card(FACTS), encoding="utf-8")
    folder = run / "peft"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(tmp_path / "base"), "pad_token": "<pad>"}))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    options = ExportOptions("peft", add={})
    options.write(folder)
    write_card(folder, str(run), options)
    return folder


def push(hub: Hub, *words: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run the real command with the hub's address in the environment."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(Path.cwd() / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [sys.executable, "-m", "llmrecipe", "push", *words], env=env, capture_output=True, text=True, check=False
    )


def test_a_push_is_private_whole_and_has_no_place_of_this_machine(hub: Hub, adapter: Path) -> None:
    """The run names its one export; the base goes out by its hub id, its licence comes with it, the token is never shown."""
    done = push(hub, str(adapter.parent), "--repo", "ann/zoo", "--base", "acme/base")
    assert done.returncode == 0, done.stderr
    assert f"done: {hub.url}/ann/zoo (private, 4 files)" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.repos["ann/zoo"] == {"private": True} and f"Bearer {TOKEN}" in hub.tokens
    (files,) = hub.commits
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"]
    assert json.loads(files["adapter_config.json"]) == {"peft_type": "LORA", "base_model_name_or_path": "acme/base", "r": 8}
    assert json.loads(files["tokenizer_config.json"]) == {"pad_token": "<pad>"}
    card = ModelCard(files["README.md"].decode())
    data = card.data
    assert (data.base_model, data.license, data.library_name, data.datasets) == (
        "acme/base",
        "apache-2.0",
        "peft",
        ["acme/rows"],
    )
    assert data.base_model_relation == "adapter" and {"llmrecipe", "lora", "sft"} <= set(data.tags)
    scores = {r.metric_type: (r.metric_value, r.dataset_split, r.dataset_type) for r in data.eval_results}
    assert scores == {"loss": (0.25, "validation", "acme/rows"), "accuracy": (0.75, "validation", "acme/rows")}
    assert "PeftModel.from_pretrained(base, 'ann/zoo')" in card.text and "0.75 [0.5, 1]" in card.text
    assert str(Path.cwd()).encode() not in b"".join(files.values())


def test_a_public_repository_is_never_pushed_to_by_accident(hub: Hub, adapter: Path) -> None:
    hub.repos["ann/zoo"] = {"private": False}
    words = (str(adapter), "--repo", "ann/zoo", "--base", "acme/base")
    refused = push(hub, *words)
    assert refused.returncode == 2 and "exists and is public; add --public" in refused.stderr and hub.commits == []
    assert push(hub, *words, "--public", "--license", "mit").returncode == 0
    assert ModelCard(hub.commits[0]["README.md"].decode()).data.license == "mit"
    hub.refuse = True
    refused = push(hub, *words, "--public")
    assert refused.returncode == 2 and "the hub refused it" in refused.stderr and TOKEN not in refused.stderr
    unnamed = push(hub, *words, "--public", token=None)
    assert unnamed.returncode == 2 and "set HF_TOKEN" in unnamed.stderr


def test_a_hub_that_is_not_there_is_no_bug(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("llmrecipe.interop.push_folder.HfApi.model_info", gone)
    assert run_command(["push", str(adapter), "--repo", "ann/zoo", "--base", "acme/base"]) == 2
    assert "the hub cannot be reached (no route to host)" in capsys.readouterr().err


def test_a_dry_run_shows_what_would_go_and_reaches_nothing(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["push", str(adapter), "--repo", "ann/zoo", "--dry-run"]
    assert run_command([*words, "--base", "acme/base", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["private"] is True and facts["url"] is None and facts["files"]["adapter_model.safetensors"] == 64
    assert "base_model: acme/base" in facts["card"] and "export.json" not in facts["files"]
    assert run_command([*words, "--base", "acme/base"]) == 0
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown and "to ann/zoo (private)" in shown and "the card names no licence" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/zoo/peft", "--repo", "a b"], "--repo a b: a name on the hub is OWNER/NAME"),
        (["runs/zoo/peft", "--repo", "ann/zoo", "--base", "./base"], "--base ./base: a name on the hub"),
        (["runs", "--repo", "ann/zoo"], "neither a run nor a folder that `llmrecipe export` wrote"),
        (["nowhere", "--repo", "ann/zoo"], "there is no such folder"),
    ],
)
def test_mistakes_are_named_before_anything_goes(
    adapter: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["push", *words]) == 2 and said in capsys.readouterr().err


def test_a_base_that_only_this_machine_knows_has_to_be_named(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "README.md").write_text("# zoo\n")
    assert run_command(["push", str(adapter), "--repo", "ann/zoo", "--dry-run"]) == 2
    assert "--base OWNER/NAME" in capsys.readouterr().err


def test_a_path_in_a_card_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = adapter / "README.md"
    card.write_text(card.read_text().replace("# zoo", "# zoo\n\nFrom /home/ann/rows.jsonl."))
    assert run_command(["push", str(adapter), "--repo", "ann/zoo", "--dry-run", "--base", "acme/base"]) == 2
    assert "README.md names a place of this machine (/home/ann/rows.jsonl" in capsys.readouterr().err


def test_a_run_without_an_export_or_with_several_says_what_to_do(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = adapter.parent
    (run / "merged").mkdir()
    ExportOptions("merged").write(run / "merged")
    assert run_command(["push", str(run), "--repo", "ann/zoo"]) == 2
    assert "several exports; name one" in capsys.readouterr().err
    for folder in (adapter, run / "merged"):
        (folder / "export.json").unlink()
    assert run_command(["push", str(run), "--repo", "ann/zoo"]) == 2
    assert "llmrecipe export" in capsys.readouterr().err


def test_an_export_names_its_base_by_hub_id_or_says_that_it_cannot(adapter: Path) -> None:
    (note,) = name_base(adapter, None)
    assert "--base OWNER/NAME" in note
    assert name_base(adapter, "acme/base") == [] and name_base(adapter, None) == []
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/base"


def test_a_combination_has_no_scores_of_one_of_its_runs(adapter: Path) -> None:
    options = ExportOptions("peft", add={"/home/ann/other": 0.5})
    write_card(adapter, str(adapter.parent), options)
    card = ModelCard.load(adapter / "README.md")
    assert card.data.eval_results is None and "zoo x 1, other x 0.5" in card.text and "/home" not in card.content


def test_a_card_names_files_by_their_names_and_hub_sets_by_their_ids() -> None:
    facts = CardFacts("a", "/home/ann/base", "dpo", [], 1, 1, ["/home/ann/rows.jsonl", "builtin:sft"], 3, {"steps": 1})
    card = ModelCard(model_card(facts))
    assert card.data.base_model is None and card.data.datasets is None and "/home" not in card.content
    assert "Trained with llmrecipe from `base`" in card.text and "rows.jsonl, builtin:sft (3 rows)" in card.text
    assert hub_id("tiny") is None and place_name("acme/rows:en") == "acme/rows:en"


@pytest.mark.parametrize("front", ["[" * 5000, "mit\ndate: 2024-13-45", "*none"])
def test_front_matter_that_cannot_be_read_is_none(tmp_path: Path, front: str) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: {front}\n---\n\n# a\n")
    assert read_card(card) == ({}, "# a\n") and base_licence(str(tmp_path)) is None


NAMING: dict[str, tuple[str, str]] = {
    "train_args.yaml": ("out: /home/ann/runs/1", "/home/ann/runs/1"),
    "notes.txt": ("x" * (1 << 20) + " see /scratch/ann/rows.jsonl", "/scratch/ann/rows.jsonl"),
    "sub/config.json": (json.dumps({"a": [{"b": "/gpfs/ann/m.bin"}]}), "/gpfs/ann/m.bin"),
    "keys.json": (json.dumps({"/mnt/ann/x": 1}), "/mnt/ann/x"),
    "model.md": ("file:///home/ann/x, C:/Users/ann/y", "/home/ann/x"),
    "windows.json": (json.dumps({"a": r"C:\Users\ann\y"}), r"C:\Users\ann\y"),
    "prompt.jinja": ("{# HERE/tools.py #}", "HERE/tools.py"),
}
"""Name -> its content, and the place that it names; HERE is the folder of the test."""


@pytest.mark.parametrize("name", NAMING)
def test_a_file_that_names_a_place_of_this_machine_is_refused(name: str, adapter: Path) -> None:
    content, place = (text.replace("HERE", str(Path.cwd())) for text in NAMING[name])
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_text(content)
    with pytest.raises(UserError) as found:
        prepare_upload(adapter, "ann/zoo", True, "acme/base", None)
    assert f"{name} names a place of this machine ({place}" in str(found.value)


def test_words_of_a_language_are_no_places(adapter: Path) -> None:
    """Tokens, templates and web addresses that look like paths stay, and what libraries note is taken out at any depth."""
    word = "/home/ann/x"
    tokens = {"added_tokens_decoder": {"5": {"content": word}}, "chat_template": f"{{{{ '{word}' }}}}", "name_or_path": word}
    texts = {
        "tokenizer.json": json.dumps({"model": {"vocab": {word: 1}}}),
        "vocab.json": json.dumps({word: 1}),
        "merges.txt": f"/home /ann\n{word} y\n",
        "tokenizer_config.json": json.dumps(tokens),
        "chat_template.jinja": f"{{# {word} #}}System:\\nx",
        "notes.md": "https://example.org/data/rows, and/or/home/ann, ../data/rows, 3:\\n4",
        "config.json": json.dumps({"text_config": {"_name_or_path": word, "vocab_size": 5}}),
    }
    for name, text in texts.items():
        (adapter / name).write_text(text)
    files = prepare_upload(adapter, "ann/zoo", True, "acme/base", None).files
    assert texts.keys() <= files.keys()
    config, kept = files["config.json"], files["tokenizer_config.json"]
    assert isinstance(config, bytes) and json.loads(config) == {"text_config": {"vocab_size": 5}}
    assert isinstance(kept, bytes) and json.loads(kept) == {k: v for k, v in tokens.items() if k != "name_or_path"}


def test_a_link_out_of_the_folder_is_not_followed(adapter: Path) -> None:
    (adapter.parent / "secret.txt").write_text("s")
    (adapter / "notes.txt").symlink_to(adapter.parent / "secret.txt")
    with pytest.raises(UserError, match=r"notes.txt is a link to .*secret.txt, outside the folder"):
        prepare_upload(adapter, "ann/zoo", True, "acme/base", None)
