"""Denoising autoencoding."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.foreign import stored_number
from llmrecipe.core.option_types import Literal, NonNegativeFloat
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence, pad
from llmrecipe.data.token_data import TokenData
from llmrecipe.engine.pooling import Pool
from llmrecipe.engine.role_models import Roles, row_tokens
from llmrecipe.engine.vector_decoder import decoder_sites, unmount_decoder
from llmrecipe.models import positions, task_heads
from llmrecipe.models.excluded import without_language_head
from llmrecipe.models.load import load_config, skeleton
from llmrecipe.models.masked_heads import check_masked_head
from llmrecipe.models.resolve_class import LANGUAGE, family_head
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.embedding_noise import noise_of_rows
from llmrecipe.objectives.pretraining._engines import embedding_target
from llmrecipe.objectives.pretraining._engines.denoising import FORMS, Denoising, NoisedRow
from llmrecipe.objectives.pretraining._engines.masking import at_own_places
from llmrecipe.objectives.row_draws import generator
from llmrecipe.objectives.token_math import TOKEN_METRICS, pair_batch
from llmrecipe.objectives.unused_options import refuse_unused
from llmrecipe.runs.open_model import resolve_section, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import ModelSection, Recipe

HEAD = "decoder"
"""Role of the cross-attention of TSDAE."""


@register
class Dae(Denoising, Objective):
    """Denoising autoencoding: L = -(1/N) sum_t log P(y_t | y_<t, noise(x)).

    `form: bart` predicts y = x, the whole text, from a text whose sentences are out of order and whose spans are masked
    (`permute_sentences`, `mask_ratio`), or under any of the other noises: single tokens masked, tokens removed or put in,
    another beginning. `form: t5` replaces spans by sentinels and predicts the sentinels with the tokens they stand for:
    round(noise_density n) of n tokens in max(1, round(noise / mean_span)) spans. N counts predicted tokens over the whole
    optimizer step. Noise follows from (seed, epoch, row): new in each epoch, the same on any number of processes and after a
    resume, fixed in evaluation. Special tokens are never noised.

    An encoder-decoder reads the noised text and writes the target. A decoder reads both as one text (`layout: prefix`), with
    the loss on the second. An encoder predicts each token at its own place, so its noise is masks alone.

    `form: tsdae` trains an encoder to give one vector a text: it reads the text with each word removed with probability 0.6,
    its states are pooled (`pool`), and the same layers, reading causally, write the text from cross-attention to that vector
    alone. Cross-attention is new and always trains; what embeds texts afterwards is the encoder.

    `form: mse` is the objective as the survey writes it, on an encoder: L = (1/N) sum_t ||h_t - e(x_t)||^2, h the last states
    of a text with masks (`mask_tokens`) or Gaussian noise on its embeddings (`sigma`), e the embeddings as they were
    (`target`). No gradient goes through e: with one, states and embeddings shrink together. Where the variance of e falls
    below a hundredth of what it was, the run says so.

    The mean loss of a row is a score of how unlike the others it is: rows with a column `outlier` are ranked by it in an
    evaluation (`outlier/auc`, the area under the ROC curve).

    Departures: fairseq draws a part of the noise from a global generator; `compat: fairseq` does what its code does with random
    numbers from (seed, epoch, row). Attention over a single vector is its value, so TSDAE's cross-attention has no queries and
    keys here, and no dropout.

    Papers: BART (arXiv 1910.13461) and fairseq's denoising_dataset.py; T5 (arXiv 1910.10683); TSDAE (arXiv 2104.06979).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "structured_text"
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "exact")
    head: ClassVar[str] = LANGUAGE

    layout: Literal["seq2seq", "prefix"] | None = None
    """Noised text and target in encoder and decoder, or one after the other in a decoder. Default: what the model is."""
    pool: Literal["cls", "avg"] = "cls"
    """TSDAE: the vector is the state of the first token, or the mean over all."""
    target: Literal["frozen", "ema", "layernorm"] = "frozen"
    """MSE: the embeddings of step 0, their moving average (decay 0.999), or the present ones normed to variance 1."""
    sigma: NonNegativeFloat = 0.0
    """MSE: deviation of the Gaussian noise on the embeddings."""

    @functools.cached_property
    def watched(self) -> dict[str, float]:
        """What is kept from step to step: the first variance of the targets of MSE, 0 once it was warned of."""
        return {}

    @functools.cached_property
    def owed(self) -> list[tuple[int, Mapping[str, float]]]:
        """The newest step and its metrics, where they have not been looked at."""
        return []

    # --- before weights are read ----------------------------------------------------------------------------------

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse options of other forms, noise that the model cannot undo, an unfit tokenizer, and rows too long."""
        refuse_unused(self, "form", FORMS)
        base = resolve_section(recipe.model, tensors=False)[0]
        config = load_config(base)
        kind = family_head(config, LANGUAGE)
        layout = {"seq2seq": "seq2seq", "causal": "prefix"}.get(kind)
        if self.layout is not None and self.layout != layout:
            able = "an encoder-decoder" if self.layout == "seq2seq" else "a decoder"
            raise RecipeError(
                f"objective.layout: {self.layout} needs {able}, and '{config.model_type}' is none; leave the key out, and the "
                "noised text is laid out as the model reads it"
            )
        self.check_noise(kind)
        longest = data.report.longest if isinstance(data, TokenData) else recipe.data.max_length
        self.check_tokens(kind, tokenizer_of(recipe.model, recipe.tokenizer), longest)
        self._check_room(base, config, kind, longest, recipe.data.max_length)

    def _check_room(self, base: ModelSection, config: PreTrainedConfig, kind: str, longest: int, limit: int) -> None:
        """Refuse rows that are longer than a learned table of positions once they are laid out."""
        stated = positions.stated_positions(config)
        needed = longest if kind == "masked" else 2 * longest + 2 if kind == "causal" else longest + 2
        if stated is None or needed <= stated:
            return
        room = positions.learned(skeleton(base, rows_head=LANGUAGE))
        if room is not None and needed > room:
            fits = (room - 2) // 2 if kind == "causal" else room - 2
            raise RecipeError(
                f"data.max_length: {limit}: a row of {longest} tokens and its target take {needed} of the {room} positions of "
                f"the model; set data.max_length={max(fits, 1)}"
            )

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the cross-attention of TSDAE, or store the embeddings that are targets.

        Raises:
            RecipeError: the model cannot undo the noise.
            ModelError: its layers do not each have a place for cross-attention.
        """
        self.check_noise(family_head(model.config, LANGUAGE))
        if self.form == "mse":
            without_language_head(model)
            if self.target != "layernorm":
                embedding_target.store_targets(model)
        if self.form != "tsdae":
            return
        check_masked_head(model)
        layers, places = int(model.config.num_hidden_layers), len(set(map(id, decoder_sites(model))))
        if places != layers:
            raise ModelError(
                f"model.path: the {layers} layers of '{model.config.model_type}' have {places} places for the cross-attention "
                "of objective.form=tsdae, which needs one in each; use a BERT or RoBERTa"
            )
        task_heads.add_cross_attention_head(model, HEAD, layers, seed)

    def finish(self, roles: Roles) -> None:
        """Take the decoder apart; what is left is the encoder."""
        if self.form == "tsdae":
            unmount_decoder(roles.model)

    def documents(self, roles: Roles) -> dict[str, dict[str, Any]]:
        """Return how TSDAE's encoder gives a text its vector."""
        if self.form != "tsdae":
            return {}
        used = {"pool": self.pool, "mlp": False, "normalize": False, "max_length": roles.max_length}
        return {task_heads.POOLING_FILE: used}

    def measures(self) -> Measures:
        """Return the metrics of the predicted tokens, by whether they stood in the noised text, and of the rows."""
        by_kind: Measures = {"accuracy/corrupted": "max", "accuracy/copied": "max", "exact": "max"}
        common: Measures = {**by_kind, "noised": None, "outlier/auc": "max"}
        if self.form == "mse":
            return {"accuracy": "max", "loss/copy": None, "target_variance": None, **common}
        return {**TOKEN_METRICS, **common}

    def measured_columns(self) -> dict[str, str]:
        """Return that outliers are ranked where rows say which they are."""
        return {"outlier/auc": "outlier"}

    def facts(self, roles: Roles) -> dict[str, Any]:
        """Return the form and its noises."""
        kind = self.kind_of(roles)
        return {"form": self.form, "model": kind, "noise": self.noise_facts(kind)}

    @staticmethod
    def kind_of(roles: Roles) -> str:
        """Return what the model is: seq2seq, causal or masked."""
        return family_head(roles.model.config, LANGUAGE)

    # --- batches --------------------------------------------------------------------------------------------------

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step; where rows are padded, those of one micro-batch are of about one length."""
        padded = self.form == "tsdae" or not roles.packing
        yield from super().batches((sorted(rows, key=row_tokens) if padded else rows for rows in source), roles)

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Add noise to the rows and lay them out as the model reads them."""
        kind = self.kind_of(roles)
        noised = [self.noised_row(row, roles, kind) for row in rows]
        trained = [self._trained(one, kind) for one in noised]
        numbers = [row["row"] for row in rows]
        if kind == "seq2seq":
            answers = [Sequence(one.target, flags) for one, flags in zip(noised, trained, strict=True)]
            batch = pair_batch([one.source for one in noised], answers, numbers, roles)
        elif self.form == "tsdae":
            read = pad([Sequence(one.source, [0] * len(one.source)) for one in noised], roles.pad_id)
            answers = [Sequence(one.target, flags) for one, flags in zip(noised, trained, strict=True)]
            batch = roles.layout(answers, numbers, packed=False)
            assert read.attention_mask is not None, "padded rows have a mask"
            batch = batch.with_extra(encoder_ids=read.input_ids, encoder_mask=read.attention_mask).to(roles.device)
        elif kind == "causal":
            batch = roles.layout([_prefixed(one, flags) for one, flags in zip(noised, trained, strict=True)], numbers)
        else:
            sequences = [Sequence(one.source, [0] * len(one.source), prompt=len(one.source)) for one in noised]
            places = [[i for i, flag in enumerate(flags) if flag] for flags in trained]
            batch = at_own_places(roles.layout(sequences, numbers), [one.target for one in noised], places)
            if self.sigma:
                batch = batch.with_extra(embedding_noise=self._embedding_noise(batch, rows, roles))
        copied = [one for row, flags in zip(noised, trained, strict=True) for one, flag in zip(row.copied, flags) if flag]
        marks = [row.get("outlier") for row in rows]
        extra = {
            "copied": torch.tensor([i for i, one in enumerate(copied) if one], dtype=torch.long),
            "corrupted": torch.tensor([i for i, one in enumerate(copied) if one is False], dtype=torch.long),
            "noised": torch.tensor([sum(one.noised for one in noised), sum(one.tokens for one in noised)]),
            "outlier": torch.tensor([math.nan if mark is None else float(mark) for mark in marks], dtype=torch.float64),
        }
        return batch.with_extra(**extra)

    def _trained(self, row: NoisedRow, kind: str) -> list[int]:
        """Return which tokens of the target are predicted."""
        if self.loss_on == "corrupted" and self.form in ("bart", "mse"):
            return [int(one is False) for one in row.copied]
        if self.form == "tsdae":
            return [0, *[1] * (len(row.target) - 1)]
        if kind == "masked":
            return [int(one is not None) for one in row.copied]
        # A decoder alone goes on after the source, whose first special tokens the target does not repeat.
        lead = row.lead if kind == "causal" else 0
        return [0] * lead + [1] * (len(row.target) - lead)

    def _embedding_noise(self, batch: Batch, rows: list[dict[str, Any]], roles: Roles) -> Tensor:
        """Draw the Gaussian noise of each row, (R, T, D), from (seed, epoch, row)."""
        width = roles.model.get_input_embeddings().weight.shape[-1]
        noises = []
        for row in rows:
            draws = generator(roles.seed, row.get("epoch"), row["row"], 1)
            noises.append(torch.from_numpy(self.sigma * draws.standard_normal((len(row["ids"]), width))).float())
        return noise_of_rows(batch, noises)

    # --- the loss -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood (or squared error) of the targets."""
        losses, correct, metrics = self._predicted(batch, roles)
        count, rows = float(losses.numel()), len(batch.rows)
        noised, tokens = batch.here.extra["noised"].tolist()
        metrics["accuracy"] = (correct.sum(), count)
        for name in ("corrupted", "copied"):
            chosen = batch.extra[name]
            metrics[f"accuracy/{name}"] = (correct[chosen].sum(), float(chosen.numel()))
        wrong = batch.sum_by_sequence(1.0 - correct)[:rows]
        metrics["exact"] = ((wrong == 0).sum(), float(rows))
        metrics["noised"] = (float(noised), float(tokens))
        return Loss(losses.sum(), metrics)

    def _predicted(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, dict[str, tuple[Any, float]]]:
        """Return the loss (N,) of each target, whether it is the likeliest (or nearest) token, and metrics of the form."""
        if self.form == "mse":
            return self._distances(batch, roles)
        if self.form == "tsdae":
            out = roles.policy(batch, want="decoded", pool=Pool(self.pool, HEAD))
        else:
            out = roles.policy(batch)
        losses = -out["logprobs"]
        return losses, out["correct"], {"nll": (losses.detach().sum(), float(losses.numel()))}

    def _distances(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, dict[str, tuple[Any, float]]]:
        states = roles.policy(batch, want="states")["states"]
        chosen = states.reshape(-1, states.shape[-1])[batch.source]
        table, count = embedding_target.target_table(roles.model, self.target), float(batch.target.numel())
        losses = embedding_target.squared_errors(chosen, batch.target, table)
        correct = (embedding_target.nearest_rows(chosen, table) == batch.target).to(losses.dtype)
        # What a model would lose that gives back the embedding of each token it reads.
        shown = table[batch.input_ids.flatten()[batch.source]]
        copied = embedding_target.squared_errors(shown, batch.target, table).sum()
        spread = embedding_target.variance(table)
        return losses, correct, {"loss/copy": (copied, count), "target_variance": (spread * count, count)}

    def after_step(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """Move the targets, and warn once where they have collapsed."""
        if self.form != "mse":
            return
        if self.target == "ema":
            embedding_target.follow_embeddings(roles.model)
        # Metrics that are on their way from a device are looked up when the next step has been made.
        before = self.owed.copy()
        self.owed[:] = [(step, metrics)]
        if isinstance(metrics, dict) or before:
            self._see_variance(*(self.owed.pop() if isinstance(metrics, dict) else before[0]), roles)

    def _see_variance(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """Warn once where the targets have collapsed, to a hundredth of their first variance."""
        first, spread = self.watched.setdefault("variance", metrics["target_variance"]), metrics["target_variance"]
        if spread < embedding_target.COLLAPSED * first and roles.events is not None:
            self.watched["variance"] = 0.0
            roles.events.warning(
                f"the targets of objective.form=mse have collapsed at step {step}: their variance is {spread:.2g}, less than a "
                "hundredth of the first; use objective.target=frozen"
            )

    def state(self) -> dict[str, Any]:
        """Return what is kept from step to step."""
        for _, metrics in self.owed:
            self.watched.setdefault("variance", metrics["target_variance"])
        return dict(self.watched)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.watched.update({name: stored_number(value, name) for name, value in state.items()})

    # --- outliers -------------------------------------------------------------------------------------------------

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return the mean loss of each row, and whether it is an outlier, (S,) each; NaN where that is not known."""
        outlier = batch.extra["outlier"].cpu()
        if not bool((~outlier.isnan()).any()):
            return {"score": torch.full_like(outlier, math.nan), "outlier": outlier}
        losses = self._predicted(batch, roles)[0].detach()
        scores = batch.sum_by_sequence(losses.double()) / batch.counts().clamp_min(1.0)
        return {"score": scores[: len(outlier)].cpu(), "outlier": outlier}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute the area under the ROC curve of the outliers, where rows say which they are."""
        known = ~tensors["outlier"].isnan()
        gold, score = tensors["outlier"][known].bool().numpy(), tensors["score"][known].numpy()
        if not 0 < gold.sum() < len(gold):
            return {}
        from sklearn.metrics import roc_auc_score  # noqa: PLC0415 (a second that only an evaluation needs)

        return {"outlier/auc": float(roc_auc_score(gold, score))}


def _prefixed(row: NoisedRow, trained: list[int]) -> Sequence:
    """Return a noised text followed by its target, without the special tokens that begin it a second time."""
    ids, flags = row.target[row.lead :], trained[row.lead :]
    return Sequence([*row.source, *ids], [0] * len(row.source) + flags, prompt=len(row.source))
