"""The hypermodel of HyperTuning: an encoder-decoder that reads examples and writes the rows of an adapter.

Letters: K adapters, T' tokens of the examples of one, Q queries, d width of the hypermodel, n rows of a block, w their width.

    E = encoder(examples)          (K, 1 + T', d)
    Z = decoder(queries, E)        (K, Q, d)     a learned table of queries in the place of tokens, each seeing all others
    row = W_2 norm(gelu(W_1 z)) / sqrt(h) + b_2  one pair W_1, W_2 for each kind of row, shared by all layers

The norm, u / rms(u) of h numbers, makes the size of fresh rows known: entries of W_2 ~ N(0, s^2) give rows of standard
deviation s. Divided by sqrt(h), as in HINT (arXiv 2212.10315), a row moves no faster in a wide hypermodel than in a narrow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.models.hooks.shared_module import SharedModule
from llmrecipe.models.native import NativeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EPSILON = 1e-6


@dataclass(frozen=True)
class RowBlock:
    """A matrix of an adapter that is written row by row."""

    kind: str
    """Blocks of one kind share the layers that write their rows."""
    rows: int
    """n"""
    width: int
    """w"""
    std: float
    """Standard deviation of fresh rows; 0 starts at zero."""


@dataclass(frozen=True)
class WritingPlan:
    """How rows are written."""

    per_matrix: bool
    """One query a block instead of one a row."""
    hidden: int | None
    """h, width between W_1 and W_2; d where None."""
    start: str
    """`normal`, or `bias`: W_2 = 0, and each row is added to one of a learned table."""
    normed: bool
    """Scale rows that do not start at zero to the size they start with."""
    causal: bool
    """Let a query see only those before it."""


class RowWriter(nn.Module):
    """W_1, W_2 and b_2 of one kind of row."""

    def __init__(self, width: int, blocks: Sequence[RowBlock], plan: WritingPlan):
        super().__init__()
        first = blocks[0]
        hidden = plan.hidden or width
        self.rows = 1 if not plan.per_matrix else first.rows
        self.width, self.std, self.normed = first.width, first.std, plan.normed and first.std > 0
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, self.rows * first.width)
        nn.init.zeros_(self.outer.bias)
        if plan.start == "bias" or not first.std:
            nn.init.zeros_(self.outer.weight)
        else:
            nn.init.normal_(self.outer.weight, std=first.std)
        total = sum(block.rows for block in blocks)
        self.start = None
        if plan.start == "bias" and first.std:
            self.start = nn.Parameter(torch.randn(total, first.width) * first.std)

    def forward(self, states: Tensor) -> Tensor:
        """Write rows (K, N, w) from the states (K, q, d) of this kind's queries; N counts the rows of all its blocks."""
        u = F.gelu(self.inner(states))
        # u / rms(u) / sqrt(h)
        u = u * torch.rsqrt(u.square().sum(-1, keepdim=True) + EPSILON)
        rows = self.outer(u).flatten(1).unflatten(1, (-1, self.width))
        if self.start is not None:
            rows = rows + self.start
        if self.normed:
            rows = rows * (self.std * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPSILON * self.std**2))
        return rows


class Hypermodel(SharedModule):
    """Encoder-decoder, queries and writers; float32, whatever the model it adapts."""

    def __init__(self, trunk: PreTrainedModel, blocks: Sequence[RowBlock], plan: WritingPlan):
        super().__init__()
        self.trunk, self.blocks, self.plan = trunk, tuple(blocks), plan
        width = width_of(trunk.config)
        self.kinds = list(dict.fromkeys(block.kind for block in blocks))
        own = {kind: [b for b in blocks if b.kind == kind] for kind in self.kinds}
        self.counts = [len(own[k]) if plan.per_matrix else sum(b.rows for b in own[k]) for k in self.kinds]
        self.queries = nn.Parameter(torch.randn(sum(self.counts), width) * 0.02)
        self.first = nn.Parameter(torch.randn(1, width) * 0.02)
        self.writers = nn.ModuleList(RowWriter(width, own[kind], plan) for kind in self.kinds)

    def forward(self, examples: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Write the blocks, each (K, n, w), from the ids and mask (K, T') of examples.

        The encoder reads a learned vector before them; without examples, that vector alone, and K = 1.
        """
        decoder: Any = self.trunk.get_decoder()
        encoder: Any = self.trunk.get_encoder()
        if examples is None:
            # A masked token, so that the embedding takes part in every step on all processes.
            none = torch.zeros(1, 1, dtype=torch.long, device=self.queries.device)
            examples = none, none
        ids, seen = examples
        embedded = self.trunk.get_input_embeddings()(ids)
        inputs = torch.cat([self.first.expand(len(ids), -1, -1).to(embedded.dtype), embedded], 1)
        mask = torch.cat([seen.new_ones(len(ids), 1), seen], 1)
        states = encoder(inputs_embeds=inputs, attention_mask=unread(mask, inputs)).last_hidden_state
        queries = self.queries.expand(len(states), -1, -1)
        # A mask of zeros over all pairs lets every query see all others; without one the decoder would be causal.
        pairs = None if self.plan.causal else queries.new_zeros(len(states), 1, queries.shape[1], queries.shape[1])
        out = decoder(
            inputs_embeds=queries,
            attention_mask=pairs,
            encoder_hidden_states=states,
            encoder_attention_mask=unread(mask, queries),
            use_cache=False,
        ).last_hidden_state
        parts = out.split(self.counts, 1)
        written = {k: w(z) for k, w, z in zip(self.kinds, self.writers, parts, strict=True)}
        pieces = {k: iter(rows.split([b.rows for b in self.blocks if b.kind == k], 1)) for k, rows in written.items()}
        return [next(pieces[block.kind]) for block in self.blocks]


def unread(mask: Tensor, queries: Tensor) -> Tensor:
    """Return the mask (K, C) of columns as it is on the host; of a device as what is added to the scores, (K, 1, q, C).

    A mask of columns is looked into to see whether it masks anything, and the host would wait for the answer.

    Args:
        queries: (K, q, d) what attends to the columns.
    """
    return mask if mask.device.type == "cpu" else over_pairs(mask, queries)


def over_pairs(mask: Tensor, queries: Tensor) -> Tensor:
    """Return a mask (K, C) of columns as what is added to the scores of all pairs, (K, 1, q, C)."""
    added = queries.new_zeros(mask.shape).masked_fill(mask == 0, torch.finfo(queries.dtype).min)
    return added[:, None, None, :].expand(-1, -1, queries.shape[1], -1)


def width_of(config: PreTrainedConfig) -> int:
    """Return the width of an encoder-decoder's states."""
    return int(getattr(config, "d_model", None) or config.hidden_size)


def native_config(vocabulary: int, width: int, depth: int, pad_id: int | None) -> PreTrainedConfig:
    """Return the configuration of a native encoder-decoder that is trained from nothing."""
    heads = next(h for h in (8, 4, 2, 1) if width % (2 * h) == 0 or h == 1)
    return NativeConfig(
        kind="encoder_decoder", vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        pad_token_id=pad_id, decoder_start_token_id=pad_id or 0, use_cache=False,
    )  # fmt: skip
