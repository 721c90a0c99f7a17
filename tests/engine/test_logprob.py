"""The log-prob engine against float64 log-softmax, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine import logprob
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.logprob import Post, token_logprobs
from tests.models.configs import tiny


def reference(hidden: torch.Tensor, target: torch.Tensor, head: nn.Linear, post: Post) -> torch.Tensor:
    z = hidden.double() @ head.weight.double().t()
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * post.scale
    if post.cap is not None:
        z = post.cap * torch.tanh(z / post.cap)
    return z.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("post", [Post(), Post(0.5), Post(cap=3.0), Post(2.0, 5.0)], ids=str)
def test_value_and_gradient_equal_float64(trained: bool, bias: bool, post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "chunk_rows", lambda vocabulary, device: 16)  # several chunks of 16 rows
    torch.manual_seed(0)
    head = nn.Linear(12, 50, bias=bias)
    head.requires_grad_(trained)
    hidden = torch.randn(41, 12, requires_grad=True)
    target = torch.randint(0, 50, (41,))
    weights = torch.randn(41)
    t = token_logprobs(hidden, target, head, post)["logprobs"]
    (t * weights).sum().backward()
    own, hidden.grad = hidden.grad, None
    own_head = None if head.weight.grad is None else head.weight.grad.clone()
    head.weight.grad = None
    wanted = reference(hidden, target, head, post)
    (wanted * weights.double()).sum().backward()
    torch.testing.assert_close(t.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own, hidden.grad, atol=1e-5, rtol=1e-4)
    if trained:
        torch.testing.assert_close(own_head, head.weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [0, 1, 4])
@pytest.mark.parametrize("post", [Post(), Post(0.5, temperature=0.7), Post(cap=3.0)], ids=str)
@pytest.mark.parametrize(("trained", "rows"), [(True, 41), (True, 9), (False, 41)])
def test_the_normalizer_has_its_gradient(
    trained: bool, rows: int, post: Post, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "chunk_rows", lambda vocabulary, device: 16)
    monkeypatch.setattr(logprob, "KEPT_CHUNKS", kept)
    torch.manual_seed(0)
    head = nn.Linear(12, 50).double().requires_grad_(trained)
    hidden = torch.randn(rows, 12, dtype=torch.float64, requires_grad=True)
    target, weights = torch.randint(0, 50, (rows,)), torch.randn(2, rows, dtype=torch.float64)
    inputs = [hidden, *(head.parameters() if trained else ())]
    out = token_logprobs(hidden, target, head, post, entropy=True, normalizer=True)
    z = post(head(hidden))
    wanted = {"logprobs": z.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1), "normalizer": z.logsumexp(-1)}
    wanted["entropy"] = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    for name, value in wanted.items():
        torch.testing.assert_close(out[name], value, check_dtype=False)
    sums = [(weights[0] * found["logprobs"] + weights[1] * found["normalizer"] ** 2).sum() for found in (out, wanted)]
    for own, other in zip(*(torch.autograd.grad(total, inputs, retain_graph=True) for total in sums), strict=True):
        torch.testing.assert_close(own, other)
    # A second pass over the same graph finds what the first left.
    for own, other in zip(*(torch.autograd.grad(total, inputs) for total in sums), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_left_of_a_probability_near_one_is_exact(trained: bool, grad: bool) -> None:
    # log p = -log(1 + sum_v exp(z_v - z_y)) = -log(1 + 9 e^-12) = -5.53e-5, where numbers near 300 are 3.05e-5 apart.
    head = nn.Linear(1, 10, bias=False).requires_grad_(trained)
    head.weight.data.copy_(torch.tensor([[301.0], *[[289.0]] * 9]))
    with torch.set_grad_enabled(grad):
        found = token_logprobs(torch.ones(1, 1), torch.tensor([0]), head)["logprobs"]
    assert found.item() == pytest.approx(-math.log1p(9 * math.exp(-12.0)), rel=0.02)


def test_without_gradients_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "chunk_rows", lambda vocabulary, device: 16)
    torch.manual_seed(0)
    head, hidden, target = nn.Linear(12, 50), torch.randn(41, 12), torch.randint(0, 50, (41,))
    with_graph = token_logprobs(hidden, target, head)
    with torch.no_grad():
        without = token_logprobs(hidden, target, head)
    assert torch.equal(with_graph["logprobs"], without["logprobs"]) and without["logprobs"].grad_fn is None


def test_frozen_and_trained_heads_give_the_same_numbers() -> None:
    torch.manual_seed(1)
    head = nn.Linear(8, 20)
    hidden, target = torch.randn(9, 8), torch.randint(0, 20, (9,))
    trained = token_logprobs(hidden, target, head, entropy=True)
    frozen = token_logprobs(hidden, target, head.requires_grad_(False), entropy=True)
    for name in trained:
        torch.testing.assert_close(trained[name], frozen[name])


def test_bf16_log_probabilities_are_summed_in_float32() -> None:
    torch.manual_seed(2)
    head = nn.Linear(16, 32_000, bias=False).requires_grad_(False)
    hidden, target = torch.randn(64, 16), torch.randint(0, 32_000, (64,))
    low = nn.Linear(16, 32_000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    low.weight.copy_(head.weight)
    z = hidden.bfloat16().double() @ low.weight.double().t()
    exact = z.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    got = token_logprobs(hidden.bfloat16(), target, low)["logprobs"]
    assert got.dtype == torch.float32
    # One sum over a sequence of 64 tokens near -10 each: bf16 accumulation would be off by units.
    assert abs(float(got.sum()) - float(exact.sum())) < 0.05


def test_no_targets_give_a_zero_that_is_attached_to_the_graph() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    out = token_logprobs(hidden, torch.zeros(0, dtype=torch.long), nn.Linear(8, 5))
    assert out["logprobs"].shape == (0,)
    out["logprobs"].sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("tied", [None, True, False])
def test_logits_of_t5_are_scaled_where_transformers_scales_them(tied: bool | None) -> None:
    """Checkpoints that say tie_word_embeddings: false (T5 1.1, Flan) have logits without the factor 1 / sqrt(D)."""
    model = tiny("t5", **({} if tied is None else {"tie_word_embeddings": tied}))
    source, ids = torch.tensor([[5, 9, 3, 2]]), [0, 7, 11, 4]
    batch = pad([Sequence(ids, [0, 1, 1, 1])], 0, extra={"encoder_ids": source, "encoder_mask": torch.ones_like(source)})
    wanted = model(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0, [0, 1, 2], [7, 11, 4]]
    got = Engine(model).eval()(batch)["logprobs"]
    assert model.config.scale_decoder_outputs == (tied is not False)
    assert torch.allclose(got, wanted, atol=1e-5)
