"""`speed_up` changes no result: outputs, losses and every gradient stay those of the stock model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmrecipe.core.forward_context import Context, activate, checkpoint_contexts
from llmrecipe.data.collate import Batch, Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._engines.low_rank import LowRank
from llmrecipe.models.attention import install_attention
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.optimizations import _plain_norm, same, speed_up
from tests.models.configs import CAUSAL, tiny

PLAIN = ["llama", "mistral", "qwen2", "qwen3"]
"""Families whose norms have the plain form."""
WIDER = ["gemma", "gemma2", "gemma3_text"]
"""Families whose norms multiply by 1 + w."""
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"]


def rows() -> list[Sequence]:
    """Two dialogues whose answers are short, so that most final states are never read."""
    return [
        Sequence([5, 9, 3, 7, 11, 4, 8, 2], [0, 0, 0, 0, 0, 1, 1, 1], prompt=5),
        Sequence([6, 12, 31, 8, 2], [0, 0, 0, 1, 1], prompt=3),
    ]


def pairs() -> list[Sequence]:
    """A prompt with two answers: both are predicted from the prompt's last state, which is read twice."""
    prompt = [5, 9, 3, 7, 11]
    return [Sequence(prompt, [0] * 5), Sequence([4, 8, 2], [1] * 3, parent=0), Sequence([13, 2], [1] * 2, parent=0)]


BATCHES = {"packed": lambda: pack(rows()), "padded": lambda: pad(rows(), 0), "shared prompt": lambda: pack(pairs())}


def adapted(family: str, train_base: bool = False) -> Engine:
    """A model with a non-zero low-rank branch at every projection of its blocks."""
    model = tiny(family)
    install_attention(model, "eager" if family in ("gemma2", "gemma3_text") else "sdpa")
    model.requires_grad_(train_base)
    torch.manual_seed(1)
    for site in anatomy(model).at("all-linear"):
        if site.rows is None and site.tensor is None:
            hook = LowRank(site.width_in, site.width_out, 2, 1.0)
            nn.init.normal_(hook.A, std=0.2)
            nn.init.normal_(hook.B, std=0.2)
            add_hook(site.module, "lora", hook, "lora")
    return Engine(model)


def step(engine: Engine, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by name."""
    engine.zero_grad()
    loss = -(engine(batch)["logprobs"] * torch.linspace(0.5, 1.5, batch.target.numel())).sum()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in engine.named_parameters() if p.grad is not None}


def assert_same(stock: Engine, fast: Engine, batch: Batch) -> None:
    """Equal loss and equal gradients, by name."""
    loss, gradients = step(stock, batch)
    fast_loss, fast_gradients = step(fast, batch)
    assert abs(fast_loss - loss) < 1e-5 * abs(loss)
    assert fast_gradients.keys() == gradients.keys()
    assert any(float(g.abs().max()) > 1e-3 for g in gradients.values()), "nothing to compare"
    for name, gradient in gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", list(BATCHES))
@pytest.mark.parametrize("family", PLAIN + WIDER)
def test_loss_and_gradients_equal_the_stock_model(family: str, layout: str) -> None:
    stock = adapted(family)
    fast = copy.deepcopy(stock)
    done = speed_up(fast.model)
    assert any("last block" in line for line in done)
    assert_same(stock, fast, BATCHES[layout]())


def test_gradients_of_a_fully_trained_model_are_equal() -> None:
    stock = adapted("llama", train_base=True)
    fast = copy.deepcopy(stock)
    speed_up(fast.model)
    assert_same(stock, fast, pack(rows()))


@pytest.mark.parametrize("family", list(CAUSAL))
def test_every_family_is_right_or_left_alone(family: str) -> None:
    stock = adapted(family)
    fast = copy.deepcopy(stock)
    speed_up(fast.model)
    assert_same(stock, fast, pack(rows()) if family not in MIXTURES else pad(rows(), 0))


@pytest.mark.parametrize("family", PLAIN + WIDER)
def test_only_norms_of_the_plain_form_are_replaced(family: str) -> None:
    model = tiny(family)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    assert all(_plain_norm(m, same) == (family in PLAIN) for m in norms)
    speed_up(model)
    assert all(("forward" in m.__dict__) == (family in PLAIN) for m in norms)


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_keep_every_row_because_routers_count_them(family: str) -> None:
    assert not any("last block" in line for line in speed_up(tiny(family)))


def test_the_last_feed_forward_sees_only_the_rows_that_are_read() -> None:
    engine = adapted("llama")
    speed_up(engine.model)
    seen: dict[str, int] = {}
    last, first = engine.model.model.layers[-1], engine.model.model.layers[0]
    for name, module in (
        ("last", last.mlp.down_proj),
        ("first", first.mlp.down_proj),
        ("keys", last.self_attn.k_proj),
    ):
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].shape[1]))
    batch = pack(rows())
    engine(batch)
    assert seen == {"last": 5, "first": 13, "keys": 13}
    assert batch.target.numel() == 5


def test_outside_an_engine_every_row_is_computed() -> None:
    model = tiny("llama")
    ids = torch.tensor([[5, 9, 3, 7]])
    expected = model(ids, use_cache=False).logits
    speed_up(model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


class Positional(Hook):
    """A hook that edits the second row it is given, wherever that row came from."""

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Adds one to row 1."""
        mark = torch.zeros(y.shape[1], 1)
        mark[1] = 1.0
        return y + mark


def test_a_hook_that_minds_positions_makes_its_module_compute_every_row() -> None:
    stock = adapted("llama")
    add_hook(stock.model.model.layers[-1].mlp.down_proj, "edit", Positional(), "edit")
    fast = copy.deepcopy(stock)
    speed_up(fast.model)
    assert_same(stock, fast, pack(rows()))


def test_a_hook_that_lengthens_the_rows_makes_every_row_count() -> None:
    model = tiny("llama")
    mlp = model.model.layers[-1].mlp
    speed_up(model)
    x = torch.randn(1, 6, 32)
    context = Context(positions=torch.arange(4)[None], read=torch.tensor([0]))
    with activate(context):
        assert bool((mlp(x)[0, 1:] != 0).all())


def test_gradients_are_equal_under_activation_checkpointing() -> None:
    stock = adapted("llama").train()
    fast = copy.deepcopy(stock)
    speed_up(fast.model)
    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    fast.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    fast.model.disable_input_require_grads()
    assert_same(stock, fast, pack(rows()))


def test_a_copy_uses_its_own_weights() -> None:
    engine = adapted("llama")
    speed_up(engine.model)
    twin = copy.deepcopy(engine)
    with torch.no_grad():
        for parameter in engine.model.model.layers[-1].parameters():
            parameter.zero_()
    original, copied = engine(pack(rows()))["logprobs"], twin(pack(rows()))["logprobs"]
    assert not torch.allclose(original, copied, atol=1e-3)
    torch.testing.assert_close(copied, adapted("llama")(pack(rows()))["logprobs"], rtol=1e-5, atol=1e-5)


def test_calling_it_twice_changes_nothing_more() -> None:
    engine = adapted("llama")
    speed_up(engine.model)
    before = engine(pack(rows()))["logprobs"]
    speed_up(engine.model)
    assert torch.equal(engine(pack(rows()))["logprobs"], before)


def test_a_meta_model_is_left_alone() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    assert speed_up(model) == []
