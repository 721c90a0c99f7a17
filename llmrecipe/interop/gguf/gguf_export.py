"""GGUF export: one file for llama.cpp and Ollama, read back by Transformers before it counts.

The run is merged first (see `interop.merged`), which proves that the merged folder computes what the run computes. llama.cpp's
own converter writes the file where it is installed, and the `gguf` library where it is not. Then Transformers reads the file:
its logits must be those of the merged folder. Prompts must be cut as the run cuts them: by llama.cpp's rules where the file was
written here (`token_tables`), by Transformers' reader where the converter wrote it.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.core.lazy import is_installed
from llmrecipe.interop import verify_logits
from llmrecipe.interop.export_options import GGUF_FILE, Q8_0, TOKENIZER_FILE
from llmrecipe.interop.gguf.architecture import BEYOND_READER, refuse_family
from llmrecipe.interop.gguf.converter import find_converter, run_converter
from llmrecipe.interop.gguf.cutting import TEXTS, Otherwise, bos_added, cut_otherwise, cuts_of, probe_prompts
from llmrecipe.interop.gguf.ollama import MODELFILE, modelfile
from llmrecipe.interop.gguf.token_tables import TokenTables, token_tables_of
from llmrecipe.interop.gguf.writer import STORED, write_gguf
from llmrecipe.interop.golden import Golden, golden_answer
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import Exported, export_merged, kept_dtype, target_folder, writing
from llmrecipe.interop.plain_family import plain_family
from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.resolve_class import first_line, quiet
from llmrecipe.runs.open_model import LoadedModel
from llmrecipe.runs.run_names import run_title

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MERGED = "merged"
Q8_0_BOUND = 5e-2
"""Largest logit difference of 8-bit weights that passes, as a share of the largest logit."""


def export_gguf(
    run: str | Path,
    out: str | Path | None = None,
    *,
    dtype: str = "auto",
    bound: float | None = None,
    converter: str | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    loaded: LoadedModel | None = None,
    rights: Mapping[str, bool] | None = None,
) -> Exported:
    """Write a run as `model.gguf` with a `Modelfile`; arguments as in `merged.export_merged`.

    Args:
        dtype: of the matrices: as for a merged folder, or `q8_0`.
        converter: path of llama.cpp's converter; default: the one on the PATH.

    Raises:
        ModelError: llama.cpp has no such model or tokenizer, or the file does not compute what the run computes.
        UserError: the `gguf` library is missing.
    """
    if not is_installed("gguf"):
        raise UserError("export --to gguf: needs gguf: pip install 'llmrecipe[gguf]'")
    target = target_folder(run, out, "gguf")
    script = find_converter(converter)
    loaded = loaded or open_run(str(run), options=options, rights=rights)
    _refuse_early(loaded, script is not None)
    wide = kept_dtype(loaded) if dtype in ("auto", Q8_0) else getattr(torch, dtype)
    wide = wide if wide in STORED else torch.float32
    kind = Q8_0.upper() if dtype == Q8_0 else STORED[wide]
    with writing(target) as folder:
        merged = export_merged(
            run, folder / MERGED, dtype=str(wide).removeprefix("torch."), bound=bound, loaded=loaded, rights=rights
        )
        tokenizer = AutoTokenizer.from_pretrained(merged.path)
        config = AutoConfig.from_pretrained(merged.path)
        tables, written = _write(script, folder, config, tokenizer, kind, run_title(Path(run).resolve()))
        notes = [*merged.notes, f"merged: {merged.difference}", *written]
        difference, golden, more = _proof(folder, tokenizer, wide, kind, bound, tables is None)
        golden.write(folder)
        text, other = modelfile(
            GGUF_FILE, tokenizer, config.max_position_embeddings, bos_added(tokenizer), tables.lead if tables else ""
        )
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        shutil.rmtree(merged.path)
    return Exported(target, difference, [*notes, *more, *other, f"Ollama: {create_command(run, target)}"])


def create_command(run: str | Path, folder: Path) -> str:
    """Return the command that makes a model of Ollama of a written folder, called by its run."""
    name = re.sub(r"[^a-z0-9._-]+", "-", run_title(Path(run).resolve()).lower()).strip("-._") or "model"
    return shlex.join(["ollama", "create", name, "-f", str(folder / MODELFILE)])


def _refuse_early(loaded: LoadedModel, converted: bool) -> None:
    """Refuse what cannot be written before anything is merged.

    Raises:
        ModelError: no language model that continues a text, or one of a family that nothing here knows how to write.
    """
    name, config = type(loaded.model).__name__, loaded.model.config
    if not name.endswith("ForCausalLM"):
        raise ModelError(f"export --to gguf: {name} does not continue a text, which is what llama.cpp and Ollama serve")
    if converted or isinstance(config, NativeConfig):
        family = plain_family(config) if isinstance(config, NativeConfig) else name
        if family is None:
            raise ModelError(
                "export --to gguf: the parts of this native model are those of no family of Transformers; Llama's are: rotary "
                "positions, RMSNorm before each part, a gated MLP"
            )
        return
    refuse_family(name, config)
    token_tables_of(loaded.tokenizer, config.vocab_size)


def _write(
    script: Path | None, folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, kind: str, name: str
) -> tuple[TokenTables | None, list[str]]:
    """Write the file, by llama.cpp's converter where there is one; return the tables written here, if any, and notes."""
    if script is not None:
        try:
            run_converter(script, folder / MERGED, folder / GGUF_FILE, kind)
            return None, [f"written by {script}"]
        except ModelError as error:
            (folder / GGUF_FILE).unlink(missing_ok=True)
            refused = error
        try:
            tables = write_gguf(folder / MERGED, folder / GGUF_FILE, config, tokenizer, kind, name)
        except ModelError as error:
            raise ModelError(f"export --to gguf: {refused}; and without it: {error}") from error
        return tables, [f"{refused}; written by the gguf library instead", *tables.notes]
    tables = write_gguf(folder / MERGED, folder / GGUF_FILE, config, tokenizer, kind, name)
    return tables, tables.notes


def _proof(
    folder: Path, tokenizer: PreTrainedTokenizerBase, wide: torch.dtype, kind: str, bound: float | None, converted: bool
) -> tuple[verify_logits.Difference, Golden, list[str]]:
    """Compare a file with the merged folder next to it: logits and tokens.

    Returns:
        What differs, the golden prompt of the file, and notes.

    Raises:
        ModelError: Transformers cannot read the file, or it is another model.
    """
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder / MERGED, dtype=wide).eval()
        ids = verify_logits.probe_inputs(model, tokenizer)
        wanted, config = verify_logits.logits_of(model, ids), model.config
        del model
        try:
            beyond = _beyond_reader(folder, config)
            plain, again = read_gguf(folder, wide, beyond)
        except (ValueError, NotImplementedError, KeyError, ImportError) as error:
            raise ModelError(
                f"export --to gguf: Transformers cannot read the file back ({first_line(error)}), so nothing proves it; "
                f"export --to merged and convert that folder: python convert_hf_to_gguf.py FOLDER --outfile {GGUF_FILE}"
            ) from error
    limit = bound if bound is not None or kind != Q8_0.upper() else Q8_0_BOUND
    difference = verify_logits.compare_logits(wanted, verify_logits.logits_of(plain, ids), wide, limit)
    verify_logits.demand(difference, "the GGUF file", "dtype=float32 rounds less; --bound allows more.")
    notes = []
    for text, ours, theirs in _read_otherwise(tokenizer, again)[:1]:
        if converted:
            raise ModelError(
                f"export --to gguf: the tokenizer of the file cuts {text!r} into {theirs}, and that of the run into {ours}. "
                "Nothing was written."
            )
        tokenizer.save_pretrained(folder)
        notes.append(
            f"llama.cpp cuts prompts as the run does, and Transformers' reader of GGUF files cuts {text!r} otherwise: the "
            "tokenizer is saved next to the file (AutoTokenizer.from_pretrained(FOLDER))"
        )
    golden = replace(golden_answer(pretrained(plain), tokenizer), config=beyond)
    if beyond:
        notes.append(
            f"Transformers takes no {', '.join(beyond)} from a GGUF file: give it the config of the base; llama.cpp has it"
        )
    return difference, golden, notes


def _read_otherwise(tokenizer: PreTrainedTokenizerBase, again: PreTrainedTokenizerBase) -> list[Otherwise]:
    """Return what the tokenizer that Transformers reads from a file cuts otherwise."""
    found = cut_otherwise(cuts_of(tokenizer), cuts_of(again), probes(tokenizer))
    own, read = verify_logits.golden_ids(tokenizer), verify_logits.golden_ids(again)
    return found + ([(verify_logits.GOLDEN_PROMPT, own, read)] if own != read else [])


def read_gguf(folder: Path, dtype: torch.dtype, settings: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer that Transformers reads from the file of a folder.

    Args:
        settings: values of the config that the file holds and Transformers does not look for.
    """
    config = AutoConfig.from_pretrained(folder, gguf_file=GGUF_FILE, trust_remote_code=False)
    for key, value in settings.items():
        setattr(config, key, value)
    # A tokenizer next to the file is there because the one read from it cuts otherwise.
    saved = (folder / TOKENIZER_FILE).is_file()
    where: dict[str, Any] = {} if saved else {"gguf_file": GGUF_FILE}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    # Its progress bar has no switch.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, config=config, dtype=dtype)
    return model.eval(), tokenizer


def _beyond_reader(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a model that its file holds and Transformers does not look for."""
    read = AutoConfig.from_pretrained(folder, gguf_file=GGUF_FILE)
    known = {key: getattr(config, key) for key in BEYOND_READER if hasattr(config, key)}
    return {key: value for key, value in known.items() if getattr(read, key, None) != value}


def probes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return texts that two tokenizers must cut alike: conversations under the chat template, and plain ones."""
    return list(dict.fromkeys([*TEXTS, *probe_prompts(tokenizer)]))
