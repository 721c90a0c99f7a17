"""TSDAE: loss and every gradient of a tied decoder of Transformers that sees one vector; the encoder it leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmrecipe.engine.masks import causal_mask
from llmrecipe.engine.vector_decoder import OWNER
from llmrecipe.models import stored_heads, task_heads
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.native import NativeConfig
from llmrecipe.models.native.model import NativeStack
from llmrecipe.objectives.pretraining.dae import HEAD, Dae
from tests.objectives.test_dae import ROWS, compare, roles_of
from tests.tiny import tiny_masked_model

NATIVE = {"positions": "learned", "bias": True, "num_key_value_heads": 4}


def encoder(family: str, **more: Any) -> tuple[Any, Dae]:
    """An encoder with the cross-attention of TSDAE, all of it large enough to matter, in float64."""
    model: Any = tiny_masked_model(family, **more)
    objective = Dae(form="tsdae", pool="avg" if family == "roberta" else "cls")
    objective.prepare_model(model, 3)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.task_head.parameters():
            parameter.normal_(std=0.3)
    return model.double(), objective


def tied_decoder(model: Any) -> nn.Module:
    """Transformers' decoder of the same family whose parameters are the encoder's own; its queries and keys are random."""
    config = type(model.config).from_dict({**model.config.to_dict(), "is_decoder": True, "add_cross_attention": True})
    torch.manual_seed(9)
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    own, head = dict(model.named_parameters(remove_duplicate=False)), model.task_head[HEAD]
    for name, module in decoder.named_modules():
        for part in list(module._parameters):
            if f"{name}.{part}" in own:
                module._parameters[part] = own[f"{name}.{part}"]
    for layer, block in enumerate(decoder.base_model.encoder.layer):
        cross = block.crossattention
        cross.self.value, cross.output.dense, cross.output.LayerNorm = head.value[layer], head.out[layer], head.norm[layer]
    return decoder


def read(model: Any, objective: Dae) -> tuple[list[Tensor], list[Tensor]]:
    """The vector (D,) and the clean text of each row, from Transformers' forward pass alone."""
    vectors, texts = [], []
    for one in ROWS:
        noised = objective.noised_row(one, roles_of(model), "masked")
        assert noised.source[0] == 1 and noised.source[-1] == 2 and 2 < len(noised.source) <= len(one["ids"])
        states = model.base_model(torch.tensor([noised.source])).last_hidden_state[0]
        vectors.append(states.mean(0) if objective.pool == "avg" else states[0])
        texts.append(torch.tensor(one["ids"]))
    return vectors, texts


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_loss_and_gradients_are_those_of_a_tied_decoder(family: str) -> None:
    model, objective = encoder(family, **({"type_vocab_size": 1} if family == "roberta" else {}))
    vectors, texts = read(model, objective)
    decoder = tied_decoder(model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for z, ids in zip(vectors, texts, strict=True):
        logits = decoder(ids[None, :-1], encoder_hidden_states=z[None, None]).logits[0]
        total = total + nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        count += len(ids) - 1
    roles = roles_of(model)
    batch = objective.collate(ROWS, roles)
    assert objective.weight(batch) == count
    compare(model, objective.loss(batch, roles), total / count, count, 1e-9)
    head = model.task_head[HEAD]
    assert min(float(p.grad.abs().max()) for p in head.parameters()) > 1e-4


@pytest.mark.parametrize("pre_norm", [True, False])
def test_the_native_encoder_decodes_as_the_native_decoder(pre_norm: bool) -> None:
    model, objective = encoder("llmrecipe_native", pre_norm=pre_norm, **NATIVE)
    vectors, texts = read(model, objective)
    config = NativeConfig.from_dict({**model.config.to_dict(), "kind": "encoder_decoder"})
    decoder = NativeStack(config, "decoder").double().eval()
    left = decoder.load_state_dict(model.model.encoder.state_dict(), strict=False)
    assert not left.unexpected_keys and all("cross" in name for name in left.missing_keys)
    head = model.task_head[HEAD]
    with torch.no_grad():
        for layer, block in enumerate(decoder.layers):
            block.cross_attn.v_proj.load_state_dict(head.value[layer].state_dict())
            block.cross_attn.o_proj.load_state_dict(head.out[layer].state_dict())
            if not pre_norm:
                block.norm_cross.weight.copy_(head.norm[layer].weight)
        total = torch.zeros((), dtype=torch.float64)
        for z, ids in zip(vectors, texts, strict=True):
            states = decoder(ids[None, :-1], encoder_hidden_states=z[None, None]).last_hidden_state[0]
            logits = model.cls(states) if hasattr(model, "cls") else model.lm_head(states)
            total += nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        roles = roles_of(model)
        found = objective.loss(objective.collate(ROWS, roles), roles).total
    torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-6)


def test_the_decoder_sees_one_vector_and_the_past() -> None:
    """A changed token of the source changes every logit, through the vector; one of the text, only those after it."""
    model, objective = encoder("bert")
    roles = roles_of(model)
    batch = objective.collate(ROWS[:1], roles)
    first = objective._predicted(batch, roles)[0].detach()
    changed = batch.input_ids.clone()
    changed[0, 10] = 7 if changed[0, 10] != 7 else 8
    later = objective._predicted(replace(batch, input_ids=changed), roles)[0].detach()
    assert torch.equal(first[:10], later[:10]) and bool((first[10:] != later[10:]).all())
    ids = batch.extra["encoder_ids"].clone()
    ids[0, -2] = 7 if ids[0, -2] != 7 else 8
    other = objective._predicted(batch.with_extra(encoder_ids=ids), roles)[0].detach()
    assert bool((other != first).all())


def test_causal_mask_of_padded_rows() -> None:
    found = causal_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert found.shape == (2, 1, 3, 3)
    assert found[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert found[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_the_finished_model_is_the_encoder_and_the_head_is_read_back() -> None:
    model, objective = encoder("bert")
    roles = roles_of(model)
    batch = objective.collate(ROWS, roles)
    loss = float(objective.loss(batch, roles).total.detach())
    assert any(name == OWNER for _, _, name, _ in all_hooks(model))
    plain = model(torch.tensor([[1, 9, 2]])).logits
    objective.finish(roles)
    assert not list(all_hooks(model))
    torch.testing.assert_close(model(torch.tensor([[1, 9, 2]])).logits, plain, rtol=0, atol=0)
    assert objective.documents(roles) == {
        task_heads.POOLING_FILE: {"pool": "cls", "mlp": False, "normalize": False, "max_length": 1024}
    }
    own, heads = stored_heads.split(model.state_dict())
    again: Any = tiny_masked_model("bert").double()
    again.load_state_dict(own)
    stored_heads.mount_heads(again, heads)
    roles = roles_of(again)
    assert float(objective.loss(objective.collate(ROWS, roles), roles).total.detach()) == pytest.approx(loss, rel=1e-6)
