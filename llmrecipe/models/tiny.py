"""The embedded model: its tokenizer, its shape, and how a finished run becomes `llmrecipe/assets/tiny`.

    python -m llmrecipe.models.tiny start OUT [FILES...]  tokenizer and shape; given JSON lines files, the tokenizer is
                                                          trained on them, otherwise the package's own is kept
    python -m llmrecipe.models.tiny install RUN [OUT]     finished run -> bfloat16 files of the package

The model is a plain Llama, so that Transformers, PEFT, TRL and inference servers load it as it is. The tokenizer is a
byte-level BPE, so no text is unknown to it; single digits and words with their space are tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.paths import ASSETS

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

FOLDER = ASSETS / "tiny"
VOCABULARY = 1024
"""Largest vocabulary; the corpus has fewer words, so the trained tokenizer stays below it."""
CONTEXT = 512
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>", "sep_token": "<sep>"}
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SENTINELS = [f"<extra_id_{i}>" for i in range(32)]
"""Markers of removed spans, for denoising."""

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('this template knows the roles system, user, assistant and tool, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""`<bos><|user|>question<eos><|assistant|>answer<eos>`: one end token closes every turn and every document."""


def texts(files: list[Path]) -> Iterator[str]:
    """Yield every text and message content in JSON lines files."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield from _strings(json.loads(line))


def _strings(value: object) -> Iterator[str]:
    """Yield the strings inside a row, except role names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "role":
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def build_tokenizer(found: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on texts; raw text is prefixed with `<bos>`, templates contain their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL.values(), *ROLES, *SENTINELS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(found, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<sep>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos>:0 $A:0 <sep>:0 $B:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        extra_special_tokens=[*ROLES, *SENTINELS],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the config: 4 layers of width 192, 6 heads with 2 key/value heads, tied embeddings; 1.8 million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def start_tiny(out: Path, corpus: list[Path]) -> None:
    """Write tokenizer and config for `model.init=random`; without a corpus, use the package's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = build_tokenizer(texts(corpus)) if corpus else AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.save_pretrained(out)
    build_config(tokenizer).save_pretrained(out)


def install_tiny(run: Path, out: Path = FOLDER) -> None:
    """Write the model of a finished run as the files of the package, in bfloat16."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(run / "final" / "model", dtype=torch.float32)
    model.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: `start` before training, `install` after it."""
    parser = argparse.ArgumentParser(description="Make the embedded model.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    begin = verbs.add_parser("start", help="write tokenizer and config")
    begin.add_argument("out", type=Path)
    begin.add_argument("corpus", type=Path, nargs="*")
    finish = verbs.add_parser("install", help="write the model of a finished run into the package")
    finish.add_argument("run", type=Path)
    finish.add_argument("out", type=Path, nargs="?", default=FOLDER)
    options = parser.parse_args(arguments)
    if options.verb == "start":
        start_tiny(options.out, options.corpus)
    else:
        install_tiny(options.run, options.out)


if __name__ == "__main__":
    main()
