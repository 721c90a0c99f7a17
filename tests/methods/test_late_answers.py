"""Answers of an earlier step: which step answers, and what is computed until the answer is here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModel

from llmrecipe.core.forward_context import Context
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.methods._base.late_answers import LateAnswers, arrive
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.memory._engines.hypermodel import native_config, over_pairs
from llmrecipe.methods.reparameterized.dora import CANCELLED, Dora
from llmrecipe.methods.selective._engines.blocks import gather_blocks, put_blocks
from llmrecipe.models.hooks.hook import all_hooks
from tests.tiny import tiny_model


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer late on the host, too."""
    monkeypatch.setattr(LateAnswers, "answers", lambda self, value: self.training)


def answers(of: LateAnswers, values: list[bool]) -> list[bool]:
    found = []
    for value in values:
        found.append(of.answer("question", torch.tensor(value)))
        arrive([of])
    return found


def test_the_step_before_the_last_one_answers(late: None) -> None:
    one = LateAnswers()
    one.training = True
    assert answers(one, [False, True, False, False, True]) == [False, False, False, True, False]
    assert copy.deepcopy(one).known == {}


def test_outside_training_a_value_answers_for_itself(late: None) -> None:
    one = LateAnswers()
    assert answers(one, [False, True, False]) == [False, True, False]


def test_the_norm_of_dora_is_the_same_unread_but_for_lost_rows_of_two_steps(late: None) -> None:
    model = tiny_model()
    Stack([Dora(name="dora", target="layers.0.mlp.up")]).attach(model)
    _, layer, _, hook = next(iter(all_hooks(model)))
    weight: Any = layer.weight
    base = weight.detach()
    hook.A.data[0] = base[3] / hook.scale
    hook.B.data.normal_(std=0.01)
    V = base.double() + hook.scale * hook.B.detach().double() @ hook.A.detach().double()

    def norm() -> torch.Tensor:
        found = hook.magnitude / hook.gain(lambda: base @ hook.A.t())
        hook.forget()
        arrive([hook.late])
        return found.detach().double()

    torch.testing.assert_close(norm(), V.norm(dim=1), atol=0, rtol=1e-5)
    # Row 3 of V becomes a ten-thousandth of row 3 of W: its three terms cancel.
    with torch.no_grad():
        hook.B[3] = 0.0
        hook.B[3, 0] = -0.9999
    V = base.double() + hook.scale * hook.B.detach().double() @ hook.A.detach().double()
    others = torch.arange(len(V)) != 3
    for _ in range(2):
        found = norm()
        torch.testing.assert_close(found[others], V.norm(dim=1)[others], atol=0, rtol=1e-5)
        assert found[3] >= 0.99 * CANCELLED**0.5 * base[3].norm()
    torch.testing.assert_close(norm(), V.norm(dim=1), atol=0, rtol=2e-3)


def test_blocks_that_hang_over_are_written_where_they_are_and_nowhere_else() -> None:
    weight = torch.arange(15.0).view(3, 5)
    idx = torch.tensor([0, 5])
    new = gather_blocks(weight, idx, 2) + 100
    wanted = weight.clone()
    wanted[:2, :2] += 100
    wanted[2:, 4:] += 100
    put_blocks(weight, idx, 2, new)
    assert torch.equal(weight, wanted)


def test_a_mask_over_pairs_gives_the_states_of_the_mask_of_columns() -> None:
    torch.manual_seed(0)
    trunk = AutoModel.from_config(native_config(40, 16, 1, 0)).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    queries = torch.randn(2, 3, 16)

    def states(form: Any) -> torch.Tensor:
        read = trunk.get_encoder()(inputs_embeds=x, attention_mask=form(mask, x)).last_hidden_state
        out = trunk.get_decoder()(
            inputs_embeds=queries, encoder_hidden_states=read, encoder_attention_mask=form(mask, queries), use_cache=False
        )
        return out.last_hidden_state

    torch.testing.assert_close(states(over_pairs), states(lambda mask, _: mask), atol=1e-6, rtol=1e-5)


def test_a_context_knows_the_host_s_values_of_what_its_batch_was_copied_from() -> None:
    batch = pad([Sequence([3, 4, 5], [0, 1, 1], prompt=1), Sequence([3], [0])], 0)
    assert Context().on_host(batch.attention_mask) is batch.attention_mask
    there = batch.to("meta")
    context = there.context()
    assert context.on_host(there.attention_mask) is batch.attention_mask
    assert context.on_host(there.prompt_lengths) is batch.prompt_lengths
    assert context.on_host(there.input_ids) is None
