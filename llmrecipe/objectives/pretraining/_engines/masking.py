"""Which tokens a masked objective hides, and what stands in their place.

Every draw follows from (seed, epoch, row) alone: a new mask in each epoch, the same one on any number of processes, in any
micro-batch and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from llmrecipe.core.errors import ModelError
from llmrecipe.data.collate import Batch
from llmrecipe.data.collate import Sequence as Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MASK, RANDOM, KEEP = 0, 1, 2
"""What stands in the place of a hidden token: the mask token, a random token, or the token itself."""
KINDS = {"mask": MASK, "random": RANDOM, "keep": KEEP}
SPAN_GEOMETRIC, LONGEST_SPAN = 0.2, 10
"""Spans have min(Geometric(p), longest) words (SpanBERT, arXiv 1907.10529)."""


@dataclass(frozen=True)
class MaskPlan:
    """How tokens are chosen and replaced."""

    prob: float
    mask: float
    random: float
    exact: bool
    unit: str
    """token, word or span."""
    most: int | None
    """Most tokens that are hidden in a row."""


@dataclass(frozen=True)
class Hidden:
    """The hidden tokens of a row, in order."""

    places: list[int]
    """Their indices in the row."""
    kinds: list[int]
    """`MASK`, `RANDOM` or `KEEP` of each."""
    shown: list[int]
    """The token id in the place of each."""


def hide(
    plan: MaskPlan, words: Sequence[int], ids: Sequence[int], draws: np.random.Generator, mask_id: int, pool: np.ndarray
) -> Hidden:
    """Choose the hidden tokens of a row and what stands in their place; none where all its tokens are special.

    Args:
        words: word of each token, -1 for special tokens, which are never hidden.
        ids: the row's token ids.
        mask_id: id of the mask token.
        pool: (P,) the ids that a random token is drawn from.
    """
    groups = _groups(words) if plan.unit != "token" else [[i] for i, word in enumerate(words) if word >= 0]
    if not groups:
        return Hidden([], [], [])
    budget = max(1, round(plan.prob * len(ids)))
    if plan.most is not None:
        budget = min(budget, plan.most)
    if plan.unit == "span":
        chosen = _spans(groups, budget, draws)
    elif plan.exact:
        chosen = _within(groups, budget, draws)
    else:
        chosen = _independent(groups, plan, draws)
    places: list[int] = []
    kinds: list[int] = []
    for tokens in chosen:
        # One decision for a whole span, one for each token otherwise (BERT draws per piece of a word too).
        drawn = [draws.random()] * len(tokens) if plan.unit == "span" else draws.random(len(tokens))
        places += tokens
        kinds += [MASK if u < plan.mask else RANDOM if u < plan.mask + plan.random else KEEP for u in drawn]
    order = sorted(range(len(places)), key=places.__getitem__)
    places, kinds = [places[i] for i in order], [kinds[i] for i in order]
    others = pool[draws.integers(len(pool), size=len(places))]
    shown = [mask_id if k == MASK else int(o) if k == RANDOM else ids[i] for i, k, o in zip(places, kinds, others, strict=True)]
    return Hidden(places, kinds, shown)


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the mask token.

    Raises:
        ModelError: the tokenizer has none.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError(
            "tokenizer: it has no mask token, which the objective puts in the place of hidden tokens; "
            "name or add one with tokenizer.mask_token=<mask>"
        )
    return int(tokenizer.mask_token_id)


_ordinary: WeakKeyDictionary[Any, np.ndarray] = WeakKeyDictionary()


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the ids (P,) of all tokens that are not special."""
    if tokenizer not in _ordinary:
        special = set(tokenizer.all_special_ids)
        _ordinary[tokenizer] = np.array(sorted(i for i in tokenizer.get_vocab().values() if i not in special))
    return _ordinary[tokenizer]


def corrupted(ids: Sequence[int], hidden: Hidden) -> Tokens:
    """Return a sequence as the model reads it, nothing of it a target of the next-token kind."""
    shown = list(ids)
    for place, token in zip(hidden.places, hidden.shown, strict=True):
        shown[place] = token
    return Tokens(shown, [0] * len(shown), prompt=len(shown))


def masked_targets(batch: Batch, rows: Sequence[Sequence[int]], hidden: Sequence[Hidden]) -> Batch:
    """Return a batch whose targets are the hidden tokens, each predicted by the state at its own place.

    `extra` gains one index tensor for each of `KINDS`: which of the N targets are of that kind.

    Args:
        batch: sequences laid out in this order, without targets.
        rows: the tokens of each before any was hidden.
    """
    kinds = [kind for found in hidden for kind in found.kinds]
    of_kind = {
        name: torch.tensor([i for i, kind in enumerate(kinds) if kind == number], dtype=torch.long)
        for name, number in KINDS.items()
    }
    return at_own_places(batch, rows, [found.places for found in hidden]).with_extra(**of_kind)


def at_own_places(batch: Batch, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Batch:
    """Return a batch whose targets are tokens of its rows, each predicted by the state at its own place.

    Args:
        batch: sequences laid out in this order, as long as the rows, without targets.
        rows: the tokens of each.
        places: which of them are targets.
    """
    here = batch.here
    lengths = torch.tensor([len(ids) for ids in rows] or [1])
    owner = [i for i, found in enumerate(places) for _ in found]
    sequence = torch.tensor(owner, dtype=torch.long)
    starts = here.last - lengths + 1
    offsets = torch.tensor([place for found in places for place in found], dtype=torch.long)
    target = [ids[place] for ids, found in zip(rows, places, strict=True) for place in found]
    found = replace(
        here,
        source=starts[sequence] + offsets,
        target=torch.tensor(target, dtype=torch.long),
        sequence=sequence,
    )
    return found.to(batch.last.device)


def _groups(words: Sequence[int]) -> list[list[int]]:
    """Return the places of each word's tokens."""
    found: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        if word >= 0:
            found.setdefault(word, []).append(place)
    return list(found.values())


def _within(groups: list[list[int]], budget: int, draws: np.random.Generator) -> list[list[int]]:
    """Take groups in random order while they fit in the budget; where none fits, the shortest one drawn first."""
    order = [groups[i] for i in draws.permutation(len(groups))]
    chosen: list[list[int]] = []
    left = budget
    for group in order:
        if len(group) <= left:
            chosen.append(group)
            left -= len(group)
    return chosen or [min(order, key=len)]


def _independent(groups: list[list[int]], plan: MaskPlan, draws: np.random.Generator) -> list[list[int]]:
    """Take each group with the probability, at least one of them, at most `plan.most` tokens."""
    taken = draws.random(len(groups)) < plan.prob
    chosen = [group for group, one in zip(groups, taken, strict=True) if one]
    chosen = chosen or [groups[int(draws.integers(len(groups)))]]
    if plan.most is None or sum(map(len, chosen)) <= plan.most:
        return chosen
    return _within(chosen, plan.most, draws)


def _spans(words: list[list[int]], budget: int, draws: np.random.Generator) -> list[list[int]]:
    """Take spans of whole words from random starts until the budget is met; a word that would exceed it ends a span."""
    free = [True] * len(words)
    chosen: list[list[int]] = []
    left = budget
    for start in draws.permutation(len(words)):
        length = min(int(draws.geometric(SPAN_GEOMETRIC)), LONGEST_SPAN)
        span: list[int] = []
        for word in range(int(start), min(int(start) + length, len(words))):
            if not free[word] or len(words[word]) > left:
                break
            free[word] = False
            left -= len(words[word])
            span += words[word]
        if span:
            chosen.append(span)
        if not left:
            break
    return chosen or [min(words, key=len)]
