"""What ends an answer: an end token, a stop text, or the limit of its length.

A stop text is searched for in the decoded text, so it may begin inside one token and end inside another. It is no part of the
answer: the text ends before the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.engine.sampling import Sampling
    from llmrecipe.models.pretrained import LanguageModel

MARGIN = 8
"""Tokens and characters read before the earliest place where a stop text can begin: a decoder may treat the first one apart."""


def end_tokens(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those the checkpoint's generation settings name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({int(t) for t in found if t is not None})


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop text begins; None where none occurs.

    Examples:
        >>> first_stop("two hens. Q: how", ["Q:", "hens"])
        4
    """
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


class AnswerEnds:
    """Decides where answers end, and what their text is.

    Args:
        tokens: that end an answer. A stop text that is a special token joins them: decoded text leaves it out.
        sampling: names the stop texts and the limit of the length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], sampling: Sampling):
        self.tokenizer, self.stops, self.most = tokenizer, sampling.stop, sampling.max_new_tokens
        known = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True) if self.stops else ()
        self.tokens = frozenset({*tokens, *(token for text, token in known if text in self.stops)})
        self.longest = max(map(len, self.stops), default=0)

    def reached(self, new: Sequence[int]) -> bool:
        """Return whether an answer ends with the newest of its tokens; call it after each of them."""
        return len(new) >= self.most or self.finished(new)

    def finished(self, new: Sequence[int]) -> bool:
        """Return whether an answer came to its own end: by a token, or by a stop text with the newest token."""
        if not new:
            return False
        return new[-1] in self.tokens or (bool(self.stops) and first_stop(self._tail(new), self.stops) is not None)

    def text(self, new: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens, up to the first stop text, stripped."""
        whole = self._decoded(new)
        return whole[: first_stop(whole, self.stops)].strip()

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tail(self, new: Sequence[int]) -> str:
        """Return the end of the text that holds every stop text the newest token can have completed."""
        count = self.longest + MARGIN
        while True:
            text = self._decoded(new[-count:])
            if count >= len(new) or len(text) - len(self._decoded(new[-1:])) >= self.longest + MARGIN:
                return text
            count *= 2


class StopRows:
    """Ends rows of Transformers' own `generate` one by one, and keeps how many new tokens each has.

    Args:
        start: tokens of a row that belong to no answer.
    """

    def __init__(self, ends: AnswerEnds, start: int):
        self.ends, self.start = ends, start
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: object, **more: object) -> Tensor:
        """Return which rows (R,) have ended, from the ids of all tokens so far, (R, T)."""
        for row, new in enumerate(input_ids[:, self.start :].tolist()):
            if row not in self.lengths and self.ends.reached(new):
                self.lengths[row] = len(new)
        done = [row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device)


def answer_ends(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> AnswerEnds:
    """Return what ends the answers of a model."""
    return AnswerEnds(tokenizer, end_tokens(model, tokenizer), sampling)
