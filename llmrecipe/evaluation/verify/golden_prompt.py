"""The golden prompt of an exported folder and what the folder alone gives for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from llmrecipe.core.errors import ModelError, ProofError
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.engine.answer_ends import end_tokens
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable
from llmrecipe.interop.export_options import GGUF_FILE
from llmrecipe.interop.gguf.gguf_export import read_gguf
from llmrecipe.interop.golden import ANSWER_TOKENS, GOLDEN_FILE, Golden, answer_logits, explained_by
from llmrecipe.interop.sentence_transformers_folder import vector_of
from llmrecipe.interop.verify_logits import golden_ids, logits_of, probe_pictures
from llmrecipe.models import native
from llmrecipe.models.checkpoint_path import adapter_base, check_folder, is_adapter, locate, offline
from llmrecipe.models.load import load_tokenizer
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.resolve_class import quiet
from llmrecipe.recipe.rights import without_rights
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel

TEXT = "golden prompt: tokens and {what} = those the folder alone gives"
REMEDY = "export the run again"


def compare_golden(folder: Path) -> Measured:
    """Compare what a folder keeps of its golden prompt with what it gives, computed in the dtype that was kept.

    Raises:
        ProofError: other tokens, an answer that ends elsewhere, or a folder that cannot be read.
        NotApplicable: what the folder depends on is not here.
    """
    try:
        return _compared(folder, Golden.read(folder))
    except ModelError as error:
        raise ProofError(str(error)) from error


def _compared(folder: Path, golden: Golden) -> Measured:
    what = "answer" if golden.answer_ids else "vector" if golden.vector else "logits"
    text = TEXT.format(what=what)
    if golden.quantized:
        raise NotApplicable(
            f"it was made on a base quantized by {', '.join(golden.quantized)}, which the folder does not name; "
            "with its run (--run RUN) the tensors are compared"
        )
    if golden.vector:
        check_folder(folder)
        _check_ids(text, golden, golden_ids(exported_tokenizer(folder), chat=False))
        with reading(str(folder), REMEDY):
            vector = vector_of(folder, golden.prompt_ids, getattr(torch, golden.dtype))
        return Measured(text, *_measured(golden, vector, folder))
    model, tokenizer = open_export(folder, golden)
    if not golden.picture:
        _check_ids(text, golden, golden_ids(tokenizer, chat=bool(golden.answer_ids)))
    if golden.answer_ids:
        _check_end(text, golden, end_tokens(model, tokenizer))
    with reading(str(folder / GOLDEN_FILE), REMEDY):
        return Measured(text, *_measured(golden, _logits(golden, model), folder))


def _measured(golden: Golden, logits: Tensor, folder: Path) -> tuple[float, float, str]:
    with reading(str(folder / GOLDEN_FILE), REMEDY):
        difference, where = explained_by(golden, logits)
    return difference, golden.bound, where


def _logits(golden: Golden, model: LanguageModel) -> Tensor:
    if golden.answer_ids:
        return answer_logits(model, golden.prompt_ids, golden.answer_ids)
    ids = probe_pictures(model, 1) if golden.picture else torch.tensor([golden.prompt_ids])
    logits = logits_of(model, ids)[0]
    return logits if logits.dim() == 2 else logits[None]


def _check_ids(text: str, golden: Golden, ids: list[int]) -> None:
    if [*golden.front_ids, *ids] != golden.prompt_ids:
        raise ProofError(f"{text}: the tokenizer of the folder gives {ids}, and {GOLDEN_FILE} has {golden.prompt_ids}")


def _check_end(text: str, golden: Golden, ends: list[int]) -> None:
    last = next((place for place, token in enumerate(golden.answer_ids, 1) if token in ends), ANSWER_TOKENS)
    if last != len(golden.answer_ids):
        raise ProofError(
            f"{text}: the kept answer has {len(golden.answer_ids)} tokens, and by the end tokens of the folder ({ends}) "
            f"it has {last}"
        )


def open_export(folder: Path, golden: Golden) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """Return the model of an exported folder in the dtype of its golden prompt, and its tokenizer; an adapter on its base.

    Raises:
        NotApplicable: the base is not on this machine, or its class is not one of Transformers.
        ModelError: the folder cannot be read.
    """
    if is_adapter(str(folder)):
        if not _is_here(base := adapter_base(str(folder))):
            raise NotApplicable(f"its base {base} is not on this machine")
        section = {**without_rights(golden.model), "path": str(folder), "dtype": golden.dtype}
        with reading(str(folder / GOLDEN_FILE), REMEDY):
            checked = ModelSection.model_validate(section)
        loaded = open_model(checked, TokenizerSection(), head=golden.head or "causal", labels=golden.labels or None)
        return loaded.model.eval(), loaded.tokenizer
    dtype = getattr(torch, golden.dtype)
    if (folder / GGUF_FILE).is_file():
        with reading(str(folder / GGUF_FILE), REMEDY):
            model, tokenizer = read_gguf(folder, dtype, golden.config)
            return pretrained(model), tokenizer
    check_folder(folder)
    name = str((read_json(folder / "config.json").get("architectures") or [""])[0])
    family: Any = getattr(transformers, name, None) or getattr(native, name, None)
    if family is None:
        raise NotApplicable(f"its class {name} is none of Transformers' own")
    with reading(str(folder), REMEDY), quiet():
        return family.from_pretrained(folder, dtype=dtype).eval(), exported_tokenizer(folder)


def exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in an exported folder."""
    return load_tokenizer(ModelSection(path=str(folder)), TokenizerSection())


def _is_here(base: str) -> bool:
    """Return whether a base model is a folder, is in the hub's cache, or can be fetched."""
    try:
        name, local = locate(base)
    except ModelError:
        return False
    return local or isinstance(try_to_load_from_cache(name, "config.json"), str) or offline() is None
