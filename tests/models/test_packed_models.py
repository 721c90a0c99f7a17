"""Whole models with sinks, or with windows that reach both ways, read packed rows as they read rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import activate
from llmrecipe.data.collate import Sequence, pack
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.packing import isolates
from llmrecipe.models import packed_attention as routes
from tests.tiny import tiny_masked_model, tiny_model

ROWS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 12, 14], [11, 12, 13, 14, 15, 16, 17]]


def gpt_oss(**more: Any) -> nn.Module:
    """Two blocks, the first with a window of four tokens; sinks weigh as much as the tokens."""
    shape = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    model = tiny_model("gpt_oss", **{**shape, "layer_types": ["sliding_attention", "full_attention"], **more})
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.constant_(parameter, 2.0)
    return model


def modernbert() -> nn.Module:
    """Two blocks, the first of which sees two tokens to each side."""
    shape = {"local_attention": 4, "layer_types": ["sliding_attention", "full_attention"], "cls_token_id": 1, "sep_token_id": 2}
    return tiny_masked_model("modernbert", **shape, attention_dropout=0.0)


def packed_logits(model: nn.Module) -> list[Tensor]:
    batch = pack([Sequence(row, [0] * len(row)) for row in ROWS])
    more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad(), activate(batch.context()):
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, **more).logits[0]
    return list(logits.split([len(row) for row in ROWS]))


def padded_logits(model: nn.Module) -> list[Tensor]:
    """What the stock model gives for rows padded to one length."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return [part[: len(row)] for part, row in zip(logits, ROWS, strict=True)]


@pytest.mark.parametrize("make", [gpt_oss, modernbert])
def test_packed_rows_give_the_logits_of_padded_ones(make: Any) -> None:
    model = make()
    packed = packed_logits(model)
    for own, wanted in zip(packed, padded_logits(model), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [gpt_oss, modernbert])
def test_models_whose_packed_rows_are_right_are_packed(make: Any) -> None:
    assert isolates(Engine(make()).eval(), torch.device("cpu"))


def test_packed_rows_that_lose_a_part_of_the_attention_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over one packed document loses it just as well, so only rows of the stock attention show it."""
    whole = routes.attend_one

    def without_sinks(*given: Any) -> Tensor:
        return whole(*given[:-1], {**given[-1], "s_aux": None})

    monkeypatch.setattr(routes, "attend_one", without_sinks)
    assert not isolates(Engine(gpt_oss()).eval(), torch.device("cpu"))
