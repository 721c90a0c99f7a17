"""P-tuning v2: the table of peft's layout, dropout on the columns, encoders with a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive._engines.prefix_kv import tables_of
from llmrecipe.methods.additive.p_tuning_v2 import PTuningV2
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from tests.methods.additive.prefix_support import IDS, adapted, bert_classifier, gradients, trained
from tests.tiny import tiny_model

P = 6


def p_tuning(**options: Any) -> PTuningV2:
    return PTuningV2(name="prefix", **{"num_virtual_tokens": P, **options})


def test_it_is_flat_prefix_tuning_with_dropout() -> None:
    ours = adapted(p_tuning())
    flat = adapted(PrefixTuning(name="prefix", num_virtual_tokens=P, reparam="flat", dropout=0.1))
    assert torch.equal(ours(input_ids=IDS).logits, flat(input_ids=IDS).logits)
    ours.train(), flat.train()
    torch.manual_seed(3)
    first = ours(input_ids=IDS).logits
    torch.manual_seed(3)
    assert torch.equal(flat(input_ids=IDS).logits, first)
    assert not torch.equal(ours.eval()(input_ids=IDS).logits, first)


def test_the_table_is_layer_major_keys_then_values() -> None:
    """Numbered entries land where peft's view (P, 2L, G, E) permuted to (2L, G, P, E) puts them."""
    model = adapted(p_tuning())
    (hook,) = tables_of(model, "prefix")
    table = hook.tables["attn"].eval()
    with torch.no_grad():
        table.flat.copy_(torch.arange(table.flat.numel()).view_as(table.flat))
    wanted = table.flat.view(P, 4, 2, 8).permute(1, 2, 0, 3)
    for layer, (keys, values) in enumerate(table()):
        assert torch.equal(keys[0], wanted[2 * layer])
        assert torch.equal(values[0], wanted[2 * layer + 1])
    assert torch.equal(table.join(table()), table.flat)


@pytest.mark.parity("p_tuning_v2", "PEFT PrefixTuningConfig")
@pytest.mark.slow
def test_an_encoder_with_a_head_equals_peft() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = bert_classifier()
    # peft moves BERT's positions behind the prefix; the P-tuning v2 code does not.
    Stack([p_tuning(positions="shift")]).attach(model)
    twin = get_peft_model(bert_classifier(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)).eval()
    (hook,) = tables_of(model, "prefix")
    with torch.no_grad():
        hook.tables["attn"].flat.copy_(twin.prompt_encoder["default"].embedding.weight)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = IDS.repeat(2, 1) * mask
    ours = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, twin(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5)


def test_counts_and_gradients_of_every_entry() -> None:
    model = adapted(p_tuning(dropout=0.0))
    assert sum(p.numel() for p in trained(model).values()) == 2 * 2 * P * 16
    grads = gradients(model, checkpointing=False)
    assert all(bool((g != 0).all()) for g in grads.values())


def test_dropout_is_the_same_in_the_replay_of_a_checkpointed_block() -> None:
    plain, replayed = (gradients(adapted(p_tuning(dropout=0.5)), c) for c in (False, True))
    for name, grad in plain.items():
        torch.testing.assert_close(grad, replayed[name])
        assert bool((grad == 0).any())


def test_heads_of_different_sizes_a_layer_share_one_table() -> None:
    model = tiny_model("gemma2", head_dim=16)
    Stack([p_tuning()]).attach(model)
    (hook,) = tables_of(model, "prefix")
    assert [(s.heads, s.key, s.value) for s in hook.tables["attn"].shapes] == [(2, 16, 16)] * 2
    assert model(input_ids=IDS).logits.isfinite().all()
