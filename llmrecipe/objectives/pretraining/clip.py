"""Contrastive learning of pictures and their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence, row_key
from llmrecipe.data.prepare import Rows, SplitRows
from llmrecipe.engine.pooling import Pool, chunk_cuts
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.models.excluded import without_language_head
from llmrecipe.models.heads.projection_head import ProjectionHead
from llmrecipe.models.resolve_class import language_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.feature_inputs import FeatureInputs
from llmrecipe.objectives.pretraining._engines import contrast, embedding_metrics

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe

HEAD = "contrast"
"""Role of the projection behind the pooled states, which has the temperature."""
DIRECTIONS = ("text", "picture")
"""What is looked for: the text of a picture, the picture of a text."""


@register
class Clip(FeatureInputs, Objective):
    """Contrastive language-image pretraining: a picture finds its text and a text its picture among those of the step.

        L = (1/2n) sum_i [ -log softmax_j(u_i . v_j / T)[i] - log softmax_j(v_i . u_j / T)[i] ],   u = W h(y) / |W h(y)|

    u of the picture (or regions, or frames: see `features`) and v of its text are pooled states of one model that reads either
    of them, a one-tower CLIP: features enter through the head that `mmlm` trains, everything behind it is shared. W is new, and
    so is 1/T, which is trained as exp(s) and kept between 1 and `max_scale`. A step is one batch, whatever the number of
    processes and micro-batches: rows are embedded `chunk` at a time, and again in the backward pass.

    Rows that share a picture, or have the same text, are no negatives of each other. An evaluation ranks the right text among
    those of the whole split (`recall@k/text`), the right picture likewise (`recall@k/picture`), and reports the mean of both.

    Departures: one tower where CLIP has two; CLIP counts equal texts of a batch as negatives.

    Papers: CLIP (arXiv 2103.00020); one tower for both: CLIPPO (arXiv 2212.08045, its 1T-CLIP).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = (
        "the number of passes over a batch differs between processes, while parameters are gathered by all at once"
    )
    rows: ClassVar[str] = "pictured_words"
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "recall@1")
    head: ClassVar[str] = "states"

    temperature: PositiveFloat = 0.07
    """T at the start; trained from there."""
    max_scale: PositiveFloat = 100.0
    """Largest 1/T."""
    width: PositiveInt | None = None
    """Numbers of a vector; default: the hidden width of the model."""
    pool: Literal["avg", "last"] | None = None
    """Mean over the states of a picture or a text, or the last one; default: avg in an encoder, last in a decoder."""
    gather: bool = True
    """Compare with the rows of all processes, not only with the own ones."""
    chunk: PositiveInt | None = None
    """Pictures and texts embedded at once, which bounds the memory of a step of any size; default: those of a micro-batch."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse features of another form, a scale that cannot be reached, and steps of one row."""
        self.check_features(data)
        if not 1.0 <= 1.0 / self.temperature <= self.max_scale:
            raise RecipeError(
                f"objective.temperature: {self.temperature} is outside of 1/max_scale = {1 / self.max_scale:g} to 1; "
                "change one of the two"
            )
        key, size = recipe.batch.smallest() if recipe is not None else ("", 2)
        if size < 2:
            raise RecipeError(f"{key}: 1: negatives are the other rows of a step; use at least 2")

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the head of features and the projection; the head of the language model gets no gradient and is not trained."""
        if model.config.is_encoder_decoder:
            raise RecipeError(
                f"model.path: '{model.config.model_type}' is an encoder-decoder, and objective=clip trains a decoder or an "
                "encoder, which reads pictures and texts in one stack"
            )
        self.add_feature_head(model, seed)
        task_heads.add_projection_head(model, HEAD, self.width, 1.0 / self.temperature, seed)
        without_language_head(model)

    def measures(self) -> Measures:
        """Return what is found among the rows of a split, in both directions, and the temperature."""
        names = [*(f"recall@{k}" for k in embedding_metrics.RECALLS), "mrr"]
        found: Measures = {f"{name}{way}": "max" for name in names for way in ("", *(f"/{one}" for one in DIRECTIONS))}
        return {**found, "accuracy": "max", "temperature": None}

    @property
    def whole_step(self) -> bool:
        """Return that rows are compared with one another."""
        return True

    # --- batches --------------------------------------------------------------------------------------------------

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a split with their own pictures, which the others are compared with."""
        return [data[i] for i in indices]

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out all pictures, then all texts."""
        pictures = [Sequence([], [], features=self.vectors(row)) for row in rows]
        texts = [Sequence(row["ids"], [0] * len(row["ids"]), prompt=len(row["ids"])) for row in rows]
        batch = self.lay_out([*pictures, *texts], rows, roles)
        keys = [(row_key([int(row["features"].key, 16)]), row_key(list(row["ids"]))) for row in rows]
        lengths = [s.slots + len(s.ids) for s in (*pictures, *texts)]
        cuts = chunk_cuts(lengths, self.chunk or (roles.micro_rows and 2 * roles.micro_rows), roles.micro_tokens)
        return batch.with_extra(
            keys=torch.tensor(keys, dtype=torch.long).view(-1, 2),
            cuts=torch.tensor(cuts, dtype=torch.long),
        )

    def weight(self, batch: Batch) -> float:
        """Return the number of rows, the loss denominator."""
        return float(len(batch.extra["keys"]))

    # --- loss -----------------------------------------------------------------------------------------------------

    def _embed(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor]:
        """Return the vectors of pictures and of texts, (R, P) each; products of two are u . v / T."""
        kind = self.pool or ("last" if language_head(roles.model.config) == "causal" else "avg")
        z = roles.policy(batch, want="pooled", pool=Pool(kind, HEAD, tuple(batch.here.extra["cuts"].tolist())))["pooled"]
        rows = len(batch.extra["keys"])
        return z[:rows], z[rows : 2 * rows]

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the rows, both directions halved."""
        own, keys = self._embed(batch, roles), batch.extra["keys"]
        joined, first = [roles.gather_rows(z)[0] if self.gather else z for z in own], 0
        every = keys
        if self.gather:
            every, first = roles.gather_rows(keys)
        place = first + torch.arange(len(keys), device=keys.device)
        shared = same_rows(keys, every, place)
        losses, found = [], []
        for anchors, candidates in ((own[0], joined[1]), (own[1], joined[0])):
            logits = anchors @ candidates.T
            losses.append(contrast.infonce(logits, place, shared))
            found.append(embedding_metrics.ranks(logits.detach(), place, shared) == 1)
        count = float(len(keys))
        temperature = 1.0 / own[0].detach().square().sum(-1)
        metrics = {"accuracy": (torch.cat(found).sum() / 2, count), "temperature": (temperature.sum(), count)}
        return Loss(torch.cat(losses).sum() / 2, metrics)

    def after_step(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """Keep the temperature where it is allowed."""
        head = roles.engine.head_of(HEAD)
        assert isinstance(head, ProjectionHead), "made by `prepare_model`"
        head.clamp(self.max_scale)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return nothing: rows are compared with those of the whole split (see `finish_evaluation`)."""
        return {}

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return the vectors of pictures and texts, (R, P) each, and digests (R, 2) of both."""
        pictures, texts = (z.detach().double().cpu() for z in self._embed(batch, roles))
        return {"pictures": pictures, "texts": texts, "keys": batch.extra["keys"].cpu()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute loss and metrics of a split: every text is a candidate of every picture, and the reverse."""
        pictures, texts, keys = (tensors[name] for name in ("pictures", "texts", "keys"))
        if not len(keys):
            return {}
        total, found = 0.0, {"temperature": float(1.0 / pictures[0].square().sum())}
        ways = []
        for anchors, candidates in ((pictures, texts), (texts, pictures)):
            places = []
            for part in torch.arange(len(keys)).split(embedding_metrics.BLOCK):
                logits, shared = anchors[part] @ candidates.T, same_rows(keys[part], keys, part)
                total += float(contrast.infonce(logits, part, shared).sum()) / (2 * len(keys))
                places.append(embedding_metrics.ranks(logits, part, shared))
            ways.append(embedding_metrics.retrieval(torch.cat(places)))
        for name in ways[0]:
            found |= {f"{name}/{way}": values[name] for way, values in zip(DIRECTIONS, ways, strict=True)}
            found[name] = (ways[0][name] + ways[1][name]) / 2
        return {"loss": total, "accuracy": found["recall@1"], **found}


def same_rows(keys: Tensor, others: Tensor, own: Tensor) -> Tensor:
    """Return which other rows (R, M) have the picture or the text of a row, itself not included.

    Args:
        keys: (R, 2) digests of picture and text; others: (M, 2); own: (R,) the place of each row among the others.

    Examples:
        >>> keys = torch.tensor([[1, 5], [2, 5], [1, 6], [3, 7]])
        >>> same_rows(keys, keys, torch.arange(4)).long().tolist()
        [[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    """
    found = (keys[:, None] == others[None]).any(-1)
    return found.scatter(1, own.unsqueeze(1), False)
