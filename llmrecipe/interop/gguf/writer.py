"""Writing a Transformers folder as one GGUF file, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from llmrecipe.core.errors import ModelError
from llmrecipe.core.lazy import load_module
from llmrecipe.data.tokenize.chat_templates import turn_end_tokens
from llmrecipe.interop.gguf.architecture import ARCHITECTURES, add_numbers, as_stored, more_tensors, refuse_family
from llmrecipe.interop.gguf.cutting import bos_added, file_template
from llmrecipe.interop.gguf.token_tables import TokenTables, token_tables_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Dtype of the weights -> type of the matrices in a file."""
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
"""Type of the matrices -> what the file says of itself (`general.file_type`)."""
BLOCK = 32
"""Numbers that share a scale in Q8_0: rows of another length are stored as F16."""
OPENED = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}")
CLOSED = re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")


def write_gguf(
    folder: Path, target: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, kind: str, name: str
) -> TokenTables:
    """Write a folder of Transformers as one file; return the tables of its tokenizer.

    Args:
        folder: with the safetensors files.
        config, tokenizer: those of the folder.
        kind: type of the matrices (`FILE_TYPES`); vectors are F32.
        name: what the file calls the model.

    Raises:
        ModelError: llama.cpp has no such model or tokenizer, said before anything is written.
    """
    gguf: Any = load_module("gguf")
    family = (config.architectures or [""])[0]
    refuse_family(family, config)
    vocabulary = token_tables_of(tokenizer, config.vocab_size)
    architecture = ARCHITECTURES[family]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(target, architecture)
    # Transformers takes a file of this very name for one of another architecture.
    writer.add_name("mistral run" if name == "mistral" else name)
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_numbers(writer, config)
    _add_vocabulary(writer, vocabulary, tokenizer, ends_in(folder, tokenizer))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from more_tensors(config).items()
        for ours, tensor in _tensors_in(folder):
            theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise ModelError(f"export --to gguf: the architecture '{architecture}' has no place for {ours}")
            yield theirs, as_stored(theirs, tensor, config, architecture)

    # Twice over the tensors: their places are written first, and no more than one of them is in memory.
    for theirs, tensor in tensors():
        stored = getattr(gguf.GGMLQuantizationType, _type_of(tensor, kind))
        count, (block, size) = tensor.numel(), gguf.GGML_QUANT_SIZES[stored]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored)
        writer.add_tensor_info(theirs, shape, gguf.gguf_writer.np.dtype("uint8"), count // block * size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors():
        stored = getattr(gguf.GGMLQuantizationType, _type_of(tensor, kind))
        writer.write_tensor_data(gguf.quants.quantize(tensor.float().contiguous().numpy(), stored))
    writer.close()
    return vocabulary


def _type_of(tensor: Tensor, kind: str) -> str:
    """Return the type a tensor is stored in."""
    if tensor.dim() < 2:
        return "F32"
    return "F16" if kind == "Q8_0" and tensor.shape[-1] % BLOCK else kind


def _tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder, one in memory at a time; scalar heads of roles are in files of their own."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def ends_in(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer, by the tokenizer, its template and the generation settings of the folder."""
    named: Any = None
    if (folder / GENERATION_CONFIG_NAME).is_file():
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    more = named if isinstance(named, list) else [named]
    return list(dict.fromkeys([*turn_end_tokens(tokenizer), *(int(number) for number in more if number is not None)]))


def _add_vocabulary(
    writer: Any,  # noqa: ANN401
    vocabulary: TokenTables,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
) -> None:
    """Add the tables of a tokenizer, its special tokens, the tokens that end an answer and its chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_first)
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    for kind, number in zip(("eot", "eom"), (n for n in ends if n != tokenizer.eos_token_id), strict=False):
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(bos_added(tokenizer))
    # A prompt goes on, so an end token that the tokenizer puts after a text is left out.
    writer.add_add_eos_token(False)
    writer.add_chat_template(plain_jinja(file_template(tokenizer, vocabulary.lead)))


def plain_jinja(text: str) -> str:
    """Return a chat template without `{% generation %}`, which Jinja itself does not know."""
    return CLOSED.sub(r"{%\1 endif \2%}", OPENED.sub(r"{%\1 if true \2%}", text))
