"""Prompt tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import Literal, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.additive._engines import prefix_from_text, virtual_tokens

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class PromptTuning(Wrapper):
    """Prompt tuning: X' = [E; X] with P trained embeddings E (P, d) before every document; only E trains.

    The virtual tokens are ordinary positions: documents begin at P, every document of a packed row has its own copy, none is a
    target, and a key/value cache holds them once. Encoder-decoder models get them in the encoder, where the decoder's
    cross-attention reads them too. E lives in the space of the embedding's output, so a prompt copied from tokens behaves as
    those tokens; a merged export adds P tokens with these embeddings, exactly.

    Step 0 is not the base model; with `init: text` it equals the base model fed that text.

    Paper: The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv 2104.08691). Encoders whose head reads the first
    position read a virtual token there, as PEFT does; `position: after_bos` keeps the first token in front.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    identity: ClassVar[bool] = False
    modality: ClassVar[str] = "text"
    otherwise: ClassVar[str] = "use vpt"
    unmergeable: ClassVar[str] = (
        "its rows stand after a document's first token, where no text can put them; with position: prefix they become tokens"
    )

    num_virtual_tokens: Rank = 20
    """Trained positions of each document."""
    init: Literal["vocab", "uniform", "normal", "text"] = "vocab"
    """Start: embeddings of random tokens, uniform in [-0.5, 0.5], standard normal, or the embeddings of `init_text`."""
    init_text: str = ""
    """Text for `init: text`, repeated or cut to the number of virtual tokens."""
    position: Literal["prefix", "after_bos"] = "prefix"
    """Before a document, or after its first token."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add the virtual tokens and initialize them."""
        virtual_tokens.attach_virtual_tokens(model, self.name, self.num_virtual_tokens, int(self.position == "after_bos"))
        virtual_tokens.init_virtual_tokens(model, self.name, self.init)

    def calibrates(self) -> bool:
        """Return whether they are initialized from a text."""
        return self.init == "text"

    def chooses(self) -> bool:
        """Return False: the text fills rows that are there."""
        return False

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Copy the embeddings of `init_text`."""
        if self.init == "text":
            ids = prefix_from_text.text_ids(probe.tokenizer, self.init_text, self.num_virtual_tokens, self.name)
            virtual_tokens.copy_tokens(model, self.name, ids)

    def as_tokens(self, model: nn.Module) -> Tensor | None:
        """Return the rows (P, d), where they come first: a merged folder adds them to the vocabulary."""
        return virtual_tokens.virtual_rows(model, self.name)[1].embeddings.detach() if self.position == "prefix" else None

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: P d train."""
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}
