"""Scores against per-example autograd, and the entries that are selected by them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.sparse_method import base_weights
from tests.methods.probe import language_probe
from tests.tiny import tiny_model


def dense_scores(model: nn.Module, probe: Any, examples: int, rows: int | None = 1, mean: bool = False) -> dict[str, Any]:
    model = copy.deepcopy(model).requires_grad_(True)
    probe = language_probe(model)
    totals = {n: torch.zeros(p.numel(), dtype=p.dtype) for n, p in model.named_parameters()}
    for batch in probe.batches(examples, rows):
        model.zero_grad()
        (probe.loss(batch) * (1.0 if mean else probe.weight(batch))).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] += parameter.grad.reshape(-1) ** 2
    return totals


@pytest.mark.parity("fishmask", "per-example autograd, float64")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("packing", [True, False])
def test_scores_equal_per_example_autograd_in_float64(family: str, packing: bool):
    more = {"tie_word_embeddings": True} if family == "llama" else {}
    model = tiny_model(family, **more).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    probe = language_probe(model, packing)
    got = selection.score_entries(model, probe, base_weights(model), 4)
    want = dense_scores(model, probe, 4)
    assert got.keys() == want.keys()
    for name, score in want.items():
        torch.testing.assert_close(got[name], score, rtol=1e-10, atol=1e-16)
    assert not [n for n, _ in model.named_modules() if selection.OWNER in n]


def test_a_square_of_a_sum_is_not_a_sum_of_squares():
    model = tiny_model("llama").double()
    probe = language_probe(model)
    weights = base_weights(model, "attn.q")
    single = selection.score_entries(model, probe, weights, 4)
    batch = selection.score_entries(model, probe, weights, 1, rows=4, reduction="mean")
    name = next(iter(weights))
    assert not torch.allclose(single[name] / single[name].sum(), batch[name] / batch[name].sum(), rtol=0.05)
    # A frozen head takes the log-prob engine's float32 shortcut, hence the tolerance.
    torch.testing.assert_close(batch[name], dense_scores(model, probe, 1, 4, mean=True)[name], rtol=1e-3, atol=1e-10)


def test_calls_in_chunks_are_one_gradient(monkeypatch: pytest.MonkeyPatch):
    from llmrecipe.engine import logprob

    model = tiny_model("llama").double()
    weights = base_weights(model, "head")
    whole = selection.score_entries(model, language_probe(model), weights, 2)
    monkeypatch.setattr(logprob, "chunk_rows", lambda width, device: 2)
    parts = selection.score_entries(model, language_probe(model), weights, 2)
    torch.testing.assert_close(parts["lm_head.weight"], whole["lm_head.weight"], rtol=1e-10, atol=1e-16)


def test_expectation_over_classes_weighs_by_probability():
    from transformers import AutoModelForSequenceClassification

    from llmrecipe.methods._base.method import Probe
    from llmrecipe.methods._base.stack import Stack
    from llmrecipe.objectives.finetuning.classification import Classification
    from tests.tiny import roles_for, tiny_config

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3)).double().eval()
    roles = roles_for(model, Stack([]))
    objective = Classification()
    row = {"ids": [5, 6, 7, 8], "label": 1, "row": 0}
    batch = objective.collate([row], roles)
    probe = Probe(lambda n, rows=None: iter([batch]), lambda b: objective.loss(b, roles).total, None, objective.weight)
    weights = base_weights(model, "attn.q")
    got = selection.score_entries(model, probe, weights, 1, targets=selection.sampled_targets(roles.engine, 1, 0))
    shares = roles.engine(batch, want="scores")["scores"].float().softmax(-1)[0].double()
    for name in weights:
        parameter = dict(model.named_parameters())[name]
        want = torch.zeros(parameter.numel(), dtype=torch.float64)
        for label in range(3):
            loss = objective.loss(batch.with_extra(labels=torch.tensor([label])), roles).total
            want += shares[label] * torch.autograd.grad(loss, parameter)[0].reshape(-1) ** 2
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-12)


def test_sampled_tokens_are_drawn_from_the_model():
    model = tiny_model("llama").double()
    weights = base_weights(model, "layers.0.attn.q")
    probe = language_probe(model)
    first, again, other = (
        selection.score_entries(
            model, language_probe(model), weights, 2, targets=selection.sampled_targets(probe.engine, 2, seed)
        )
        for seed in (0, 0, 1)
    )
    name = next(iter(weights))
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_layer_groups_choose_the_same_entries():
    model = tiny_model("llama").double()
    weights = base_weights(model)

    def scorer(group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return selection.score_entries(model, language_probe(model), group, 3)

    whole = selection.select_top(weights, 321, 1, scorer)
    for groups in (2, 5, 100):
        parts = selection.select_top(weights, 321, groups, scorer)
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[n], whole[n]) for n in whole)
