"""Blocks at rest: what trains, what is kept for the backward pass, which blocks are chosen, resume and files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import UserError
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.memory._engines.block_scores import active_blocks, blocks_of, owners_of
from llmrecipe.methods.memory.freeze import Freeze
from llmrecipe.methods.memory.lora_fa import LoraFa
from llmrecipe.methods.memory.mezo import Mezo
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.attention import install_attention
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import optimizer_bytes, retained_bytes, saved_bytes
from tests.methods.additive.harness import attached, fill, model_of
from tests.methods.probe import language_probe
from tests.tiny import tiny_model
from tests.trainings import events, resumes_to_the_bit

IDS = torch.arange(3, 43).view(2, 20)
TOKENS, D, WIDE, R = 40, 32, 48, 4


def deep(layers: int = 4) -> nn.Module:
    return tiny_model(num_hidden_layers=layers)


def on(model: nn.Module, *wrappers: Wrapper) -> tuple[nn.Module, Stack]:
    stack = Stack(list(wrappers))
    stack.attach(model)
    return model, stack


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.square().mean()


def training_blocks(model: nn.Module) -> set[int]:
    owners = owners_of(model)
    return {owners[n] for n, p in model.named_parameters() if p.requires_grad and n in owners}


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "native-encoder_decoder", "native-mixture"])
def test_every_parameter_of_a_block_is_found_and_the_lower_half_rests_by_default(family: str) -> None:
    model, _ = on(model_of(family), Freeze(name="freeze"))
    owners, count = owners_of(model), len(blocks_of(model))
    assert set(owners.values()) == {-1, *range(count)}
    assert training_blocks(model) == set(range(count // 2, count))
    free = {n for n, p in model.named_parameters() if n not in owners}
    assert free and all(dict(model.named_parameters())[n].requires_grad for n in free)
    if family == "t5":
        paths = [s.path.split(".")[0] for s in blocks_of(model).sites]
        assert paths == ["encoder", "encoder", "decoder", "decoder"]


@pytest.mark.parametrize("layers", ["0", "0|2", "1:", "0:3"])
@pytest.mark.parametrize("method", [None, Lora, LoraFa])
def test_gradients_are_those_of_full_training_where_something_trains_and_none_elsewhere(layers: str, method: Any) -> None:
    more = [] if method is None else [method(name="w", target="all-linear", r=R)]
    (whole, _), (model, stack) = (on(deep(), *more, *extra) for extra in ([], [Freeze(name="freeze", layers=layers)]))
    for each in (whole, model):
        fill(each)
        loss_of(each).backward()
    resting = next(w for w in stack if w.name == "freeze").resting(model)
    wanted = dict(whole.named_parameters())
    assert resting and any(p.requires_grad for p in model.parameters())
    for name, parameter in model.named_parameters():
        if name in resting or not wanted[name].requires_grad:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-6, rtol=1e-5)


def kept(model: nn.Module) -> int:
    there = [*model.parameters(), *model.buffers()]
    loss, saved = saved_bytes(lambda: loss_of(model), there)
    return max(saved, retained_bytes(loss, there))


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("method", [Lora, LoraFa])
def test_blocks_below_the_lowest_one_that_trains_keep_nothing(method: Any, nf4: bool) -> None:
    """Each further block at the bottom frees what one block keeps: the sum that the memory report is made of."""
    sizes = []
    for frozen in range(4):
        below = [Nf4(name="nf4")] if nf4 else []
        more = [Freeze(name="freeze", layers=f"0:{frozen}")] if frozen else []
        model, _ = on(deep(), *below, method(name="w", target="all-linear", r=R), *more)
        sizes.append(kept(model))
    # Two norms with their statistics; queries, keys, values, attention's output and one statistic a head; gate, its
    # activation, up; seven rank-r activations; and with LoRA the inputs of q, k, v, of gate and up, and of down.
    q, k, heads = D, D // 2, 4
    block = 2 * (D + 1) + (q + 2 * k + q + heads) + 3 * WIDE + 7 * R + (0 if method is LoraFa else 2 * D + WIDE)
    assert {a - b for a, b in itertools.pairwise(sizes)} == {4 * TOKENS * block}


def test_a_block_at_rest_between_others_keeps_what_passes_gradients_and_not_its_inputs() -> None:
    sizes = {}
    for layers in (None, "1", "1|2"):
        more = [Freeze(name="freeze", layers=layers)] if layers else []
        model, _ = on(deep(), Lora(name="w", target="all-linear", r=R), *more)
        sizes[layers] = kept(model)
    # The inputs of q, k, v; of gate and up; of down; and the rank-r activations of seven layers. SDPA keeps that of o.
    each = 4 * TOKENS * (2 * D + WIDE + 7 * R)
    assert sizes[None] - sizes["1"] == each and sizes["1"] - sizes["1|2"] == each


def test_the_optimizer_holds_what_trains_and_the_file_holds_everything() -> None:
    from llmrecipe.core import registry

    config = registry.load_class("optim", "adamw")(lr=1e-2)
    model, stack = on(deep(), Freeze(name="freeze", layers="0:3"))
    optimizer = build_optimizer(config, parameter_groups(model, config, stack.groups(model)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    owners = owners_of(model)
    trained = {n for n in before if owners.get(n, 3) == 3}
    count = sum(before[n].numel() for n in trained)
    assert optimizer_bytes(optimizer) == 8 * count + 4 * len(trained)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained
    assert stack.delta(model).keys() == before.keys()
    adapter, own = on(deep(), Lora(name="w"), Freeze(name="freeze"))
    assert {n.split(".")[2] for n in own.delta(adapter)} == {"0", "1", "2", "3"}


@pytest.mark.parametrize(
    ("score", "wanted", "mean", "contiguous", "chosen"),
    [
        ("grad_norm", 2, [5.0, 1.0, 4.0, 2.0], False, [0, 2]),
        ("grad_norm", 2, [1.0, 5.0, 4.0, 2.0], True, [1, 2, 3]),
        ("grad_norm", 1, [1.0, 1.0, 1.0, 1.0], True, [3]),
        # 5/4, 1/3, 4/2, 1/1
        ("cost", 1, [5.0, 1.0, 4.0, 1.0], True, [2, 3]),
        ("cost", 2, [5.0, 1.0, 4.0, 1.0], False, [0, 2]),
        ("cost", 4, [5.0, 1.0, 4.0, 1.0], False, [0, 1, 2, 3]),
    ],
)
def test_which_blocks_are_chosen(score: str, wanted: int, mean: list[float], contiguous: bool, chosen: list[int]) -> None:
    assert active_blocks(score, 4, wanted, mean, contiguous, (0, 0)) == chosen


def test_random_blocks_are_all_drawn_in_time_and_the_top_one_always() -> None:
    drawn = [active_blocks("random", 6, 2, [], False, (0, step)) for step in range(0, 4000, 10)]
    assert all(len(d) == 2 and d[1] == 5 for d in drawn)
    counts = [sum(d[0] == i for d in drawn) for i in range(5)]
    assert all(50 < c < 110 for c in counts), counts
    assert drawn == [active_blocks("random", 6, 2, [], False, (0, step)) for step in range(0, 4000, 10)]
    assert drawn != [active_blocks("random", 6, 2, [], False, (1, step)) for step in range(0, 4000, 10)]
    assert active_blocks("random", 6, 3, [], True, (0, 0))[-1] == 5


@pytest.mark.parametrize("score", ["grad_norm", "cost"])
def test_dynamic_measures_the_norms_it_chooses_by(score: str) -> None:
    wrapper = Freeze(name="freeze", mode="dynamic", score=score, active=1, contiguous=False, interval=2, score_batches=2)
    model, stack = on(deep(), Lora(name="w"), wrapper)
    fill(model)
    probe = language_probe(model, stack=stack)
    assert not wrapper.resting(model) and wrapper.calibrates()
    stack.calibrate(model, probe)
    norms = [0.0] * 4
    for batch in probe.batches(2):
        probe.loss(batch).backward()
        for i in range(4):
            own = [p.grad for n, p in model.named_parameters() if f"layers.{i}." in n and p.grad is not None]
            norms[i] += float(torch.cat([g.flatten() for g in own]).norm()) / 2
        model.zero_grad(set_to_none=True)
    assert wrapper.state()["mean"] == pytest.approx(norms, rel=1e-5)
    assert stack.before_step(model, 0)
    ratio = [n / (4 - i) if score == "cost" else n for i, n in enumerate(norms)]
    best = max(range(4), key=lambda i: ratio[i])
    assert training_blocks(model) == {best} and wrapper.metrics(model) == {"training_blocks": 1.0, "lowest_training": best}
    assert not stack.before_step(model, 1) and not stack.before_step(model, 2)
    loss_of(model).backward()
    g = float(
        torch.cat([p.grad.flatten() for n, p in model.named_parameters() if f"layers.{best}." in n and p.requires_grad]).norm()
    )
    stack.after_backward(model, 2)
    after = wrapper.state()["mean"]
    assert after[best] == pytest.approx(0.9 * norms[best] + 0.1 * g, rel=1e-5)
    assert [m for i, m in enumerate(after) if i != best] == pytest.approx(
        [m for i, m in enumerate(norms) if i != best], rel=1e-5
    )


@pytest.mark.parametrize(
    ("family", "wrappers", "message"),
    [
        ("llama", [Freeze(name="f", layers="7")], r"stack\.f\.layers: '7' names no block; this model has 2"),
        ("llama", [Freeze(name="f", layers="")], r"stack\.f\.layers: '' names no block"),
        ("llama", [Freeze(name="f", layers="a:b")], r"stack\.f\.layers: 'a:b' names no block"),
        ("llama", [Freeze(name="f", mode="dynamic", layers="0")], r"stack\.f\.layers"),
        ("llama", [Freeze(name="f", mode="dynamic", active=3)], "at most 2 can train"),
        ("llama", [Freeze(name="f", mode="dynamic"), Mezo(name="mezo")], r"stack\.f\.score: grad_norm works on gradients"),
    ],
)
def test_what_cannot_be_is_refused(family: str, wrappers: list[Wrapper], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attached(family, *wrappers)


def test_gradient_checkpointing_changes_nothing_about_it() -> None:
    from llmrecipe.core.forward_context import checkpoint_contexts

    grads = []
    for checkpointing in (False, True):
        model, _ = on(deep(), Lora(name="w"), Freeze(name="freeze", layers="0|2"))
        install_attention(model, "sdpa")
        fill(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        loss_of(model).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and {n.split(".")[2] for n in grads[0]} == {"1", "3"}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-5)


DYNAMIC = ["stack.freeze.mode=dynamic", "stack.freeze.interval=2", "stack.freeze.active=2", "stack.freeze.contiguous=false"]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["random", "grad_norm"])
@pytest.mark.parametrize("stack", ["[lora_fa,freeze]", "[freeze]"])
def test_a_resumed_run_chooses_and_learns_what_the_whole_run_does(tmp_path: Path, stack: str, score: str) -> None:
    words = [f"stack={stack}", *DYNAMIC, f"stack.freeze.score={score}", "stack.freeze.seed=3", "steps=8", "epochs=null"]
    words += ["batch.size=4", "eval.at_start=false", "save.every=5"]
    resumes_to_the_bit(tmp_path, "freeze", words, 5)
    lowest = [e["freeze/lowest_training"] for e in events(tmp_path / "whole")]
    assert lowest == [e["freeze/lowest_training"] for e in events(tmp_path / "parts")]
    assert score == "grad_norm" or len(set(lowest)) > 1
