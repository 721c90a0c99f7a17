"""The head of a language model as one module, from states to logits.

Masked language models keep it in one child or in several that are called in turn; the module that ties with the embedding is
only the last of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmrecipe.core.errors import ModelError

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel

CHAINS: tuple[tuple[str, ...], ...] = (
    ("cls",),
    ("lm_head",),
    ("predictions",),
    ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    ("generator_predictions", "generator_lm_head"),
    ("head", "decoder"),
    ("lm_head", "decoder"),
)
"""Children of a language model that lead from states (..., D) to logits (..., V), in the order they are called."""


def head_chain(model: nn.Module) -> nn.Module | None:
    """Return a head made of known children of a model, one module (..., D) -> (..., V); None where it has no such children."""
    # Longer chains first: a child that is a head of its own in one family is the first step of two in another.
    for chain in sorted(CHAINS, key=len, reverse=True):
        parts = [part for name in chain if isinstance(part := getattr(model, name, None), nn.Module)]
        # The decoder of an encoder-decoder is a model, which its head follows.
        if len(parts) == len(chain) and not isinstance(parts[-1], PreTrainedModel):
            return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    return None


class BiasedHead(nn.Module):
    """A head (..., D) -> (..., V) and the bias (1, V) that its model adds to the logits outside of it (BART, Marian)."""

    def __init__(self, head: nn.Module, bias: Tensor):
        super().__init__()
        self.head = head
        self.bias = bias
        self.out_features = bias.shape[-1]

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits of states."""
        return self.head(states) + self.bias[0]


def language_head_of(model: LanguageModel) -> nn.Module:
    """Return the module that maps states (..., D) to the logits (..., V) of a language model."""
    head = head_chain(model) or model.get_output_embeddings()
    assert head is not None, "a language model has a head"
    bias = getattr(model, "final_logits_bias", None)
    return head if bias is None else BiasedHead(head, bias)


def check_masked_head(model: LanguageModel) -> None:
    """Refuse a masked language model whose head is not known.

    Raises:
        ModelError: its family arranges the head in another way.
    """
    if head_chain(model) is not None:
        return
    raise ModelError(
        f"model.path: the head of '{model.config.model_type}' is not known as one of a masked language model "
        f"(known: {'; '.join(' -> '.join(chain) for chain in CHAINS)})"
    )
