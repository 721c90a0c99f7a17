"""How the folder of a text encoder says that the states of a text become one vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import read_json

MODULES_FILE = "modules.json"
"""File of a sentence-transformers folder that lists the steps from a text to its vector."""
MODES = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}
"""Pooling -> its switch in the `config.json` of a pooling step."""


def folder_pooling(folder: Path) -> str | None:
    """Return the pooling of a sentence-transformers folder, one of `MODES`; None where the folder is none.

    Two modes at once are joined by `+`: the library puts their vectors behind each other.

    Raises:
        ModelError: a file of the folder cannot be read.
    """
    if not (folder / MODULES_FILE).is_file():
        return None
    for step in _read(folder / MODULES_FILE, list):
        if isinstance(step, dict) and str(step.get("type", "")).rpartition(".")[2] == "Pooling":
            place = folder / str(step.get("path", "")) / "config.json"
            if not place.resolve().is_relative_to(folder.resolve()):
                raise ModelError(f"model.path: {folder / MODULES_FILE}: the step '{step['path']}' is outside of its folder")
            config = _read(place, dict)
            if "pooling_mode" in config:
                given = config["pooling_mode"]
                return given if isinstance(given, str) else "+".join(map(str, given))
            return "+".join(mode for mode, switch in MODES.items() if config.get(switch))
    return None


def _read(path: Path, kind: type) -> Any:  # noqa: ANN401 (what a JSON file holds)
    return read_json(path, "model.path", "copy the folder again", ModelError, kind)
