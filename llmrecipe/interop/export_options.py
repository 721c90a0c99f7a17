"""The options of an export, which the written folder keeps for `verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmrecipe.core.errors import UserError, did_you_mean
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.interop.merge_options import MergeConfig

FORMATS = ("merged", "peft", "vllm-lora", "gguf", "adapter_hub", "sentence_transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
Q8_0 = "q8_0"
"""Dtype of a GGUF file alone: 8 bits a weight, and a scale for each 32."""
COMPRESSED = (
    "from llmcompressor import oneshot; {imports}; oneshot(model='FOLDER', recipe=[{recipe}], dataset='ultrachat_200k', "
    "splits='train_sft[:256]', output_dir='FOLDER-{name}')"
)
"""Python that quantizes a merged folder with llm-compressor."""
OTHER_TOOLS = {
    "awq": COMPRESSED.format(
        name="awq",
        imports="from llmcompressor.modifiers.quantization import QuantizationModifier; "
        "from llmcompressor.modifiers.transform.awq import AWQModifier",
        recipe="AWQModifier(), QuantizationModifier(targets=['Linear'], scheme='W4A16_ASYM', ignore=['lm_head'])",
    ),
    "gptq": COMPRESSED.format(
        name="gptq",
        imports="from llmcompressor.modifiers.gptq import GPTQModifier",
        recipe="GPTQModifier(targets=['Linear'], scheme='W4A16', ignore=['lm_head'])",
    ),
}
"""Formats that llm-compressor writes from a merged folder -> the Python that does it."""
GGUF_FILE = "model.gguf"
TOKENIZER_FILE = "tokenizer.json"
"""Next to a GGUF file where Transformers reads the tokenizer inside in another way."""
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
    converter: str | None = None
    """llama.cpp's converter for a GGUF file; None takes the one on the PATH, if any."""
    base: str | None = None
    """Hub id of the base model that the written folder names; None names it as the run does."""
    weight: float = 1.0
    add: Mapping[str, float] = field(default_factory=dict)
    """Run or PEFT folder -> its weight in a combination."""
    merge: MergeConfig = field(default_factory=MergeConfig)

    def check(self, run: str) -> None:
        """Refuse values that no export has.

        Args:
            run: what is exported, for the command of another tool.

        Raises:
            UserError: naming the option and what it may be.
        """
        if self.to in OTHER_TOOLS:
            raise UserError(
                f"--to {self.to}: not written by llmrecipe: such weights are chosen by sample texts, which llm-compressor "
                "does, and its releases pin a transformers of their own. "
                f"Merge first: llmrecipe export {run} --to merged --out FOLDER. Then, in another environment: "
                f'pip install llmcompressor && python -c "{OTHER_TOOLS[self.to]}" '
                f"(allowed: {', '.join(FORMATS)})"
            )
        dtypes = (*DTYPES, Q8_0) if self.to == "gguf" else DTYPES
        for key, value, allowed in (("--to", self.to, FORMATS), ("--dtype", self.dtype, dtypes)):
            if value not in allowed:
                raise UserError(f"{key}: there is no '{value}'{did_you_mean(value, allowed)} (allowed: {', '.join(allowed)})")
        if self.converter is not None and self.to != "gguf":
            raise UserError(f"--converter: belongs to --to gguf, not to --to {self.to}")
        self.merge.check()

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
