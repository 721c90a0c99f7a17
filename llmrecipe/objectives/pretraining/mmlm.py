"""Masked multimodal language modelling."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.data.tokenize.word_rows import SPECIAL
from llmrecipe.engine.role_models import Roles
from llmrecipe.models.masked_heads import check_masked_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.feature_inputs import OWN, VIEW, VIEWS, FeatureInputs, gains, measures_by_view
from llmrecipe.objectives.pretraining._engines.masked_tokens import MASKED_METRICS, MaskedTokens, masked_metrics
from llmrecipe.objectives.pretraining._engines.masking import Hidden, corrupted, masked_targets
from llmrecipe.objectives.token_math import negative_log_likelihood

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe

ATTRIBUTE = "attribute"


@register
class Mmlm(FeatureInputs, MaskedTokens, Objective):
    """Masked multimodal language modelling: L = -(1/|M|) sum_{i in M} log P(x_i | x with M hidden, y), y what a text is about.

    y are the patches of a picture, regions of it, or frames of sound or video: each becomes one input of the encoder, before
    the text, through a new trained head (see `features`), and attention is bidirectional over both (one stream). Text is
    hidden as `mlm` hides it, y is complete, and the loss is on hidden text alone. Positions count text tokens only, so a text
    has the positions it has without a picture. An evaluation reads each row three times: with its own y, with none (`removed`),
    and with that of another row (`shuffled`); `gain` is the loss a hidden token has more without its own y, in nats.

    Departures: patches get the sinusoids of their row and column through a trained matrix, so pictures may have any size;
    segment 1 of a model with segments, as in VisualBERT. `region` is UNITER's form, without its matching and region losses;
    two streams (ViLBERT) are not offered.

    Papers: UNITER (arXiv 1909.11740), VisualBERT (arXiv 1908.03557); patches as in ViLT (arXiv 2102.03334).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "pictured_words"
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "gain/removed")
    head: ClassVar[str] = "masked"
    special_tokens: ClassVar[tuple[str, ...]] = ("mask",)

    target_words: Literal["any", "attribute"] = "any"
    """Hide any tokens of the text, or only those of the words that the rows name in `attributes`."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse shares that exceed one, features of another form, and rows without attributes where those are hidden."""
        self.check_shares()
        self.check_features(data)
        if self.target_words == ATTRIBUTE and not all(any(row.get(ATTRIBUTE) or ()) for row in data):
            raise RecipeError(
                "objective.target_words: attribute hides the words that rows name in their column 'attributes', and there are "
                "rows without any; add them, or set objective.target_words=any"
            )

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the head that turns features into inputs; one that came with the model keeps its values."""
        check_masked_head(model)
        self.add_feature_head(model, seed)

    def measures(self) -> Measures:
        """Return the metrics of the hidden tokens, over all of them, by what stands in their place, and by view."""
        return {**MASKED_METRICS, **measures_by_view({"nll": "min", "accuracy": "max", "accuracy/attribute": "max"})}

    # --- batches --------------------------------------------------------------------------------------------------

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Hide tokens and lay the rows out behind their features; targets are the hidden tokens, at their own places."""
        hidden = [self._hidden(row, roles) for row in rows]
        sequences = [
            replace(corrupted(row["ids"], found), features=self.vectors(row)) for row, found in zip(rows, hidden, strict=True)
        ]
        batch = self.lay_out(sequences, rows, roles)
        batch = masked_targets(batch, [row["ids"] for row in rows], hidden)
        return batch.with_extra(**self._kinds_of_target(rows, hidden))

    def _hidden(self, row: dict[str, Any], roles: Roles) -> Hidden:
        words = row["words"]
        if self.target_words == ATTRIBUTE:
            words = [word if mark else SPECIAL for word, mark in zip(words, row[ATTRIBUTE], strict=True)]
        return self.hide_tokens(row["ids"], words, row, roles)

    def _kinds_of_target(self, rows: list[dict[str, Any]], hidden: list[Hidden]) -> dict[str, Tensor]:
        """Return view -> which of the N targets are in a row of that view, and which are tokens of an attribute."""
        views = [row.get(VIEW, OWN) for row, found in zip(rows, hidden) for _ in found.places]
        marks = [
            bool((row.get(ATTRIBUTE) or [0] * len(row["ids"]))[i]) for row, found in zip(rows, hidden) for i in found.places
        ]
        kinds = {view: [i for i, one in enumerate(views) if one == view] for view in VIEWS}
        kinds[ATTRIBUTE] = [i for i, mark in enumerate(marks) if mark]
        return {name: torch.tensor(places, dtype=torch.long) for name, places in kinds.items()}

    # --- the loss -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood of the hidden tokens."""
        out = roles.policy(batch)
        logprobs, correct = out["logprobs"], out["correct"]
        metrics = masked_metrics(logprobs, correct, batch.extra)
        of_kind = batch.extra[ATTRIBUTE]
        metrics["accuracy/attribute"] = (correct[of_kind].sum(), float(of_kind.numel()))
        return Loss(negative_log_likelihood(logprobs), metrics)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return loss and metrics of the rows with their own features, and those of the other views under their names."""
        out = roles.policy(batch)
        found: dict[str, tuple[Any, float]] = {}
        for view in VIEWS:
            mine = batch.extra[view]
            own = torch.zeros_like(batch.target, dtype=torch.bool).index_fill(0, mine, value=True)
            logprobs, correct = out["logprobs"].detach(), out["correct"]
            if view == OWN:
                kinds = {k: v[own[v]] for k, v in batch.extra.items() if k in ("mask", "random", "keep")}
                # `masked_metrics` counts over all targets; those of the other views are left out of its sums.
                found |= masked_metrics(logprobs, correct, kinds)
                found["loss"] = (-logprobs[mine].sum(), float(mine.numel()))
            name = "" if view == OWN else f"/{view}"
            marked = batch.extra[ATTRIBUTE]
            marked = marked[own[marked]]
            found[f"nll{name}"] = (-logprobs[mine].sum(), float(mine.numel()))
            found[f"accuracy{name}"] = (correct[mine].sum(), float(mine.numel()))
            found[f"accuracy/attribute{name}"] = (correct[marked].sum(), float(marked.numel()))
        return found

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return the loss that a hidden token has more without its own features."""
        return gains(sums)
