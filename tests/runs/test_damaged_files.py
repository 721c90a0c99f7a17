"""Whatever lies in a folder of a model, an adapter or a run, opening it ends in one message about that file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.core.file_hashes import digest
from llmrecipe.core.foreign import reading
from llmrecipe.interop.adapter_hub.hub_adapters import read_hub_adapter
from llmrecipe.interop.peft.layout import read_adapter_folder
from llmrecipe.interop.verify_logits import adapter_head
from llmrecipe.models.checkpoint_path import TINY, adapter_base, check_folder
from llmrecipe.models.folder_pooling import folder_pooling
from llmrecipe.pipelines.search import costs
from llmrecipe.pipelines.search.trial_journal import TrialJournal
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs import checkpoint_io
from llmrecipe.runs.base_files import weight_files
from llmrecipe.runs.delta import mount_layer, read_stack
from llmrecipe.runs.open_model import resolve_section
from llmrecipe.runs.run_dir import RunDir, read_metrics
from llmrecipe.runs.run_record import read_task_scores
from tests.tiny import tiny_model

WHOLE = b'{"base_model_name_or_path": "tiny", "status": "done", "x": [1, 2, 3]}'
DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "cut": WHOLE[:30],
    "binary": bytes(range(256)),
    "list": b"[1, 2]",
    "null": b"null",
    "text": b'"hello"',
    "number": b"7",
    "deep": b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "utf-16": WHOLE.decode().encode("utf-16"),
    "lone surrogate": b'{"status": "\\ud800", "base": "\\ud800"}',
}


def load_tokenizer(folder: Path) -> Any:
    from llmrecipe.models import load

    return load.load_tokenizer(ModelSection(path=str(folder)), TokenizerSection())


def load_config(folder: Path) -> Any:
    from llmrecipe.models import resolve_class

    return resolve_class.load_config(ModelSection(path=str(folder)))


def read_report(folder: Path) -> Any:
    from llmrecipe.runs.report.page import run_page

    return run_page(folder)


def compose_run(folder: Path) -> Any:
    from llmrecipe.interop.run_plugins import open_plugins_of

    return open_plugins_of(str(folder))


def saved_checkpoint(folder: Path) -> Any:
    """Of a checkpoint whose checksums are those of the damaged file."""
    place = folder / "step-000001"
    files = {path.name: {"sha256": digest(path), "bytes": path.stat().st_size} for path in place.iterdir()}
    (place / "checksums.json").write_text(json.dumps({"step": 1, "files": files}))
    return checkpoint_io.read_checkpoint(place)


def trials(folder: Path) -> Any:
    path = folder / "trials.jsonl"
    journal = object.__new__(TrialJournal)
    journal.path, journal.composition = path, SimpleNamespace(mapping={})
    journal._head = lambda: {"search": {}}  # type: ignore[method-assign]
    path.write_bytes(json.dumps({"search": {}}).encode() + b"\n" + path.read_bytes().replace(b"\n", b" ") + b"\n")
    return journal.read()


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "status": ("status.json", lambda folder: RunDir(folder).read_status()),
    "metrics": ("final/metrics.json", read_metrics),
    "adapter": ("adapter_config.json", lambda folder: adapter_base(str(folder))),
    "config": ("config.json", check_folder),
    "config read": ("config.json", load_config),
    "weights": ("model.safetensors", check_folder),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "tokenizer config": ("tokenizer_config.json", load_tokenizer),
    "stack": ("stack.yaml", read_stack),
    "report of a run": ("report.json", read_report),
    "plugins of a run": ("recipe.yaml", compose_run),
    "index": ("model.safetensors.index.json", lambda folder: weight_files(folder)),
    "index checked": ("model.safetensors.index.json", check_folder),
    "pooling": ("modules.json", folder_pooling),
    "adapter of peft": ("adapter_config.json", read_adapter_folder),
    "tensors of peft": ("adapter_model.safetensors", read_adapter_folder),
    "adapter of the hub": ("adapter_config.json", lambda folder: read_hub_adapter(folder, torch.nn.Linear(1, 1))),
    "head of an adapter": ("adapter_config.json", adapter_head),
    "tasks": ("tasks.json", read_task_scores),
    "trained parameters": ("report.json", costs._left),
    "checkpoint": ("step-000001/judge.json", saved_checkpoint),
    "checkpoint's tensors": ("step-000001/delta.safetensors", saved_checkpoint),
    "trials": ("trials.jsonl", trials),
}
BESIDE = {
    "report of a run": {"recipe.yaml": "steps: 1", "status.json": '{"status": "done"}'},
    "plugins of a run": {"stack.yaml": ""},
}
"""Reader -> the other files that it wants in the folder."""
MAPPINGS = ("metrics", "config", "report of a run", "plugins of a run", "head of an adapter", "checkpoint")
"""A mapping is all that these want, or any JSON at all."""
HARMLESS = {(reader, "lone surrogate") for reader in MAPPINGS} | {
    *(("checkpoint", damage) for damage in ("list", "null", "text", "number")),
    *(("plugins of a run", damage) for damage in ("empty", "cut")),
    ("pooling", "list"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_one_message(reader: str, damage: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    shutil.copytree(TINY, tmp_path / "folder")
    for file, content in BESIDE.get(reader, {}).items():
        (tmp_path / "folder" / file).write_text(content)
    if "index" in reader:
        (tmp_path / "folder" / "model.safetensors").unlink()
    path = tmp_path / "folder" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(DAMAGE[damage])
    try:
        read(tmp_path / "folder")
    except UserError as error:
        text = str(error)
        assert str(tmp_path / "folder") in text and len(text) < len(str(path)) * 3 + 600, text
    else:
        # UTF-16 is an encoding of JSON, and the libraries read what is a mapping.
        assert (reader, damage) in HARMLESS or damage == "utf-16" or "tokenizer" in reader or "read" in reader


ODD: list[tuple[str, Any]] = [
    ("layers.0.wrappers.lora.r", "many"), ("layers.0.wrappers.lora.kind", None), ("layers.0.wrappers.lora", [1]),
    ("layers.0.structures.lora", "x"), ("layers.0.structures", 3), ("layers", {"a": 1}), ("base.section", [1]),
    ("base.section.dtype", "float7"), ("base", 1), ("labels", 4),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ODD)
def test_a_stored_stack_with_odd_values_is_one_message(key: str, value: object, tmp_path: Path) -> None:
    """A file that is whole and holds what nobody wrote."""
    section: dict[str, Any] = {"path": "tiny"}
    layer = {"wrappers": {"lora": {"kind": "lora", "r": 2}}, "structures": {"lora": {}}, "file": "delta.safetensors"}
    stored: dict[str, Any] = {"base": {"path": "tiny", "section": section}, "head": "causal", "layers": [layer]}
    *above, last = key.split(".")
    holder: Any = stored
    for part in above:
        holder = holder[int(part)] if part.isdigit() else holder[part]
    holder[last] = value
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "stack.yaml").write_text(yaml.safe_dump(stored))
    save_file({}, str(final / "delta.safetensors"))

    def opened() -> None:
        _, saved, _ = resolve_section(ModelSection(path=str(tmp_path / "run")))
        assert saved is not None
        for stack in saved.layers:
            mount_layer(tiny_model(), stack, 0)

    with pytest.raises(UserError) as found:
        opened()
    assert "stack.yaml" in str(found.value) and len(str(found.value)) < len(str(final)) + 600


PANICS: dict[str, dict[str, Any]] = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA////"},
    "post_processor": {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}], "pair": [],
        "special_tokens": {},
    },
}  # fmt: skip
"""Parts of a tokenizer.json on which its library panics: no `Exception` is raised."""


@pytest.mark.parametrize("part", PANICS)
def test_a_library_that_panics_is_one_message(part: str, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "folder")
    path = tmp_path / "folder" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: PANICS[part]}))
    with pytest.raises(ModelError, match=r"tokenizer.path: .*folder: cannot read its tokenizer: "):
        load_tokenizer(tmp_path / "folder")


def test_a_panic_is_no_bug_of_this_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from llmrecipe.cli import app

    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException("retry-limit-in-match over")

    monkeypatch.setattr(app, "build_app", panic)
    assert app.run_command(["list"]) == 2
    err = capsys.readouterr().err
    assert "a library gave up on what it was given: retry-limit-in-match over; a tokenizer.json" in err
    with pytest.raises(UserError, match="x: retry-limit"), reading("x"):
        panic()
    with pytest.raises(KeyboardInterrupt), reading("x"):
        raise KeyboardInterrupt
