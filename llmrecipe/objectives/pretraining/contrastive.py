"""Contrastive learning of sentence embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence, row_key
from llmrecipe.data.prepare import Rows, SplitRows
from llmrecipe.data.token_data import TokenData
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.pooling import Pool, chunk_cuts
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.models.excluded import without_language_head
from llmrecipe.models.random_state import random_state_kept
from llmrecipe.models.resolve_class import language_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.correlations import rank_correlation
from llmrecipe.objectives.pretraining._engines import contrast, embedding_metrics
from llmrecipe.objectives.pretraining._engines.comparison import Candidates, ComparedAnchors, Comparison, Vectors, compare
from llmrecipe.objectives.unused_options import refuse_unused

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


TEXTS = ("ids_a", "ids_b", "ids_c")
LOSSES = {
    **dict.fromkeys(("margin", "distance"), ("triplet",)),
    **dict.fromkeys(("temperature", "hard_negative_weight"), ("infonce",)),
}
"""Option -> losses that read it."""
HEAD = "pool"
"""Role of the head behind a pooled first token."""


@register
class Contrastive(Objective):
    """Contrastive learning: L = (1/n) sum_i max(0, d(z_i, z_i+) - d(z_i, z_i-) + margin), z the pooled states of a text.

    Rows are an anchor, a text like it and one unlike it (`loss_type: triplet`), or pairs with `mining`, whose negatives are the
    other texts of the step. `loss_type: infonce` compares an anchor with all of them at once:

        l_i = -log( exp(s(z_i, z_i+) / temperature) / sum_j exp(s(z_i, z_j) / temperature) ),   s the cosine,

    j over the positives and the hard negatives (third texts) of the step, over all processes; with `positives: dropout` the
    positive is the same text under another dropout mask. A text that equals the anchor or its positive is never its negative.
    Both losses are divided by the number of anchors, n. A step whose texts are compared is not cut into micro-batches: they are
    embedded `chunk` at a time, and again in the backward pass, which gives the gradient of one large batch.

    Rows with a score (STS) are positives from `min_score` on; the others lend their texts as negatives. Evaluation ranks the
    right text among those of the whole split, and finds the classes of labelled texts by k-means (`v_measure`). Behind
    `pool: cls` stands tanh(W h + b), in training only (`mlp_only_train`).

    Departures: SimCSE counts equal texts of a batch as negatives, and divides the gradient by the number of processes.

    Papers: FaceNet (arXiv 1503.03832); InfoNCE (arXiv 1807.03748); SimCSE (arXiv 2104.08821); chunks: GradCache
    (arXiv 2101.06983); alignment and uniformity: arXiv 2005.10242.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = (
        "the number of passes over a batch differs between processes, while parameters are gathered by all at once"
    )
    rows: ClassVar[str] = "pairs"
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "recall@1", "spearman")
    head: ClassVar[str] = "states"

    loss_type: Literal["triplet", "infonce"] = "triplet"
    """Margin between two distances, or a choice among all candidates."""
    margin: PositiveFloat = 1.0
    """How much farther the negative must be; in the scale of z, so 1 suits normalised vectors and about 5 raw BERT states."""
    distance: Literal["euclidean", "squared", "cosine"] = "euclidean"
    """Distance of the triplet loss."""
    mining: Literal["all", "semi_hard", "hard"] | None = None
    """Negatives of the triplet loss from the whole step: the mean over all, the nearest beyond the positive, or the nearest."""
    temperature: PositiveFloat = 0.05
    """Divides the similarities of InfoNCE."""
    symmetric: bool = False
    """With infonce, the mean of both directions: also the anchor among all anchors of the step."""
    hard_negative_weight: float = 0.0
    """Added to the logit of an anchor's own hard negative, after the temperature."""
    positives: Literal["pairs", "dropout"] = "pairs"
    """The second text of a row, or the first once more under another dropout mask (infonce)."""
    min_score: float | None = None
    """Least score of a pair that counts as a positive, for rows with scores."""
    normalize: bool | None = None
    """Scale vectors to length 1; default: with infonce only."""
    pool: Literal["cls", "last", "avg", "avg_top2", "avg_first_last"] | None = None
    """First token, last token, mean over tokens; of the last layer, the last two, or the first and the last.
    Default: cls in an encoder, last in a decoder."""
    mlp_head: bool | None = None
    """A trained tanh layer behind the pooled states; default: with cls only."""
    mlp_only_train: bool = True
    """Leave that layer out of evaluation, and of what the model is used for."""
    gather: bool = True
    """Compare with the texts of all processes, not only with the own ones."""
    chunk: PositiveInt | None = None
    """Texts embedded at once, which bounds the memory of a step of any size; default: those of a micro-batch."""

    @property
    def whole_step(self) -> bool:
        """Return whether a row is compared with the other rows of its step."""
        return self.loss_type == "infonce" or self.mining is not None

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse options that contradict each other or are not read, and rows without the texts they need."""
        if self.loss_type == "triplet" and (self.positives == "dropout" or self.symmetric):
            key = "positives: dropout" if self.positives == "dropout" else "symmetric: true"
            raise RecipeError(f"objective.{key}: compares a text with all others, which is objective.loss_type=infonce")
        if self.loss_type == "infonce" and self.mining is not None:
            raise RecipeError("objective.mining: chooses negatives of the triplet loss; infonce compares with all of them")
        refuse_unused(self, "loss_type", LOSSES)
        refuse_unused(self, "positives", {"min_score": ("pairs",), "hard_negative_weight": ("pairs",)})
        key, size = recipe.batch.smallest() if recipe is not None else ("", 2)
        if self.whole_step and size < 2:
            raise RecipeError(f"{key}: 1: negatives are the other texts of a step; use at least 2")
        if isinstance(data, TokenData) and len(data):
            self._check_rows(data)

    def _check_rows(self, data: TokenData) -> None:
        first = data[0]
        needed = 1 if self.positives == "dropout" else 2 if self.whole_step else 3
        held = sum(bool(first.get(name)) for name in TEXTS)
        if held < needed:
            remedy = (
                "single texts are learned from by objective.loss_type=infonce objective.positives=dropout"
                if held < 2
                else "objective.mining=semi_hard and objective.loss_type=infonce find negatives among the other texts of a step"
            )
            raise RecipeError(
                f"objective.loss_type: {self.loss_type} reads rows of {needed} texts, and row 0 has {held}; {remedy}"
            )
        scored = self.positives == "pairs" and any(score is not None for score in data.column("score"))
        if scored and self.min_score is None:
            raise RecipeError(
                "objective.min_score: rows have scores, so not every pair is alike; name the least score of a positive pair "
                "(the others lend their texts as negatives), such as objective.min_score=0.75 for scores up to 1"
            )
        if self.positives == "pairs" and data.labels is not None and len(data.labels) > 1:
            raise RecipeError(
                f"data.path: rows have the labels {', '.join(data.labels[:5])}, and every pair would be a positive; keep the "
                "rows of one label, or write triples of an anchor, a positive and a negative"
            )

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the layer behind the pooled states; the head of the language model gets no gradient and is not trained."""
        kind = self.pool_of(model)
        if kind == "cls" and language_head(model.config) == "causal":
            raise RecipeError(
                "objective.pool: cls: the first token of a decoder has seen no other; use last, avg, avg_top2 or avg_first_last"
            )
        if self._has_mlp(kind):
            task_heads.add_dense_head(model, HEAD, seed)
        without_language_head(model)

    def pool_of(self, model: LanguageModel) -> str:
        """Return how states are pooled: as set, or by the kind of the model."""
        return self.pool or ("last" if language_head(model.config) == "causal" else "cls")

    def _has_mlp(self, kind: str) -> bool:
        return kind == "cls" if self.mlp_head is None else self.mlp_head

    def facts(self, roles: Roles) -> dict[str, Any]:
        """Return how the run pools."""
        kind = self.pool_of(roles.model)
        return {"pool": kind, "mlp": self._has_mlp(kind), "normalize": self.normalized}

    def documents(self, roles: Roles) -> dict[str, dict[str, Any]]:
        """Return how a text becomes a vector when the model is used."""
        used = self.facts(roles) | {"max_length": roles.max_length}
        return {task_heads.POOLING_FILE: used | {"mlp": used["mlp"] and not self.mlp_only_train}}

    @property
    def normalized(self) -> bool:
        """Whether vectors are scaled to length 1."""
        return self.loss_type == "infonce" if self.normalize is None else self.normalize

    def start(self, roles: Roles) -> None:
        """Refuse positives by dropout where the model has none: both vectors of a text would be the same."""
        if self.positives != "dropout" or not len(roles.data):
            return
        was = roles.engine.training
        with roles.alone(), torch.no_grad(), random_state_kept(roles.device):
            roles.engine.train()
            both = self._embed(self.collate([roles.data[0]], roles), roles)
            roles.engine.train(was)
        if torch.allclose(both[0], both[1], rtol=1e-5, atol=1e-6):
            raise RecipeError(
                "objective.positives: dropout: the model has no dropout, so a text and its positive are the same vector; "
                "set it in the model's config, such as model.config.hidden_dropout_prob=0.1 (native: model.config.dropout=0.1)"
            )

    def measures(self) -> Measures:
        """Return what is found among the texts of a split, how the vectors lie, and the agreement with scores and labels."""
        found: Measures = {
            **{f"recall@{k}": "max" for k in embedding_metrics.RECALLS},
            "mrr": "max",
            "spearman": "max",
            "v_measure": "max",
        }
        lie: Measures = {"alignment": "min", "uniformity": "min", "effective_rank": "max", "norm": None}
        return {**found, **lie, "accuracy": "max", "active": "min"}

    def measured_columns(self) -> dict[str, str]:
        """Return that second texts are looked for, and people's scores and labels compared with, where rows have them."""
        found = dict.fromkeys(("mrr", *(f"recall@{k}" for k in embedding_metrics.RECALLS)), "ids_b")
        return {**found, "spearman": "score", "v_measure": "label"}

    # --- batches --------------------------------------------------------------------------------------------------

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a split; second texts are read in evaluation even where training makes its own positives."""
        return [{**data[i], "whole": True} for i in indices]

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out all first texts, then their positives, then the hard negatives."""
        twice = [self.positives == "dropout" and not (row.get("whole") and row.get("ids_b")) for row in rows]
        needed = TEXTS if self.loss_type == "triplet" and self.mining is None else TEXTS[:2]
        for row, own in zip(rows, twice, strict=True):
            if not own and not all(row.get(name) for name in needed):
                raise RecipeError(f"data.path: row {row['row']} has fewer than the {len(needed)} texts that are compared")
        hard = [i for i, row in enumerate(rows) if row.get("ids_c") and not twice[i]]
        texts = [row["ids_a"] for row in rows]
        texts += [row["ids_a"] if own else row["ids_b"] for row, own in zip(rows, twice, strict=True)]
        texts += [rows[i]["ids_c"] for i in hard]
        scores = [math.nan if row.get("score") is None else float(row["score"]) for row in rows]
        least = math.inf if self.min_score is None else self.min_score
        paired = [own or math.isnan(score) or score >= least for own, score in zip(twice, scores, strict=True)]
        size = self.chunk or (roles.micro_rows and roles.micro_rows * len(texts) // max(len(rows), 1))
        cuts = chunk_cuts([len(ids) for ids in texts], size, roles.micro_tokens) if self.whole_step else ()
        extra = {
            "keys": torch.tensor([row_key(list(ids)) for ids in texts], dtype=torch.long),
            "hard": torch.tensor(hard, dtype=torch.long),
            "score": torch.tensor(scores, dtype=torch.float64),
            "label": torch.tensor([_class_of(row) for row in rows], dtype=torch.float64),
            "paired": torch.tensor(paired, dtype=torch.bool),
            "cuts": torch.tensor(cuts, dtype=torch.long),
        }
        sequences = [Sequence(list(ids), [0] * len(ids), prompt=len(ids)) for ids in texts]
        return roles.layout(sequences, [row["row"] for row in rows], extra)

    def weight(self, batch: Batch) -> float:
        """Return the number of anchors, the loss denominator."""
        return float(batch.here.extra["paired"].sum())

    # --- loss -----------------------------------------------------------------------------------------------------

    def _embed(self, batch: Batch, roles: Roles) -> Tensor:
        """Return the vector of every text, (S, D)."""
        kind = self.pool_of(roles.model)
        head = HEAD if self._has_mlp(kind) and (roles.engine.training or not self.mlp_only_train) else None
        pool = Pool(kind, head, tuple(batch.here.extra["cuts"].tolist()))
        return roles.policy(batch, want="pooled", pool=pool)["pooled"]

    def _vectors(self, z: Tensor, extra: Mapping[str, Tensor]) -> Vectors:
        """Return the vectors of texts in the order of a batch by what they are."""
        count, hard = extra["paired"].shape[0], extra["hard"]
        z = F.normalize(z, dim=-1) if self.normalized else z
        return Vectors(z[:count], z[count : 2 * count], z[2 * count : 2 * count + len(hard)], **{
            name: extra[name] for name in ("keys", "hard", "paired")
        })  # fmt: skip

    def _compared(self, own: Vectors, others: Candidates, chosen: Tensor) -> ComparedAnchors:
        """Return loss and nearness of the chosen anchors (indices of rows) among all candidates."""
        how = Comparison(
            self.loss_type, self.margin, self.distance, self.mining or "all", self.temperature, self.hard_negative_weight
        )
        return compare(own, others, chosen, how)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the anchors."""
        z = self._embed(batch, roles)
        own = self._vectors(z, batch.extra)
        chosen = to_device(batch.here.extra["paired"].nonzero().squeeze(-1), z.device)
        count = float(len(chosen))
        metrics: dict[str, tuple[Any, float]] = {}
        if self.whole_step:
            found = self._compared(own, own.joined(roles if self.gather else None, self.symmetric), chosen)
            losses, first = found.losses, found.ranks() == 1
        else:
            near, far = self._both_distances(own)
            losses, first = contrast.triplet(near, far, self.margin), near < far
        metrics["accuracy"] = (first.sum(), count)
        if self.loss_type == "triplet":
            metrics["active"] = ((losses.detach() > 0).sum(), count)
        with torch.no_grad():
            metrics["alignment"] = (embedding_metrics.alignment(own.a, own.b)[chosen].sum(), count)
            rows = len(own.a)
            metrics["norm"] = (z[:rows].norm(dim=-1).sum(), float(rows))
        return Loss(losses.sum(), metrics)

    def _both_distances(self, v: Vectors) -> tuple[Tensor, Tensor]:
        """Return how far the anchors of triples are from their positive and from their negative, (C,) each."""
        a, b = v.a[v.hard], v.b[v.hard]
        return contrast.distances(a, b, self.distance), contrast.distances(a, v.c, self.distance)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return nothing: texts are compared with those of the whole split (see `finish_evaluation`)."""
        return {}

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return vectors (R, D) of first, second and third texts (NaN where there is none), digests, scores and labels."""
        extra = batch.extra
        count, hard = extra["paired"].shape[0], extra["hard"]
        z = self._embed(batch, roles).detach().double()
        third = torch.full_like(z[:count], math.nan).index_copy(0, hard, z[2 * count : 2 * count + len(hard)])
        keys = extra["keys"].new_zeros(3, count)
        keys[:2] = extra["keys"][: 2 * count].reshape(2, count)
        keys[2, hard] = extra["keys"][2 * count :]
        found = {"a": z[:count], "b": z[count : 2 * count], "c": third, "keys": keys.T}
        return {k: v.cpu() for k, v in {**found, **{k: extra[k] for k in ("score", "label", "paired")}}.items()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute loss and metrics of a split: every text is a candidate of every anchor."""
        a, b, c, keys = (tensors[name] for name in ("a", "b", "c", "keys"))
        if not len(a):
            return {}
        hard = (~c.isnan().any(-1)).nonzero().squeeze(-1)
        extra = {"hard": hard, "paired": tensors["paired"].bool(), "keys": torch.cat((keys[:, 0], keys[:, 1], keys[hard, 2]))}
        v = self._vectors(torch.cat((a, b, c[hard])), extra)
        found = {"norm": float(a.norm(dim=-1).mean()), "uniformity": embedding_metrics.uniformity(a)}
        found["effective_rank"] = embedding_metrics.effective_rank(a)
        alone = replace(v, b=v.a, c=v.c[:0], keys=keys[:, :1].T.repeat(2, 1).flatten(), hard=hard[:0], paired=v.paired | True)
        found |= self._losses_of(alone if self.positives == "dropout" else v)
        if bool((keys[:, 0] != keys[:, 1]).any()):
            found |= self._pair_metrics(v)
        known = ~tensors["score"].isnan()
        if bool(known.any()):
            cosine = self.loss_type == "infonce" or self.distance == "cosine"
            near = F.cosine_similarity(v.a, v.b) if cosine else -contrast.distances(v.a, v.b, self.distance)
            found["spearman"] = rank_correlation(near[known], tensors["score"][known])
        known = ~tensors["label"].isnan()
        if len(tensors["label"][known].unique()) > 1:
            found["v_measure"] = embedding_metrics.v_measure(v.a[known], tensors["label"][known])
        return found

    def _losses_of(self, v: Vectors) -> dict[str, float]:
        if not self.whole_step:
            near, far = self._both_distances(v)
            losses = contrast.triplet(near, far, self.margin)
        else:
            others = v.joined(None, self.symmetric)
            losses = torch.cat([self._compared(v, others, part).losses for part in v.blocks()])
        if not len(losses):
            return {}
        found = {"loss": float(losses.mean())}
        if self.loss_type == "triplet":
            found["active"] = float((losses > 0).double().mean())
        return found

    def _pair_metrics(self, v: Vectors) -> dict[str, float]:
        found: dict[str, float] = {}
        if len(v.hard):
            near, far = self._both_distances(v)
            found["accuracy"] = float((near < far).double().mean())
        if not bool(v.paired.any()):
            return found
        others = v.joined(None, False)
        places = torch.cat([self._compared(v, others, part).ranks() for part in v.blocks()])
        found |= embedding_metrics.retrieval(places)
        return found | {"alignment": float(embedding_metrics.alignment(v.a, v.b)[v.paired].mean())}


def _class_of(row: dict[str, Any]) -> float:
    """Return the class of a text that stands alone; NaN where it has none, or several."""
    label = row.get("label")
    return float(label) if isinstance(label, int) and not row.get("ids_b") else math.nan
