"""Feed-forward layers in chunks: the numbers of the whole layer, with a part of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.chunked_ffn import chunk_feed_forward
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.load import prepare_for_training
from llmrecipe.models.optimizations import speed_up
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training.dry_run import check
from tests.methods.additive.harness import fill, model_of
from tests.support import PeakBytes
from tests.tiny import tiny_model

IDS = torch.arange(3, 35)[None].repeat(4, 1)


def passed(rows: int | None, form: Any = False, wrappers: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], int]:
    """Logits and gradients of a model whose feed-forward is wide, and the most that lived."""
    model: Any = tiny_model(intermediate_size=1024)
    made = {"lora": Lora(name="lora", r=2, target="mlp.gate|down"), "adapter": Adapter(name="adapter", r=2)}
    if wrappers:
        Stack([made[name] for name in wrappers]).attach(model)
        fill(model)
    if rows is not None:
        assert chunk_feed_forward(model, rows) == 2
    prepare_for_training(model, ModelSection(gradient_checkpointing=form))
    with PeakBytes(list(model.parameters())) as live:
        logits = model.train()(input_ids=IDS, use_cache=False).logits
        logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}, live.peak


@pytest.mark.parametrize("wrappers", [(), ("lora", "adapter")])
def test_chunks_give_the_numbers_of_the_whole_with_less_memory(wrappers: tuple[str, ...]) -> None:
    for form in (False, True):
        whole, most = passed(None, form, wrappers)
        for rows in (40, 128, 1000):
            found, peak = passed(rows, form, wrappers)
            assert found.keys() == whole.keys()
            for name, value in whole.items():
                torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
            # 128 positions of 1024 float32 numbers are 512 KiB, and 40 of them 160.
            assert peak < most - 2**20 if rows == 40 else peak == most


def test_a_pass_without_gradients_has_chunks_too_and_unused_rows_are_left_out() -> None:
    model = tiny_model(intermediate_size=1024).eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        chunk_feed_forward(model, 40)
        assert any(line.startswith("last block: ") for line in speed_up(model))
        with PeakBytes(list(model.parameters())) as live:
            torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)
    assert live.peak < 2**20


class Placed(Hook):
    """Reads the place of a position."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + torch.arange(y.shape[1])[:, None]


def test_what_depends_on_places_is_refused() -> None:
    model = tiny_model()
    add_hook(model.model.layers[1].mlp.down_proj, "placed", Placed(), "placed")
    chunk_feed_forward(model, 8)
    with pytest.raises(ModelError, match=r"runtime\.ffn_rows: stack\.placed changes .* by the place of a position"):
        model(input_ids=IDS)
    outside = tiny_model()
    add_hook(outside.model.layers[1].mlp, "placed", Placed(), "placed")
    wanted = outside(input_ids=IDS).logits
    chunk_feed_forward(outside, 8)
    torch.testing.assert_close(outside(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "native-mixture"])
def test_models_without_such_a_layer_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match=r"runtime\.ffn_rows: \w+ has no feed-forward layer that works position by position"):
        chunk_feed_forward(model_of(family), 8)


def test_the_key_is_refused_beside_products_that_are_kept() -> None:
    with pytest.raises(RecipeError, match=r"runtime\.ffn_rows: chunks .* leave it out, or set"):
        compose("sft_lora", ["runtime.ffn_rows=64", "model.gradient_checkpointing=selective"])


def test_check_knows_what_chunks_hold() -> None:
    words = ["model.config.intermediate_size=4096", "model.init=random", "data.limit=8", "log.live=off"]
    words += ["model.gradient_checkpointing=true"]
    whole, chunks = (check("sft_lora", [*words, *more]).memory for more in ([], ["runtime.ffn_rows=32"]))
    assert not chunks.unpredicted and chunks.activations == whole.activations
    assert chunks.temporary < 0.6 * whole.temporary


def test_a_linear_model_has_none() -> None:
    with pytest.raises(ModelError):
        chunk_feed_forward(nn.Linear(2, 2), 8)
