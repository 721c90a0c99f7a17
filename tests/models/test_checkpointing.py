"""Forms of gradient checkpointing: gradients of a pass that keeps everything, what each keeps and what it computes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate, current
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.checkpointing import _is_kept, _operands, from_host, noted_results, to_host
from llmrecipe.models.load import prepare_for_training
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training.kept_tensors import KeptTensors
from tests.methods.additive.harness import fill, logits, model_of
from tests.support import PeakBytes
from tests.tiny import tiny_model
from tests.waiting import PLACE, Device

aten: Any = torch.ops.aten
DROPS = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5, "num_key_value_heads": None},
    "llama": {"attention_dropout": 0.5},
}
"""Dropout in the blocks and in attention, by family."""


def gradients(model: Any, form: Any) -> tuple[dict[str, Tensor], int, int]:
    """Gradients of a pass of a model, the bytes it keeps, and the floating-point operations of its backward pass."""
    prepare_for_training(model, ModelSection(gradient_checkpointing=form))
    batch = pad([Sequence(list(range(3, 33)), [0] * 10 + [1] * 20), Sequence([1, 7, 8], [0, 1, 1])], 0)
    torch.manual_seed(4)
    with KeptTensors(list(model.parameters())) as kept:
        loss = Engine(model).train()(batch)["logprobs"].square().sum()
        now = kept.now
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, now, counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_selective_recomputes_nothing_dear_and_draws_the_same_dropout(family: str) -> None:
    sizes = {k: v for k, v in DROPS[family].items() if "dropout" not in k}
    whole, all_kept, once = gradients(tiny_model(family, **sizes), False)
    full, inputs_kept, twice = gradients(tiny_model(family, **sizes), True)
    found, kept, flops = gradients(tiny_model(family, **sizes), "selective")
    assert inputs_kept < kept < 0.8 * all_kept
    assert flops == once < twice
    assert all(torch.equal(whole[n], full[n]) and torch.equal(whole[n], found[n]) for n in whole)
    dropping = [gradients(tiny_model(family, **DROPS[family]), form)[0] for form in (False, True, "selective")]
    assert any(not torch.equal(whole[n], dropping[0][n]) for n in whole), "dropout drops nothing"
    assert all(torch.equal(dropping[0][n], other[n]) for other in dropping[1:] for n in whole)


@pytest.mark.parametrize("family", ["bert", "t5", "native-decoder"])
def test_forms_change_no_gradient_in_other_families(family: str) -> None:
    found = []
    for form in (False, True, "selective", "offload"):
        model = model_of(family)
        prepare_for_training(model, ModelSection(gradient_checkpointing=form))  # type: ignore[arg-type]
        logits(model.train()).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, whole in found[0].items():
        # Gradients of a bias that blocks share are summed in another order where blocks are computed again.
        torch.testing.assert_close(found[1][name], whole, atol=2e-5, rtol=1e-4)
        assert all(torch.equal(found[1][name], other[name]) for other in found[2:])


def test_the_wide_result_of_an_adapter_is_computed_again() -> None:
    """4 columns of rank 1 become 64: no product is kept whose inner side is less than 1/16 of its columns."""
    model = tiny_model(intermediate_size=64)
    Stack([Lora(name="lora", r=1, target="mlp.up")]).attach(model)
    fill(model)
    prepare_for_training(model, ModelSection(gradient_checkpointing="selective"))
    kept: list[tuple[int, ...]] = []
    ids = torch.tensor([[3, 4, 5]])
    with noted_results(lambda tensor: kept.append(tuple(tensor.shape))):
        model.train()(input_ids=ids, use_cache=False)
    # q, k, v, o, gate, up and down of two layers, and the hook's projection on its rank.
    assert sum(shape == (3, 64) for shape in kept) == 2 * 2 and sum(shape == (3, 1) for shape in kept) == 2
    with noted_results(lambda tensor: kept.append(())), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert () not in kept, "a pass without gradients keeps nothing"


def test_attention_that_drops_is_computed_again() -> None:
    attention, x = aten._scaled_dot_product_flash_attention.default, torch.ones(1, 1, 2, 8)
    assert _is_kept(attention, (x, x, x), {}) and _is_kept(attention, (x, x, x, 0.0, True), {})
    assert not _is_kept(attention, (x, x, x, 0.1), {}) and not _is_kept(attention, (x, x, x), {"dropout_p": 0.1})
    assert not _is_kept(aten.bmm.default, (x[0], x[0].mT), {}) and not _is_kept(aten.silu.default, (x,), {})
    assert not _is_kept(aten._scaled_dot_product_flash_attention_backward.default, (x, x, x), {})


def test_results_are_found_by_their_operands() -> None:
    layers, x = [nn.Linear(4, 4, bias=False) for _ in range(2)], torch.ones(3, 4)
    keys = [_operands(aten.mm.default, (x, layer.weight.t())) for layer in layers]
    assert keys[0] != keys[1] and keys[0] == _operands(aten.mm.default, (2 * x, layers[0].weight.t()))
    assert keys[0] != _operands(aten.mm.default, (x[:2], layers[0].weight.t()))


class Remembers(nn.Module):
    """A block that computes a product of its weights in its first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4, bias=False), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.seen:
            self.seen = True
            with torch.no_grad():
                self.norm = (self.linear.weight @ torch.ones(4, 4)).norm()
        return self.linear(x).tanh() * self.norm


def test_a_block_that_remembers_is_computed_right() -> None:
    from torch.utils.checkpoint import checkpoint

    from llmrecipe.models.checkpointing import selective_contexts

    block, x = Remembers(), torch.randn(4, 4, requires_grad=True)
    wanted = torch.autograd.grad(block(x).sum(), x)[0]
    block.seen = False
    y = checkpoint(block, x, use_reentrant=False, context_fn=selective_contexts)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted)


def test_a_kept_result_that_changes_in_place_is_an_error() -> None:
    from torch.utils.checkpoint import checkpoint

    from llmrecipe.models.checkpointing import selective_contexts

    linear, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    y = checkpoint(lambda x: linear(x).add_(1).tanh().exp(), x, use_reentrant=False, context_fn=selective_contexts)
    with pytest.raises(RuntimeError, match=r"changed in place; set model\.gradient_checkpointing=true"):
        y.sum().backward()


def test_a_selective_block_is_computed_again_under_its_context() -> None:
    model = tiny_model()
    prepare_for_training(model, ModelSection(gradient_checkpointing="selective"))
    roles: list[str] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: roles.append(current().role))
    with activate(Context(role="value")):
        loss = model.train()(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).logits.sum()
    loss.backward()
    assert roles == ["value", "value"]


# --- offload ---------------------------------------------------------------------------------------------------------


def test_offload_moves_each_blocks_states_once_and_nothing_on_a_cpu() -> None:
    found, moved = [], [0]

    def pack(tensor: Tensor) -> Any:
        moved[0] += 1
        return tensor.numpy().copy()

    for form, host in ((True, None), ("offload", (pack, torch.from_numpy)), ("offload", None)):
        model = tiny_model(num_hidden_layers=6)
        prepare_for_training(model, ModelSection(gradient_checkpointing=form), host)  # type: ignore[arg-type]
        ids = torch.arange(3, 60)[None]
        with PeakBytes(list(model.parameters())) as live:
            loss = model.train()(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
            held = live.now
            loss.backward()
        found.append((held, {n: p.grad for n, p in model.named_parameters()}))
    assert moved == [6]
    # 57 tokens of 32 float32 numbers: all inputs but the one that the first norm of the model's end still needs.
    assert found[0][0] - found[1][0] == 6 * 57 * 32 * 4
    assert found[2][0] == found[0][0]
    assert all(torch.equal(g, other[n]) for _, other in found[1:] for n, g in found[0][1].items())


def test_a_copy_to_the_host_and_back_keeps_nobody_waiting() -> None:
    with Device() as device:
        packed = to_host(torch.ones(3, 4, dtype=torch.bfloat16, device=PLACE))
        assert packed[1].device.type == "cpu"
        back = from_host(packed)
    assert not device.waits and sum(device.copies.values()) == 1
    assert (back.device, back.shape, back.dtype) == (PLACE, (3, 4), torch.bfloat16)


def test_a_family_without_blocks_is_refused_by_its_name() -> None:
    model: Any = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="Linear does not support it; set it to false"):
        prepare_for_training(model, ModelSection(gradient_checkpointing="selective"))
