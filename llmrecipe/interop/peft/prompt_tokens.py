"""Trained prompts as tokens: P new words in the vocabulary whose embeddings are the prompt's rows.

A text that begins with these words, spelled by the folder's tokenizer, is computed as the run computed the text alone: the
virtual tokens of a prompt are ordinary positions. A chat template writes them by itself; other texts need them in front, before
the token that the tokenizer may put at the beginning of a text.

The words can be read but must not be written. Their rows in the head are copies of the row of the token that was least likely
on the probe, so they never win and take next to nothing from the others; a head that was tied to the embedding is untied,
since its row would make the virtual token an answer like any other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.models import vocabulary
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.host import remove_hook
from llmrecipe.runs.open_model import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.methods._base.method import Wrapper
    from llmrecipe.models.pretrained import LanguageModel


PROMPT_FILE = "prompt.json"


@dataclass(frozen=True)
class Spelled:
    """A prompt written as new words of the vocabulary."""

    words: list[str]
    ids: list[int]
    share: float
    """Largest probability that all the words together get on the probe."""

    @property
    def text(self) -> str:
        """Return what a text begins with."""
        return "".join(self.words)

    def write(self, folder: Path) -> None:
        """Write the words and their ids next to the weights."""
        found = {"text": self.text, "ids": self.ids, "place": "before all tokens of a text, special ones included"}
        (folder / PROMPT_FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def notes(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Describe how the folder is used."""
        reported = f"the trained prompt became {len(self.ids)} tokens of the vocabulary ({PROMPT_FILE})"
        if getattr(tokenizer, "chat_template", None):
            reported += "; the chat template puts them before a conversation"
        ids = call_tokenizer(tokenizer, self.text + "a")["input_ids"]
        how = f"begin every other text with {self.words[0]} ... {self.words[-1]}, without spaces between them"
        if ids[: len(self.ids)] != self.ids:
            how = "of every other text, put their ids before all that the tokenizer gives"
        return [
            reported,
            f"{how}; a text without them is not computed as the run did",
            f"their own share of answers: {self.share:.2g}",
        ]


def wrapper_of(loaded: LoadedModel) -> Wrapper | None:
    """Return the only mounted wrapper whose prompt can be written as tokens; None where there is none.

    Raises:
        ModelError: there are two, or the head is tied in a way that has no room for tokens that are only read.
    """
    found = [w for w in loaded.mounted if not w.merges() and w.as_tokens(loaded.model) is not None]
    if len(found) > 1:
        names = " and ".join(f"'{w.name.split('_', 1)[1]}'" for w in found)
        raise ModelError(f"export --to merged: {names} stand before one text; only one prompt can become tokens")
    if found and loaded.head in ("seq2seq", "masked") and _tied(loaded.model):
        raise ModelError(
            f"export --to merged: '{found[0].name.split('_', 1)[1]}' becomes tokens that must not be answers, and the head of "
            f"this {loaded.model.config.model_type} is tied to its embedding; llmrecipe.load(run) uses it as it is"
        )
    return found[0] if found else None


def _tied(model: LanguageModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def detach_prompt(loaded: LoadedModel, wrapper: Wrapper) -> Tensor:
    """Read the embedding rows (P, D) of a prompt's tokens and remove its virtual tokens.

    They are in the space of the embedding's output, so a family's scale inside the embedding is divided out.
    """
    rows = wrapper.as_tokens(loaded.model)
    assert rows is not None, "`wrapper_of` looked"
    for _, module, name, _ in list(all_hooks(loaded.model, wrapper.name)):
        remove_hook(module, name)
    loaded.mounted.remove(wrapper)
    scale: Any = getattr(loaded.model.get_input_embeddings(), "embed_scale", 1.0)
    return rows / float(scale)


@torch.no_grad()
def add_prompt_words(loaded: LoadedModel, rows: Tensor, logits: Tensor) -> Spelled:
    """Add the words of a prompt to a folded model and its tokenizer.

    Args:
        logits: (..., V) of the run on the probe.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    known = tokenizer.get_vocab()
    words: list[str] = []
    number = 0
    while len(words) < len(rows):
        if f"<prompt_{number}>" not in known:
            words.append(f"<prompt_{number}>")
        number += 1
    vocabulary.add_tokens(tokenizer, words)
    ids = cast("list[int]", tokenizer.convert_tokens_to_ids(words))
    _prepend(tokenizer, "".join(words))
    tied = _tied(model)
    vocabulary.fit(model, tokenizer)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied and head is not None:
        head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    embed.weight[ids] = rows.to(embed.weight)
    if head is None:
        return Spelled(words, ids, 0.0)
    likely = logits.log_softmax(-1).flatten(0, -2).amax(0)
    least = int(likely[: min(ids)].argmin())
    for tensor in (head.weight, getattr(head, "bias", None)):
        if tensor is not None:
            tensor[ids] = tensor[least].clone()
    return Spelled(words, ids, len(ids) * float(likely[least].exp()))


def _prepend(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Have every chat template begin with a text."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        tokenizer.chat_template = {name: text + own for name, own in template.items()}
    elif template:
        tokenizer.chat_template = text + template
