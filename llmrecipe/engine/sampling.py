"""How tokens are picked: greedily, or from a stream of random numbers that belongs to one answer alone.

Letters: R rows, V vocabulary.

    p = softmax(top_p(top_k(logits / temperature)))        token = min {v : p_1 + ... + p_v >= u_t},  u_t ~ U(0, 1]

The numbers u_1, u_2, ... of an answer follow from the seed and the answer's key and from nothing else, so an answer does not
depend on which others share its batch, on the batch's size, or on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.generation import logits_process as known

from llmrecipe.data.transfer import to_device

SHARES = 2.0**52
"""In which shares of probability are counted where their sums have to be exact."""
Report = Callable[[int, int], None]
"""Takes the index of an answer and its next token, as soon as it is picked."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy; otherwise all logits are divided by it."""
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 16
    """Answers generated at once."""
    seed: int | None = None
    """Seed of the sampling; None draws one from the running random state."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""


class NextTokens(Protocol):
    """What decides the next tokens of rows."""

    greedy: bool
    """Whether each is the likeliest, so that a library's own greedy search picks the same."""

    def pick(self, logits: Tensor, answers: Sequence[int], at: Sequence[int]) -> Tensor:
        """Return the next token of each row, (R,), from scores (R, V); see `Picker.pick`."""


class Picker:
    """Next tokens of rows, each from its own stream.

    Args:
        keys: of the answers, which name their streams.
        report: called with (answer, token) for each token at once; what it raises ends the decoding.
        record: keep the log-probability of every token that is picked.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[int | str], report: Report | None = None, record: bool = False):
        self.likeliest, self.report, self.record = sampling.temperature <= 0, report, record
        self.greedy = self.likeliest and report is None
        self.temperature = 1.0 if self.likeliest else float(sampling.temperature)
        self.recorded: dict[int, list[Tensor]] = {}
        self.uniform = torch.empty(0)
        """(answers, max_new_tokens) u in float64; empty where nothing is drawn."""
        self.warpers = known.LogitsProcessorList()
        if self.likeliest:
            return
        seed = int(torch.randint(2**31, (1,))) if sampling.seed is None else sampling.seed
        self.uniform = torch.stack([stream(seed, key, sampling.max_new_tokens) for key in keys])
        if sampling.temperature != 1.0:
            self.warpers.append(known.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self.warpers.append(known.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.warpers.append(TopP(sampling.top_p))

    def pick(self, logits: Tensor, answers: Sequence[int], at: Sequence[int]) -> Tensor:
        """Pick the next token of each row, (R,).

        Args:
            logits: (R, V).
            answers: which answer each row is.
            at: how many tokens it has.
        """
        tokens = logits.argmax(-1) if self.likeliest else self._drawn(logits, answers, at)
        if self.record:
            scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
            picked = scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            for answer, value in zip(answers, picked.unbind(), strict=True):
                self.recorded.setdefault(answer, []).append(value)
        if self.report is not None:
            for answer, token in zip(answers, tokens.tolist(), strict=True):
                self.report(answer, token)
        return tokens

    def logprobs(self, answer: int, count: int) -> Tensor:
        """Return log softmax(logits / temperature) of an answer's first tokens, (count,) on the CPU; temperature 1 if greedy.

        They are those of the whole distribution, before `top_k` and `top_p`.
        """
        values = self.recorded.get(answer, [])[:count]
        return torch.stack(values).float().cpu() if values else torch.zeros(0)

    def _drawn(self, logits: Tensor, answers: Sequence[int], at: Sequence[int]) -> Tensor:
        scores = self.warpers(torch.empty(0), logits.to(torch.promote_types(logits.dtype, torch.float32)))  # type: ignore[arg-type]
        cumulative = running_sums(scores.double().softmax(-1))
        u = to_device(self.uniform[list(answers), list(at)], logits.device)[:, None]
        return in_vocabulary(torch.searchsorted(cumulative, u * cumulative[:, -1:]).squeeze(1), logits.shape[-1], logits.device)


def in_vocabulary(tokens: Tensor, vocabulary: int, device: torch.device) -> Tensor:
    """Return drawn tokens (R,), on a GPU cut to the vocabulary: scores that are no numbers have none.

    The host raises where it looks such a token up. A GPU would end every further call of this process, and with it the report
    of the step whose update left no numbers behind, which is read after what follows it has been started.
    """
    return tokens if device.type == "cpu" else tokens.clamp(max=vocabulary - 1)


class TopP(known.TopPLogitsWarper):
    """The likeliest tokens that have `top_p` together, as Transformers has it, on a device without deterministic sums too."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (R, V), the others' at minus infinity."""
        if not _sums_vary(scores):
            return super().__call__(input_ids, scores)
        ordered, places = scores.sort(descending=False)
        left_out = running_sums(ordered.softmax(-1)) <= 1 - self.top_p
        left_out[..., -self.min_tokens_to_keep :] = False
        return scores.masked_fill(left_out.scatter(1, places, left_out), self.filter_value)


def _sums_vary(x: Tensor) -> bool:
    """Return whether torch refuses running sums of floats where a tensor is: on a GPU, where it is to be deterministic."""
    return x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def running_sums(shares: Tensor) -> Tensor:
    """Return the running sums (R, V) of shares, which add up to 1 in each row."""
    if not _sums_vary(shares):
        return shares.cumsum(-1)
    # Sums of integers are the same in any order.
    return (shares.double() * SHARES).round().long().cumsum(-1).double() / SHARES


def stream(seed: int, key: int | str, count: int) -> Tensor:
    """Draw (count,) float64 numbers in (0, 1], the same for the same seed and key."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return 1.0 - torch.rand(count, generator=generator, dtype=torch.float64)


class PickerProcessor:
    """A picker as a logits processor for one batch of Transformers' own `generate`: all tokens but the picked are ruled out.

    Args:
        answers: which answer each row of the batch is.
    """

    def __init__(self, picker: NextTokens, answers: Sequence[int]):
        self.picker, self.answers, self.at = picker, answers, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (R, V) with one finite entry a row."""
        token = self.picker.pick(scores, self.answers, [self.at] * len(self.answers))[:, None]
        self.at += 1
        return torch.full_like(scores, float("-inf")).scatter(1, token, scores.gather(1, token))
