"""NEFTune: the noise of the reference hook, per row whatever the layout, in updates alone, bit-equal after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.prompt_tuning import PromptTuning
from llmrecipe.objectives.embedding_noise import uniform_noise, with_uniform_noise
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.objectives.row_draws import generator
from tests.objectives.test_encoder_decoder import pair_model
from tests.tiny import roles_for, tiny_model
from tests.trainings import curve, events, learned, resumes_to_the_bit, train_recipe

ROWS: list[dict[str, Any]] = [
    {"ids": [5, 9, 3, 44, 7], "trained": [0, 0, 0, 1, 1], "row": 4, "epoch": 2},
    {"ids": [6, 21, 40], "trained": [0, 1, 1], "row": 0, "epoch": 2},
    {"ids": [33, 4, 17, 9, 1, 12, 30], "trained": [0, 0, 1, 1, 1, 1, 1], "row": 9, "epoch": 2},
]
ALPHA = 5.0


def noisy(model: Any, rows: list[dict[str, Any]], packing: bool) -> tuple[Any, Any, Sft]:
    objective = Sft(neftune_alpha=ALPHA)
    roles = roles_for(model, Stack([]), packing)
    return objective.collate(rows, roles), roles, objective


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hooked_loss(model: Any, one: dict[str, Any], noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The summed loss of one row in Transformers with its NEFTune hook, whose unit noise is given, (1, L, D)."""
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = ALPHA
    handle = embedding.register_forward_hook(neftune_post_forward_hook)
    was = model.training
    model.train()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "uniform_", lambda self, low, high: self.copy_(noise * high))
            logits = model(torch.tensor([one["ids"]])).logits[0]
    finally:
        handle.remove()
        model.train(was)
    logprobs = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(one["ids"][1:])[:, None])[:, 0]
    return -(logprobs * torch.tensor(one["trained"][1:])).sum()


@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_are_those_of_the_hook_in_transformers(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model().double()
    width = model.config.hidden_size
    total = torch.zeros((), dtype=torch.float64)
    for one in ROWS:
        length = len(one["ids"])
        unit = uniform_noise(generator(0, one["epoch"], one["row"], 2), length, width, 1.0) * (length * width) ** 0.5
        assert 0.9 < float(unit.abs().max()) <= 1.0
        total = total + hooked_loss(model, one, unit.double()[None], monkeypatch)
    wanted = gradients(total, model)
    batch, roles, objective = noisy(model, ROWS, packing)
    loss = objective.training_loss(batch, roles).total
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=1e-6)
    assert abs(objective.loss(batch, roles).total.item() - total.item()) > 1e-2
    for name, gradient in gradients(loss, model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_noise_is_alpha_over_the_root_of_length_times_width() -> None:
    noise = uniform_noise(generator(3, 0, 1), 400, 16, 8.0)
    assert float(noise.abs().max()) == pytest.approx(8.0 / 80.0, rel=1e-3)
    # The variance of U(-b, b) is b^2 / 3.
    assert float(noise.var()) == pytest.approx(0.01 / 3.0, rel=0.03)


@pytest.mark.parametrize("family", ["t5", "bart", "native"])
def test_encoder_and_decoder_of_a_pair_both_read_noise(family: str) -> None:
    model: Any = pair_model(family).double()
    batch, roles, objective = noisy(model, ROWS, False)
    found = with_uniform_noise(batch, batch.extra["noise_draws"], roles, ALPHA)
    inputs, total = found.extra, torch.zeros((), dtype=torch.float64)
    for place, one in enumerate(ROWS):
        prompt = one["trained"].index(1)
        start = [int(model.config.decoder_start_token_id), *one["ids"][prompt:]]
        encoder, decoder = model.get_encoder(), model.get_decoder()
        read = encoder.get_input_embeddings()(torch.tensor([one["ids"][:prompt]])) + inputs["encoder_noise"][place, :prompt]
        own = decoder.get_input_embeddings()(torch.tensor([start])) + inputs["embedding_noise"][place, : len(start)]
        logits = model(inputs_embeds=read, decoder_inputs_embeds=own).logits[0, :-1]
        total = total - logits.log_softmax(-1).gather(-1, torch.tensor(start[1:])[:, None]).sum()
        bound = ALPHA / (prompt * read.shape[-1]) ** 0.5
        assert bound * 0.8 < float(inputs["encoder_noise"][place].abs().max()) <= bound
        assert not inputs["encoder_noise"][place, prompt:].any()
    torch.testing.assert_close(objective.training_loss(batch, roles).total, total, rtol=1e-6, atol=1e-6)


def test_without_alpha_nothing_is_added() -> None:
    batch = Sft().collate(ROWS, roles_for(tiny_model(), Stack([]), True))
    assert not batch.extra


STEPS = ["data.max_length=128", "steps=3", "batch.size=4", "schedule=constant", "eval.batches=2", "objective.neftune_alpha=10"]


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["", "lora", "prompt_tuning"])
def test_evaluations_are_without_noise_and_a_resume_continues_it(stack: str, tmp_path: Path) -> None:
    words = [*STEPS, *([f"stack=[{stack}]"] if stack else [])]
    resumes_to_the_bit(tmp_path / "noisy", "sft", words, 2)
    train_recipe(tmp_path / "plain", "sft", *words, "objective.neftune_alpha=0")
    with_noise, without = (tmp_path / name for name in ("noisy/whole", "plain"))
    assert events(with_noise, "evaluation")[0]["eval/loss"] == events(without, "evaluation")[0]["eval/loss"]
    assert curve(with_noise)[0][1] != curve(without)[0][1]
    assert any(not torch.equal(tensor, learned(without)[name]) for name, tensor in learned(with_noise).items())


@pytest.mark.parametrize("packing", [False, True])
def test_virtual_tokens_stand_before_the_noise_and_have_none(packing: bool) -> None:
    model: Any = tiny_model().double()
    stack = Stack([PromptTuning(name="p", num_virtual_tokens=3)])
    stack.attach(model)
    objective, roles = Sft(neftune_alpha=ALPHA), roles_for(model, stack, packing)
    own = model.get_parameter("model.embed_tokens.p.embeddings")
    torch.nn.init.normal_(own)
    batch = objective.collate(ROWS, roles)
    total = torch.zeros((), dtype=torch.float64)
    with activate(Context(off=frozenset({"p"}))):
        for one in ROWS:
            length, width = len(one["ids"]), own.shape[1]
            noise = uniform_noise(generator(0, one["epoch"], one["row"], 2), length, width, ALPHA)
            read = torch.cat([own.double(), model.get_input_embeddings()(torch.tensor(one["ids"])) + noise])
            logprobs = model(inputs_embeds=read[None]).logits[0, 3:-1].log_softmax(-1)
            picked = logprobs.gather(-1, torch.tensor(one["ids"][1:])[:, None])[:, 0]
            total = total - (picked * torch.tensor(one["trained"][1:])).sum()
    loss = objective.training_loss(batch, roles).total
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(loss, own)[0].abs().max() > 1e-3
