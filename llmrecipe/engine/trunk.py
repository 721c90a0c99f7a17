"""Passes of a model without its language head: states of rows, vectors and scores of sequences, in every layout.

Letters: R rows, T tokens, D width, S sequences, C classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GenericForQuestionAnswering

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import activate, checkpoint_contexts, current
from llmrecipe.data.batch_parts import part_of_batch
from llmrecipe.data.collate import Batch
from llmrecipe.data.row_groups import by_groups
from llmrecipe.engine.logprob import Post, upcast
from llmrecipe.engine.masks import causal_mask
from llmrecipe.engine.pooling import LAYERS, Pool, pool_states
from llmrecipe.engine.row_reading import RowReading, measure_reading, obeys
from llmrecipe.engine.vector_decoder import decoding, encoder_rows, mount_decoder
from llmrecipe.models.fused_kernels import FusedParts
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.load_balance import auxiliary_loss
from llmrecipe.models.pretrained import backbone_of, pretrained
from llmrecipe.models.resolve_class import language_head
from llmrecipe.models.task_heads import FEATURES

if TYPE_CHECKING:
    from llmrecipe.models.compiled_blocks import CompiledBlocks
    from llmrecipe.models.pretrained import LanguageModel


class Trunk(nn.Module):
    """A model and how its rows are read."""

    def __init__(self, model: LanguageModel, autocast: torch.dtype | None = None):
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.compiled: CompiledBlocks | None = None
        """Its blocks, where they are compiled."""
        self.fused = FusedParts()
        """What of it goes through fused kernels of a package."""
        self.one_by_one = False
        """Whether packed documents are attended in turn because one call for all did not give the model's states."""
        self.post = Post.of(model.config)
        self.is_pair_model = bool(getattr(model.config, "is_encoder_decoder", False))
        if not any(p.is_meta for p in model.parameters()):
            # Before anybody counts or records passes of this model.
            _ = self.reading

    def head_of(self, role: str) -> nn.Module:
        """Return a role's own scalar head, stored under `task_head` of the model."""
        heads = getattr(self.model, "task_head", None)
        if not isinstance(heads, nn.ModuleDict) or role not in heads:
            raise KeyError(f"the model has no task head for the role '{role}'")
        return heads[role]

    def hidden_of(self, batch: Batch) -> Tensor:
        """Return the last hidden states (R, T, D) under the batch's own context, without any head."""
        with activate(batch.context()):
            return self.hidden(batch)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states (R, T, D) of the backbone."""
        return self.states(batch)[0]

    @property
    def reading(self) -> RowReading:
        """Return how the model reads rows, measured once, without what is injected into it, and kept with the model."""
        if "row_reading" not in self.model.__dict__:
            with self._uncompiled():
                self.model.row_reading = measure_reading(self.model, self._read_together)
        return self.model.row_reading

    def _read_together(self, batch: Batch) -> Tensor:
        """Return the base's last hidden states (R, T, D) of rows that share a pass whatever it reads of the padding."""
        injected = frozenset(hook.owner for _, _, _, hook in all_hooks(self.model))
        with activate(dataclasses.replace(batch.context(), off=injected)):
            return (self._pair_pass(batch) if self.is_pair_model else self._pass(batch, (-1,)))[0][0]

    def _uncompiled(self) -> contextlib.AbstractContextManager[None]:
        """Compile nothing inside: probes have shapes that no batch has."""
        return contextlib.nullcontext() if self.compiled is None else self.compiled.off()

    def _by_length(
        self, batch: Batch, compute: Callable[[Batch], tuple[list[Tensor], Tensor | None]], whole: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Compute tensors of a batch: in one pass, or one for each length of its rows where the model reads the padding.

        Args:
            whole: the tensors are (R, ...), one entry a row, and not (R, T, ...).
        """
        if batch.attention_mask is None or batch.pixels is not None or not self.reading.apart:
            return compute(batch)

        def part(own: Batch) -> tuple[list[Tensor], Tensor | None]:
            around = current()
            with activate(dataclasses.replace(own.context(around.role), off=around.off, examples=around.examples)):
                return compute(own)

        return by_groups(batch, part, self.reading.alone, whole)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the last hidden states (R, T, D) of the backbone, and the loss the model itself adds, if any."""
        if self.is_pair_model:
            layers, auxiliary = self._by_length(batch, self._pair_pass)
        else:
            layers, auxiliary = self._layers(batch, (-1,))
        return layers[0], auxiliary

    def continued(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the states (R, T, D) of rows that a model continues, and the loss the model itself adds, if any.

        A decoder reads them as ever. An encoder sees the prompt (features included) whole and each later token what is before
        it, as a prefix language model does; its rows are padded.
        """
        if self.is_pair_model or language_head(self.model.config) == "causal":
            return self.states(batch)
        self.check_masking()
        layers, auxiliary = self._layers(batch, (-1,), ordered=True)
        return layers[0], auxiliary

    def check_masking(self) -> None:
        """Refuse an encoder that cannot be kept from later tokens: one that mixes tokens elsewhere than in attention.

        Raises:
            ModelError: with a causal mask its states still depend on what follows.
        """
        if "obeys_causal_mask" not in self.model.__dict__:

            def ordered(batch: Batch) -> Tensor:
                with activate(batch.context()):
                    return self._pass(batch, (-1,), ordered=True)[0][0]

            with self._uncompiled():
                self.model.obeys_causal_mask = obeys(self.model, ordered)
        if not self.model.obeys_causal_mask:
            raise ModelError(
                f"model.path: '{self.model.config.model_type}' mixes tokens elsewhere than in attention, so no mask keeps it "
                "from the tokens it is to predict; use an encoder such as bert or roberta, or a decoder"
            )

    def _layers(self, batch: Batch, places: tuple[int, ...], ordered: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Return the states of some layers, -1 the last with its norm, and the loss the model itself adds, if any.

        Args:
            ordered: a token sees the prompt and what is before it; default: as the model has it.
        """
        return self._by_length(batch, lambda part: self._pass(part, places, ordered))

    def _pass(self, batch: Batch, places: tuple[int, ...], ordered: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Return `_layers` of rows that share a pass."""
        backbone = backbone_of(self.model)
        inputs = self._inputs(batch)
        if ordered:
            assert batch.attention_mask is not None, "rows with a mask of their own are padded"
            inputs["attention_mask"] = causal_mask(batch.attention_mask, batch.prompt_lengths)
        inputs["position_ids"] = batch.position_ids + getattr(self.model, "position_offset", 0)
        if getattr(self.model.config, "use_cache", None) is not None:
            inputs["use_cache"] = False
        last = places == (-1,)
        if not last:
            inputs["output_hidden_states"] = True
        out = backbone(**inputs)
        layers = [out.last_hidden_state] if last else [out.hidden_states[place] for place in places]
        return layers, auxiliary_loss(self.model.config, out, batch.attention_mask)

    def pooled(self, batch: Batch, pool: Pool, role: str = "policy") -> tuple[Tensor, Tensor | None]:
        """Return one vector a sequence, (S, D), and the loss the model itself adds, if any.

        Where `pool` has cuts, chunks are computed one by one and again in the backward pass. They are compared with one
        another, so all vectors exist before the first gradient does; the second pass replays the random states of the first, so
        its dropout is the same and the gradient that of one large batch. The model's own loss is the mean over their tokens.
        """
        if not pool.cuts:
            return self._pooled(batch, pool)
        vectors: list[Tensor] = []
        total: Tensor | None = None
        for first, last in pool.chunks(batch.sequences):
            part = part_of_batch(batch, first, last)
            with activate(dataclasses.replace(part.context(role), off=current().off)):
                if torch.is_grad_enabled():
                    again: dict[str, Any] = {"use_reentrant": False, "context_fn": checkpoint_contexts}
                    found, own = checkpoint(self._pooled, part, pool, **again)
                else:
                    found, own = self._pooled(part, pool)
            vectors.append(found)
            if own is not None:
                own = own * (part.tokens / max(batch.tokens, 1))
                total = own if total is None else total + own
        return torch.cat(vectors), total

    def _pooled(self, batch: Batch, pool: Pool) -> tuple[Tensor, Tensor | None]:
        layers, auxiliary = self._layers(batch, LAYERS[pool.kind])
        vectors = pool_states(batch, layers, pool.kind)
        return vectors if pool.head is None else self.head_of(pool.head)(vectors), auxiliary

    def decoded(self, batch: Batch, pool: Pool) -> tuple[Tensor, Tensor | None]:
        """Return the states (R, T, D) of an encoder that runs as the decoder of a vector, and the loss the model itself adds.

        The vector is pooled from its states of other rows; the same layers then read the batch's rows, each token those before
        it, with the cross-attention of the head that `pool` names.
        """
        self.check_masking()
        rows = encoder_rows(batch)
        with activate(
            dataclasses.replace(
                current(), attention_mask=rows.attention_mask, positions=rows.position_ids, padded=None, read=None
            )
        ):
            layers, own = self._layers(rows, LAYERS[pool.kind])
        head: Any = self.head_of(pool.head or "")
        mount_decoder(self.model)
        added = head(pool_states(rows, layers, pool.kind))
        steps = [functools.partial(head.add, layer, c=c) for layer, c in enumerate(added)]
        # What a layer adds belongs to the rows of the whole batch, which a model that obeys a causal mask can read together.
        with activate(decoding(steps)):
            states, auxiliary = self._pass(dataclasses.replace(batch, prompt_lengths=None), (-1,), ordered=True)
        return states[0], auxiliary if own is None or auxiliary is None else own + auxiliary

    def _pair_pass(self, batch: Batch) -> tuple[list[Tensor], Tensor | None]:
        """Return the last states of the decoder; the encoder reads `encoder_ids`, the decoder the batch's rows."""
        model, mask = self.model, batch.extra["encoder_mask"]
        # The batch's own rows are the decoder's; their masks and positions do not hold for the encoder's rows.
        own = dataclasses.replace(current(), attention_mask=mask, positions=None, prompt_lengths=None, padded=None, read=None)
        with activate(own):
            encoder = model.get_encoder()
            read = _noised(encoder, batch.extra["encoder_ids"], batch.extra.get("encoder_noise"))
            out = encoder(**read, attention_mask=mask)
        decoder = model.get_decoder()
        # Its cross-attention has the encoder's mask, of which the batch's own rows say nothing.
        with activate(dataclasses.replace(current(), padded=None)):
            answer = decoder(
                **_noised(decoder, batch.input_ids, batch.extra.get("embedding_noise")),
                attention_mask=batch.attention_mask,
                encoder_hidden_states=out.last_hidden_state,
                encoder_attention_mask=mask,
                use_cache=False,
            )
        own_loss = auxiliary_loss(model.config, answer, batch.attention_mask)
        read_loss = auxiliary_loss(model.config, out, mask)
        both = own_loss if read_loss is None or own_loss is None else own_loss + read_loss
        return [answer.last_hidden_state], both

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return a sequence head's logits (S, C), and the loss the model itself adds, if any.

        Decoders are read at the last real token, other families by their own pooling.
        """
        head = getattr(self.model, "score", None)
        if isinstance(head, nn.Module):
            hidden, auxiliary = self.states(batch)
            pooled = hidden.reshape(-1, hidden.shape[-1])[batch.last]
            weight: Any = head.weight
            return upcast(head(pooled.to(weight.dtype))), auxiliary

        def scored(rows: Batch) -> tuple[list[Tensor], Tensor | None]:
            return [self.model(**self._inputs(rows)).logits], None

        return upcast(self._by_length(batch, scored, whole=True)[0][0]), None

    def token_scores(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return a token head's logits (R, T, C), and the loss the model itself adds, if any.

        A head of spans has two of them: the token as the first and as the last one of an answer.
        """
        spans = isinstance(self.model, GenericForQuestionAnswering)
        head = getattr(self.model, "qa_outputs" if spans else "score", None)
        if isinstance(head, nn.Module):
            hidden, auxiliary = self.states(batch)
            dropout: Any = getattr(self.model, "dropout", None)
            dropped = hidden if dropout is None else dropout(hidden)
            weight: Any = head.weight
            return upcast(head(dropped.to(weight.dtype))), auxiliary

        def scored(rows: Batch) -> tuple[list[Tensor], Tensor | None]:
            places = rows.position_ids + getattr(self.model, "position_offset", 0)
            return [token_logits(self.model(**self._inputs(rows), position_ids=places))], None

        return upcast(self._by_length(batch, scored)[0][0]), None

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Return what the model reads: pictures, or tokens with features in some of their places."""
        if batch.pixels is not None:
            return {"pixel_values": batch.pixels.to(self.model.dtype)}
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if "token_type_ids" in batch.extra:
            inputs["token_type_ids"] = batch.extra["token_type_ids"]
        if batch.slots is None:
            return inputs | _noised(self.model, batch.input_ids, batch.extra.get("embedding_noise"))
        embedded = self.model.get_input_embeddings()(batch.input_ids)
        vectors = self.head_of(FEATURES)(batch.slots.values, batch.slots.place).to(embedded.dtype)
        return inputs | {"inputs_embeds": embedded.flatten(0, 1).index_copy(0, batch.slots.index, vectors).view_as(embedded)}


def token_logits(out: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (R, T, C) of a model's output; of a head of spans the start and the end."""
    return torch.stack((out["start_logits"], out["end_logits"]), -1) if "start_logits" in out else out["logits"]


def _noised(part: nn.Module, ids: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
    """Return what a part of the model reads: token ids, or their embeddings with noise (R, T, D) on them."""
    if noise is None:
        return {"input_ids": ids}
    plain = pretrained(part).get_input_embeddings()(ids)
    return {"inputs_embeds": plain + noise.to(plain.dtype)}
