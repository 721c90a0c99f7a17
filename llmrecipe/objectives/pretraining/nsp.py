"""Next sentence prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Fraction, Literal, PositiveFloat
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.data.tokenize.word_rows import SPECIAL, pair_frame
from llmrecipe.engine.logprob import upcast
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.models.excluded import without_language_head
from llmrecipe.models.masked_heads import check_masked_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.pretraining._engines.masked_tokens import MASKED_METRICS, MaskedTokens, masked_metrics
from llmrecipe.objectives.pretraining._engines.masking import Hidden, corrupted, masked_targets
from llmrecipe.objectives.pretraining._engines.sentence_pairs import Document, Pair, PairPlan, make_pairs
from llmrecipe.objectives.row_draws import generator
from llmrecipe.objectives.token_math import negative_log_likelihood
from llmrecipe.objectives.unused_options import refuse_unused

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


HEAD = "nsp"
SPLIT = "split"
"""Key of the rows an evaluated row's partners are drawn from."""


def as_document(row: dict[str, Any]) -> Document:
    """Return the document of a token row."""
    return Document(row["ids"], row["words"], row["sentences"])


@register
class Nsp(MaskedTokens, Objective):
    """Next sentence prediction: L = -(1/n) sum_i [y_i log p_i + (1 - y_i) log(1 - p_i)], y = 1 where B follows A.

    p = softmax(W2 tanh(W1 h + b1) + b2)[is next], h the state of the first token of `[CLS] A [SEP] B [SEP]`. A row is a
    document of sentences; it gives pairs as BERT makes them, new ones in each epoch, all from (seed, epoch, row): consecutive
    sentences are gathered to the length of a row, A is the first few, B the rest, or with `p_random` (always where there is
    no rest) sentences of another document. n counts pairs over the whole optimizer step. `with_mlm` hides tokens of the
    same pairs and adds the loss of `mlm`, each term divided by its own count (tokens, pairs) over the whole step:
    L = L_mlm + weight * L_nsp. Without it the objective learns topics rather than order.

    Departures: labels are the survey's (1 = is next); BERT's code and Transformers use 0, so the two outputs of the head are
    exchanged where weights are compared. BERT writes `dupe_factor` files of pairs beforehand. The head (a pooler and two
    outputs) is new and always trains.

    Papers: BERT (arXiv 1810.04805); `negatives: swap` is the sentence order prediction of ALBERT (arXiv 1909.11942).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "sentences"
    headline: ClassVar[tuple[str, ...]] = ("nsp/accuracy", "accuracy")
    head: ClassVar[str] = "masked"
    special_tokens: ClassVar[tuple[str, ...]] = ("sep",)

    p_random: Fraction = 0.5
    """Probability that B does not follow A."""
    short_prob: Fraction = 0.1
    """Probability that the pairs of a document are shorter than `data.max_length`, by a random length."""
    balance: Literal["bert", "exact"] = "bert"
    """Pairs of a chunk of one sentence are negative; or are not made, and B from elsewhere is as long as the B it replaces."""
    negatives: Literal["other_doc", "same_doc", "swap"] = "other_doc"
    """Where B comes from when it does not follow: another document, another place of the same one, or the two exchanged."""
    with_mlm: bool = False
    """Hide tokens of the pairs and predict them too; the options of `mlm` hold only then."""
    weight_nsp: PositiveFloat = 1.0
    """Weight of this term next to that of the hidden tokens."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse options that are not read, and data that have no negatives."""
        masking = {field.name for field in fields(MaskedTokens)}  # type: ignore[arg-type]
        refuse_unused(self, "with_mlm", dict.fromkeys((*masking, "weight_nsp"), (True,)))
        self.check_shares()
        if self.negatives == "other_doc" and data is not None and len(data) < 2:
            raise RecipeError(
                "objective.negatives: other_doc draws B from another document, and the data are one document; split them into "
                "documents (one row each), or set objective.negatives=same_doc or swap"
            )

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the pooler and the two outputs."""
        check_masked_head(model)
        task_heads.add_pooled_head(model, HEAD, 2, seed)
        if not self.with_mlm:
            without_language_head(model)

    def measures(self) -> Measures:
        """Return the metrics of the pairs, and of the hidden tokens where there are any."""
        own: Measures = {
            "nsp/nll": "min",
            "nsp/accuracy": "max",
            "nsp/accuracy/next": "max",
            "nsp/accuracy/other": "max",
            "nsp/share_next": None,
            "nsp/f1": "max",
            "nsp/auc": "max",
        }
        return {**own, **MASKED_METRICS, "loss/nsp": "min", "loss/mlm": "min"} if self.with_mlm else own

    # --- pairs ----------------------------------------------------------------------------------------------------

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows with the split they belong to, in which the partners of its documents are."""
        return [{**data[i], SPLIT: data} for i in indices]

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield micro-batches that know how many hidden tokens and pairs their whole step has, over all processes."""
        for rows in source:
            micros = [self.collate(part, roles) for part in roles.split(rows)]
            if self.with_mlm:
                own = [sum(float(m.target.numel()) for m in micros), sum(self.weight(m) for m in micros)]
                tokens, pairs = roles.sum(own)
                scale = torch.tensor(pairs / max(tokens, 1.0))
                micros = [micro.with_extra(scale=scale) for micro in micros]
            yield micros

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Make the pairs of the documents and lay them out."""
        before, between, after = pair_frame(roles.tokenizer)
        room = roles.max_length - len(before) - len(between) - len(after)
        made: list[tuple[list[int], list[int], Pair, dict[str, Any], int]] = []
        for row in rows:
            for number, pair in enumerate(self._pairs(row, roles, room)):
                tokens = [(i, SPECIAL) for i in before] + pair.first + [(i, SPECIAL) for i in between] + pair.second
                tokens += [(i, SPECIAL) for i in after]
                made.append(([i for i, _ in tokens], [w for _, w in tokens], pair, row, number))
        if self.with_mlm:
            hidden = [self.hide_tokens(ids, words, row, roles, 1 + number) for ids, words, _, row, number in made]
        else:
            hidden = [Hidden([], [], []) for _ in made]
        sequences: list[Sequence] = [corrupted(ids, found) for (ids, *_), found in zip(made, hidden, strict=True)]
        batch = masked_targets(roles.layout(sequences), [ids for ids, *_ in made], hidden)
        here = batch.here
        lengths = torch.tensor([len(ids) for ids, *_ in made], dtype=torch.long)
        starts = (here.last[: len(made)] - lengths + 1) if made else lengths
        labels = torch.tensor([int(pair.is_next) for _, _, pair, _, _ in made], dtype=torch.long)
        batch = batch.with_extra(pool=starts, is_next=labels)
        classes = {
            "next": [i for i, (_, _, pair, _, _) in enumerate(made) if pair.is_next],
            "other": [i for i, (_, _, pair, _, _) in enumerate(made) if not pair.is_next],
        }
        batch = batch.with_extra(**{k: torch.tensor(v, dtype=torch.long) for k, v in classes.items()})
        if int(getattr(roles.model.config, "type_vocab_size", 0) or 0) > 1:
            heads = [len(before) + len(pair.first) + len(between) for _, _, pair, _, _ in made]
            second = [(i, j) for i, (ids, *_) in enumerate(made) for j in range(heads[i], len(ids))]
            owner = torch.tensor([i for i, _ in second], dtype=torch.long)
            places = starts[owner] + torch.tensor([j for _, j in second], dtype=torch.long)
            types = torch.zeros_like(here.input_ids).flatten().index_fill(0, places, 1)
            batch = batch.with_extra(token_type_ids=types.view_as(batch.input_ids))
        return batch

    def _pairs(self, row: dict[str, Any], roles: Roles, room: int) -> list[Pair]:
        plan = PairPlan(room, self.p_random, self.short_prob, self.balance == "exact", self.negatives)
        split = row.get(SPLIT, roles.data)

        def other(number: int) -> Document:
            return as_document(split[number % len(split)])

        return make_pairs(as_document(row), plan, generator(roles.seed, row.get("epoch"), row["row"]), other)

    # --- the loss -------------------------------------------------------------------------------------------------

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs, the loss denominator."""
        return float(batch.extra["is_next"].numel())

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the pairs, and that of the hidden tokens times pairs / tokens of the step."""
        out = roles.policy(batch, heads=(HEAD,))
        terms, metrics = self._terms(batch, out)
        total = terms["nsp"] * (self.weight_nsp if self.with_mlm else 1.0)
        if self.with_mlm:
            # A batch outside a step, of a calibration for one, is a step of its own.
            own = self.weight(batch) / max(float(batch.target.numel()), 1.0)
            total = total + terms["mlm"] * batch.extra.get("scale", own)
        return Loss(total, metrics)

    def _terms(self, batch: Batch, out: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Any, float]]]:
        scores, labels = upcast(out[HEAD]), batch.extra["is_next"]
        pairs = float(labels.numel())
        nsp = F.cross_entropy(scores, labels, reduction="sum") if pairs else scores.sum() * 0.0
        right = (scores.argmax(-1) == labels).float()
        metrics: dict[str, tuple[Any, float]] = {
            "nsp/nll": (nsp.detach(), pairs),
            "nsp/accuracy": (right.sum(), pairs),
            "nsp/share_next": (labels.float().sum(), pairs),
        }
        for kind in ("next", "other"):
            of_kind = batch.extra[kind]
            metrics[f"nsp/accuracy/{kind}"] = (right[of_kind].sum(), float(of_kind.numel()))
        terms = {"nsp": nsp}
        # A micro-batch without targets still takes part in the backward pass of the language head.
        terms["mlm"] = negative_log_likelihood(out["logprobs"])
        if self.with_mlm:
            metrics |= masked_metrics(out["logprobs"], out["correct"], batch.extra)
        return terms, metrics

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return each term with its own count; `finish_evaluation` adds their means."""
        terms, metrics = self._terms(batch, roles.policy(batch, heads=(HEAD,)))
        pairs, tokens = self.weight(batch), float(batch.target.numel())
        if not self.with_mlm:
            return {"loss": (terms["nsp"], pairs), **metrics}
        return {"loss/nsp": (terms["nsp"], pairs), "loss/mlm": (terms["mlm"], tokens), **metrics}

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return log p(is next) - log p(is not), (S,), and whether it is, (S,)."""
        with torch.no_grad():
            scores = upcast(roles.policy(batch, heads=(HEAD,))[HEAD])
        return {"margin": (scores[:, 1] - scores[:, 0]).cpu(), "is_next": batch.extra["is_next"].cpu()}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute F1 of the positive pairs and the area under the ROC curve; add the terms of the loss."""
        found = {}
        if self.with_mlm:
            found["loss"] = sums["loss/mlm"] + self.weight_nsp * sums["loss/nsp"]
        gold, margin = tensors["is_next"].bool().numpy(), tensors["margin"].numpy()
        if 0 < gold.sum() < len(gold):
            from sklearn.metrics import f1_score, roc_auc_score  # noqa: PLC0415 (a second that only an evaluation needs)

            found |= {"nsp/f1": float(f1_score(gold, margin > 0)), "nsp/auc": float(roc_auc_score(gold, margin))}
        return found
