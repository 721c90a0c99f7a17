"""Captioning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.models.resolve_class import LANGUAGE, language_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.feature_inputs import OWN, VIEW, VIEWS, FeatureInputs, gains, measures_by_view
from llmrecipe.objectives.token_math import TOKEN_METRICS, negative_log_likelihood, sequences_of, token_metrics

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


@register
class Caption(FeatureInputs, Objective):
    """Captioning: L = -(1/N) sum_t log P(x_t | x_<t, y), x the text of a row and y the picture, regions or frames it is about.

    y is read before the text, through the head that `mmlm` trains (see `features`), and takes no position of the text. An
    encoder sees y whole and of the text what is before a token, as a prefix language model, so a run of `mmlm` goes on as it
    is; a decoder reads all from left to right. Text starts with the tokenizer's start token, which is given, and ends with its
    end token. `exact_match` is the share of captions that greedy writing gives to the letter: those whose every token is the
    likeliest after the ones before it. An evaluation reads each row with its own y, with none (`removed`) and with that of
    another row (`shuffled`); `gain` is the loss a token has more without its own y, in nats.

    Papers: GIT (arXiv 2205.14100), unified vision-language pretraining (arXiv 1909.11059).
    """

    rows: ClassVar[str] = "multimodal"
    headline: ClassVar[tuple[str, ...]] = ("exact_match", "gain/removed")
    head: ClassVar[str] = LANGUAGE
    special_tokens: ClassVar[tuple[str, ...]] = ("eos",)

    def loss_mask(self) -> str:
        """Train on the whole text."""
        return "all"

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse features of another form."""
        self.check_features(data)

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the head that turns features into inputs; one that came with the model keeps its values."""
        if model.config.is_encoder_decoder:
            raise RecipeError(
                f"model.path: '{model.config.model_type}' is an encoder-decoder, and objective=caption trains a decoder or an "
                "encoder, which reads picture and text in one stack"
            )
        self.add_feature_head(model, seed)

    def measures(self) -> Measures:
        """Return the metrics of the tokens and of whole captions, by view."""
        return measures_by_view({**TOKEN_METRICS, "exact_match": "max"})

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay texts out behind their features."""
        sequences = [replace(s, features=self.vectors(row)) for s, row in zip(sequences_of(rows), rows, strict=True)]
        packed = language_head(roles.model.config) == "causal"
        views = torch.tensor([VIEWS.index(row.get(VIEW, OWN)) for row in rows], dtype=torch.long)
        return self.lay_out(sequences, rows, roles, packed).with_extra(**{VIEW: views})

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood of the texts."""
        out = roles.policy(batch, want="continued")
        return Loss(negative_log_likelihood(out["logprobs"]), token_metrics(out))

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return loss and metrics of the rows with their own features, and those of the other views under their names."""
        out, views = roles.policy(batch, want="continued"), batch.extra[VIEW]
        right = out["correct"].float()
        rows = len(views)
        whole = (batch.sum_by_sequence(right)[:rows] == batch.counts()[:rows]).float()
        found: dict[str, tuple[Any, float]] = {}
        for number, view in enumerate(VIEWS):
            mine = views[batch.sequence] == number if rows else torch.zeros_like(batch.sequence, dtype=torch.bool)
            of_view = views == number
            count, name = float(mine.sum()), "" if view == OWN else f"/{view}"
            found[f"nll{name}"] = (-out["logprobs"][mine].sum(), count)
            found[f"accuracy{name}"] = (right[mine].sum(), count)
            found[f"exact_match{name}"] = (whole[of_view].sum(), float(of_view.sum()))
        return {"loss": found["nll"], **found}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the loss that a token has more without its own features."""
        return gains(sums)
