"""Text to token ids, in batches: raw text with the tokenizer's special tokens, rendered templates without.

A template writes its own BOS, so encoding its text with special tokens would double it; raw text has none, so encoding it
without would lose it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.chat_templates import PROBE, Template, special_ids, template_of, turn_end_tokens

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Ids = list[int]
SHORT = 200
"""Most characters of a piece of a template whose ids are kept."""


class Tokens:
    """A tokenizer with the few facts the data layer needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.eos_text: str = tokenizer.eos_token or ""
        probe = self._encode(["a"], special=True)["input_ids"][0]
        self.adds_eos = self.eos is not None and len(probe) > 1 and probe[-1] == self.eos
        self.template: Template | None = template_of(tokenizer)
        self.ends = frozenset(turn_end_tokens(tokenizer))
        self.special = frozenset(special_ids(tokenizer))
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self._tails: dict[str, Ids] = {}

    def _encode(self, texts: Sequence[str], special: bool, offsets: bool = False) -> BatchEncoding:
        return call_tokenizer(
            self.tokenizer,
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    def raw(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of raw texts, with the special tokens the tokenizer adds."""
        return self._encode(texts, special=True)["input_ids"] if texts else []

    def raw_prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Return ids like `raw`, without an end token the tokenizer adds, since a prompt goes on."""
        found = self.raw(texts)
        return [ids[:-1] if ids and ids[-1] == self.eos else ids for ids in found] if self.adds_eos else found

    def documents(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of complete raw texts: the end token's text is appended where it is missing."""
        return self.document_encodings(texts)[0]

    def document_encodings(self, texts: Sequence[str]) -> tuple[list[Ids], list[Encoding] | None]:
        """Return the ids of complete raw texts, and a fast tokenizer's encodings, which have each token's place in its text."""
        if not texts:
            return [], None
        encoded = self._encode(
            [t if not self.eos_text or t.endswith(self.eos_text) else t + self.eos_text for t in texts], True
        )
        found: list[Ids] = encoded["input_ids"]
        if self.adds_eos:
            found = [ids[:-1] if ids[-2:] == [self.eos, self.eos] else ids for ids in found]
        return found, encoded.encodings

    def rendered(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of rendered templates: nothing is added."""
        return self._encode(texts, special=False)["input_ids"] if texts else []

    def rendered_encodings(self, texts: Sequence[str]) -> tuple[list[Ids], list[Encoding]]:
        """Return the ids of rendered templates, with the library's encodings, which have each token's place in the text."""
        found = self._encode(texts, special=False)
        assert found.encodings is not None, "only fast tokenizers have places"
        return found["input_ids"], found.encodings

    def tails(self, texts: Iterable[str]) -> dict[str, Ids]:
        """Return the ids of pieces of templates: headers and turn ends, which are the same in every row, are kept."""
        wanted = list(dict.fromkeys(texts))
        missing = [text for text in wanted if text not in self._tails]
        found = {text: self._tails[text] for text in wanted if text in self._tails}
        found |= zip(missing, self.rendered(missing), strict=True)
        if len(self._tails) > 4096:
            self._tails.clear()
        self._tails |= {text: found[text] for text in missing if len(text) <= SHORT}
        return found

    def header(self) -> int:
        """Return the length in tokens of the assistant's header, which no truncation may cut off."""
        if self.template is None:
            return 0
        plain, prompt = self.template.render(PROBE), self.template.render(PROBE, prompt=True)
        same = next((i for i, (a, b) in enumerate(zip(plain, prompt)) if a != b), min(len(plain), len(prompt)))
        return len(self.rendered([prompt[same:]])[0]) if len(prompt) > same else 0

    def is_space(self, ids: Sequence[int]) -> bool:
        """Return whether tokens are nothing but white space."""
        return not str(self.tokenizer.decode(list(ids))).strip()
