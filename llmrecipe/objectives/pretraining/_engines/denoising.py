"""Options of denoising autoencoders, and what a noised row is."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Field, Fraction, Literal, NonNegativeFloat, PositiveFloat
from llmrecipe.core.registry import options
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.pretraining._engines.masking import mask_token, ordinary_tokens
from llmrecipe.objectives.pretraining._engines.span_corruption import corrupt_spans, noise_mask, span_counts
from llmrecipe.objectives.pretraining._engines.text_noise import NEW, NoisePlan, PlainText, Vocabulary, add_noise
from llmrecipe.objectives.row_draws import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = ("mask_ratio", "mask_tokens", "delete", "insert", "permute_sentences", "rotate")
"""Options that are noises of BART; None stands for the default of the form."""
MOVING = ("mask_ratio", "delete", "insert", "permute_sentences", "rotate")
"""Noises after which a token is no longer at its own place."""
SENTINEL = re.compile(r"<extra_id_(\d+)>")
FORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SHARES, ("bart", "mse", "tsdae")),
    **dict.fromkeys(("poisson", "replace_length"), ("bart", "tsdae")),
    "mask_random": ("bart", "mse", "tsdae"),
    **dict.fromkeys(("noise_density", "mean_span"), ("t5",)),
    "loss_on": ("bart", "mse"),
    "compat": ("bart",),
    "layout": ("bart", "t5"),
    "pool": ("tsdae",),
    **dict.fromkeys(("target", "sigma"), ("mse",)),
}
"""Option -> forms that read it."""
FULL_STOP, WORD_START = ".", "\u0120"
"""A full stop in a byte-level BPE, whose words begin with the other one."""


@dataclass(frozen=True)
class NoisedRow:
    """A row as the model reads it, and what it is to predict."""

    source: list[int]
    target: list[int]
    copied: list[bool | None]
    """Whether each target stands in the source; None for sentinels and special tokens."""
    noised: int
    """Tokens of the text that do not stand in the source."""
    tokens: int
    """Tokens of the text."""
    lead: int = 0
    """Special tokens that begin both source and target."""


@options
class Denoising:
    """Mixin for an `Objective` that adds noise to its rows and predicts them."""

    form: Literal["bart", "t5", "mse", "tsdae"] = "bart"
    """Predict the text from a noised one, the spans that sentinels stand for, the embeddings of the text (squared error), or
    the text from one vector of a noised one."""
    mask_ratio: Fraction | None = None
    """Share of the words that are in masked spans. Default: 0.3; 0 for an encoder."""
    poisson: PositiveFloat | None = 3.0
    """Mean of the lengths of those spans, in words; spans of no words put in a mask. Null: each word by itself."""
    replace_length: Literal[-1, 0, 1] = 1
    """Masks in the place of a span: one, none (0), or one for each token (-1)."""
    mask_random: Fraction = 0.1
    """Probability that a mask is a random token instead."""
    mask_tokens: Fraction | None = None
    """Share of the tokens that become one mask each. Default: 0; 0.15 for an encoder with form bart or mse."""
    delete: Fraction | None = None
    """Share of the tokens that are removed; TSDAE: probability of each word. Default: 0; TSDAE: 0.6."""
    insert: NonNegativeFloat | None = None
    """Masks that are put in, as a share of the length. Default: 0."""
    permute_sentences: Fraction | None = None
    """Share of the sentences that change places with one another. Default: 1; 0 for an encoder."""
    rotate: Fraction | None = None
    """Probability that the text starts at another of its tokens. Default: 0."""
    noise_density: Fraction = 0.15
    """T5: share of the tokens that are in spans."""
    mean_span: float = Field(3.0, ge=1.0)
    """T5: mean length of those spans, in tokens."""
    loss_on: Literal["all", "corrupted"] = "all"
    """Targets: all tokens of the text, or those that the noise removed."""
    compat: Literal["none", "fairseq"] = "none"
    """With fairseq, noise of BART as that code makes it (at least one of the masks put in is a random token, random tokens may
    be special ones, sentences end at full stops alone, rotations by nothing)."""

    def plan(self, kind: str) -> NoisePlan:
        """Return the noises of the text.

        Args:
            kind: of the model: seq2seq, causal or masked.
        """
        defaults = {"mask_tokens": 0.15} if kind == "masked" else {"mask_ratio": 0.3, "permute_sentences": 1.0}
        defaults = {"delete": 0.6} if self.form == "tsdae" else defaults
        shares: dict[str, Any] = {
            name: defaults.get(name, 0.0) if (own := getattr(self, name)) is None else own for name in SHARES
        }
        return NoisePlan(
            **shares, poisson=self.poisson, replace_length=self.replace_length, mask_random=self.mask_random,
            by_word=self.form == "tsdae", fairseq=self.compat == "fairseq",
        )  # fmt: skip

    def check_noise(self, kind: str) -> None:
        """Refuse noise that the kind of model, or the form, cannot undo.

        Raises:
            RecipeError: it names the option.
        """
        if self.form == "t5" and kind == "masked":
            raise RecipeError(
                "objective.form: t5: an encoder has no decoder to write the spans with; use objective.form=bart (masks, "
                "each predicted at its place), or an encoder-decoder"
            )
        if self.form == "tsdae" and kind != "masked":
            raise RecipeError(
                "objective.form: tsdae: its decoder is the encoder itself with cross-attention, so it trains encoders "
                "(BERT, or model.config.kind=encoder); use objective.form=bart for a model with a decoder"
            )
        if self.form == "mse" and kind != "masked":
            raise RecipeError(
                "objective.form: mse: compares each state with the embedding at its place, which needs an encoder (BERT, or "
                "model.config.kind=encoder)"
            )
        if (
            self.form != "tsdae"
            and kind == "masked"
            and (moved := next((name for name in MOVING if getattr(self, name)), None))
        ):
            raise RecipeError(
                f"objective.{moved}: moves tokens, and an encoder predicts each at its own place; use objective.mask_tokens, "
                "or an encoder-decoder"
            )

    def check_tokens(self, kind: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        """Refuse a tokenizer without the tokens that the noise is made of.

        Args:
            longest: tokens of the longest row.

        Raises:
            ModelError: it names the key that adds them.
        """
        if self.form == "t5":
            known, needed = len(sentinels(tokenizer)), max(span_counts(longest, self.noise_density, self.mean_span)[1], 1)
            if needed > known:
                raise ModelError(
                    f"tokenizer: rows of {longest} tokens have up to {needed} spans, and it has {known} sentinels for them "
                    f"(<extra_id_0>, <extra_id_1>, ...); add them with tokenizer.add_tokens=[<extra_id_{known}>, ...], shorten "
                    "the rows with data.max_length, or make fewer spans with objective.mean_span"
                )
            return
        plan = self.plan(kind)
        if (plan.mask_ratio and plan.replace_length) or plan.mask_tokens or plan.insert:
            mask_token(tokenizer)

    def noise_facts(self, kind: str) -> dict[str, Any]:
        """Return the noises in force, for the report of a run."""
        if self.form == "t5":
            return {"noise_density": self.noise_density, "mean_span": self.mean_span}
        plan = asdict(self.plan(kind))
        return {name: plan[name] for name in SHARES if plan[name]}

    def noised_row(self, row: dict[str, Any], roles: Roles, kind: str) -> NoisedRow:
        """Add noise to a row; all draws follow from (seed, epoch, row).

        Args:
            row: with ids, words and sentences, `row` and, in training, `epoch`.
        """
        places = [i for i, sentence in enumerate(row["sentences"]) if sentence >= 0]
        first, last = places[0], places[-1] + 1
        before, after = list(row["ids"][:first]), list(row["ids"][last:])
        end = roles.tokenizer.eos_token_id
        closing = after or ([] if end is None or kind == "masked" else [end])
        ids, words = list(row["ids"][first:last]), row["words"][first:last]
        draws = generator(roles.seed, row.get("epoch"), row["row"])
        if self.form == "t5":
            mask = noise_mask(sum(word >= 0 for word in words), self.noise_density, self.mean_span, draws)
            spans = corrupt_spans(ids, words, mask, sentinels(roles.tokenizer))
            kinds: list[bool | None] = [None if one else False for one in spans.sentinel] + [None] * len(closing)
            return NoisedRow([*before, *spans.source, *closing], [*spans.target, *closing], kinds, spans.noised, len(ids))
        text = PlainText(ids, words, row["sentences"][first:last])
        tokens = add_noise(text, self.plan(kind), self._vocabulary(roles, len(before) + len(closing)), draws)
        kept = {place for _, place in tokens if place != NEW}
        source = [*before, *(token for token, _ in tokens), *closing]
        copied: list[bool | None] = [i in kept for i in range(len(ids))]
        copied = [*[None] * len(before), *copied, *[None] * len(closing)]
        return NoisedRow(source, [*before, *ids, *closing], copied, len(ids) - len(kept), len(ids), len(before))

    def _vocabulary(self, roles: Roles, around: int) -> Vocabulary:
        tokenizer = roles.tokenizer
        found = -1 if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id)
        if self.compat == "none":
            return Vocabulary(found, ordinary_tokens(tokenizer))
        size, stop = fairseq_tokens(tokenizer)
        return Vocabulary(found, np.arange(1, size), stop, around)


_sentinels: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
_fairseq: WeakKeyDictionary[Any, tuple[int, int | None]] = WeakKeyDictionary()


def sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of <extra_id_0>, <extra_id_1> and so on, as many as there are without a gap."""
    if tokenizer not in _sentinels:
        numbered = {int(m[1]): i for token, i in tokenizer.get_vocab().items() if (m := SENTINEL.fullmatch(token))}
        _sentinels[tokenizer] = [numbered[k] for k in range(len(numbered)) if all(j in numbered for j in range(k))]
    return _sentinels[tokenizer]


def fairseq_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | None]:
    """Return the size of the vocabulary, and the token that fairseq takes for a full stop.

    That is the full stop of a byte-level BPE such as GPT-2's, and the end token with any other tokenizer.
    """
    if tokenizer not in _fairseq:
        vocabulary = tokenizer.get_vocab()
        bytewise = FULL_STOP in vocabulary and any(token.startswith(WORD_START) for token in vocabulary)
        stop = vocabulary[FULL_STOP] if bytewise else tokenizer.eos_token_id
        _fairseq[tokenizer] = (max(vocabulary.values()) + 1, stop)
    return _fairseq[tokenizer]
