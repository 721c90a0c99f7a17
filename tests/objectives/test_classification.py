"""Classification: the loss and gradients of Transformers' own heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.attention import install_attention
from llmrecipe.objectives.finetuning.classification import Classification
from tests.objectives.harness import rows_of
from tests.tiny import Tokenizer, tiny_config


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_loss_and_gradients_are_those_of_the_stock_head(family: str) -> None:
    """Rows of unlike lengths: a decoder's head reads the last token of each, whatever the padding token is."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = tiny_config(family, num_labels=3, pad_token_id=0)
    model: Any = AutoModelForSequenceClassification.from_config(config).double().eval()
    install_attention(model, "sdpa")
    objective = Classification()
    roles = Roles(Engine(model), Stack([]), Tokenizer(), torch.device("cpu"), packing=True)
    rows = [{**row, "label": i % 3} for i, row in enumerate(rows_of(objective))]
    batch = objective.collate(rows, roles)
    loss = objective.loss(batch, roles).total / objective.weight(batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    width = max(len(r["ids"]) for r in rows)
    ids = torch.tensor([r["ids"] + [0] * (width - len(r["ids"])) for r in rows])
    mask = torch.tensor([[1] * len(r["ids"]) + [0] * (width - len(r["ids"])) for r in rows])
    theirs = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([r["label"] for r in rows])).loss
    theirs.backward()
    assert len({len(r["ids"]) for r in rows}) > 1
    torch.testing.assert_close(loss.detach(), theirs.detach(), rtol=1e-10, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-9, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
