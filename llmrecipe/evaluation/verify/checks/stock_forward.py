"""The product's forward pass and that of the stock model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.forward_context import activate
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.pooling import real_tokens
from llmrecipe.engine.trunk import token_logits
from llmrecipe.evaluation.verify.bench import Bench, largest
from llmrecipe.evaluation.verify.documents import BatchText, documents_of, segment_rows
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification
from llmrecipe.models.optimizations import without_speed_ups
from llmrecipe.models.resolve_class import NEW_HEADS, SPANS


@register
class StockForward(Verification):
    """Log-probabilities (or class scores) and gradients of the engine = those of Transformers' own forward pass."""

    order: ClassVar[int] = 30

    def measure(self, bench: Bench) -> Measured:
        """Compare each document's targets with a plain call of the model on that document alone."""
        with bench.probing() as run:
            if run.roles.engine.is_pair_model:
                raise NotApplicable("an encoder-decoder reads two texts a row; its layouts are compared above")
            micros = bench.micros(run)
            if bench.run.objective.model_head() in NEW_HEADS:
                return self._scores(bench, micros)
            if any(m.slots is not None for m in micros):
                raise NotApplicable("features enter through a head of their own; the layouts are compared above")
            micros = [m for m in micros if m.target.numel()]
            if not micros:
                raise NotApplicable("the objective has no token targets")
            fast: dict[str, Tensor] = {}
            stock: dict[str, Tensor] = {}
            for number, micro in enumerate(micros):
                values = run.roles.engine(micro)["logprobs"]
                _pull(values, bench.by_gradient)
                fast[f"batch {number}"] = values.detach()
            gradients = bench.gradients()
            for number, micro in enumerate(micros):
                stock[f"batch {number}"] = self._stock(bench, micro)
            apart, where = largest(stock, fast)
            slope, name = largest(bench.gradients(), gradients)
            worst = (slope, f"gradient of {name}") if not slope <= apart else (apart, where)
        what = "log-probabilities and gradients" if bench.by_gradient else "log-probabilities"
        return Measured(f"{what} of the engine = of the stock forward", worst[0], bench.bound, worst[1])

    def _stock(self, bench: Bench, micro: Batch) -> Tensor:
        """Return the targets' log-probabilities (N,) from the logits of plain calls, one document each."""
        found = torch.zeros(micro.target.numel(), device=bench.run.roles.device)
        ranks = _weights(found)
        for document in documents_of(micro):
            logits = _plain_logits(bench, document)
            places = torch.tensor([index for index, _ in document.places], device=found.device)
            positions = torch.tensor([position for _, position in document.places], device=found.device)
            rows = logits[0, positions].float().log_softmax(-1)
            values = rows.gather(-1, micro.target[places, None]).squeeze(-1)
            if bench.by_gradient and values.requires_grad:
                (values * ranks[places]).sum().backward()
            found[places] = values.detach()
        return found

    def _scores(self, bench: Bench, micros: list[Batch]) -> Measured:
        wanted, found = {}, {}
        gradients: list[dict[str, Tensor]] = []
        for number, micro in enumerate(micros):
            values = self._engine_scores(bench, micro)
            _pull(values, bench.by_gradient)
            found[str(number)] = values.detach()
        gradients.append(bench.gradients())
        for number, micro in enumerate(micros):
            if micro.pixels is not None:
                rows = [_plain_scores(bench, picture[None])[0] for picture in micro.pixels]
            else:
                rows = [_plain_logits(bench, document)[0] for document in whole_documents(micro)]
            # A head that reads every token gives (T, C) of each document, any other (C,).
            values = (torch.cat if rows[0].dim() == 2 else torch.stack)(rows).float()
            _pull(values, bench.by_gradient)
            wanted[str(number)] = values.detach()
        gradients.append(bench.gradients())
        apart, where = largest(wanted, found)
        slope, name = largest(gradients[1], gradients[0])
        worst = (slope, f"gradient of {name}") if not slope <= apart else (apart, f"batch {where}")
        return Measured("class scores and gradients of the engine = of the stock forward", worst[0], bench.bound, worst[1])

    def _engine_scores(self, bench: Bench, micro: Batch) -> Tensor:
        """Return the engine's scores (S, C), or (M, C) of every real token where the head reads them all."""
        roles = bench.run.roles
        if bench.run.objective.model_head() not in ("token_classification", SPANS):
            return roles.engine(micro, want="scores")["scores"]
        values = roles.engine(micro, want="token_scores")["token_scores"]
        return values.reshape(-1, values.shape[-1])[real_tokens(micro)[0]]


def _weights(values: Tensor) -> Tensor:
    """Return the fixed weights 1, 1/2, 1/3, ... of the values, so that errors of opposite sign do not cancel."""
    return 1.0 / torch.arange(1, values.numel() + 1, device=values.device).view(values.shape)


def _pull(values: Tensor, wanted: bool) -> None:
    if wanted and values.requires_grad:
        (values * _weights(values.detach())).sum().backward()


def whole_documents(micro: Batch) -> list[BatchText]:
    """Return one document per sequence of a batch without token targets."""
    lasts = micro.last.tolist()
    if micro.layout is not None:
        ids = micro.input_ids[0].tolist()
        return [BatchText(ids[s.start : s.start + s.length], s.prompt) for s in micro.layout.segments]
    width, kinds = micro.input_ids.shape[1], segment_rows(micro)
    assert micro.attention_mask is not None, "padded rows have a mask"
    firsts = micro.attention_mask.argmax(1).tolist()
    found = []
    for last in lasts:
        row, span = last // width, slice(firsts[last // width], last % width + 1)
        found.append(BatchText(micro.input_ids[row, span].tolist(), 0, segments=None if kinds is None else kinds[row][span]))
    return found


def _plain_scores(bench: Bench, pixels: Tensor) -> Tensor:
    """Return the logits (S, C) of Transformers' own forward on pictures (S, C, H, W)."""
    engine = bench.run.roles.engine
    device = bench.run.roles.device.type
    autocast = torch.autocast(device, dtype=engine.autocast or torch.bfloat16, enabled=engine.autocast is not None)
    with without_speed_ups(bench.run.model), autocast:
        model: Any = bench.run.model
        return model(pixel_values=pixels.to(model.dtype)).logits


def _plain_logits(bench: Bench, document: BatchText) -> Tensor:
    """Return the logits of Transformers' own forward on one document, without anything that makes it faster."""
    run = bench.run
    batch = document.batch(run.roles.pad_id).to(run.roles.device)
    model: Any = run.model
    engine = run.roles.engine
    autocast = torch.autocast(
        run.roles.device.type, dtype=engine.autocast or torch.bfloat16, enabled=engine.autocast is not None
    )
    with without_speed_ups(model), activate(batch.context()), autocast:
        more = (
            {} if document.segments is None else {"token_type_ids": torch.tensor([document.segments], device=run.roles.device)}
        )
        return token_logits(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more))
