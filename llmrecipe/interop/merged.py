"""Merged export: a plain Transformers folder with everything a run learned folded into its weights.

The export is verified before the folder is in place: Transformers alone loads the folder, which must give the logits the run
gave with its hooks, and what it gives for one prompt is stored next to the weights (see `interop.golden`).
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from llmrecipe.core.errors import ModelError, RunError
from llmrecipe.core.foreign import read_json
from llmrecipe.engine.answer_ends import end_tokens
from llmrecipe.interop import verify_logits
from llmrecipe.interop.golden import golden_answer
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.peft import prompt_tokens
from llmrecipe.interop.plain_family import as_plain_family
from llmrecipe.methods._engines.quantized import dequantize_model, quantized
from llmrecipe.models import stored_heads, task_heads
from llmrecipe.models.attention_calls import stock_backend
from llmrecipe.models.heads.label_head import LabelHead
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.shared_module import shared_modules
from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.resolve_class import quiet
from llmrecipe.models.vocabulary import input_embedding
from llmrecipe.runs.durable import ASIDE
from llmrecipe.runs.open_model import LoadedModel, merge_order

if TYPE_CHECKING:
    from types import TracebackType

    from llmrecipe.methods._base.method import Wrapper
    from llmrecipe.models.pretrained import LanguageModel


@dataclass(frozen=True)
class Exported:
    """What an export wrote and proved."""

    path: Path
    difference: verify_logits.Difference
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"path": str(self.path), **self.difference.facts(), "notes": self.notes}


def export_merged(
    run: str | Path,
    out: str | Path | None = None,
    *,
    dtype: str = "auto",
    bound: float | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    loaded: LoadedModel | None = None,
    rights: Mapping[str, bool] | None = None,
) -> Exported:
    """Write a run as a Transformers folder.

    Args:
        out: the folder; default `RUN/merged`. It must not exist yet.
        dtype: of the written weights: `auto` keeps the one `model.dtype` named, else that of the base as it is stored,
            whatever training computed in.
        bound: largest logit difference that passes, as a share of the largest logit; default by dtype (`verify_logits.BOUNDS`).
        options, rights: see `open_run`.
        loaded: what to write instead of the run itself (see `merge_adapters.open_combination`).

    Raises:
        ModelError: a method of the stack cannot be folded (said before anything is written), or the logits moved.
        RunError: the folder exists, or the disk is full.
    """
    target = target_folder(run, out, "merged")
    loaded = loaded or open_run(str(run), options=options, rights=rights)
    refuse_label_head(loaded, "merged")
    for wrapper in loaded.mounted:
        if not wrapper.merges() and wrapper.as_tokens(loaded.model) is None:
            raise ModelError(
                f"export --to merged: '{wrapper.name.split('_', 1)[1]}' cannot be folded into the weights: {reason(wrapper)}. "
                "`llmrecipe.load(run)` and `llmrecipe chat` use it as it is"
            )
    prompt = prompt_tokens.wrapper_of(loaded)
    wide = kept_dtype(loaded) if dtype == "auto" else getattr(torch, dtype)
    if not any(quantized(loaded.model)):
        widen(loaded.model, wide)
    ids = verify_logits.probe_inputs(loaded.model, loaded.tokenizer)
    wanted = verify_logits.logits_of(loaded.model, ids)
    rows = None if prompt is None else prompt_tokens.detach_prompt(loaded, prompt)
    notes = fold_mounted(loaded, wide)
    spelled = None if rows is None else prompt_tokens.add_prompt_words(loaded, rows, wanted)
    notes += name_plainly(loaded)
    with writing(target) as folder:
        write_model(loaded, folder, wide)
        family: Any = type(loaded.model)
        front: list[int] = []
        if spelled is not None:
            spelled.write(folder)
            notes += spelled.notes(loaded.tokenizer)
            front = spelled.ids
        loaded.model = pretrained(torch.nn.Identity())  # one model in memory at a time
        with quiet():
            plain = family.from_pretrained(folder, dtype=wide)
        difference = verify_logits.compare_logits(wanted, verify_logits.logits_of(plain, ids, front), wide, bound, front)
        verify_logits.demand(difference, "the merged model", "dtype=float32 rounds less; --bound allows more.")
        golden_answer(plain, loaded.tokenizer, front).write(folder)
    return Exported(target, difference, notes)


def serving_notes(folder: Path) -> list[str]:
    """Return how vLLM serves a merged folder: where its class continues texts and is one of Transformers' own."""
    config = read_json(folder / "config.json")
    names = [name for name in config.get("architectures") or [] if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if "auto_map" in config or not any(hasattr(transformers, name) for name in names):
        return []
    return [f"vLLM: {shlex.join(['vllm', 'serve', str(folder)])}"]


def refuse_label_head(loaded: LoadedModel, name: str) -> None:
    """Refuse a format without a place for the layer that reads the pooled states of a text.

    Raises:
        ModelError: it names the format that has one.
    """
    heads = getattr(loaded.model, task_heads.ATTRIBUTE, None)
    if isinstance(heads, torch.nn.ModuleDict) and any(isinstance(head, LabelHead) for head in heads.values()):
        raise ModelError(
            f"export --to {name}: the run scores pooled states (objective.pooling), for which Transformers has no class; "
            "export --to sentence_transformers writes pooling and scores"
        )


def reason(wrapper: Wrapper) -> str:
    """Return why a method cannot be folded, as its class says (`unmergeable`)."""
    return getattr(wrapper, "unmergeable", "") or "its effect is not a fixed change of the base weights"


def widen(model: LanguageModel, dtype: torch.dtype) -> None:
    """Cast a model to `dtype` where that is wider, so that a run's changes are added before anything is rounded."""
    if dtype.itemsize > dtype_of(model).itemsize:
        model.to(dtype)


def fold_mounted(loaded: LoadedModel, dtype: torch.dtype) -> list[str]:
    """Fold every mounted method into the weights, oldest first, onto the base that training saw, and round once.

    Args:
        dtype: what the weights will be written in.

    Raises:
        ModelError: something could not be folded.
    """
    notes = []
    if count := dequantize_model(loaded.model):
        notes.append(
            f"{count} quantized layers were dequantized: the methods were trained on these weights, not on the originals"
        )
    widen(loaded.model, dtype)
    for wrapper in merge_order(loaded):
        wrapper.merge(loaded.model)
        notes.append(f"folded {wrapper.name.split('_', 1)[1]}")
    left = [path for path, _, _, _ in all_hooks(loaded.model)] + [name for name, _ in shared_modules(loaded.model)]
    if left:
        raise ModelError(f"export --to merged: parts of a method are left at {', '.join(left[:3])}")
    return notes


def name_plainly(loaded: LoadedModel) -> list[str]:
    """Turn a native model into one of Transformers' own families, where one has its parts; say what became of it."""
    if loaded.model.config.model_type != NativeConfig.model_type:
        return []
    plain = as_plain_family(loaded.model)
    if plain is None:
        return ["its parts are those of no family of Transformers: the folder loads after `import llmrecipe.models.native`"]
    plain.stored_dtype = loaded.model.stored_dtype
    loaded.model = plain
    return [f"written as {type(plain).__name__}: the same weights under the names of {plain.config.model_type}"]


def dtype_of(model: LanguageModel) -> torch.dtype:
    """Return the dtype of a model's embedding."""
    weight = getattr(input_embedding(model), "weight", None)
    return (next(model.parameters()) if weight is None else weight).dtype


def kept_dtype(loaded: LoadedModel) -> torch.dtype:
    """Return the dtype that `model.dtype` names, else the one the base is stored in."""
    named = loaded.section.dtype
    return loaded.model.stored_dtype if named == "auto" else getattr(torch, named)


def write_model(loaded: LoadedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, config, generation settings, tokenizer and template."""
    model: Any = loaded.model
    attention = model.config._attn_implementation
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ends = end_tokens(model, loaded.tokenizer)
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
        generation.pad_token_id = loaded.tokenizer.pad_token_id
    # The stock name, so that the folder loads where this package is not installed.
    model.config._attn_implementation_internal = stock_backend(attention or "") or None
    model.to(dtype)
    model.config.dtype = dtype
    # Scalar heads of roles are no part of the architecture: they are written next to it.
    state, heads = stored_heads.split(model.state_dict())
    stored_heads.write_heads(heads, folder)
    with quiet():
        model.save_pretrained(folder, state_dict=state)
    loaded.tokenizer.save_pretrained(folder)
    if loaded.processor is not None:
        loaded.processor.save(folder)


def target_folder(run: str | Path, out: str | Path | None, name: str) -> Path:
    """Return the folder an export is written to.

    Raises:
        RunError: the folder exists and is not empty.
    """
    target = Path(out) if out is not None else Path(run) / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"--out: {target} exists already; name another folder or remove it")
    return target


class writing:
    """A folder written aside and moved into place when everything inside succeeded.

    Raises:
        RunError: the disk is full or not writable.
    """

    def __init__(self, target: Path):
        self.target = target
        self.aside = target.parent / f"{ASIDE}{target.name}"

    def __enter__(self) -> Path:
        shutil.rmtree(self.aside, ignore_errors=True)
        try:
            self.aside.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"cannot write {self.target}: {error.strerror or error}") from error
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            if self.target.exists():
                self.target.rmdir()
            os.replace(self.aside, self.target)
            return
        shutil.rmtree(self.aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write {self.target}: {error.strerror or error}") from error
