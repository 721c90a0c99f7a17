"""Small trained tokenizers of the kinds that GGUF files are written for, and chat templates for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import llmrecipe
from llmrecipe.interop.gguf.token_tables import PATTERNS

SPECIAL = ["<unk>", "<s>", "</s>"]
SPACE = "\u2581"
REGEX = {name: pattern for pattern, name in PATTERNS.items()}
HEADERS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Turns that start with a text which is no token, as in Zephyr and TinyLlama."""
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }} </s>"
    "{% else %}<<SYS>>{{ m['content'] }}<</SYS>> {% endif %}{% endfor %}"
)
"""As in Llama 2 and Mistral."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def corpus() -> tuple[str, ...]:
    """Lines of this package's documentation."""
    pages = sorted((Path(llmrecipe.__file__).parent / "docs").glob("*.md"))
    return tuple(line for page in pages for line in page.read_text(encoding="utf-8").splitlines())


def byte_level(*before: Any, own: bool = True, whole: bool = False, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `before` cuts words first, and `own` says that byte-level BPE's own pattern does as well."""
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    if whole:
        parts = json.loads(tokenizer.to_str())
        parts["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token=None)


def split(name: str) -> Any:
    """The pattern of a name in a file."""
    return pre_tokenizers.Split(Regex(REGEX[name]), "isolated")


@cache
def pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """SentencePiece's vocabulary and every pair of pieces that makes one, as Transformers reads them from its file."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, limit_alphabet=120, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    found = sorted((n, t) for t, n in json.loads(trained.to_str())["model"]["vocab"].items() if t not in SPECIAL)
    runs = [SPACE * 2, SPACE * 4]
    longer = runs + [t for _, t in found if len(t) > 1 and t not in runs]
    known = [*longer, *(t for _, t in found if len(t) == 1)]
    vocabulary = {t: n for n, t in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *known])}
    merges = []
    for text in longer:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += sorted((p for p in pairs if set(p) <= set(known)), key=lambda p: (vocabulary[p[0]], vocabulary[p[1]]))
    return vocabulary, merges


def prepending() -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as Llama 2 has it in `tokenizer.json`: every part of a text gets a space."""
    vocabulary, merges = pieces()
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(**more: Any) -> LlamaTokenizer:
    """SentencePiece's BPE as Transformers builds it: the first part of a text gets a space, where none is."""
    vocabulary, merges = pieces()
    return LlamaTokenizer(vocab=dict(vocabulary), merges=list(merges), **more)


def with_template(tokenizer: Any, template: str, tokens: Sequence[str] = ("<|im_start|>", "<|im_end|>")) -> Any:
    """A tokenizer with a chat template, special tokens and one plain added token."""
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in tokens])
    tokenizer.add_tokens([AddedToken("foo", normalized=False)])
    tokenizer.chat_template = template
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "gpt-2": byte_level,
    "gpt-2 chatml": lambda: with_template(byte_level(), CHATML),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(split("llama-bpe"), own=False, whole=True),
    "qwen2 chatml": lambda: with_template(byte_level(split("qwen2"), own=False, normalizer=normalizers.NFC()), CHATML),
    "prepending": prepending,
    "prepending inst": lambda: with_template(prepending(), INST, ()),
    "prepending chatml": lambda: with_template(prepending(), CHATML),
    "metaspace": metaspace,
    "metaspace headers": lambda: with_template(metaspace(), HEADERS, ()),
    "metaspace inst": lambda: with_template(metaspace(), INST, ()),
    "metaspace chatml": lambda: with_template(metaspace(), CHATML),
    "metaspace always": lambda: with_template(metaspace(legacy=True), CHATML),
    "metaspace never": lambda: with_template(metaspace(add_prefix_space=False), CHATML),
}
