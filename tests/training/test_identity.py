"""A run knows what it is trained with: anything else stops a resume, by name; and no first step waits for a hash."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmrecipe.core import file_hashes
from llmrecipe.core.errors import RunError
from llmrecipe.core.file_hashes import FileHash, sha256_of
from llmrecipe.core.paths import ASSETS
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs import identity
from llmrecipe.runs.checkpoint_io import save_checkpoint
from llmrecipe.runs.events import read_events
from llmrecipe.runs.identity import base_hashes, changed, tokenizer_facts
from llmrecipe.training.run import Run
from tests.trainings import resume, stop_after, train_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of own data and an own base, stopped after step 1."""
    place = tmp_path_factory.mktemp("stopped")
    shutil.copytree(ASSETS / "tiny", place / "base")
    for split, count in (("train", 8), ("valid", 2), ("test", 2)):
        rows = [{"prompt": f"{split} {i}", "completion": f" is {i}"} for i in range(count)]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stop_after(1, place / "run", "sft_lora", *options(place), "eval.test=true")
    return place


def options(place: Path) -> list[str]:
    return [
        f"model.path={place}/base", f"data.path={place}/train.jsonl", f"data.validation={place}/valid.jsonl",
        f"data.test={place}/test.jsonl", "steps=2", "batch.size=2", "eval.at_start=false",
    ]  # fmt: skip


def moved(stopped: Path, place: Path) -> Path:
    """A copy of the run with its files, its recipe naming the copies."""
    shutil.copytree(stopped, place)
    recipe = place / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(stopped), str(place)))
    return place / "run"


def test_fingerprints_are_in_the_run_and_in_the_checkpoint(stopped: Path) -> None:
    found = json.loads((stopped / "run" / "identity.json").read_text())
    assert found == json.loads((stopped / "run" / "checkpoints" / "step-000001" / "identity.json").read_text())
    weights = hashlib.sha256((stopped / "base" / "model.safetensors").read_bytes()).hexdigest()
    config = hashlib.sha256((stopped / "base" / "config.json").read_bytes()).hexdigest()
    assert found["base"] == {"config.json": config, "model.safetensors": weights}
    assert len(found["run"]) == 32 and len(set(found["data"].values())) == 3 and None not in found["data"].values()
    assert found["tokenizer"] != found["template"]


def test_an_unchanged_run_goes_on_in_another_place(stopped: Path, tmp_path: Path) -> None:
    assert resume(moved(stopped, tmp_path / "else")).first_step == 1


def append(name: str) -> Callable[[Path], None]:
    """One more row in a file."""

    def change(place: Path) -> None:
        with open(place / name, "a") as file:
            file.write('{"prompt": "more", "completion": " rows"}\n')

    return change


def flip_weight(place: Path) -> None:
    """One bit of the last weight; size and names stay."""
    path = place / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_template(place: Path) -> None:
    path = place / "base" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def change_tokenizer(place: Path) -> None:
    path = place / "base" / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["merges"] = value["model"]["merges"][:-100]
    path.write_text(json.dumps(value))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "training data": (append("train.jsonl"), "the data of the train split has other content"),
    "validation data": (append("valid.jsonl"), "the data of the validation split has other content"),
    "test data": (append("test.jsonl"), "the data of the test split has other content"),
    "weights": (flip_weight, "the base model's model.safetensors has other content"),
    "template": (change_template, "the chat template is another one"),
    "tokenizer": (change_tokenizer, "the tokenizer is another one"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_with_anything_else_stops_and_names_it(name: str, stopped: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    run = moved(stopped, tmp_path / "else")
    before = (run / "events.jsonl").read_bytes()
    change(run.parent)
    with pytest.raises(RunError, match="is trained with has changed") as caught:
        resume(run)
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [message]
    assert (run / "events.jsonl").read_bytes() == before


def test_an_older_run_gets_them_with_one_warning(stopped: Path, tmp_path: Path) -> None:
    run = moved(stopped, tmp_path / "else")
    (run / "identity.json").unlink()
    at = run / "checkpoints" / "step-000001"
    sums = json.loads((at / "checksums.json").read_text())
    (at / "identity.json").unlink()
    del sums["files"]["identity.json"]
    (at / "checksums.json").write_text(json.dumps(sums))
    resume(run)
    said = [e["message"] for e in read_events(run, "warning") if "fingerprints" in e["message"]]
    assert said == ["this run kept no fingerprints of its data, base, tokenizer and template; it does from here on"]
    files = base_hashes(ModelSection(path=str(tmp_path / "else" / "base")))
    wanted = {name: found.sha256 for name, found in files.items()}
    assert json.loads((run / "identity.json").read_text())["base"] == wanted


def test_a_checkpoint_of_another_run_is_refused(stopped: Path, tmp_path: Path) -> None:
    run = moved(stopped, tmp_path / "else")
    stop_after(1, tmp_path / "other", "sft_lora", *options(tmp_path / "else"))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints")
    with pytest.raises(RunError, match=r"step-000001 is a checkpoint of another run than .*run; take it out of there"):
        resume(run)


def test_a_damaged_identity_is_made_whole_from_the_checkpoint(stopped: Path, tmp_path: Path) -> None:
    run = moved(stopped, tmp_path / "else")
    whole = (run / "identity.json").read_bytes()
    (run / "identity.json").write_bytes(whole[:40])
    resume(run)
    assert json.loads((run / "identity.json").read_text())["run"] == json.loads(whole)["run"]


def test_no_step_waits_for_a_hash_and_a_checkpoint_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, made = threading.Event(), []
    original, report = identity.file_hash, Run.report_step

    def slow(path: Path) -> FileHash:
        assert go.wait(30)
        return original(path)

    def step(self: Run, *arguments: Any) -> None:
        report(self, *arguments)
        made.append(self.progress.step)
        if self.progress.step == 2:
            go.set()

    monkeypatch.setattr(identity, "file_hash", slow)
    monkeypatch.setattr(Run, "report_step", step)
    train_recipe(tmp_path / "run", "sft_lora", "steps=3", "batch.size=2", "data.limit=4", "eval.at_start=false")
    assert made == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["base"]


def test_a_hash_is_computed_once_and_again_when_the_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "weights", []
    original = file_hashes.digest
    monkeypatch.setattr(file_hashes, "digest", lambda *a: (read.append(a), original(*a))[1])
    path.write_bytes(b"one")
    for _ in range(2):
        assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    state = os.stat(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert sha256_of(path) == hashlib.sha256(b"two").hexdigest() and len(read) == 2
    (tmp_path / "next").write_bytes(b"ten")
    os.utime(tmp_path / "next", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    os.replace(tmp_path / "next", path)  # the same size and time, another inode
    assert sha256_of(path) == hashlib.sha256(b"ten").hexdigest() and len(read) == 3


def test_the_hub_names_its_blobs_by_their_hash(tmp_path: Path) -> None:
    name = hashlib.sha256(b"what the hub says").hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"not read")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert sha256_of(tmp_path / "snapshots" / "model.safetensors") == name
    other = tmp_path / "snapshots" / "config.json"
    (tmp_path / "blobs" / ("f" * 40)).write_bytes(b"named by git")
    other.symlink_to(tmp_path / "blobs" / ("f" * 40))
    assert sha256_of(other) == hashlib.sha256(b"named by git").hexdigest()


def test_a_tokenizer_is_known_by_what_it_does(tmp_path: Path) -> None:
    first = tokenizer_facts(AutoTokenizer.from_pretrained(ASSETS / "tiny"))
    AutoTokenizer.from_pretrained(ASSETS / "tiny").save_pretrained(tmp_path)
    assert tokenizer_facts(AutoTokenizer.from_pretrained(tmp_path)) == first
    more = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    more.add_tokens(["<new>"])
    assert changed(first, tokenizer_facts(more)) == ["the tokenizer is another one"]


def test_a_parent_run_and_a_reward_model_are_part_of_what_a_run_is_trained_with(tmp_path: Path) -> None:
    train_recipe(tmp_path / "parent", "sft_lora", "steps=1", "batch.size=2", "data.limit=4", "eval.at_start=false")
    found = {name: file.sha256 for name, file in base_hashes(ModelSection(path=str(tmp_path / "parent"))).items()}
    assert set(found) == {"config.json", "model.safetensors", "run/stack.yaml", "run/delta.safetensors"}
    named = identity.named_files({"reward": {"model": {"path": str(tmp_path / "parent")}}, "text": "no such file", "n": 3})
    assert {name.split("/", 1)[1]: file.sha256 for name, file in named.items()} == found


def test_best_weights_of_another_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrecipe.training.run.evaluate", lambda evaluation, data: {"loss": float(evaluation.step)})
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Run, "finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt()))
        train_recipe(
            tmp_path / "run", "sft_lora", "steps=2", "batch.size=2", "data.limit=4", "eval.at_start=false", "eval.every=1"
        )
    gc.collect()
    save_checkpoint(tmp_path / "run" / "best", 1, {"delta": {}}, {"judge": {}, "identity": {"run": "0" * 32}})
    with pytest.raises(RunError, match=r"best/step-000001 is a checkpoint of another run"):
        resume(tmp_path / "run")
