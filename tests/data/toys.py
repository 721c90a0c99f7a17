"""Tokenizers small enough to reason about: byte-level, with or without merges, with or without their own BOS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmrecipe.data.templates.chatml import CHATML

PREFIX_ONLY = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""chatml without marks: turns have to be found by token prefixes."""
MARKS = ["<|im_start|>", "<|im_end|>"]


def byte_tokenizer(
    merges: Iterable[tuple[str, str]] = (), *, adds_bos: bool = False, template: str | None = CHATML, pad_is_eos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte, plus the given merges; decoding gives the text back exactly."""
    merges = list(merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", "<pad>", *alphabet, *(a + b for a, b in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>" if pad_is_eos else "<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.chat_template = template.replace("{{ bos_token }}", "") if template and not adds_bos else template
    return tokenizer


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def trained_text(tokenizer: PreTrainedTokenizerFast, ids: list[int], trained: list[int]) -> str:
    return tokenizer.decode([i for i, t in zip(ids, trained) if t])
