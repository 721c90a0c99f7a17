"""The options of an export, which the written folder keeps for `verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmrecipe.core.foreign import read_json, reading
from llmrecipe.interop.merge_options import MergeConfig

FORMATS = ("merged", "peft", "adapter_hub", "sentence_transformers")
OTHER_TOOLS = {
    "gguf": "llama.cpp's own converter reads it: python llama.cpp/convert_hf_to_gguf.py FOLDER --outfile FILE.gguf",
    "awq": "llm-compressor, which chooses the scales from sample texts, reads it",
    "gptq": "llm-compressor, which rounds the weights by sample texts, reads it",
}
"""Formats that are not written here -> what writes them from a merged folder."""
OPTIONS_FILE = "export.json"
"""File in an exported folder that says how it was exported."""


@dataclass(frozen=True)
class ExportOptions:
    """What an exported folder depends on next to its run."""

    to: str
    """One of `FORMATS`."""
    dtype: str = "auto"
    rank: int | None = None
    as_lora: bool = False
    uniform: bool = False
    base: str | None = None
    """Hub id of the base model that the written folder names; None names it as the run does."""
    weight: float = 1.0
    add: Mapping[str, float] = field(default_factory=dict)
    """Run or PEFT folder -> its weight in a combination."""
    merge: MergeConfig = field(default_factory=MergeConfig)

    def write(self, folder: Path) -> None:
        """Keep the options in an exported folder."""
        (folder / OPTIONS_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ExportOptions:
        """Return the options that a folder keeps.

        Raises:
            RunError: the file is damaged.
        """
        found = read_json(folder / OPTIONS_FILE)
        with reading(str(folder / OPTIONS_FILE), "export the run again"):
            return cls(**{**found, "merge": MergeConfig(**found["merge"])})
