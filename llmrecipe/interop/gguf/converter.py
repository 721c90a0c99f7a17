"""llama.cpp's own converter, `convert_hf_to_gguf.py`, run on a merged folder where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.core.lazy import load_module
from llmrecipe.core.path_hints import near_path

SCRIPT = "convert_hf_to_gguf.py"


def find_converter(given: str | None) -> Path | None:
    """Return the converter to use: the one given, else the one on the PATH, else None.

    Raises:
        UserError: what is given is no file.
    """
    if given is not None:
        path = Path(given)
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            near = near_path(Path(given))
            raise UserError(f"--converter {given}: there is no such file{near}; it is {SCRIPT} of a checkout of llama.cpp")
        return path.resolve()
    found = shutil.which(SCRIPT)
    return None if found is None else Path(found).resolve()


def run_converter(script: Path, folder: Path, target: Path, kind: str) -> None:
    """Convert a folder into one file with llama.cpp's converter.

    Args:
        kind: type of the matrices, such as `BF16`.

    Raises:
        ModelError: it refuses, with its own last words.
    """
    command = [sys.executable, str(script), str(folder), "--outfile", str(target), "--outtype", kind.lower()]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=offline, check=False)
    if done.returncode or not target.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ModelError(f"{script} ended with exit code {done.returncode}: {said[-1].strip() if said else 'it said nothing'}")
    scores = load_module("gguf").GGUFReader(target).fields.get("tokenizer.ggml.scores")
    # It knows the scores of SentencePiece's own file alone; of a tokenizer.json it writes one number for all pieces.
    if scores is not None and len({float(scores.parts[place][0]) for place in scores.data}) < 2:
        raise ModelError(
            f"{script} wrote no scores for the pieces of the tokenizer, so llama.cpp would cut text in another way"
        )
