"""llama.cpp's way of cutting text into tokens, computed by the tokenizers library.

llama.cpp splits a text at its special and added tokens and cuts the parts between them. Of the rest of a tokenizer, it
knows this much:

- a token is taken wherever its text stands: no white space goes with it, and it may be part of a word;
- text stays as it is: a normal form such as NFC is not made;
- `llama` (SentencePiece): spaces are written as U+2581, and one more is put before every part, or before none. Metaspace puts
  it before the first part alone, or only where none is.

So the same tokenizer with these parts replaced cuts as llama.cpp does, and shows what a file will do to a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.tokenize.call_tokenizer import added_tokens, call_tokenizer
from llmrecipe.data.tokenize.chat_templates import is_prompted_raw, raw_template, served_template
from llmrecipe.interop.gguf.ollama import CONVERSATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cuts = Callable[[str], list[int]]
"""A text -> its token ids."""
Otherwise = tuple[str, list[int], list[int]]
"""A text, and the two ways in which it is cut."""
SPACE = "\u2581"
TEXTS = ("The hen lives in the barn.", "Tom has 12 apples; he buys 345 more!\nHow many?", "na\u00efve \u00fcber \u6f22\u5b57")
"""What both tokenizers must cut alike, next to conversations."""
SPACED = (" The hen", "if x:\n\n    y  =  1\t\n ")
"""Texts with more white space, in which some tokenizers differ."""
STRICT = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
"""What llama.cpp knows of an added token."""


def as_llama_cpp(tokenizer: PreTrainedTokenizerBase, space_first: bool | None) -> Cuts:
    """Return how llama.cpp cuts a text by the tables of a tokenizer.

    Args:
        space_first: a space is put before every part; None for byte-level BPE, which writes none.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts |= {"normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    parts["added_tokens"] = [{**token, **STRICT} for token in parts["added_tokens"]]
    if space_first is not None:
        first = [{"type": "Prepend", "prepend": SPACE}] if space_first else []
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        parts |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [*first, spaces]}}
    changed = Tokenizer.from_str(json.dumps(parts))
    return lambda text: list(changed.encode(text, add_special_tokens=False).ids)


def cut_otherwise(ours: Cuts, theirs: Cuts, texts: Iterable[str]) -> list[Otherwise]:
    """Return the texts that two tokenizers cut differently, with the ids of both."""
    return [(text, own, other) for text in texts if (own := ours(text)) != (other := theirs(text))]


def cuts_of(tokenizer: PreTrainedTokenizerBase) -> Cuts:
    """Return how a tokenizer cuts a text, without tokens that it adds."""
    return lambda text: list(call_tokenizer(tokenizer, text, add_special_tokens=False)["input_ids"])


def probe_prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return prompts in the form the model was trained on: conversations under its template, or plain texts."""
    template = served_template(tokenizer)
    if template is None or is_prompted_raw(tokenizer):
        return list(TEXTS)
    found = []
    for conversation in CONVERSATIONS:
        try:
            found.append(template.render([{"role": r, "content": c} for r, c in conversation], prompt=True))
        except BadRow:
            continue
    return found or list(TEXTS)


def other_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return texts in which llama.cpp may differ: white space, and added tokens that do more than stand for their text."""
    added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    texts = [token["content"] for token in added if any(token[key] for key in STRICT)]
    return [*TEXTS, *SPACED, *(between.format(text) for text in texts for between in ("a{}b", "a {} b"))]


def file_template(tokenizer: PreTrainedTokenizerBase, lead: str) -> str:
    """Return the chat template of a file; a model of raw text has one, since llama.cpp takes ChatML where there is none.

    Args:
        lead: what it writes before all else (`token_tables.TokenTables.lead`).
    """
    template = served_template(tokenizer)
    text = raw_template(tokenizer) if template is None else template.text
    return f"{{{{ {lead!r} }}}}{text}" if lead else text


def bos_added(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether llama.cpp puts BOS before every prompt: the tokenizer does, and its chat template does as well.

    llama.cpp knows one setting for raw text and for conversations, and takes a BOS that a template writes for its own.
    """
    bos = str(tokenizer.bos_token or "")
    raw = served_template(tokenizer) is None or is_prompted_raw(tokenizer)
    return added_tokens(tokenizer)[0] and (raw or all(text.startswith(bos) for text in probe_prompts(tokenizer)))
