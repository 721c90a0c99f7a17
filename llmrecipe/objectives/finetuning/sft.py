"""Supervised fine-tuning."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, LossMaskName, NonNegativeFloat, OpenFraction, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.embedding_noise import noise_draws, with_uniform_noise
from llmrecipe.objectives.finetuning._engines.answer_metric import answer_loss, answered_rows, with_answers
from llmrecipe.objectives.finetuning._engines.compared_tokens import compared_loss
from llmrecipe.objectives.text_metric import TextMetric, metric_class
from llmrecipe.objectives.token_math import TOKEN_METRICS, collate_tokens, target_weights, token_loss
from llmrecipe.objectives.unused_options import refuse_unused
from llmrecipe.recipe.sharding_rules import GATHERED

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


@register
class Sft(Objective):
    """Supervised fine-tuning: L = -(1/N) sum over supervised tokens of w_t log p(y_t | y_<t, x), N = sum of w_t.

    `mask` says which tokens are supervised: the completion, every assistant turn, the last turn, or all. The token that ends
    a turn is always among them. N is summed over all micro-batches and processes of an optimizer step. w_t is 1 unless a row
    says otherwise: an assistant message may have a `weight`, a row of token ids `weights`. What the mask leaves out has weight
    0, and what has weight 0 is not supervised. `nll` and `accuracy` count every supervised token alike.

    `loss_type: dft` weights each token by its own detached probability. `label_smoothing` e trains
    (1 - e) log p(y_t) + (e / V) sum_v log p(v) in the place of log p(y_t), V tokens in the vocabulary. Evaluations report the
    plain loss.

    `loss_type: metric` has L = (1/R) sum over rows |best - m(answer, reference)| instead: `metric` m (exact_match, token_f1, a
    text metric) of the greedy answer to a row's prompt against its completion, or to what precedes the last supervised turn of
    a dialogue against that turn; best is the better bound of m, 1 for most. It has no gradient: it needs an update rule that
    does without, such as `stack=[mezo]`, rows whose answers are partly right at the start, and batches large enough to tell
    weights apart. Each value of L takes generating all answers of the step. Evaluations report the likelihood; `eval.metrics`
    adds the metric.

    `neftune_alpha` (NEFTune) adds noise to the embeddings of training rows: U(-1, 1) alpha / sqrt(L D), L the tokens of the row
    and D the width; an encoder's rows have their own. It depends on seed, epoch and row alone. Evaluations, calibration and
    generation are without it. Departure: the reference code takes the padded length of the batch for L.

    `kl_to_base` c adds c (1/N) sum w_t KL(p_0(. | y_<t, x) || p(. | y_<t, x)), p_0 the model the run starts from, so that less
    of what it could do is lost. p_0 is the model without the stack where that starts at it, else the tensors that train are
    kept twice. It reads the same tokens without noise and dropout, one more pass without gradients; the mean is reported as
    `kl_to_base` and is no part of the loss.

    Papers: Training language models to follow instructions (arXiv 2203.02155); FLAN (arXiv 2109.01652); DFT (arXiv 2508.05629);
    NEFTune (arXiv 2310.05914).
    """

    rows: ClassVar[str] = "dialogue"
    head: ClassVar[str] = "causal"
    encoder_decoders: ClassVar[bool] = True
    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    whole_options: ClassVar[dict[str, dict[str, str]]] = {
        "loss_type": {
            "metric": "each process writes answers of lengths of their own, while parameters are gathered by all at once"
        }
    }

    mask: LossMaskName = "assistant"
    """Which tokens are supervised; for prompt/completion rows `assistant` means the completion."""
    loss_type: Literal["nll", "dft", "metric"] = "nll"
    """Negative log-likelihood, dynamic fine-tuning, or a text metric of generated answers."""
    metric: str = "exact_match"
    """Text metric that `loss_type: metric` trains (`llmrecipe list metric`)."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens of an answer that is scored."""
    label_smoothing: OpenFraction = 0.0
    """Share of each target spread over the vocabulary."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Size of NEFTune's noise, 5 to 15 in the paper; 0: none."""
    kl_to_base: NonNegativeFloat = 0.0
    """Weight of the divergence from the model the run starts from, in nats a token; 0: none."""

    def loss_mask(self) -> str:
        """Train on what the option says."""
        return self.mask

    def has_gradient(self) -> bool:
        """Return whether likelihoods are trained."""
        return self.loss_type != "metric"

    def generates(self) -> bool:
        """Return whether answers are scored."""
        return self.loss_type == "metric"

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse options that the kind of loss does not read, a metric or a base that is not there, and rows without prompts.

        Raises:
            RecipeError: naming the option.
        """
        if self.kl_to_base and recipe.model.init == "random":
            raise RecipeError(
                "objective.kl_to_base: with model.init=random the run starts from fresh weights, whose answers are worth "
                "nothing; leave it out"
            )
        if self.kl_to_base and recipe.runtime.shard in GATHERED:
            raise RecipeError(
                "objective.kl_to_base: the model of step 0 has not been shown to answer under runtime.shard="
                f"{recipe.runtime.shard}; use zero1, or leave it out"
            )
        if self.label_smoothing and self.loss_type != "nll":
            raise RecipeError(f"objective.label_smoothing: belongs to loss_type=nll; with {self.loss_type} leave it out")
        likelihoods, answers = ("nll", "dft"), ("metric",)
        refuse_unused(
            self,
            "loss_type",
            {"metric": answers, "max_new_tokens": answers, "neftune_alpha": likelihoods, "kl_to_base": likelihoods},
        )
        if self.loss_type != "metric":
            return
        if self.mask == "all":
            raise RecipeError(
                "objective.mask: all leaves no prompt to answer, which objective.loss_type=metric needs; use mask=assistant"
            )
        self.scorer  # noqa: B018 (a metric that is not there is refused here)

    @functools.cached_property
    def scorer(self) -> TextMetric:
        """Hold the metric of the answers."""
        return metric_class(self.metric, "objective.metric")()  # type: ignore[no-any-return]

    def reference_of(self) -> str:
        """Return the model of step 0 where the loss holds to it."""
        return "initial" if self.kl_to_base else "none"

    def compares_distributions(self) -> bool:
        """Return whether the loss holds to the model of step 0."""
        return self.kl_to_base > 0

    def measures(self) -> Measures:
        """Return the metrics of the supervised tokens."""
        return TOKEN_METRICS

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay dialogues out for one forward pass."""
        batch = collate_tokens(rows, roles)
        weights = target_weights(rows)
        if weights is not None:
            batch = batch.with_extra(weights=weights)
        if self.loss_type == "metric":
            return with_answers(batch, rows, roles)
        return batch.with_extra(noise_draws=noise_draws(rows)) if self.neftune_alpha else batch

    def weight(self, batch: Batch) -> float:
        """Return the loss denominator: the sum of the weights of the supervised tokens, or the number of answers."""
        return float(answered_rows(batch)) if self.loss_type == "metric" else self._token_weight(batch)

    def _token_weight(self, batch: Batch) -> float:
        """Return the sum of the weights of the supervised tokens: their number where no row has weights."""
        here = batch.here.extra
        return math.fsum(here["weights"].tolist()) if "weights" in here else super().weight(batch)

    def training_loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the loss of rows that are trained on, the only ones that are read with noise."""
        if self.neftune_alpha:
            batch = with_uniform_noise(batch, batch.here.extra["noise_draws"], roles, self.neftune_alpha)
        return super().training_loss(batch, roles)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the supervised tokens, or of the answers."""
        if self.loss_type == "metric":
            return answer_loss(batch, roles, self.scorer, self.metric, self.max_new_tokens)
        if self.label_smoothing or self.kl_to_base:
            return compared_loss(batch, roles, self.loss_type, self.label_smoothing, self.kl_to_base)
        return token_loss(batch, roles, self.loss_type)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return the plain negative log-likelihood whatever `loss_type` is, so that evaluations of different losses compare."""
        loss = token_loss(batch, roles)
        return {"loss": (loss.total, self._token_weight(batch)), **loss.metrics}
