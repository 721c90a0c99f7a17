"""Whatever lies in a folder of a model, an adapter or a run, opening it ends in one message about that file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import UserError
from llmrecipe.models.checkpoint_path import TINY, adapter_base, check_folder
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.delta import read_stack
from llmrecipe.runs.run_dir import RunDir, read_metrics

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
}
HARMLESS = {("metrics", "lone surrogate"), ("config", "lone surrogate")}
"""A mapping is all that these want."""


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_one_message(reader: str, damage: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    shutil.copytree(TINY, tmp_path / "folder")
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
