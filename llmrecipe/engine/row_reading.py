"""How a model reads the rows of a batch, measured on the model at hand instead of looked up in a list of families.

A batch is padded to its longest row. A model that obeys its attention mask gives a row the states it has alone; some mix the
padding in whatever the mask says: a Fourier transform or a convolution over the columns, hashed attention, pooled queries.
A model that is trained to predict the next token must not see it; some families do unless their config says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmrecipe.data import collate
from llmrecipe.data.collate import Batch
from llmrecipe.models.random_state import random_state_kept
from llmrecipe.models.vocabulary import input_embedding

FINE, COARSE = 1e-4, 5e-2
"""Largest difference that is rounding, over the largest value: in float32, and in lower precision or of quantized weights."""
SHORT, LONG = 6, 12
"""Tokens of the rows that are compared."""
KEPT = 3
"""First tokens of a row that stay where its later ones are replaced."""


@dataclass(frozen=True)
class RowReading:
    """What the states of a row depend on besides its own tokens up to each of them."""

    apart: bool = False
    """Rows of different lengths cannot share a pass."""
    alone: bool = False
    """No rows can share a pass, not even those of equal length."""
    causal: bool = True
    """No state depends on a later token."""


def measure_reading(model: nn.Module, states: Callable[[Batch], Tensor]) -> RowReading:
    """Measure how a model reads rows; what cannot be measured (a model that reads no tokens) is taken to be in order.

    Args:
        states: returns the last hidden states (R, T, D) of a padded batch.
    """
    embedding = input_embedding(model)
    if not isinstance(embedding, nn.Embedding) or embedding.weight.device.type == "meta":
        return RowReading()
    probe = _Probe(model, states, embedding.num_embeddings)
    short, long = probe.row(3, SHORT), probe.row(17, LONG)
    changed = [*short[:KEPT], *probe.row(29, SHORT - KEPT)]
    own = probe.run([short])
    if own is None:
        return RowReading()
    together = probe.run([short, long, changed])
    if together is not None:
        padded = probe.equal(together[0, :SHORT], own[0])
        causal = probe.equal(together[2, :KEPT], together[0, :KEPT])
        if padded:
            return RowReading(causal=causal)
    pair = probe.run([short, changed])
    if pair is None:
        return RowReading(apart=True, alone=True)
    return RowReading(
        apart=True,
        alone=not probe.equal(pair[0], own[0]),
        causal=probe.equal(pair[1, :KEPT], pair[0, :KEPT]),
    )


def obeys(model: nn.Module, states: Callable[[Batch], Tensor]) -> bool:
    """Return whether no state that `states` returns depends on a later token; False where it cannot compute them."""
    embedding = input_embedding(model)
    if not isinstance(embedding, nn.Embedding):
        return False
    probe = _Probe(model, states, embedding.num_embeddings)
    short = probe.row(3, SHORT)
    both = probe.run([short, [*short[:KEPT], *probe.row(29, SHORT - KEPT)]])
    return both is not None and probe.equal(both[1, :KEPT], both[0, :KEPT])


def in_full_precision(model: nn.Module) -> bool:
    """Return whether all weights are float32 or float64, so that what differs by more than their rounding is different."""
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())


def same_states(model: nn.Module, found: Tensor, wanted: Tensor, coarse: bool = False) -> bool:
    """Return whether states of two passes are equal but for rounding.

    Args:
        coarse: a pass computed in lower precision than the weights have.
    """
    exact = not coarse and in_full_precision(model)
    scale = wanted.float().abs().max().clamp_min(1e-6)
    return bool((found.float() - wanted.float()).abs().max() <= (FINE if exact else COARSE) * scale)


@dataclass
class _Probe:
    """Passes over made-up rows, in evaluation mode and without a trace in the random state."""

    model: nn.Module
    states: Callable[[Batch], Tensor]
    vocabulary: int

    def row(self, start: int, length: int) -> list[int]:
        """Return consecutive token ids."""
        return [i % self.vocabulary for i in range(start, start + length)]

    def equal(self, found: Tensor, wanted: Tensor) -> bool:
        """Return whether states are equal but for rounding."""
        return same_states(self.model, found, wanted)

    @torch.no_grad()
    def run(self, rows: Sequence[list[int]]) -> Tensor | None:
        """Return the states of padded rows, or None where the model cannot compute them."""
        # A token of its own fills the padding: the vector of a padding token may be zero until it is trained.
        batch = collate.pad([collate.Sequence(ids, [0] * len(ids)) for ids in rows], 41 % self.vocabulary)
        if getattr(self.model.config, "is_encoder_decoder", False):
            read = collate.pad([collate.Sequence(self.row(5, len(ids)), [0] * len(ids)) for ids in rows], 0)
            assert read.attention_mask is not None, "padded rows have a mask"
            batch = batch.with_extra(encoder_ids=read.input_ids, encoder_mask=read.attention_mask)
        device = next(self.model.parameters()).device
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with random_state_kept(device):
                return self.states(batch.to(device))
        except Exception:  # families raise whatever their own code leads to; an inspection stops no run
            return None
        finally:
            for module, mode in modes:
                module.training = mode
